package btrfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// specByID is BTRFS_DEVICE_SPEC_BY_ID.
const specByID = 1 << 3

// Add makes the block device at path a member. The kernel looks at nothing
// that is on it and overwrites it: the caller has wiped it, and on a mounted
// seed has made sure that it is large enough (too small a first device is an
// oops on 6.18 and a hung kernel on 6.1 and 6.12). On a seed this makes the
// sprout: the filesystem gets a new fsid and stays read-only until it is
// remounted.
func (f *FS) Add(path string) error {
	var args volArgs
	err := putString(args.name[:], path)
	if err == nil {
		err = f.call(iocAddDev, unsafe.Pointer(&args))
	}
	return opError("add the device", path, 0, err)
}

// Remove moves everything off the member and lets it go. It blocks until that
// is done, was cancelled ([ErrCancelled]) or failed. What was moved before a
// cancel, a failure or the death of the process stays moved, and calling it
// again goes on from there. EIO: see [FS.UnreadableFiles]. ENOSPC: the others
// have no room for it. [ErrOnlyWritable] and [ErrExclusiveRunning] refuse it.
func (f *FS) Remove(devid uint64) error {
	args := volArgsV2{flags: specByID}
	binary.NativeEndian.PutUint64(args.name[:], devid)
	err := onOwnThread(func() error { return f.call(iocRmDevV2, unsafe.Pointer(&args)) })
	return opError("remove the device", f.path, devid, err)
}

// CancelRemove tells a running removal to stop and waits until it has stopped
// moving data; [FS.Remove] then returns [ErrCancelled], unless it had just got
// to its end. The error wraps [ErrNotRunning] when no removal runs. Linux 5.14.
//
// A request that comes after the last block group was moved is kept by the
// kernel (fs_info.reloc_cancel_req) and stops the next relocation at its
// start, so a removal that ends with ErrCancelled though nobody cancelled it is
// simply started again.
func (f *FS) CancelRemove() error {
	var args volArgsV2
	copy(args.name[:], "cancel")
	err := f.call(iocRmDevV2, unsafe.Pointer(&args))
	if errors.Is(err, ErrCancelled) {
		return nil // This is how the kernel says that it worked.
	}
	return f.fail("cancel the removal", err)
}

// Resize makes the filesystem use size bytes of the member, 0 for the whole
// device. Growing is quick; shrinking moves data and blocks until done. The
// member is always named: without a devid the kernel takes devid 1, which is
// the seed.
func (f *FS) Resize(devid, size uint64) error {
	spec := fmt.Sprintf("%d:%d", devid, size)
	if size == 0 {
		spec = fmt.Sprintf("%d:max", devid)
	}
	var args volArgs
	err := putString(args.name[:], spec)
	if err == nil {
		err = onOwnThread(func() error { return f.call(iocResize, unsafe.Pointer(&args)) })
	}
	return opError("resize the device", f.path, devid, err)
}

// The commands and results of BTRFS_IOC_DEV_REPLACE.
const (
	replaceCmdStart, replaceCmdStatus, replaceCmdCancel = 0, 1, 2

	replaceNotStarted, replaceAlreadyStarted, replaceScrubRunning = 1, 2, 3
)

// Replace copies the writable member onto the block device at target, which
// takes over its devid and UUID, and lets the old device go. It blocks until
// done. A seed cannot be replaced (EINVAL), and the target must not be smaller
// than the member (EINVAL); a larger one needs [FS.Resize] afterwards. Unlike a
// removal it starts over after a cancel, and the kernel finishes it at the next
// mount after a crash.
//
// Newer kernels take no notice of writes to the target that fail (6.18: it ends
// well, with no error counted anywhere), and what cannot be read is left out. So
// the copy is not known to be whole before [FS.Scrub] has read it.
func (f *FS) Replace(devid uint64, target string) error {
	args := replaceStartArgs{cmd: replaceCmdStart, start: replaceStart{srcDevID: devid}}
	err := putString(args.start.target[:], target)
	if err == nil {
		err = onOwnThread(func() error {
			r1, errno, err := f.raw(iocDevReplace, unsafe.Pointer(&args))
			switch {
			case err != nil:
				return err
			case errno == 0 && r1 == replaceAlreadyStarted,
				errno == 0 && args.result == replaceAlreadyStarted:
				return ErrExclusiveRunning
			case errno == 0 && r1 == 0 && args.result == replaceScrubRunning:
				return fmt.Errorf("%w: a scrub is running", unix.EINPROGRESS)
			}
			return cause(r1, errno)
		})
	}
	return opError("replace the device with "+target, f.path, devid, err)
}

// ReplaceState says how far a replace has got.
type ReplaceState uint64

// The states of a replace. Suspended: the kernel will go on at the next mount.
const (
	ReplaceNeverStarted ReplaceState = iota
	ReplaceStarted
	ReplaceFinished
	ReplaceCancelled
	ReplaceSuspended
)

// ReplaceStatus describes the running replace, or else the last one.
type ReplaceStatus struct {
	State ReplaceState
	// DevID is the devid of the member that is copied; 0 when it is over, and for
	// a moment at its start.
	DevID       uint64
	PerMille    uint64    // of the device that has been gone through
	Started     time.Time // zero when never started
	Stopped     time.Time // zero while it runs
	WriteErrors uint64
	ReadErrors  uint64 // those that could not be corrected
}

// Over reports whether nothing is being copied, nor will be at the next mount.
func (s ReplaceStatus) Over() bool {
	return s.State != ReplaceStarted && s.State != ReplaceSuspended
}

// ReplaceStatus asks for the state of the running or last replace.
func (f *FS) ReplaceStatus() (ReplaceStatus, error) {
	const op = "ask for the state of the replace"
	args := replaceStatusArgs{cmd: replaceCmdStatus}
	if err := f.call(iocDevReplace, unsafe.Pointer(&args)); err != nil {
		return ReplaceStatus{}, f.fail(op, err)
	}
	a := args.status
	s := ReplaceStatus{
		State: ReplaceState(a.state), PerMille: a.progress1000,
		Started: unixTime(a.started), Stopped: unixTime(a.stopped),
		WriteErrors: a.writeErrors, ReadErrors: a.readErrors,
	}
	if s.Over() {
		return s, nil
	}
	// The ioctl does not say what is copied. The item can still be of the replace before.
	at := key{0, typeDevReplace, 0}
	err := f.search(treeDev, at, at, func(_ key, item []byte) error {
		s.DevID = replaceItem(item).DevID
		return nil
	})
	return s, f.fail(op, err)
}

// ReplaceTarget gives the device to which a replace copies that is not over;
// false where there is none. It has the devid 0 and a UUID of its own.
func (f *FS) ReplaceTarget() (Member, bool, error) {
	list, err := f.devices()
	if err != nil || len(list) == 0 || list[0].DevID != replaceDevID {
		return Member{}, false, err
	}
	return list[0], true, nil
}

func unixTime(seconds uint64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}

// CancelReplace stops a running replace: [FS.Replace] returns [ErrCancelled],
// the member keeps everything, the target is no member. The error wraps
// [ErrNotRunning] when none runs.
func (f *FS) CancelReplace() error {
	args := replaceStatusArgs{cmd: replaceCmdCancel}
	err := f.call(iocDevReplace, unsafe.Pointer(&args))
	if err == nil && args.result == replaceNotStarted {
		err = ErrNotRunning
	}
	return f.fail("cancel the replace", err)
}

// Scan tells the kernel of the filesystem on the block device at path. A
// sprout can be mounted when its seed and all its members have been scanned.
func Scan(path string) error {
	return opError("scan the device", path, 0, control(iocScanDev, path))
}

// Forget makes the kernel drop what a scan of the block device at path told
// it. It fails with EBUSY while the filesystem is mounted.
func Forget(path string) error {
	return opError("forget the device", path, 0, control(iocForgetDev, path))
}

func control(req uint32, path string) error {
	if path == "" {
		return unix.ENOENT // To the kernel "" means every device.
	}
	var args volArgs
	if err := putString(args.name[:], path); err != nil {
		return err
	}
	file, err := os.OpenFile("/dev/btrfs-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // There is nothing to write out.
	var r1 uintptr
	var errno unix.Errno
	if err := withFD(file, func(fd uintptr) { r1, errno = sysIoctl(fd, req, unsafe.Pointer(&args)) }); err != nil {
		return err
	}
	return cause(r1, errno)
}
