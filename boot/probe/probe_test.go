package probe

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sproutd.org/sproutd/tests/testenv"
)

// Each tool makes its own file system in a sparse file, and blkid says what the
// prober has to say.
func TestProbeSaysWhatBlkidSays(t *testing.T) {
	testenv.NeedTool(t, "blkid")
	for _, c := range []struct{ name, fstype, make string }{
		{"ext2", "ext4", "mke2fs -q -F -t ext2 -L LIVE IMAGE"},
		{"ext4 without a label", "ext4", "mke2fs -q -F -t ext4 IMAGE"},
		{"vfat 32", "vfat", "mkfs.vfat -F 32 -n SPROUT IMAGE"},
		{"vfat 16", "vfat", "mkfs.vfat -F 16 -n SPROUT IMAGE"},
		{"vfat 12 without a label", "vfat", "mkfs.vfat -F 12 -S 4096 -s 64 IMAGE"},
		{"btrfs", "btrfs", "mkfs.btrfs -q -L my\tlabel IMAGE"},
		{"xfs", "xfs", "mkfs.xfs -q -L LIVE IMAGE"},
		{"iso9660", "iso9660", "xorriso -as mkisofs -quiet -V SPROUTLIVE -R -o IMAGE DIR"},
		{"iso9660 with Joliet", "iso9660", "xorriso -as mkisofs -quiet -V A_LABEL_OF_MANY_LETTERS -R -J -o IMAGE DIR"},
		{"nothing", "", "true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
			words := strings.Split(strings.NewReplacer("IMAGE", image, "DIR", dir).Replace(c.make), " ")
			testenv.NeedTool(t, words[0])
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, 512<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", words, err, out)
			}
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			got, err := Probe(f)
			want := FS{Type: c.fstype, Label: blkid(t, image, "LABEL"), UUID: blkid(t, image, "UUID")}
			if err != nil || got != want {
				t.Errorf("found %+v (%v), blkid says %+v", got, err, want)
			}
		})
	}
}

func blkid(t *testing.T, image, tag string) string {
	t.Helper()
	out, err := exec.Command("blkid", "-p", "-o", "value", "-s", tag, image).Output()
	if err != nil && len(out) > 0 {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// Whatever is on a device, it is read without a panic and without an effort
// that the device decides on.
func FuzzProbe(f *testing.F) {
	f.Add([]byte{})
	for at, magic := range map[int]string{64<<10 + 64: "_BHRfS_M", 32<<10 + 1: "CD001", 1<<10 + 56: "\x53\xef", 0: "XFSB"} {
		head := make([]byte, headSize)
		copy(head[at:], magic)
		f.Add(head)
	}
	boot := make([]byte, 600)
	copy(boot[510:], "\x55\xaa")
	copy(boot[82:], "FAT32   ")
	f.Add(boot)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := Probe(bytes.NewReader(data)); err != nil {
			t.Error(err)
		}
	})
}
