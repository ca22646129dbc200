package block

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotBlockDevice is matched by every [NotBlockDeviceError].
	ErrNotBlockDevice = errors.New("not a block device")
	// ErrChanged says that the name or number now means another device than the one
	// that was asked for.
	ErrChanged = errors.New("the device is not the same any more")
	// ErrReadOnly says that the device does not accept writes.
	ErrReadOnly = errors.New("the device is read-only")
	// ErrStillInUse says that the loop device was told to go and will, but something
	// has it open or mounted still.
	ErrStillInUse = errors.New("the device is still in use")
	// ErrNotSupported says that the device or the kernel cannot do this.
	ErrNotSupported = errors.New("not supported by the device")
	// ErrNoDevice says that the file system is not on a block device.
	ErrNoDevice = errors.New("not on a block device")
	// ErrOutOfSight says that a file is in use but cannot be opened: it has no name
	// from here.
	ErrOutOfSight = errors.New("it has no name here")
	// ErrLoopWritable says that the loop is not read-only: the kernel puts another
	// file only behind one that is.
	ErrLoopWritable = errors.New("the loop device is not read-only")
	// ErrSizeDiffers says that a loop device would have another size with another
	// file behind it.
	ErrSizeDiffers = errors.New("the file has another size")
	// ErrNoProbeTool says that wipefs of util-linux is missing, so nobody can say what
	// is on a device.
	ErrNoProbeTool = errors.New("the program wipefs (util-linux) is not installed")
)

// NotBlockDeviceError says what a path names instead of a block device.
type NotBlockDeviceError struct {
	Path string
	// Kind is a noun with its article: "a directory", "a regular file".
	Kind string
}

func (e *NotBlockDeviceError) Error() string {
	return fmt.Sprintf("%s is %s, not a block device", e.Path, e.Kind)
}

// Is makes errors.Is(err, ErrNotBlockDevice) true.
func (e *NotBlockDeviceError) Is(target error) bool { return target == ErrNotBlockDevice }

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFCHR:
		return "a character device"
	case unix.S_IFIFO:
		return "a named pipe"
	case unix.S_IFSOCK:
		return "a socket"
	}
	return "something else"
}

// gone reports whether err is what the kernel answers for a device that was
// unplugged, or has no medium in it, while it was being looked at.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOMEDIUM)
}
