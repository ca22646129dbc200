package dbus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/dbus/names"
)

// call is one method call.
type call struct {
	path                  godbus.ObjectPath
	iface, member, sender string
	signature             string
	flags                 godbus.Flags
	args                  []any

	// What dispatch found.
	tree   *tree
	object *object // nil on the way to an object
	spec   methodSpec
}

// function answers a call. The arguments have the types the interface says.
type function func(ctx context.Context, c *session, call *call) ([]any, error)

// LookupObject, LookupInterface and LookupMethod are godbus' way to a method.
// They find anything, because the errors godbus gives for what is missing are
// not the standard ones; dispatch gives those.
func (c *session) LookupObject(path godbus.ObjectPath) (godbus.ServerObject, bool) {
	return route{session: c, path: path}, true
}

// route is a message on its way to dispatch.
type route struct {
	session *session
	path    godbus.ObjectPath
	iface   string
	member  string
}

func (r route) LookupInterface(name string) (godbus.Interface, bool) {
	r.iface = name
	return r, true
}

func (r route) LookupMethod(name string) (godbus.Method, bool) {
	r.member = name
	return r, true
}

func (r route) NumArguments() int     { return 0 }
func (r route) NumReturns() int       { return 0 }
func (r route) ArgumentValue(int) any { return nil }
func (r route) ReturnValue(int) any   { return nil }

// DecodeArguments keeps the message as it is for Call.
func (r route) DecodeArguments(_ *godbus.Conn, sender string, msg *godbus.Message, args []any) ([]any, error) {
	signature, _ := msg.Headers[godbus.FieldSignature].Value().(godbus.Signature)
	return []any{&call{
		path: r.path, iface: r.iface, member: r.member, sender: sender,
		signature: signature.String(), flags: msg.Flags, args: args,
	}}, nil
}

// Call answers one message. It runs in a goroutine of godbus' own, and nothing
// above it would survive a panic.
func (r route) Call(args ...any) (reply []any, err error) {
	c, call := r.session, args[0].(*call)
	select {
	case <-c.ready:
	case <-c.ctx.Done():
		return nil, errStopping()
	}
	waits := call.member == "Wait"
	if err := c.callers.begin(call.sender, waits); err != nil {
		return nil, err
	}
	defer c.callers.end(call.sender, waits)
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("a call failed with a defect of sproutd", slog.String("method", call.member),
				slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			err = fault.New(fault.Internal, "sproutd has a defect: its log says more")
		}
		if err != nil {
			reply, err = nil, call.reply(c, err)
		}
	}()
	return c.dispatch(call)
}

// reply makes err into what is sent. Nothing is sent to those who want no reply.
func (call *call) reply(c *session, err error) error {
	sent := replyError(err)
	if c.ctx.Err() != nil && errors.Is(err, context.Canceled) {
		sent = errStopping()
	}
	if strings.HasSuffix(sent.Name, ".Internal") {
		c.log.Error("a call failed", slog.String("method", call.member), slog.Any("error", err))
	} else {
		c.log.Debug("a call was refused", slog.String("method", call.member), slog.Any("error", err))
	}
	if call.flags&godbus.FlagNoReplyExpected != 0 {
		return nil
	}
	return sent
}

// dispatch finds the function for a call, checks its arguments and calls it.
func (c *session) dispatch(call *call) ([]any, error) {
	s := c.server
	call.tree = s.current(c.ctx)
	call.object = call.tree.objects[call.path]
	if call.object == nil && call.tree.children[call.path] == nil {
		return nil, busError(names.ErrorUnknownObject, "there is no object %s", call.path)
	}
	interfaces := interfacesOf(call.object)
	if call.iface == "" {
		// Permitted by the specification. Member names of ours are unique on
		// each object, which a test makes sure of.
		for _, name := range interfaces {
			if _, ok := s.specs[name].methods[call.member]; ok {
				call.iface = name
				break
			}
		}
		if call.iface == "" {
			return nil, busError(names.ErrorUnknownMethod, "%s has no method %s", call.path, call.member)
		}
	}
	if !slices.Contains(interfaces, call.iface) {
		return nil, busError(names.ErrorUnknownInterface, "%s has no interface %s", call.path, call.iface)
	}
	spec, ok := s.specs[call.iface].methods[call.member]
	run := s.functions[call.iface+"."+call.member]
	if !ok || run == nil {
		return nil, busError(names.ErrorUnknownMethod, "interface %s has no method %s", call.iface, call.member)
	}
	call.spec = spec
	if call.signature != spec.in {
		return nil, busError(names.ErrorInvalidArgs, "%s takes arguments of the types (%s), not (%s)", call.member, spec.in, call.signature)
	}
	reply, err := run(c.ctx, c, call)
	if strings.HasPrefix(call.iface, names.Bus) {
		// Who gets an answer has already got the signals of what it says.
		s.signals.flush(c.ctx)
	}
	return reply, err
}

// interfacesOf lists the interfaces of an object, in the order of introspection.
// godbus answers Peer itself.
func interfacesOf(o *object) []string {
	if o == nil {
		return []string{names.Peer, names.Introspectable}
	}
	out := []string{names.Peer, names.Introspectable, names.Properties}
	if o.path == names.Root {
		out = append(out, names.ObjectManager)
	}
	return append(out, o.iface)
}

// argument gives the n-th argument. The signature check has made sure of T.
func argument[T any](call *call, n int) T {
	v, ok := call.args[n].(T)
	if !ok {
		panic(fmt.Sprintf("argument %d of %s is a %T", n, call.member, call.args[n]))
	}
	return v
}
