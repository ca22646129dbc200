package client

import (
	"slices"
	"strconv"
	"strings"
)

// Sprout is what the service shows of a sprout. Sizes are in bytes.
type Sprout struct {
	Path       string   `json:"object"`
	Fsid       string   `dbus:"Fsid" json:"fsid"`
	SeedFsid   string   `dbus:"SeedFsid" json:"seed_fsid"` // "" once the seed has left
	Label      string   `dbus:"Label" json:"label"`
	MountPoint string   `dbus:"MountPoint" json:"mount_point"`
	State      string   `dbus:"State" json:"state"` // volatile, persistent, installed, partial
	Members    []Member `dbus:"Members" json:"members"`
	Size       uint64   `dbus:"Size" json:"size"`
	Free       uint64   `dbus:"Free" json:"free"`
	LowSpace   bool     `dbus:"LowSpace" json:"low_space"`
	// Intent is what an unfinished job wanted; empty when there is none.
	Intent map[string]any `dbus:"Intent" json:"intent"`
	// CurrentJob is the path of the job under way, "" for none.
	CurrentJob   string   `dbus:"CurrentJob" json:"current_job"`
	SafeToUnplug bool     `dbus:"SafeToUnplug" json:"safe_to_unplug"`
	MediaHolders []string `dbus:"MediaHolders" json:"media_holders"`
	// Warnings are what the user has to know, empty from an older service.
	Warnings []string `dbus:"Warnings" json:"warnings"`
}

// Member is one device of a sprout.
type Member struct {
	DevID    uint64 `dbus:"devid" json:"devid"`
	Path     string `dbus:"path" json:"path"`
	Size     uint64 `dbus:"size" json:"size"`
	Used     uint64 `dbus:"used" json:"used"`
	Role     string `dbus:"role" json:"role"` // seed, zram, persistent, disk
	Writable bool   `dbus:"writable" json:"writable"`
}

// Job is what the service shows of a job. Times are µs since the epoch.
type Job struct {
	Path            string         `json:"object"`
	Operation       string         `dbus:"Operation" json:"operation"`
	Sprout          string         `dbus:"Sprout" json:"sprout"` // path
	StartedByUID    uint32         `dbus:"StartedByUid" json:"started_by_uid"`
	StartTime       uint64         `dbus:"StartTime" json:"start_time"`
	State           string         `dbus:"State" json:"state"`
	Step            string         `dbus:"Step" json:"step"`
	StepNumber      uint32         `dbus:"StepNumber" json:"step_number"`
	StepCount       uint32         `dbus:"StepCount" json:"step_count"`
	Progress        float64        `dbus:"Progress" json:"progress"` // 0..1
	BytesDone       uint64         `dbus:"BytesDone" json:"bytes_done"`
	BytesTotal      uint64         `dbus:"BytesTotal" json:"bytes_total"`
	Rate            uint64         `dbus:"Rate" json:"rate"`                         // bytes a second
	ExpectedEndTime uint64         `dbus:"ExpectedEndTime" json:"expected_end_time"` // 0 = not known
	Cancelable      bool           `dbus:"Cancelable" json:"cancelable"`
	ErrorName       string         `dbus:"ErrorName" json:"error_name"`
	ErrorMessage    string         `dbus:"ErrorMessage" json:"error_message"`
	Result          map[string]any `dbus:"Result" json:"result"`
}

// The states in which a job has ended.
const (
	Done        = "done"
	Failed      = "failed"
	Cancelled   = "cancelled"
	Interrupted = "interrupted"
)

// Finished reports whether the job has ended, well or not.
func (j Job) Finished() bool {
	return slices.Contains([]string{Done, Failed, Cancelled, Interrupted}, j.State)
}

// Number is the number in the job's path, 0 if there is none.
func (j Job) Number() uint64 { return JobNumber(j.Path) }

// JobNumber is the number in a job's path, 0 if there is none.
func JobNumber(path string) uint64 {
	number, err := strconv.ParseUint(path[strings.LastIndexByte(path, '/')+1:], 10, 64)
	if err != nil {
		return 0
	}
	return number
}

// Err is the error the job ended with, nil if it runs or is done.
func (j Job) Err() error {
	if !j.Finished() || j.State == Done {
		return nil
	}
	if j.ErrorName != "" {
		return &Error{Name: j.ErrorName, Code: codeOf(j.ErrorName, j.Path), Message: j.ErrorMessage}
	}
	// No name is a defect of the service, but the state tells enough.
	code := map[string]string{Cancelled: "Cancelled", Interrupted: "Interrupted", Failed: Internal}[j.State]
	return &Error{Code: code, Message: "the job was " + j.State}
}

// Device is what the service shows of a block device.
type Device struct {
	Object      string            `json:"object"`
	Path        string            `dbus:"Path" json:"path"`
	Size        uint64            `dbus:"Size" json:"size"`
	Model       string            `dbus:"Model" json:"model"`
	Serial      string            `dbus:"Serial" json:"serial"`
	Removable   bool              `dbus:"Removable" json:"removable"`
	ReadOnly    bool              `dbus:"ReadOnly" json:"read_only"`
	Signatures  []string          `dbus:"Signatures" json:"signatures"`
	Holders     []string          `dbus:"Holders" json:"holders"`
	Role        string            `dbus:"Role" json:"role"`
	EligibleFor []string          `dbus:"EligibleFor" json:"eligible_for"`
	Reasons     map[string]string `dbus:"Reasons" json:"reasons"` // by operation, why not
}

// Objects is everything the service shows, read at one moment.
type Objects struct {
	Sprouts []Sprout // by mount point, without the alias for the root
	Jobs    []Job    // by number
	Devices []Device // by path
}

// SeedInfo is what the service found out about a seed.
type SeedInfo struct {
	Seeding         bool     `dbus:"seeding" json:"seeding"`
	Fsid            string   `dbus:"fsid" json:"fsid"`
	Label           string   `dbus:"label" json:"label"`
	Size            uint64   `dbus:"size" json:"size"`
	Used            uint64   `dbus:"used" json:"used"`
	CsumType        string   `dbus:"csum_type" json:"csum_type"`
	MetadataProfile string   `dbus:"metadata_profile" json:"metadata_profile"`
	Supported       bool     `dbus:"supported" json:"supported"`
	Reasons         []string `dbus:"reasons" json:"reasons"` // why not
}

// Plan is what an operation would do.
type Plan struct {
	Steps         []Step    `dbus:"steps" json:"steps"`
	BytesToMove   uint64    `dbus:"bytes_to_move" json:"bytes_to_move"`
	TargetSize    uint64    `dbus:"target_size" json:"target_size"`
	MinTargetSize uint64    `dbus:"min_target_size" json:"min_target_size"`
	Destroys      []string  `dbus:"destroys" json:"destroys"`
	Problems      []Problem `dbus:"problems" json:"problems"`
	Resumes       bool      `dbus:"resumes" json:"resumes"`
}

// Step is one step of a [Plan].
type Step struct {
	Kind   string `dbus:"kind" json:"kind"`
	Device string `dbus:"device" json:"device"`
	Bytes  uint64 `dbus:"bytes" json:"bytes"`
	Text   string `dbus:"text" json:"text"`
}

// Problem is a reason why a [Plan] cannot be carried out.
type Problem struct {
	Error   string `dbus:"error" json:"error"` // D-Bus error name
	Message string `dbus:"message" json:"message"`
}

// Err gives the problem as the error the operation would be refused with.
func (p Problem) Err() error {
	code := p.Error
	if strings.Contains(code, ".") {
		code = codeOf(code, "")
	}
	return &Error{Name: p.Error, Code: code, Message: p.Message}
}

// Err gives the first problem as an error, nil if there is none.
func (p Plan) Err() error {
	if len(p.Problems) == 0 {
		return nil
	}
	return p.Problems[0].Err()
}

// CreateOptions are the options of [Client.CreateSprout]. What is zero is left
// to the service.
type CreateOptions struct {
	ZramSize      uint64 `dbus:"zram_size"` // bytes, virtual
	ZramAlgorithm string `dbus:"zram_algorithm"`
	Compress      string `dbus:"compress"`
	MountOptions  string `dbus:"mount_options"`
	Device        string `dbus:"device"` // block device to use and no zram
	Wipe          bool   `dbus:"wipe"`
}

// ResetOptions are the options of [Client.Reset].
type ResetOptions struct {
	Undo bool `dbus:"undo"` // take back what was asked for before
}

// MoveOptions are the options of the operations on a sprout. What is zero is
// left to the service; an operation refuses the options it does not have.
type MoveOptions struct {
	Wipe       bool   `dbus:"wipe"`
	Compress   string `dbus:"compress"`
	Label      string `dbus:"label"`
	Bootloader string `dbus:"bootloader"`
	// MetadataProfile is "single" or "dup".
	MetadataProfile string `dbus:"metadata_profile"`
	// ReleaseFirst makes a flatten release the seed to memory first.
	ReleaseFirst bool `dbus:"release_first"`
	// Size in bytes and Algorithm are those of a new zram device.
	Size      uint64 `dbus:"size"`
	Algorithm string `dbus:"algorithm"`
}
