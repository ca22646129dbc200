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
	conn          *godbus.Conn
	serial        uint32
	flags         godbus.Flags
	sender        string
	path          godbus.ObjectPath
	iface, member string
	signature     string
	args          []any

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

// DecodeArguments keeps the message as it is for Call. It makes godbus believe
// that no reply is wanted, because Call replies itself.
func (r route) DecodeArguments(conn *godbus.Conn, sender string, msg *godbus.Message, args []any) ([]any, error) {
	signature, _ := msg.Headers[godbus.FieldSignature].Value().(godbus.Signature)
	c := &call{
		conn: conn, serial: msg.Serial(), flags: msg.Flags, sender: sender,
		path: r.path, iface: r.iface, member: r.member, signature: signature.String(), args: args,
	}
	msg.Flags |= godbus.FlagNoReplyExpected
	return []any{c}, nil
}

// Call answers one message. It runs in a goroutine of godbus' own. A call is in
// flight until its reply was written, so that the server can end without
// losing one.
func (r route) Call(args ...any) ([]any, error) {
	c := r.session
	call, ok := args[0].(*call)
	if !ok {
		return nil, fault.New(fault.Internal, "the message was not decoded")
	}
	select {
	case <-c.ready:
	case <-c.ctx.Done():
		return nil, nil
	}
	waits := call.member == "Wait"
	if err := c.callers.begin(call.sender, waits); err != nil {
		call.reply(nil, err)
		return nil, nil
	}
	defer c.callers.end(call.sender, waits)
	call.reply(c.answer(call))
	return nil, nil
}

// answer calls dispatch. Nothing above it would survive a panic.
func (c *session) answer(call *call) (reply []any, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("a call failed with a defect of sproutd", slog.String("method", call.member),
				slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			reply, err = nil, fault.New(fault.Internal, "sproutd has a defect: its log says more")
		}
	}()
	reply, err = c.dispatch(call)
	switch {
	case err == nil:
	case c.ctx.Err() != nil && errors.Is(err, context.Canceled):
		err = errStopping()
	case fault.CodeOf(err) == fault.Internal && !isBusError(err):
		c.log.Error("a call failed", slog.String("method", call.member), slog.Any("error", err))
	default:
		c.log.Debug("a call was refused", slog.String("method", call.member), slog.Any("error", err))
	}
	return reply, err
}

// reply sends the answer to a call, unless the caller wants none.
func (call *call) reply(values []any, err error) {
	if call.flags&godbus.FlagNoReplyExpected != 0 {
		return
	}
	m := &godbus.Message{Type: godbus.TypeMethodReply, Body: values, Headers: map[godbus.HeaderField]godbus.Variant{
		godbus.FieldDestination: godbus.MakeVariant(call.sender),
		godbus.FieldReplySerial: godbus.MakeVariant(call.serial),
	}}
	if err != nil {
		e := replyError(err)
		m.Type, m.Body = godbus.TypeError, e.Body
		m.Headers[godbus.FieldErrorName] = godbus.MakeVariant(e.Name)
	}
	if len(m.Body) > 0 {
		m.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(m.Body...))
	}
	call.conn.Send(m, nil) // it fails only with the connection
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
