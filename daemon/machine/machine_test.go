package machine

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/mount"
)

func TestTheRootStandsForAFileSystemThatIsMountedManyTimes(t *testing.T) {
	root, data := block.DevNum{Minor: 30}, block.DevNum{Minor: 40}
	btrfs := func(id int, num block.DevNum, dir, at string) mount.Entry {
		return mount.Entry{ID: id, Num: num, Root: dir, MountPoint: at, FSType: "btrfs"}
	}
	got := mainMounts([]mount.Entry{
		{ID: 1, MountPoint: "/", FSType: "rootfs"},
		btrfs(2, root, "/@home", "/home"),
		btrfs(3, root, "/", "/run/toplevel"),
		btrfs(4, root, "/@", "/"),
		btrfs(5, data, "/a", "/srv/a"),
		btrfs(6, data, "/", "/srv/all"),
		btrfs(7, data, "/", "/covered"),
		{ID: 8, MountPoint: "/covered", FSType: "tmpfs"},
		{ID: 9, Num: block.DevNum{Major: 8, Minor: 1}, MountPoint: handover.MediaMount, FSType: "iso9660"},
	})
	var at []string
	for _, e := range got {
		at = append(at, e.MountPoint)
	}
	if want := []string{"/", "/srv/all"}; !slices.Equal(at, want) {
		t.Errorf("shown are the mounts %q, wanted %q", at, want)
	}
}

func TestTheNoteOfTheEarlyBootIsForThisBoot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "boot.json")
	read := func(want string, fails bool) {
		t.Helper()
		if n, err := readNote(path, "this"); n.FSID != want || (err != nil) != fails {
			t.Errorf("the note is %+v, %v", n, err)
		}
	}
	read("", false)
	for boot, want := range map[string]string{"this": "f", "another": ""} {
		if err := (handover.Note{BootID: boot, FSID: "f"}).Write(path); err != nil {
			t.Fatal(err)
		}
		read(want, false)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	read("", true)
}

// Where nothing is known of a change, a device is not opened again: it may be the
// stick that was said to be safe to unplug.
func TestOnlyWhatHasChangedIsLookedAtAgain(t *testing.T) {
	device := func(minor uint32) block.Device {
		return block.Device{ID: block.ID{Num: block.DevNum{Major: 8, Minor: minor}, DiskSeq: 1, Size: 100}}
	}
	a, b, broken := device(0), device(1), device(2)
	b.Signatures, broken.ProbeError = []block.Signature{{Type: "ext4"}}, os.ErrInvalid
	var s seen
	look := func(want ...bool) {
		t.Helper()
		known := s.known()
		for i, d := range []block.Device{a, b, broken} {
			if signatures, ok := known(d.ID); ok != want[i] || ok && len(signatures) != len(d.Signatures) {
				t.Errorf("device %d: %v, %v", i, signatures, ok)
			}
		}
	}
	look(false, false, false)
	s.keep([]block.Device{a, b, broken})
	look(true, true, false)
	s.forget(b.Num) // while that look is under way
	s.keep([]block.Device{a, b, broken})
	look(true, false, false)
	s.keep([]block.Device{a, b, broken})
	other := a.ID
	other.DiskSeq++
	if _, ok := s.known()(other); ok {
		t.Error("another disk of the same number is taken for the one that is known")
	}
	s.forget(block.DevNum{}) // events were lost
	s.keep([]block.Device{a, b})
	look(false, false, false)
}
