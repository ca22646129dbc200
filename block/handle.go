package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	siderolabs "github.com/siderolabs/go-blockdevice/v2/block"
	"golang.org/x/sys/unix"
)

// Handle is an opened block device. Everything done through it is done to the
// device that was opened, whatever its path names by then. It is not safe for
// concurrent use.
type Handle struct {
	s    *System
	f    *os.File
	id   ID
	lock *os.File // the whole disk, while locked
}

// Open opens the device that path names, for reading and without a claim.
// Symbolic links are followed once. A path that names something else is never
// opened. Errors: [NotBlockDeviceError], [ErrChanged], [os.ErrNotExist].
func (s *System) Open(ctx context.Context, path string) (*Handle, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	// O_PATH has no side effects, where opening a watchdog for example has.
	fd, err := unix.Open(s.path(path), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	name := os.NewFile(uintptr(fd), path)
	defer func() { _ = name.Close() }()
	num, err := rdevOf(name)
	if err != nil {
		return nil, err
	}
	id, err := s.Identify(num)
	if err != nil {
		return nil, err
	}
	f, err := reopen(name, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	h := &Handle{s: s, f: f, id: id}
	// From here on the open descriptor keeps the number from being given to
	// another disk; one may have come in between.
	if err := h.check(); err != nil {
		_ = h.Close()
		return nil, err
	}
	return h, nil
}

// reopen opens what f is open on once more, with other flags.
func reopen(f *os.File, flags int) (*os.File, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// ID is the identity of the device when it was opened.
func (h *Handle) ID() ID { return h.id }

// File is the open device, for reading. It belongs to the Handle.
func (h *Handle) File() *os.File { return h.f }

// check fails when the medium was changed since Open.
func (h *Handle) check() error {
	now, err := h.s.Identify(h.id.Num)
	if err != nil {
		return err
	}
	if !now.Same(h.id) {
		return fmt.Errorf("cannot use %s: %w", h.id.Path, ErrChanged)
	}
	return nil
}

// Probe reads what is on the device and who uses it, now. A descriptor of this
// process does not count as a user.
func (h *Handle) Probe(ctx context.Context) (Device, error) {
	if err := h.check(); err != nil {
		return Device{}, err
	}
	use, err := h.s.usage()
	if err != nil {
		return Device{}, err
	}
	d, err := h.s.describe(h.id.Num, use)
	if err != nil {
		return Device{}, err
	}
	d.Signatures, err = h.s.signatures(ctx, h.f)
	return d, err
}

// Lock takes the whole disk's lock, which makes udev keep its hands off until
// Close (systemd's BLOCK_DEVICE_LOCKING). It waits until ctx ends.
func (h *Handle) Lock(ctx context.Context) error {
	if h.lock != nil {
		return nil
	}
	disk, err := h.s.WholeDisk(h.id.Num)
	if err != nil {
		return err
	}
	f, err := h.s.openNode(disk.Path, disk.Num)
	if err != nil {
		return err
	}
	device := siderolabs.NewFromFile(f)
	err = device.TryLock(true)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = device.RetryLock(ctx, true)
	}
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("cannot lock %s: %w", disk.Path, err)
	}
	h.lock = f
	return nil
}

// Claim opens the device for writing with exclusive use, which the kernel
// refuses while it is mounted, swapped on or held in any other way, in any
// mount namespace (the error wraps EBUSY); and while it is held nobody can mount
// it. [ErrReadOnly] for a device that takes no writes.
func (h *Handle) Claim() (*os.File, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	// Opening a read-only device for writing may work; only the write fails.
	readOnly, err := unix.IoctlGetUint32(int(h.f.Fd()), unix.BLKROGET)
	if err != nil {
		return nil, fmt.Errorf("cannot ask whether %s is read-only: %w", h.id.Path, err)
	}
	if readOnly != 0 {
		return nil, fmt.Errorf("cannot write to %s: %w", h.id.Path, ErrReadOnly)
	}
	f, err := reopen(h.f, unix.O_RDWR|unix.O_EXCL)
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("cannot write to %s: %w", h.id.Path, ErrReadOnly)
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("cannot get %s for exclusive use: %w", h.id.Path, err)
	case err != nil:
		return nil, fmt.Errorf("cannot open %s for writing: %w", h.id.Path, err)
	}
	return f, nil
}

const (
	wipeEdge  = 2 << 20 // of each end: partition tables, RAID and LVM metadata, most file systems
	wipeBlock = 4096
	// wipeRounds bounds how often a new signature may come to light when others
	// are gone.
	wipeRounds = 16
)

// BtrfsSuperblocks gives the places, in bytes, at which a device of a Btrfs has a
// superblock if it is large enough. Source: fs/btrfs/disk-io.h.
func BtrfsSuperblocks() [3]uint64 { return [...]uint64{64 << 10, 64 << 20, 256 << 30} }

// Wipe makes the device empty for everything that looks for signatures: zeroes
// over the first and last 2 MiB, the Btrfs superblocks and every signature
// found, flushed to the medium, and looked at again. It fails if anything is
// left. Data in between stays readable: this is no secure erase.
//
// The kernel must grant exclusive use of the device (otherwise the error wraps
// EBUSY) and drops the partitions of a whole disk. [ErrReadOnly] for a device
// that takes no writes. Nothing is written in these cases.
func (h *Handle) Wipe(ctx context.Context) (err error) {
	f, err := h.Claim()
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil && e != nil {
			err = fmt.Errorf("cannot wipe %s: %w", h.id.Path, e)
		}
	}()
	device := siderolabs.NewFromFile(f)
	size, err := device.GetSize()
	if err != nil {
		return fmt.Errorf("cannot read the size of %s: %w", h.id.Path, err)
	}
	found, err := h.s.signatures(ctx, f)
	if err != nil {
		return err
	}
	if err := h.dropPartitions(device); err != nil {
		return err
	}
	zero := func(from, to uint64) error {
		to = min(to, size)
		if from >= to {
			return nil
		}
		if _, err := f.WriteAt(make([]byte, to-from), int64(from)); err != nil {
			return fmt.Errorf("cannot wipe %s: %w", h.id.Path, err)
		}
		return nil
	}
	if err := zero(0, wipeEdge); err != nil {
		return err
	}
	if err := zero(size-min(size, wipeEdge), size); err != nil {
		return err
	}
	for _, at := range BtrfsSuperblocks() {
		if err := zero(at, at+wipeBlock); err != nil {
			return err
		}
	}
	for range wipeRounds {
		for _, sig := range found {
			from := sig.Offset &^ (wipeBlock - 1)
			if err := zero(from, sig.Offset+max(sig.length, wipeBlock)); err != nil {
				return err
			}
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("cannot flush %s: %w", h.id.Path, err)
		}
		if found, err = h.s.signatures(ctx, f); err != nil {
			return err
		}
		if len(found) == 0 {
			return nil
		}
	}
	return fmt.Errorf("cannot wipe %s: a %s signature is still there at byte %d", h.id.Path, found[0].Type, found[0].Offset)
}

// WipeBtrfs overwrites the Btrfs superblocks on the device and nothing else,
// flushed to the medium, so that nobody takes it for a part of that filesystem
// any more. Unlike [Handle.Wipe] it starts no program, and the partitions of a
// whole disk stay. Errors as for Wipe; nothing is written in these cases.
func (h *Handle) WipeBtrfs() (err error) {
	f, err := h.Claim()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for _, at := range BtrfsSuperblocks() {
		const magicAt, magic = 64, "_BHRfS_M"
		super := make([]byte, wipeBlock)
		if at+wipeBlock > h.id.Size {
			break
		}
		if _, err := f.ReadAt(super, int64(at)); err != nil {
			return fmt.Errorf("cannot read %s: %w", h.id.Path, err)
		}
		if string(super[magicAt:magicAt+len(magic)]) != magic {
			continue
		}
		clear(super)
		if _, err := f.WriteAt(super, int64(at)); err != nil {
			return fmt.Errorf("cannot wipe %s: %w", h.id.Path, err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("cannot flush %s: %w", h.id.Path, err)
	}
	return nil
}

// RestoreBtrfs writes back the Btrfs superblocks on the device that mend can make
// whole, each flushed to the medium, and nothing else. mend is given what is at a
// place of a superblock, and gives what belongs there, or nil to leave it as it is.
//
// The primary superblock, which alone is what makes it a part of a file system,
// comes last: cut off before, it is all to be done again. If it is left as it is,
// nothing is written and the error is [ErrChanged]. Other errors as for Wipe.
func (h *Handle) RestoreBtrfs(mend func(at uint64, block []byte) []byte) (err error) {
	f, err := h.Claim()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	places := BtrfsSuperblocks()
	var mended [len(places)][]byte
	for i, at := range places {
		block := make([]byte, wipeBlock)
		if at+wipeBlock > h.id.Size {
			break
		}
		if _, err := f.ReadAt(block, int64(at)); err != nil {
			return fmt.Errorf("cannot read %s: %w", h.id.Path, err)
		}
		mended[i] = mend(at, block)
	}
	if mended[0] == nil {
		return fmt.Errorf("cannot restore the superblock of %s: %w", h.id.Path, ErrChanged)
	}
	for i, at := range slices.Backward(places[:]) {
		if mended[i] == nil {
			continue
		}
		if _, err := f.WriteAt(mended[i], int64(at)); err != nil {
			return fmt.Errorf("cannot restore the superblocks of %s: %w", h.id.Path, err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("cannot flush %s: %w", h.id.Path, err)
		}
	}
	return nil
}

// dropPartitions makes the kernel forget the partitions of a whole disk. It
// comes before the first write, so that one that somebody has open stops the
// wipe while nothing is lost.
func (h *Handle) dropPartitions(device *siderolabs.Device) error {
	dir, disk, err := h.s.dirs(h.id.Num)
	if err != nil || dir != disk {
		return err
	}
	names, err := partitions(disk)
	if err != nil {
		return fmt.Errorf("cannot list the partitions of %s: %w", h.id.Path, err)
	}
	for _, name := range names {
		number, err := attrUint(h.s.classDir(name), "partition")
		if err == nil {
			err = device.KernelPartitionDelete(int(number))
		}
		if err != nil && !gone(err) {
			return fmt.Errorf("cannot drop partition %s: %w", name, err)
		}
	}
	return nil
}

// discardChunk is how much is discarded at once: a running ioctl cannot be
// stopped.
const discardChunk = 1 << 30

// Discard tells the device that none of its contents is needed any more. The
// kernel must grant exclusive use, as for Wipe. [ErrNotSupported] where the
// device cannot. What is read afterwards is up to the device: it is no wipe.
func (h *Handle) Discard(ctx context.Context) error {
	f, err := h.Claim()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	size, err := siderolabs.NewFromFile(f).GetSize()
	if err != nil {
		return fmt.Errorf("cannot read the size of %s: %w", h.id.Path, err)
	}
	for at := uint64(0); at < size; at += discardChunk {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cannot discard all of %s: %w", h.id.Path, err)
		}
		part := [2]uint64{at, min(discardChunk, size-at)}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&part)))
		if slices.Contains([]unix.Errno{unix.EOPNOTSUPP, unix.ENOTTY}, errno) {
			return fmt.Errorf("cannot discard %s: %w", h.id.Path, ErrNotSupported)
		}
		if errno != 0 {
			return fmt.Errorf("cannot discard %s: %w", h.id.Path, errno)
		}
	}
	return nil
}

// Close gives up the lock and the device. A second Close does nothing.
func (h *Handle) Close() error {
	if h.f == nil {
		return nil
	}
	var errLock error
	if h.lock != nil {
		errLock = h.lock.Close()
	}
	err := errors.Join(errLock, h.f.Close())
	h.f, h.lock = nil, nil
	return err
}
