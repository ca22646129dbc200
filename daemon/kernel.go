package daemon

import (
	"context"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/daemon/plan"
)

// Kernel is all that the engine sees and does. [sproutd.org/sproutd/daemon/machine]
// is the real one; the fake in the tests can fail or stop at any call.
//
// Errors that a user can do something about are faults; anything else counts as
// internal. A method that changes something has either done it or left things
// as they were, but for Remove, which may have moved a part, and for Replace.
type Kernel interface {
	Looker
	Changer
	Seeder
}

// Looker looks and changes nothing.
type Looker interface {
	// Sprouts gives every mounted file system that has a seed or a zram member
	// or for which known says true. Groups and Leftovers are left out.
	Sprouts(ctx context.Context, known func(fsid string) bool) ([]plan.Sprout, error)
	// Detail gives the sprout mounted at mountpoint with the groups of every member.
	Detail(ctx context.Context, mountpoint string) (plan.Sprout, error)
	// Measure adds to the data groups of the given members of s their extents,
	// after writing out what waits to be written.
	Measure(ctx context.Context, s *plan.Sprout, devids []uint64) error
	// Devices gives every block device. Unless again is true, only those are
	// opened of which the kernel said that they have changed: a stick that was
	// said to be safe to unplug must not be read in passing.
	Devices(ctx context.Context, again bool) ([]block.Device, error)
	// Device gives the block device at path, looked at now.
	Device(ctx context.Context, path string) (block.Device, error)
	// Attached tells which of the given devices are still there: the same
	// device, with a backing file if it is a loop, and with a size.
	Attached(ctx context.Context, ids []block.ID) ([]block.ID, error)
	// IsMounted tells whether anything is mounted at the directory.
	IsMounted(ctx context.Context, mountpoint string) (bool, error)
	// Media gives the whole disk the seed member comes from, following a loop
	// device to the device its backing file is on; zero when there is none.
	Media(ctx context.Context, seed block.ID) (Media, error)
	// MediaHolders lists what uses the disk or a partition of it. An empty list
	// is proof that the disk can be unplugged.
	MediaHolders(ctx context.Context, disk block.ID) ([]block.Holder, error)
	// SeedFile tells what a seed is read from; media is the disk that the session
	// came from, zero where that is not known.
	SeedFile(ctx context.Context, seed, media block.ID) (plan.SeedFile, error)
	// Destination looks at a directory that a seed could be copied to, and gives it by
	// its path without symbolic links, or at a block device, and gives that.
	Destination(ctx context.Context, path string, media block.ID) (*plan.Target, error)
	// Room looks for a persistence partition on the disk, and for room for one. A
	// fault.NotSupported where none can be made.
	Room(ctx context.Context, disk block.ID) (Room, error)
	// BtrfsDevices tells how many devices the Btrfs has that is on a device
	// which nobody uses, seeds included.
	BtrfsDevices(ctx context.Context, id block.ID) (uint64, error)
	// Moved reads the counters for progress while devid is being removed or copied.
	Moved(ctx context.Context, mountpoint string, devid uint64, from, to block.ID) (Counters, error)
}

// Media says where a seed lies.
type Media struct {
	// Disk is the whole disk; its Num is zero where there is none (a tmpfs).
	Disk block.ID
	// Part is the partition or disk that carries the seed itself, or the file
	// system the image file is in.
	Part block.ID
}

// Room says where on a disk a live system can keep what it writes.
type Room struct {
	// Partitions are those that were made for that.
	Partitions []block.ID
	// Free is the size in bytes that a new partition would have.
	Free uint64
}

// Counters are raw counters; only differences mean something.
type Counters struct {
	// Left is what is still to be moved off the member, in bytes; it falls a
	// block group at a time.
	Left uint64
	// Group is the used size in bytes of the block group moved next.
	Group uint64
	// Read from the leaving device and Written to the target, in bytes.
	Read, Written uint64
}

// Release says what seed to copy, and where to.
type Release struct {
	MountPoint string
	DevID      uint64 // of the seed in the file system there
	Seed       block.ID
	SeedFSID   string
	// To is [plan.RAM], a directory or the path of Device.
	To string
	// Device is the block device to copy all of the seed to, zero for none.
	Device block.ID
	// Progress is called with the bytes that are copied so far, from any goroutine.
	Progress func(done uint64)
}

// SeedCopy is a copy that a seed is read from.
type SeedCopy struct {
	// Path of the file or block device, "" for one in memory.
	Path string
	// Bytes that were copied and compared.
	Bytes uint64
}

// Changer changes a mounted sprout.
type Changer interface {
	// Wipe destroys all signatures on the device, after it looked again that
	// it is the same device and nobody uses it.
	Wipe(ctx context.Context, id block.ID) error
	// MakePartition makes a persistence partition in the free space of the disk.
	MakePartition(ctx context.Context, disk block.ID) (block.ID, error)
	// Add adds the device, after it looked again that it is the same device,
	// empty and not in use.
	Add(ctx context.Context, mountpoint string, id block.ID) error
	// Remove moves everything off the member and removes it. When ctx ends the
	// kernel is told to stop, and the error is a fault.Cancelled.
	Remove(ctx context.Context, mountpoint string, devid uint64) error
	// Replace copies the member to the device, after it looked again as Add does,
	// or waits for the end where the kernel does that already. When ctx ends the
	// kernel is told to stop, and the error is a fault.Cancelled: the member has
	// everything then, and the device is none. The same holds for every failure
	// that the kernel tells of in time; that the copy is whole is not known before
	// Check. The kernel may go on when this process dies, and does after a crash.
	Replace(ctx context.Context, mountpoint string, devid uint64, id block.ID) error
	// Check reads what is on the member and compares it with its checksums; a
	// fault.IOError names the files that are damaged.
	Check(ctx context.Context, mountpoint string, devid uint64) error
	// Resize makes the file system use all of the member's device.
	Resize(ctx context.Context, mountpoint string, devid uint64) error
	// ReadAhead reads what is on a seed before a removal of it comes to it, until
	// ctx ends, and gives the bytes it asked for; a fault.NotSupported says why
	// it cannot help. The removal begins when begun is closed; until then as much
	// is read as may be ahead of it.
	ReadAhead(ctx context.Context, mountpoint string, devid uint64, seed block.ID, begun <-chan struct{}) (uint64, error)
	// Release copies what is in use of a seed, makes sure that the copy is right, and
	// makes the seed's loop read from it. When ctx ends before that, or on any error,
	// the loop reads from where it did and there is no copy. A block device is looked
	// at again before, as by Add; what the sprout has of the seed no more is copied
	// to it as well, and the superblocks last.
	Release(ctx context.Context, r Release) (SeedCopy, error)
	// SettleCopy tidies up what a release to a directory left that was cut off: a
	// part of a copy goes, and a copy that is in use gets its name.
	SettleCopy(ctx context.Context, dir, seedFSID string) error
	MakeWritable(ctx context.Context, mountpoint string, options ...string) error
	SetCompress(ctx context.Context, mountpoint, value string) error
	SetLabel(ctx context.Context, mountpoint, label string) error
	ConvertMetadata(ctx context.Context, mountpoint, profile string) error
	// CreateZram makes a zram device; record is called with what is known of it
	// before: its Path, while its Num is zero, and then all of it, before any
	// memory is given to it.
	CreateZram(ctx context.Context, size uint64, algorithm string, record func(block.ID) error) (block.ID, error)
	// FreeZram resets and removes a zram device that CreateZram made, in this
	// or an earlier life; a fault.NotSupported for any other.
	FreeZram(ctx context.Context, id block.ID) error
	DetachLoop(ctx context.Context, id block.ID) error
	// Sync writes everything out to the members.
	Sync(ctx context.Context, mountpoint string) error
}

// Seeder makes a session of a seed and ends it.
type Seeder interface {
	InspectSeed(ctx context.Context, path string) (SeedReport, error)
	// AttachSeed gives the block device of the seed: a new read-only loop for
	// a file, the device itself for a block device.
	AttachSeed(ctx context.Context, path string) (id block.ID, loop bool, err error)
	// MountSeed mounts the seed read-only.
	MountSeed(ctx context.Context, seed block.ID, mountpoint string, options []string) error
	Unmount(ctx context.Context, mountpoint string) error
	// Adopt takes over zram devices, and loops over files in memory, that an
	// earlier life of the daemon or the early boot made, and gives those that
	// are really there.
	Adopt(ctx context.Context, zrams []block.ID) []block.ID
	// BootID names this boot.
	BootID() string
	// BootNote is what the early boot of this boot left to know, zero where the
	// system was not booted from a seed.
	BootNote() (handover.Note, error)
	// MemoryTotal in bytes.
	MemoryTotal() uint64
}
