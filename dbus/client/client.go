// Package client talks to sproutd over D-Bus.
//
//   - client.go  the connection and how a call is made
//   - calls.go   one function for each method of the service
//   - types.go   the properties as plain structs
//   - decode.go  from D-Bus values to those structs
//   - watch.go   following a job to its end
//   - errors.go  the errors callers inspect
//
// Nothing here polls and nothing has a time limit of its own: a call lasts
// until its reply comes, its context ends, or the service leaves the bus.
package client

import (
	"context"
	"fmt"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// Options say how a [Client] behaves. The zero value never lets the service
// ask anybody for a password, and starts the service when it is not there.
type Options struct {
	// Interactive allows polkit to ask the user for a password.
	Interactive bool
	// NoAutoStart makes calls fail when the service does not run yet, where
	// they would else have the bus start it.
	NoAutoStart bool
}

// Client is a connection to the system bus of its own. Its methods may be
// called from several goroutines.
type Client struct {
	conn  *godbus.Conn
	flags godbus.Flags
}

// Connect opens a connection to the system bus, or to the bus that
// DBUS_SYSTEM_BUS_ADDRESS names. The context is for connecting only. Whether
// the service is there shows at the first call.
func Connect(ctx context.Context, options Options) (*Client, error) {
	life, end := context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, end)
	conn, err := godbus.ConnectSystemBus(
		godbus.WithContext(life),
		// The default handler loses the order of signals when they come fast.
		godbus.WithSignalHandler(godbus.NewSequentialSignalHandler()),
	)
	if !stop() && err == nil {
		conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		end()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("cannot connect to the system bus: %w", ctx.Err())
		}
		return nil, &Error{Code: Unavailable, Message: "cannot connect to the system bus: " + err.Error(), Err: err}
	}
	c := &Client{conn: conn}
	if options.Interactive {
		c.flags |= godbus.FlagAllowInteractiveAuthorization
	}
	if options.NoAutoStart {
		c.flags |= godbus.FlagNoAutoStart
	}
	return c, nil
}

// Close ends the connection; calls under way fail.
func (c *Client) Close() error {
	if err := c.conn.Close(); err != nil {
		return fmt.Errorf("cannot close the connection to the bus: %w", err)
	}
	return nil
}

// call makes one method call and stores what it returns. It builds the message
// itself because godbus.Object.Call drops the flag that allows polkit to ask.
func (c *Client) call(ctx context.Context, path, iface, member string, args []any, results ...any) error {
	if path == "" || !godbus.ObjectPath(path).IsValid() {
		return &Error{Code: InvalidArgs, Message: fmt.Sprintf("%q is not the path of an object", path)}
	}
	message := &godbus.Message{
		Type:  godbus.TypeMethodCall,
		Flags: c.flags,
		Headers: map[godbus.HeaderField]godbus.Variant{
			godbus.FieldDestination: godbus.MakeVariant(names.Bus),
			godbus.FieldPath:        godbus.MakeVariant(godbus.ObjectPath(path)),
			godbus.FieldInterface:   godbus.MakeVariant(iface),
			godbus.FieldMember:      godbus.MakeVariant(member),
		},
		Body: args,
	}
	if len(args) > 0 {
		message.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(args...))
	}
	call := <-c.conn.SendWithContext(ctx, message, make(chan *godbus.Call, 1)).Done
	if call.Err != nil {
		return fromBus(ctx, call.Err, path)
	}
	if err := call.Store(results...); err != nil {
		return &Error{Code: Internal, Message: fmt.Sprintf("cannot understand the reply to %s: %v", member, err), Err: err}
	}
	return nil
}
