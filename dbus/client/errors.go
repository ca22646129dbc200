package client

import (
	"context"
	"errors"
	"fmt"
	"strings"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// The codes this package gives to errors of its own and to the standard D-Bus
// errors. All others are the last part of the service's own error names.
const (
	// Unavailable: there is no bus or no service, or it went away.
	Unavailable  = "Unavailable"
	InvalidArgs  = "InvalidArgs"
	NoSuchJob    = "NoSuchJob"
	NoSuchSprout = "NoSuchSprout"
	NoSuchDevice = "NoSuchDevice"
	NotSupported = "NotSupported"
	Busy         = "Busy"
	Internal     = "Internal"
)

const standardPrefix = "org.freedesktop.DBus.Error."

// Error is an error of the service or of the way to it.
type Error struct {
	// Name is the D-Bus error name, "" if the error did not come over the bus.
	Name string
	// Code is the short name: "TargetTooSmall", "AccessDenied", [Unavailable], …
	Code string
	// Message says what happened in the user's terms.
	Message string
	// Err is the cause, nil where there is none.
	Err error
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// CodeOf gives the code of the outermost [Error] in err's chain, "" if there is none.
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// codeOf gives the code for a D-Bus error name; path is the object that was
// called, which tells what an unknown object would have been.
func codeOf(name, path string) string {
	if code, ok := strings.CutPrefix(name, names.ErrorPrefix); ok {
		return code
	}
	short, ok := strings.CutPrefix(name, standardPrefix)
	if !ok {
		return Internal
	}
	switch short {
	case "InvalidArgs", "AccessDenied", "InteractiveAuthorizationRequired":
		return short
	case "UnknownObject":
		switch {
		case strings.HasPrefix(path, names.JobsParent+"/"):
			return NoSuchJob
		case strings.HasPrefix(path, names.SproutsParent+"/"):
			return NoSuchSprout
		case strings.HasPrefix(path, names.DevicesParent+"/"):
			return NoSuchDevice
		}
		return NotSupported
	case "UnknownMethod", "UnknownInterface", "UnknownProperty":
		return NotSupported
	case "LimitsExceeded":
		return Busy
	case "ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "NoServer", "Timeout", "TimedOut":
		return Unavailable
	}
	if strings.HasPrefix(short, "Spawn.") {
		return Unavailable
	}
	return Internal
}

// fromBus makes an [Error] of what a call gave. An ended context stays what it is.
func fromBus(ctx context.Context, err error, path string) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return fmt.Errorf("cannot wait for the reply: %w", err)
	}
	var reply godbus.Error
	if !errors.As(err, &reply) {
		return &Error{Code: Unavailable, Message: "the connection to the system bus was lost: " + err.Error(), Err: err}
	}
	result := &Error{Name: reply.Name, Code: codeOf(reply.Name, path), Message: reply.Error(), Err: err}
	if result.Code == NoSuchJob && JobNumber(path) != 0 {
		result.Message = fmt.Sprintf("there is no job %d", JobNumber(path))
	}
	return result
}
