package machine

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/zram"
)

// explain gives err as a fault about what was being done. The order matters:
// the more telling cause comes first.
func explain(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	var already *fault.Error
	if errors.As(err, &already) {
		return err
	}
	if text := telling(err); text != "" {
		return fault.New(codeOf(err), "%s", text)
	}
	return fault.Wrap(err, codeOf(err), format, args...)
}

// telling gives the text of a cause that tells the user more than what was being
// done: who is in the way, or what a path names instead. Causes as such stay in
// the log.
func telling(err error) string {
	var (
		busy      *mount.BusyError
		algorithm *zram.UnknownAlgorithmError
		other     *block.NotBlockDeviceError
	)
	switch {
	case errors.As(err, &busy):
		return busy.Error()
	case errors.As(err, &algorithm):
		return algorithm.Error()
	case errors.As(err, &other):
		return other.Error()
	}
	return ""
}

func codeOf(err error) fault.Code {
	var (
		busy      *mount.BusyError
		algorithm *zram.UnknownAlgorithmError
	)
	for _, c := range []struct {
		is   bool
		code fault.Code
	}{
		{errors.Is(err, btrfs.ErrCancelled), fault.Cancelled},
		{errors.Is(err, btrfs.ErrOnlyWritable), fault.WrongState},
		{errors.Is(err, btrfs.ErrExclusiveRunning), fault.Busy},
		{errors.Is(err, btrfs.ErrNotBtrfs), fault.WrongState},
		{errors.Is(err, btrfs.ErrUnknownLayout), fault.NotSupported},
		{errors.Is(err, btrfs.ErrTreeCorrupt), fault.IOError},
		{errors.As(err, &busy), fault.DeviceBusy},
		{errors.As(err, &algorithm), fault.InvalidArgs},
		{errors.Is(err, zram.ErrNotOurs), fault.NotSupported},
		{errors.Is(err, block.ErrNotBlockDevice), fault.NoSuchDevice},
		{errors.Is(err, block.ErrChanged), fault.NoSuchDevice},
		{errors.Is(err, block.ErrReadOnly), fault.DeviceReadOnly},
		{errors.Is(err, block.ErrStillInUse), fault.DeviceBusy},
		{errors.Is(err, block.ErrNotSupported), fault.NotSupported},
		{errors.Is(err, block.ErrNoProbeTool), fault.NotSupported},
		{errors.Is(err, unix.ENOSPC), fault.NoSpace},
		{errors.Is(err, unix.ENOMEM), fault.NoMemory},
		{errors.Is(err, errNotCopied), fault.IOError},
		{errors.Is(err, unix.EINPROGRESS), fault.Busy}, // a scrub
		{errors.Is(err, unix.EBUSY), fault.DeviceBusy},
		{errors.Is(err, unix.ETXTBSY), fault.DeviceBusy}, // a swap file is active
		{errors.Is(err, unix.EEXIST), fault.DeviceIsMember},
		{errors.Is(err, unix.EIO), fault.IOError},
		{errors.Is(err, unix.EROFS), fault.IOError}, // forced read-only after an error
		{errors.Is(err, fs.ErrNotExist), fault.NoSuchDevice},
		{errors.Is(err, unix.ENOTDIR), fault.NoSuchDevice}, // as a path through a file, or
		{errors.Is(err, unix.ELOOP), fault.NoSuchDevice},   // a symbolic link to itself
		{errors.Is(err, unix.ENAMETOOLONG), fault.NoSuchDevice},
		{errors.Is(err, unix.ENXIO), fault.NoSuchDevice},
		{errors.Is(err, unix.ENODEV), fault.NoSuchDevice},
		{errors.Is(err, unix.ENOMEDIUM), fault.NoSuchDevice},
		{errors.Is(err, unix.EOPNOTSUPP), fault.NotSupported},
		{errors.Is(err, fs.ErrPermission), fault.NotSupported}, // by a policy of the system: we are root
		{errors.Is(err, context.Canceled), fault.Cancelled},
		{errors.Is(err, context.DeadlineExceeded), fault.DeviceBusy}, // a lock that nobody gave back
	} {
		if c.is {
			return c.code
		}
	}
	return fault.Internal
}
