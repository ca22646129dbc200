// Package plan decides. Given what a sprout is made of now and what is wanted,
// [Make] gives the steps that are left, or the reasons why it cannot be done.
//
// The package is pure: no call here reads or changes anything. That is what
// makes resuming after a crash the same thing as starting: planning again from
// whatever members the kernel shows gives the steps that remain.
//
//   - types.go   the values: Sprout, Target, Request, Plan, Step
//   - state.go   which state a set of members is
//   - make.go    the planner
//   - replace.go when a member is copied as a whole
//   - refuse.go  what is refused before anything is touched
//   - release.go a seed that is copied off its media
//   - size.go    how large a target must be
//   - warn.go    what the user is warned of
package plan

import (
	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
)

// Operation is something a user asks of a sprout.
type Operation string

// The operations on a mounted sprout.
const (
	Persist      Operation = "persist"
	Flatten      Operation = "flatten"
	AddDevice    Operation = "add-device"
	RemoveDevice Operation = "remove-device"
	// Release copies the seed off the media, so that the media is free.
	Release Operation = "release"
	// Resume stands for whatever operation was left unfinished.
	Resume Operation = "resume"
)

// Role says what a member is to its sprout.
type Role string

// The roles.
const (
	RoleSeed       Role = "seed"       // read-only, the image the session came from
	RoleZram       Role = "zram"       // RAM, gone at power-off
	RolePersistent Role = "persistent" // a writable device next to the seed
	RoleDisk       Role = "disk"       // a writable device that needs no seed, or is to need none
)

// State is the state of a sprout, see design §2.
type State string

// The states.
const (
	Volatile   State = "volatile"
	Persistent State = "persistent"
	Installed  State = "installed"
	Partial    State = "partial"
)

// Member is one device of a sprout as the kernel shows it now.
type Member struct {
	// DevID is the kernel's number of the member within the file system.
	DevID uint64
	// UUID is the member's own Btrfs device UUID, with dashes.
	UUID string
	// ID is the block device; its Num is zero for a missing device.
	ID block.ID
	// Size in bytes.
	Size uint64
	// Used is what is allocated on the member, in bytes.
	Used uint64
	// Seed is true for the read-only seed.
	Seed bool
	// Zram is true for RAM: a zram device, or a loop over a file in memory.
	Zram bool
	// Writable is false for the seed and for a read-only member.
	Writable bool
	// Missing is true when the device is gone: it was unplugged, or the file
	// system is mounted without it.
	Missing bool
	// Leaving is true while the kernel is removing the member.
	Leaving bool
	// Groups are the parts of the file system that lie on the member, in the
	// order in which the kernel would move them. Empty where nobody asked.
	Groups []Group
}

// Grows reports whether the file system could use more of the device than it
// does. Less than a stripe is what the kernel rounds.
func (m Member) Grows() bool { return m.ID.Size > m.Size+stripe }

// GroupType is the kind of content of a [Group].
type GroupType string

// The kinds of content.
const (
	Data     GroupType = "data"
	Metadata GroupType = "metadata"
	System   GroupType = "system"
)

// Group is one device extent: a stretch of a member that holds one copy of a
// block group.
type Group struct {
	Type GroupType
	// Logical is the block group's address in the file system.
	Logical uint64
	// Length of the device extent in bytes.
	Length uint64
	// Used bytes of it; a block group with two copies on the member is listed
	// twice.
	Used uint64
	// Extents of a data group, in order of their address; only where they were
	// asked for, see [Measured].
	Extents []Extent
}

// Extent is a stretch of a data group that is in use.
type Extent struct {
	Start, Length uint64
}

// Space is what a file system holds, in bytes, whatever member it is on.
type Space struct {
	DataUsed, MetadataUsed, SystemUsed uint64
	// MetadataCopies is 2 for DUP, 1 for single.
	MetadataCopies uint64
	// GlobalReserve is the kernel's emergency reserve.
	GlobalReserve uint64
	// Free is an estimate of what can still be written.
	Free uint64
	// NodeSize of a metadata block.
	NodeSize uint64
}

// Sprout is a sprout as the kernel shows it now.
type Sprout struct {
	FSID, SeedFSID string // with dashes; SeedFSID is "" once the seed has left
	Label          string
	// MountPoint is where it is mounted, "/" if it is the root.
	MountPoint string
	// ReadOnly is true when the kernel has it mounted read-only.
	ReadOnly bool
	// Compress is the value of the compress= mount option, "" for none.
	Compress string
	// Members in order of DevID.
	Members []Member
	Space   Space
	// Replace is what the kernel copies, or is to go on copying once the file
	// system can be written; nil for nothing.
	Replace *Replace
	// Exclusive is the kernel's exclusive operation under way that no job of
	// ours runs ("balance", "device remove", …), "" for none.
	Exclusive string
	// Swapfiles are active swap files on the file system; the kernel refuses
	// to remove a device under one.
	Swapfiles []string
	// Leftovers are devices that served this sprout, do not any more and
	// still wait to be freed.
	Leftovers []Leftover
	// MediaMount is where the file system is mounted that the seed's image is
	// in, if it is to be unmounted once the seed has left it; "" for none.
	MediaMount string
	// SeedFile is what the seed is read from, zero where there is no seed.
	SeedFile SeedFile
	// Unplugged is true when the media that the seed is on is gone.
	Unplugged bool
	// WillReset is true when the next boot is to drop the sprout.
	WillReset bool
	// MemoryAvailable in bytes, for moving content into RAM.
	MemoryAvailable uint64
	// Intent is what an earlier job left undone, nil when nothing is.
	Intent *Request
	// MinSizes keeps the least sizes that were worked out for some of the members,
	// exact ones and rough ones, where many targets are tried; nil keeps none.
	MinSizes map[string]uint64
	// Rough is set where nobody is shown the least size unless the target is too
	// small: one that the target has is then as good as the exact one, and found at
	// once.
	Rough bool
}

// Replace is a replace that is not over.
type Replace struct {
	// DevID of the member that is copied; 0 where the kernel does not say.
	DevID uint64
	// Target is what it is copied to, with the DevID 0. It becomes the member,
	// with its DevID, UUID and size, when all is copied.
	Target Member
}

// SeedFile says what the loop device of a seed reads from.
type SeedFile struct {
	// Loop is false for a seed that is on a device itself; the rest is zero then.
	Loop bool
	// Path of the file as the kernel names it; it need not mean anything here.
	Path string
	// Device is the block device that the loop is over, zero for a file.
	Device block.ID
	// Offset of the seed in what the loop is over, and Limit of its size there, 0
	// for none; in bytes.
	Offset, Limit uint64
	// Memory is true for a copy in memory that a release has made.
	Memory bool
	// Elsewhere is true when it is proved that the file is not on the media the
	// session came from.
	Elsewhere bool
	// Fixed says why the kernel cannot put another file behind the loop, "" where
	// it can.
	Fixed string
}

// Leftover is a device to give back: a zram or a loop that is no member now.
type Leftover struct {
	Zram bool // it was RAM, else the seed's loop
	ID   block.ID
}

// Target is the device a request names, looked at just now.
type Target struct {
	block.Device
	// Media is true if the device is, or is a part of, or holds the media the
	// seed comes from, in a way that writing to it could change the seed.
	Media bool
	// SameDisk is true if the device is a partition on the media's disk.
	SameDisk bool
	// MemberOf is the fsid of the mounted file system the device belongs to.
	MemberOf string
	// BtrfsDevices is how many devices a file system has of which the device is
	// one, and which is not mounted; 0 where there is none.
	BtrfsDevices uint64
	// Free is, in bytes, what a new partition would have for which the request
	// asks; the device is then the disk on which it is to be made. For a release
	// it is what the directory has room for that Path names, and nothing else is
	// known of the device but what it is to the sprout.
	Free uint64
}

// RAM is the destination of a release that copies the seed into memory.
const RAM = "ram"

// CopyName gives the name of the copy of a seed in the directory it is released to.
func CopyName(seedFSID string) string { return "sprout-" + seedFSID + ".img" }

// TargetRef finds the target again in a later life of the daemon.
type TargetRef struct {
	// Zram is true for a new zram device; the rest is then zero but Size until
	// it was made.
	Zram bool
	// Free is true for a partition that is still to be made in the free space of
	// the media's disk; the rest but BootID is then zero.
	Free bool
	// ReleaseTo is where a release copies the seed to: [RAM], or the absolute path of a
	// directory or a block device. The rest but BootID and SeedFSID is then zero, but
	// for the ID of a block device.
	ReleaseTo string
	// SeedFSID is the fsid of the seed that is copied.
	SeedFSID string `json:",omitempty"`
	ID       block.ID
	// UUID is the Btrfs device UUID, once the target became a member.
	UUID string
	// BootID of the boot in which ID.Num and ID.DiskSeq are right.
	BootID string
	// Copy is the Btrfs device UUID of the member that is copied to the device, from
	// before that until what came of it was read again; else "".
	Copy string
}

// onDevice reports whether a release is to copy the seed to a block device.
func (r TargetRef) onDevice() bool { return r.ReleaseTo != "" && r.ID.Path != "" }

// Options are the options of a request. The zero value is the default.
type Options struct {
	// Wipe allows to destroy what is on the target.
	Wipe bool
	// Compress is the compress= mount option for what is written from now on.
	// "" leaves it as it is.
	Compress string
	// Label is the new label, "" to keep the present one.
	Label string
	// MetadataProfile is "single" or "dup", "" to keep the present one.
	MetadataProfile string
	// Bootloader is "none" or "" (auto).
	Bootloader string
	// Size in bytes of a new zram device.
	Size uint64
	// Algorithm of a new zram device, "" for the kernel's default.
	Algorithm string
	// ReleaseFirst makes a flatten release the seed to memory first.
	ReleaseFirst bool `json:",omitempty"`
}

// Request is what a user wants. It is all that the journal keeps: from it and
// from the members the kernel shows, the steps that are left follow.
type Request struct {
	Operation Operation
	// Target the operation names.
	Target  TargetRef
	Options Options
	// NoReplace is true when the kernel could not copy a member as a whole.
	NoReplace bool
}

// StepKind says what a step does.
type StepKind string

// The kinds of steps.
const (
	StepWipe      StepKind = "wipe"           // destroy the signatures on the target
	StepPartition StepKind = "make-partition" // make the target in the free space of a disk
	StepWritable  StepKind = "make-writable"  // remount read-write
	StepCompress  StepKind = "compress"       // change the compress= mount option
	StepAdd       StepKind = "add"            // add the target to the file system
	StepAddZram   StepKind = "add-zram"       // make a zram device and add it
	StepReplace   StepKind = "replace"        // copy a member to the target, which takes its place
	StepCheck     StepKind = "check"          // compare what was copied with its checksums
	StepResize    StepKind = "resize"         // use all of the target
	StepRemove    StepKind = "remove"         // move everything off a member and remove it
	StepFreeZram  StepKind = "free-zram"      // give the memory of a removed zram back
	StepDetach    StepKind = "detach-loop"    // detach the loop device of the removed seed, or over a file in memory
	StepRelease   StepKind = "release-seed"   // copy the seed, and make its loop read from the copy
	StepUnmount   StepKind = "unmount-media"  // unmount the file system that the seed's image is in, or was
	StepConvert   StepKind = "convert-metadata"
	StepLabel     StepKind = "set-label"
)

// Step is one action the kernel can see.
type Step struct {
	Kind StepKind
	// DevID of the member for StepRemove, StepRelease, StepReplace, StepCheck and
	// StepResize.
	DevID uint64
	// Device the step is about, for StepReplace the target; zero for steps about the
	// whole file system and for StepAddZram.
	Device block.ID
	// From is the device of the member that StepReplace copies, and Copy its UUID.
	From block.ID
	Copy string
	// Bytes the step moves, 0 for those that move nothing.
	Bytes uint64
	// Value is the new label, compress= value or profile, the mount point of the
	// media, or where the seed is copied to.
	Value string
	// Text says in a sentence what the step does.
	Text string
}

// Plan is the answer of [Make].
type Plan struct {
	Operation Operation
	// Steps that are left, in order. Empty when all is done already.
	Steps []Step
	// BytesToMove by all steps together.
	BytesToMove uint64
	// TargetSize and MinTargetSize in bytes; 0 where the operation has no target.
	TargetSize, MinTargetSize uint64
	// Destroys says what the first steps destroy, one sentence each.
	Destroys []string
	// Problems are the reasons why it cannot be done, the most important first.
	// With a problem there are no steps.
	Problems []*fault.Error
	// Resumes is true when an earlier job did a part already.
	Resumes bool
}

// Err gives the first problem, nil where there is none.
func (p Plan) Err() error {
	if len(p.Problems) == 0 {
		return nil
	}
	return p.Problems[0]
}
