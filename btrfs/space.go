package btrfs

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The flags of block groups. Source: linux/btrfs_tree.h.
const (
	flagData      = 1 << 0
	flagSystem    = 1 << 1
	flagMetadata  = 1 << 2
	flagDup       = 1 << 5
	maskProfile   = 0x7f8   // bits 3 to 10
	flagSingle    = 1 << 48 // BTRFS_AVAIL_ALLOC_BIT_SINGLE: single, where 0 means "any"
	flagGlobalRsv = 1 << 49
)

// SpaceType is what a block group holds.
type SpaceType uint8

// The kinds of space. Mixed is data and metadata in one, which small old
// filesystems have.
const (
	Data SpaceType = iota + 1
	Metadata
	System
	GlobalReserve
	Mixed
)

// String gives the word btrfs-progs uses.
func (t SpaceType) String() string {
	switch t {
	case Data:
		return "Data"
	case Metadata:
		return "Metadata"
	case System:
		return "System"
	case GlobalReserve:
		return "GlobalReserve"
	case Mixed:
		return "Data+Metadata"
	}
	return "unknown"
}

func spaceType(flags uint64) SpaceType {
	switch {
	case flags&flagGlobalRsv != 0:
		return GlobalReserve
	case flags&flagSystem != 0:
		return System
	case flags&flagData != 0 && flags&flagMetadata != 0:
		return Mixed
	case flags&flagMetadata != 0:
		return Metadata
	case flags&flagData != 0:
		return Data
	}
	return 0
}

// profiles are the redundancy profiles with their number of copies.
var profiles = []struct {
	flag   uint64
	name   string
	copies int
}{
	{1 << 3, "raid0", 1}, {1 << 4, "raid1", 2}, {flagDup, "dup", 2}, {1 << 6, "raid10", 2},
	{1 << 7, "raid5", 1}, {1 << 8, "raid6", 1}, {1 << 9, "raid1c3", 3}, {1 << 10, "raid1c4", 4},
}

// profile gives the profile's name, "single" when there is no redundancy.
func profile(flags uint64) string {
	for _, p := range profiles {
		if flags&p.flag != 0 {
			return p.name
		}
	}
	return "single"
}

func copies(name string) int {
	for _, p := range profiles {
		if p.name == name {
			return p.copies
		}
	}
	return 1
}

// Space is the space of one kind and profile over all devices.
type Space struct {
	Type    SpaceType
	Profile string // "single", "dup", "raid1", ...
	// Total is what is allocated to block groups, Used what of that is in
	// use; bytes, each counted once however many copies there are.
	Total, Used uint64
}

// Spaces is the space of a filesystem by kind and profile.
type Spaces []Space

func (s Spaces) used(types ...SpaceType) uint64 {
	var sum uint64
	for _, space := range s {
		for _, t := range types {
			if space.Type == t {
				sum += space.Used
			}
		}
	}
	return sum
}

// DataUsed gives the bytes of data, those of mixed groups included.
func (s Spaces) DataUsed() uint64 { return s.used(Data, Mixed) }

// MetadataUsed gives the bytes of metadata, one copy.
func (s Spaces) MetadataUsed() uint64 { return s.used(Metadata) }

// SystemUsed gives the bytes of the chunk tree, one copy.
func (s Spaces) SystemUsed() uint64 { return s.used(System) }

// GlobalReserve gives the bytes the kernel keeps back for metadata.
func (s Spaces) GlobalReserve() uint64 {
	for _, space := range s {
		if space.Type == GlobalReserve {
			return space.Total
		}
	}
	return 0
}

// MetadataCopies says how often metadata is stored: 1 for single, 2 for dup.
// When there are several profiles, as in the middle of a conversion, the
// highest counts.
func (s Spaces) MetadataCopies() int {
	n := 1
	for _, space := range s {
		if space.Type == Metadata || space.Type == Mixed {
			n = max(n, copies(space.Profile))
		}
	}
	return n
}

// Spaces asks for the space of each kind. Source: BTRFS_IOC_SPACE_INFO.
func (f *FS) Spaces() (Spaces, error) {
	const slots = 64 // five kinds with nine profiles each cannot fill them
	args := struct {
		head  spaceArgs
		items [slots]spaceInfo
	}{head: spaceArgs{slots: slots}}
	if err := f.call(iocSpaceInfo, unsafe.Pointer(&args)); err != nil {
		return nil, f.fail("ask for the space in use", err)
	}
	var spaces Spaces
	for _, item := range args.items[:min(args.head.total, slots)] {
		spaces = append(spaces, Space{
			Type: spaceType(item.flags), Profile: profile(item.flags), Total: item.total, Used: item.used,
		})
	}
	return spaces, nil
}

// The flags of a balance. Source: linux/btrfs.h.
const (
	balanceData     = 1 << 0
	balanceSystem   = 1 << 1
	balanceMetadata = 1 << 2
	balanceForce    = 1 << 3 // allows fewer copies than before

	filterLogical = 1 << 4
	filterConvert = 1 << 8
	filterSoft    = 1 << 9 // leaves groups alone that have the profile already

	balanceCtlCancel = 2
)

// ConvertMetadata rewrites metadata and system block groups that have another
// profile than the given one, "single" or "dup". It blocks until done; when ctx
// ends it stops after the group under way and the error wraps [ErrCancelled],
// with both profiles in use: calling it again finishes.
func (f *FS) ConvertMetadata(ctx context.Context, profile string) error {
	const op = "convert the metadata"
	if err := ctx.Err(); err != nil {
		return f.fail(op, fmt.Errorf("%w: %w", ErrCancelled, err))
	}
	var target uint64
	switch profile {
	case "single":
		target = flagSingle
	case "dup":
		target = flagDup
	default:
		return f.fail(op, fmt.Errorf("%w: the profile %q is neither single nor dup", unix.EINVAL, profile))
	}
	filter := balanceFilter{target: target, flags: filterConvert | filterSoft}
	args := balanceArgs{flags: balanceMetadata | balanceSystem | balanceForce, meta: filter, sys: filter}
	return f.fail(op, f.balance(ctx, &args))
}

// Relocate moves what is in a data group to other groups or new ones, and gives its
// space back. It blocks until done; when ctx ends it stops, the error wraps
// [ErrCancelled] and the group may still be there. With too little space for that
// (ENOSPC) it is.
func (f *FS) Relocate(ctx context.Context, g Group) error {
	const op = "move a group"
	if err := ctx.Err(); err != nil {
		return f.fail(op, fmt.Errorf("%w: %w", ErrCancelled, err))
	}
	if g.Type() != Data {
		return f.fail(op, fmt.Errorf("%w: it is no data group", unix.EINVAL))
	}
	args := balanceArgs{flags: balanceData, data: balanceFilter{flags: filterLogical, vstart: g.Logical, vend: g.Logical + 1}}
	return f.fail(op, f.balance(ctx, &args))
}

func (f *FS) balance(ctx context.Context, args *balanceArgs) error {
	done, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		f.cancelBalance(ctx, done)
	}()
	err := onOwnThread(func() error { return f.call(iocBalanceV2, unsafe.Pointer(args)) })
	close(done)
	<-watched
	return err
}

// cancelBalance stops the balance when ctx ends before done does. A request
// that comes before the kernel has begun gets ENOTCONN and is made again.
func (f *FS) cancelBalance(ctx context.Context, done <-chan struct{}) {
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		// The command is passed by value, so this one does not go through call.
		var err error
		closed := withFD(f.dir, func(fd uintptr) { err = unix.IoctlSetInt(int(fd), iocBalanceCtl, balanceCtlCancel) })
		if closed != nil || !errors.Is(err, unix.ENOTCONN) {
			return
		}
		select {
		case <-done:
			return
		case <-retry.C:
		}
	}
}

const (
	// MinFirstDevice is the least size of a sprout's first writable device, in
	// bytes: below it the kernel may abort the transaction of the sprout, and
	// 6.18 then oopses.
	MinFirstDevice = 512 << 20
	// MinZram is the least virtual size of a zram device that is to be the first,
	// in bytes. It costs nothing until it is written to.
	MinZram = 1 << 30
)

// FirstDeviceSize gives the least size in bytes of the device that turns a
// seed with the given global reserve into a sprout.
func FirstDeviceSize(globalReserve uint64) uint64 {
	return max(MinFirstDevice, 20*globalReserve)
}
