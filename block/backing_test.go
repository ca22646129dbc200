package block

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

func TestTheFileBehindALoopIsTheVeryFile(t *testing.T) {
	testenv.NeedRoot(t)
	s, f := New(), image(t, 16*mib)
	if _, err := f.WriteAt([]byte("it is me"), 0); err != nil {
		t.Fatal(err)
	}
	over := func(num DevNum) string {
		t.Helper()
		file, err := s.OpenBacking(num)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		head := make([]byte, 8)
		if _, err := file.ReadAt(head, 0); err != nil {
			t.Fatal(err)
		}
		return string(head)
	}
	l := attach(t, f, LoopOptions{ReadOnly: true})
	if got := over(l.Num); got != "it is me" {
		t.Errorf("behind the loop is %q", got)
	}
	device, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	second := attach(t, device, LoopOptions{ReadOnly: true})
	if got := over(second.Num); got != "it is me" {
		t.Errorf("behind the loop over a device is %q", got)
	}

	if err := os.Rename(f.Name(), f.Name()+".old"); err != nil {
		t.Fatal(err)
	}
	if got := over(l.Num); got != "it is me" { // the kernel knows the new name
		t.Errorf("renamed, behind the loop is %q", got)
	}
	if err := os.Remove(f.Name() + ".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenBacking(l.Num); !errors.Is(err, ErrOutOfSight) {
		t.Errorf("deleted, opening it gave %v", err)
	}
	// Another file in its place, under the very name that the kernel shows.
	if err := os.WriteFile(f.Name()+".old (deleted)", []byte("an impostor"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenBacking(l.Num); !errors.Is(err, ErrOutOfSight) {
		t.Errorf("with another file in its place, opening it gave %v", err)
	}
}

func TestDirectIOIsSwitchedWhileTheLoopIsInUse(t *testing.T) {
	testenv.NeedRoot(t)
	s, f := New(), image(t, 16*mib)
	content := bytes.Repeat([]byte("sprout"), mib)[:4*mib]
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	l := attach(t, f, LoopOptions{ReadOnly: true})
	if errors.Is(s.SetDirectIO(l.ID, true), ErrNotSupported) {
		testenv.Skip(t, "the file system of the temporary directory has no direct I/O")
	}
	for _, on := range []bool{false, false, true} {
		if err := s.SetDirectIO(l.ID, on); err != nil {
			t.Fatal(err)
		}
		now, err := s.LoopStatus(l.Num)
		if err != nil || now.DirectIO != on {
			t.Errorf("direct I/O set to %v is %v (%v)", on, now.DirectIO, err)
		}
		got, err := os.ReadFile(l.Path)
		if err != nil || !bytes.Equal(got[:len(content)], content) {
			t.Errorf("with direct I/O %v the loop reads otherwise (%v)", on, err)
		}
	}
	stale := l.ID
	stale.DiskSeq--
	if err := s.SetDirectIO(stale, false); !errors.Is(err, ErrChanged) {
		t.Errorf("another device: %v, want ErrChanged", err)
	}
}

func TestWhichDisksTurn(t *testing.T) {
	s := onPaper(t, nil)
	put := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(s.path(path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const stick = "sys/devices/pci0000:00/usb1/1-2/1-2:1.0/host0/block/sda/"
	spins := func(num DevNum) bool {
		t.Helper()
		yes, err := s.Spins(num)
		if err != nil {
			t.Fatal(err)
		}
		return yes
	}
	s.loopBacking = func(string) (backing, error) { return backing{dev: DevNum{8, 1}}, nil }
	if spins(DevNum{8, 0}) || spins(DevNum{8, 1}) || spins(DevNum{7, 0}) {
		t.Error("a stick that says it turns is believed")
	}
	put(stick+"removable", "0\n")
	if !spins(DevNum{8, 0}) || !spins(DevNum{8, 1}) || !spins(DevNum{7, 0}) {
		t.Error("a disk that turns is not believed")
	}
	put(stick+"queue/rotational", "0\n")
	if spins(DevNum{8, 0}) {
		t.Error("a disk that says it does not turn is not believed")
	}
	s.loopBacking = func(string) (backing, error) { return backing{}, unix.EPERM }
	if _, err := s.Spins(DevNum{7, 0}); !errors.Is(err, unix.EPERM) {
		t.Errorf("a loop that cannot be looked through gave %v", err)
	}
}
