package daemon

import (
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// View is everything the service shows, at one moment. It is never changed
// after it was published; a new one takes its place.
type View struct {
	Sprouts []SproutView // in order of FSID
	Jobs    []JobView    // in order of Number
	Devices []DeviceView // in order of Name
}

// SproutView is one sprout as shown.
type SproutView struct {
	FSID, SeedFSID, Label, MountPoint string
	State                             plan.State
	Members                           []MemberView
	// Size and Free in bytes. Size counts writable members only.
	Size, Free uint64
	// LowSpace is true when less than a tenth of the space, or less than
	// 256 MiB, is free on a volatile sprout (design: early warning).
	LowSpace bool
	// Intent is the unfinished request, nil when there is none.
	Intent *Intent
	// CurrentJob is the number of the job under way, 0 for none.
	CurrentJob uint32
	// SafeToUnplug is true only when it was proved that nothing uses the media.
	SafeToUnplug bool
	// MediaHolders says what still uses the media, one line each.
	MediaHolders []string
	// Warnings are what the user has to know, one or two sentences each.
	Warnings []string
}

// MemberView is one member as shown.
type MemberView struct {
	DevID    uint64
	Path     string
	Size     uint64
	Used     uint64
	Role     plan.Role
	Writable bool
}

// Intent is what an unfinished job wanted.
type Intent struct {
	Job       uint32
	Operation plan.Operation
	// Target is the path the target had, "zram" for a new zram device, "free" for
	// a partition that was not made yet; for a release its destination.
	Target string
	// State of the job that left it.
	State JobState
}

// JobState is the state of a job.
type JobState string

// The states of a job.
const (
	JobPending     JobState = "pending"
	JobRunning     JobState = "running"
	JobCancelling  JobState = "cancelling"
	JobDone        JobState = "done"
	JobFailed      JobState = "failed"
	JobCancelled   JobState = "cancelled"
	JobInterrupted JobState = "interrupted"
)

// Finished reports whether a job in state s will never change again.
func (s JobState) Finished() bool {
	switch s {
	case JobDone, JobFailed, JobCancelled, JobInterrupted:
		return true
	}
	return false
}

// JobView is one job as shown.
type JobView struct {
	Number       uint32
	Operation    plan.Operation
	Sprout       string // fsid
	StartedByUID uint32
	StartTime    time.Time
	State        JobState
	Step         string // text of the step under way, "" before the first and after the last
	StepNumber   uint32 // counts from 1; 0 before the first step
	StepCount    uint32
	// Progress from 0 to 1; it never falls and is 1 exactly when the job is done.
	Progress              float64
	BytesDone, BytesTotal uint64
	// Rate in bytes a second, smoothed; 0 when nothing is being moved.
	Rate uint64
	// ExpectedEnd is zero while it is not known.
	ExpectedEnd time.Time
	Cancelable  bool
	// Err is why the job failed, nil unless State is failed, cancelled or interrupted.
	Err *fault.Error
	// Result of a finished job: string keys, values are string, bool, uint64 or []string.
	Result map[string]any
}

// DeviceView is one block device as shown.
type DeviceView struct {
	block.Device
	// Role the device has in a sprout, "" for none; "media" if a seed is read from it.
	Role string
	// EligibleFor lists the operations that would take the device.
	EligibleFor []string
	// Reasons why not, by operation, for the others.
	Reasons map[string]string
}

// SeedReport is what InspectSeed says of an image or device.
type SeedReport struct {
	Seeding         bool
	FSID, Label     string
	Size, Used      uint64 // bytes
	CsumType        string
	MetadataProfile string
	// Supported is true if this kernel can make a sprout of it.
	Supported bool
	// Reasons why not.
	Reasons []string
}

// CreateOptions are the options of CreateSprout. The zero value is the default.
type CreateOptions struct {
	// ZramSize in bytes, virtual; 0 means half of the memory but at least 1 GiB.
	ZramSize uint64
	// ZramAlgorithm "" means the kernel's default.
	ZramAlgorithm string
	// Compress is the compress= mount option; "" means zstd:1, "none" means no compression.
	Compress string
	// MountOptions are further mount options, separated by commas.
	MountOptions string
	// Device is a block device to use instead of zram, "" for zram.
	Device string
	// Wipe allows to destroy what is on Device.
	Wipe bool
}

// Caller is who asked, as the bus proves it.
type Caller struct {
	UID uint32
	// Name is the unique bus name, "" for a caller inside the process.
	Name string
}

// RequestArgs is a request as it comes from a client: the target is still a
// path, looked up when the request is carried out.
type RequestArgs struct {
	Operation plan.Operation
	// Target is a path of a block device, or "zram" for AddDevice, or "free" for
	// Persist, or a directory, a block device or "ram" for Release, or "" for Resume.
	Target  string
	Options plan.Options
}
