// Package fault names the ways in which an operation can be refused or fail.
//
// A fault is an error a caller inspects: it has a code, a message in the
// user's terms and, where there is one, the cause. The D-Bus layer turns the
// code into an error name and the command line turns it into an exit code and
// a remedy; both tables are tested to be complete against [Codes].
package fault

import (
	"errors"
	"fmt"
)

// Code is the last part of the error's D-Bus name.
type Code string

// The codes. Each says what the caller can rely on: up to and including
// InvalidArgs nothing was changed when the error was returned by a starting
// call; IOError, Cancelled, Interrupted and NoSpace can also end a running job.
const (
	NotSeed           Code = "NotSeed"                          // the image or device is no Btrfs seed
	SeedUnsupported   Code = "SeedUnsupported"                  // this kernel cannot mount the seed
	SeedDamaged       Code = "SeedDamaged"                      // the seed is truncated or its superblock is corrupt
	NoSuchDevice      Code = "NoSuchDevice"                     // the path is missing or no block device
	DeviceBusy        Code = "DeviceBusy"                       // mounted, swap, held or open; the message says by whom
	DeviceReadOnly    Code = "DeviceReadOnly"                   // the device cannot be written
	DeviceIsMember    Code = "DeviceIsMember"                   // the device already belongs to a sprout
	DeviceIsMedia     Code = "DeviceIsMedia"                    // the device holds the seed
	TargetTooSmall    Code = "TargetTooSmall"                   // the message says how much is needed
	TargetNotEmpty    Code = "TargetNotEmpty"                   // the message says what is there
	NoSpace           Code = "NoSpace"                          // the file system ran out of space
	NoMemory          Code = "NoMemory"                         // not enough memory
	Busy              Code = "Busy"                             // another job or exclusive operation runs; the message names it
	WrongState        Code = "WrongState"                       // the sprout's state does not allow the operation
	NotSupported      Code = "NotSupported"                     // this build or kernel cannot do it
	IOError           Code = "IOError"                          // a device failed; the message names member and files
	Cancelled         Code = "Cancelled"                        // the job was cancelled
	NothingToResume   Code = "NothingToResume"                  // no earlier job left anything undone
	NoSuchJob         Code = "NoSuchJob"                        // no job of that number
	NoSuchSprout      Code = "NoSuchSprout"                     // no sprout of that fsid; on the bus this is UnknownObject
	Interrupted       Code = "Interrupted"                      // the daemon ended while the job ran
	InvalidArgs       Code = "InvalidArgs"                      // an argument or option makes no sense; on the bus the standard InvalidArgs
	AccessDenied      Code = "AccessDenied"                     // on the bus the standard AccessDenied
	InteractionNeeded Code = "InteractiveAuthorizationRequired" // on the bus the standard name
	Internal          Code = "Internal"                         // a defect of sproutd
)

// Codes lists every code, for tests of completeness.
func Codes() []Code {
	return []Code{
		NotSeed, SeedUnsupported, SeedDamaged, NoSuchDevice, DeviceBusy, DeviceReadOnly, DeviceIsMember,
		DeviceIsMedia, TargetTooSmall, TargetNotEmpty, NoSpace, NoMemory, Busy, WrongState, NotSupported,
		IOError, Cancelled, NothingToResume, NoSuchJob, NoSuchSprout, Interrupted, InvalidArgs, AccessDenied,
		InteractionNeeded, Internal,
	}
}

// Error is an error with a code.
type Error struct {
	Code Code
	// Message says what happened in the user's terms, without a remedy.
	Message string
	// Files that cannot be read any more, where the fault is about some.
	Files []string
	// Err is the cause, nil where there is none. It is for logs.
	Err error
}

// Error gives the message and, where there is one, the cause.
func (e *Error) Error() string {
	if e.Err != nil {
		return e.Message + ": " + e.Err.Error()
	}
	return e.Message
}

// Text is what a user is told: the message, and the cause unless that would tell
// of sproutd's insides or of how somebody was refused.
func (e *Error) Text() string {
	switch e.Code {
	case Internal, AccessDenied, InteractionNeeded:
		return e.Message
	}
	return e.Error()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// New makes a fault without a cause.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Wrap makes a fault with a cause. It returns nil for a nil cause.
func Wrap(err error, code Code, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Err: err}
}

// CodeOf gives the code of the outermost fault in err's chain, "" for nil and
// Internal for an error that is no fault.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var fault *Error
	if errors.As(err, &fault) {
		return fault.Code
	}
	return Internal
}
