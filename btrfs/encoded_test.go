package btrfs

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteZstdSaysWhatIsWrong(t *testing.T) {
	fd, err := unix.MemfdCreate("no Btrfs", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "no Btrfs")
	defer file.Close()
	for _, c := range []struct {
		frame, length int
		want          error
	}{
		{0, 4096, unix.EINVAL}, {8192, 4096, unix.EINVAL}, {4096, MaxEncoded + 4096, unix.EINVAL}, {100, 4096, unix.ENOTTY},
	} {
		if err := WriteZstd(file, 0, make([]byte, c.frame), c.length); !errors.Is(err, c.want) {
			t.Errorf("%d bytes for %d: %v, want %v", c.frame, c.length, err, c.want)
		}
	}
}
