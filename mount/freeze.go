package mount

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The ioctls of fsfreeze(8). Source: linux/fs.h, FIFREEZE and FITHAW.
const (
	ioctlFreeze = 0xC0045877
	ioctlThaw   = 0xC0045878
)

// Freeze writes a file system out and makes everybody who writes to it wait,
// until [Thaw]. dir is an open file or directory on it. It outlives the process:
// whoever freezes has to see to it that somebody thaws. The error wraps EBUSY for
// one that is frozen already.
func Freeze(dir *os.File) error {
	if err := unix.IoctlSetInt(int(dir.Fd()), ioctlFreeze, 0); err != nil {
		return fmt.Errorf("cannot freeze the file system at %s: %w", dir.Name(), err)
	}
	return nil
}

// Thaw ends [Freeze]. The error wraps EINVAL for a file system that is not frozen.
func Thaw(dir *os.File) error {
	if err := unix.IoctlSetInt(int(dir.Fd()), ioctlThaw, 0); err != nil {
		return fmt.Errorf("cannot thaw the file system at %s: %w", dir.Name(), err)
	}
	return nil
}
