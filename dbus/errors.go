package dbus

import (
	"errors"
	"fmt"
	"strings"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/dbus/names"
)

// ErrorName gives the D-Bus name of an error with the given code.
func ErrorName(code fault.Code) string {
	switch code {
	case fault.NoSuchSprout:
		return names.ErrorUnknownObject
	case fault.InvalidArgs:
		return names.ErrorInvalidArgs
	case fault.AccessDenied:
		return names.ErrorAccessDenied
	case fault.InteractionNeeded:
		return names.ErrorInteractionNeeded
	}
	return names.ErrorPrefix + string(code)
}

// replyError makes err into the error a caller sees, with its cause: the kernel
// often says what is wrong. The causes of defects stay in the log.
func replyError(err error) *godbus.Error {
	if reply, ok := errors.AsType[*godbus.Error](err); ok {
		return reply
	}
	message := err.Error()
	var f *fault.Error
	if errors.As(err, &f) {
		message = f.Text()
	}
	return busError(ErrorName(fault.CodeOf(err)), "%s", message)
}

// busError makes an error with a name that no fault code stands for.
func busError(name, format string, args ...any) *godbus.Error {
	return godbus.NewError(name, []any{text(fmt.Sprintf(format, args...))})
}

// isBusError reports whether err has a D-Bus name already.
func isBusError(err error) bool {
	_, ok := errors.AsType[*godbus.Error](err)
	return ok
}

// errStopping answers calls that come too late.
func errStopping() *godbus.Error {
	return busError(names.ErrorDisconnected, "sproutd is stopping")
}

// text makes s fit for a D-Bus string, which is UTF-8 without NUL. Labels,
// mount points and model names may be anything.
func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func texts(in []string) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = text(s)
	}
	return out
}
