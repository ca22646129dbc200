package btrfs

import (
	"errors"
	"fmt"

	dbtrfs "github.com/dennwc/btrfs"
	"golang.org/x/sys/unix"
)

// OpError says which operation the kernel refused. The cause, reachable with
// errors.Is and errors.As, is a [KernelCode], one of this package's sentinels,
// or an errno.
type OpError struct {
	// Op is the operation in words, for example "add the device".
	Op string
	// Path is the device or the mount point the operation was about.
	Path string
	// DevID is the member the operation was about, 0 when it was about none.
	DevID uint64
	// Err is the cause.
	Err error
}

// Error tells what could not be done, to what, and why.
func (e *OpError) Error() string {
	if e.DevID != 0 {
		return fmt.Sprintf("cannot %s (device %d of %s): %v", e.Op, e.DevID, e.Path, e.Err)
	}
	return fmt.Sprintf("cannot %s (%s): %v", e.Op, e.Path, e.Err)
}

// Unwrap gives the cause.
func (e *OpError) Unwrap() error { return e.Err }

// KernelCode is a refusal that the kernel reports as a positive ioctl result
// with errno 0. Source: enum btrfs_err_code in linux/btrfs.h.
type KernelCode int

// The two codes that callers act on.
const (
	// ErrOnlyWritable refuses the removal of the only writable device.
	ErrOnlyWritable = KernelCode(dbtrfs.ErrDevOnlyWritable)
	// ErrExclusiveRunning says that another exclusive operation (balance,
	// device add, remove or replace, resize) runs on the filesystem.
	ErrExclusiveRunning = KernelCode(dbtrfs.ErrDevExclRunInProgress)
)

// Error gives the reason in words.
func (c KernelCode) Error() string {
	switch c {
	case ErrOnlyWritable:
		return "it is the only writable device"
	case ErrExclusiveRunning:
		return "another exclusive operation is running on the filesystem"
	case 9: // The library's table ends at 8.
		return "unable to go below three devices on raid1c3"
	case 10:
		return "unable to go below four devices on raid1c4"
	}
	return dbtrfs.ErrCode(c).Error()
}

// state is an errno that has a meaning of its own in this package's calls.
type state struct {
	text  string
	errno unix.Errno
}

func (s *state) Error() string { return s.text }
func (s *state) Unwrap() error { return s.errno }

// What a caller can meet apart from errnos and kernel codes.
var (
	// ErrCancelled ends an operation that somebody told to stop. What was
	// moved until then stays moved. It wraps ECANCELED.
	ErrCancelled error = &state{"cancelled", unix.ECANCELED}
	// ErrNotRunning says that there was nothing to cancel. It wraps ENOTCONN.
	ErrNotRunning error = &state{"no such operation is running", unix.ENOTCONN}
	// ErrNotBtrfs says that a directory, file or device holds no Btrfs.
	ErrNotBtrfs = errors.New("not a Btrfs filesystem")
	// ErrSuperCorrupt says that there is a Btrfs superblock, but a damaged one.
	ErrSuperCorrupt = errors.New("the Btrfs superblock is damaged")
	// ErrTruncated says that the image or device is shorter than the
	// filesystem on it.
	ErrTruncated = errors.New("shorter than the filesystem on it")
)

// cause turns the two results of an ioctl into an error, nil for success.
func cause(r1 uintptr, errno unix.Errno) error {
	switch {
	case errno == unix.ECANCELED:
		return ErrCancelled
	case errno == unix.ENOTCONN:
		return ErrNotRunning
	case errno != 0:
		return errno
	case r1 != 0:
		return KernelCode(r1)
	}
	return nil
}
