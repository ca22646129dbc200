package dbus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

const (
	polkitName      = "org.freedesktop.PolicyKit1"
	polkitPath      = "/org/freedesktop/PolicyKit1/Authority"
	polkitAuthority = "org.freedesktop.PolicyKit1.Authority"
)

// authorization is what polkit needs to know besides caller and action.
type authorization struct {
	// details go to polkit, for its rules and for the question it asks.
	details map[string]string
	// interactive allows polkit to ask the user.
	interactive bool
}

// polkitSubject is the caller by unique bus name. A process id would be open to
// races and a user id in the wrong type is not looked at by polkit at all.
type polkitSubject struct {
	Kind    string
	Details variants
}

type polkitResult struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// authorize checks that the caller may do all of actions, and says who it is.
// Root may, without polkit being asked. Everybody else may only if polkit says
// so: no answer means no. It ends when the caller leaves the bus.
func (c *session) authorize(call *call, auth authorization, actions ...string) (daemon.Caller, error) {
	for _, action := range actions {
		if !slices.Contains(call.spec.actions, action) {
			return daemon.Caller{}, fmt.Errorf("%s is not declared to need %s", call.member, action)
		}
	}
	ctx, uid, stop, err := c.callers.watch(c.ctx, call.sender)
	if err != nil {
		return daemon.Caller{}, fault.Wrap(err, fault.AccessDenied, "cannot find out who is asking")
	}
	defer stop()
	caller := daemon.Caller{UID: uid, Name: call.sender}
	if uid == 0 {
		return caller, nil
	}
	for _, action := range actions {
		if err := c.check(ctx, call, auth, action); err != nil {
			c.log.Info("refused", slog.String("method", call.member), slog.String("action", action),
				slog.String("sender", call.sender), slog.Any("uid", uid), slog.Any("error", err))
			return daemon.Caller{}, err
		}
	}
	return caller, nil
}

// check asks polkit about one action.
func (c *session) check(ctx context.Context, call *call, auth authorization, action string) error {
	var flags uint32
	if auth.interactive {
		flags = 1 // AllowUserInteraction
	}
	id := "sproutd-" + strconv.FormatUint(c.cancellations.Add(1), 10)
	subject := polkitSubject{Kind: "system-bus-name", Details: variants{"name": godbus.MakeVariant(call.sender)}}
	authority := c.conn.Object(polkitName, polkitPath)
	var r polkitResult
	err := authority.CallWithContext(ctx, polkitAuthority+".CheckAuthorization", 0, subject, action, auth.details, flags, id).Store(&r)
	switch {
	case ctx.Err() != nil:
		// Giving up here does not close the dialog there.
		authority.Go(polkitAuthority+".CancelCheckAuthorization", godbus.FlagNoReplyExpected, nil, id)
		return fault.Wrap(context.Cause(ctx), fault.AccessDenied, "the question for permission was given up")
	case err != nil:
		return fault.Wrap(err, fault.AccessDenied, "cannot ask polkit for permission, and without it only root may do this%s", missing(err))
	case r.Authorized:
		return nil
	case r.Challenge && !auth.interactive:
		return fault.New(fault.InteractionNeeded, "the action %s needs authentication, and the call does not allow to ask for it", action)
	case r.Details["polkit.dismissed"] != "":
		return fault.New(fault.AccessDenied, "the action %s was not allowed: the authentication was dismissed", action)
	}
	return fault.New(fault.AccessDenied, "the action %s is not allowed", action)
}

// missing says in brackets that polkit is not there, if that is what err means.
func missing(err error) string {
	var e godbus.Error
	if !errors.As(err, &e) {
		return ""
	}
	switch e.Name {
	case "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner":
		return " (polkit is not running)"
	}
	return ""
}

// authorizationFor gathers what polkit is told about a call: the operation and,
// where it has a target, the device.
func authorizationFor(call *call, v *daemon.View, o options, operation, target string) authorization {
	details := map[string]string{"operation": text(operation), "wipe": strconv.FormatBool(o.is("wipe"))}
	switch {
	case operation == string(plan.Persist) && target == "free":
		details["device"] = "a new partition on the stick"
	case target != "":
		details["device"] = text(target)
	}
	if d := deviceAt(v, target); d != nil {
		details["device"] = text(d.Path)
		details["model"] = text(d.Model)
		details["serial"] = text(d.Serial)
		details["size"] = strconv.FormatUint(d.Size, 10)
		details["removable"] = strconv.FormatBool(d.Removable)
	}
	return authorization{
		details:     details,
		interactive: call.flags&godbus.FlagAllowInteractiveAuthorization != 0 && !o.is(noInteraction),
	}
}

// deviceAt finds the device a path names. It is for the text of a question
// only; what is done is decided on the open device. Links are followed below
// /dev alone, where nobody but root puts anything in the way.
func deviceAt(v *daemon.View, path string) *daemon.DeviceView {
	path = filepath.Clean(path)
	if strings.HasPrefix(path, "/dev/") {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
	}
	i := slices.IndexFunc(v.Devices, func(d daemon.DeviceView) bool { return d.Path == path })
	if i < 0 {
		return nil
	}
	return &v.Devices[i]
}
