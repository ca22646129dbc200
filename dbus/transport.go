package dbus

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"

	godbus "github.com/godbus/dbus/v5"
)

// systemBusSocket is where the specification has the system bus.
const systemBusSocket = "/run/dbus/system_bus_socket"

// systemBusAddress gives the address of the system bus.
func systemBusAddress() string {
	if address := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); address != "" {
		return address
	}
	return "unix:path=" + systemBusSocket
}

// connect makes a connection of its own to the bus at address. The connection
// ends with ctx, whether or not the bus takes what is being sent.
//
// It does not let godbus dial: godbus then agrees to take file descriptors,
// and those that callers attach to messages we do not expect would stay open
// for ever. On a connection without the agreement the bus refuses such messages.
func connect(ctx context.Context, address string, log *slog.Logger, opts ...godbus.ConnOption) (*godbus.Conn, error) {
	socket, err := dial(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the bus at %s: %w", address, err)
	}
	conn, err := godbus.NewConn(&framed{UnixConn: socket, in: bufio.NewReader(socket), dropped: func(size int) {
		log.Warn("a message was left out because of its size", slog.Int("bytes", size))
	}}, opts...)
	if err != nil {
		_ = socket.Close()
		return nil, fmt.Errorf("cannot connect to the bus at %s: %w", address, err)
	}
	// Neither Auth nor Close take a context, and both wait for a bus that does
	// not answer unless the socket below them is closed.
	context.AfterFunc(ctx, func() { _ = socket.Close() })
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot log in to the bus at %s: %w", address, err)
	}
	return conn, nil
}

// maxMessage is the size in bytes up to which messages are taken. A bus lets
// anybody send 32 MiB, which decoded would be twenty times that.
const maxMessage = 1 << 20

// framed reads many messages with one system call, and leaves out those that
// are too large before anything is made from them. Their callers get no reply.
type framed struct {
	*net.UnixConn
	in       *bufio.Reader
	dropped  func(size int)
	messages atomic.Bool // set when the login is over and messages begin
	left     int         // bytes of the present message
}

func (f *framed) Write(p []byte) (int, error) {
	if string(p) == "BEGIN\r\n" {
		f.messages.Store(true) // the bus says nothing more until it has read this
	}
	return f.UnixConn.Write(p)
}

func (f *framed) Read(p []byte) (int, error) {
	if !f.messages.Load() {
		return f.in.Read(p)
	}
	for f.left == 0 {
		// https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-messages
		fixed, err := f.in.Peek(16)
		if err != nil {
			return 0, err
		}
		var order binary.ByteOrder = binary.LittleEndian
		if fixed[0] == 'B' {
			order = binary.BigEndian
		}
		body, fields := int(order.Uint32(fixed[4:])), int(order.Uint32(fixed[12:]))
		size := 16 + (fields+7)/8*8 + body
		if size <= maxMessage {
			f.left = size
			break
		}
		f.dropped(size)
		if _, err := f.in.Discard(size); err != nil {
			return 0, err
		}
	}
	n, err := f.in.Read(p[:min(len(p), f.left)])
	f.left -= n
	return n, err
}

// dial connects to the first bus that answers of a D-Bus address, which is a
// list separated by semicolons.
func dial(ctx context.Context, address string) (*net.UnixConn, error) {
	err := errors.New("the address is empty")
	for one := range strings.SplitSeq(address, ";") {
		transport, keys, _ := strings.Cut(one, ":")
		if transport != "unix" {
			err = fmt.Errorf("transport %q is not supported, only unix", transport)
			continue
		}
		var name string
		if name, err = socketName(keys); err != nil {
			continue
		}
		var dialer net.Dialer
		var conn net.Conn
		if conn, err = dialer.DialContext(ctx, "unix", name); err != nil {
			continue
		}
		if unixConn, ok := conn.(*net.UnixConn); ok {
			return unixConn, nil
		}
		return nil, fmt.Errorf("cannot use the bus: %s is no Unix socket", name)
	}
	return nil, err
}

func socketName(keys string) (string, error) {
	for pair := range strings.SplitSeq(keys, ",") {
		key, value, _ := strings.Cut(pair, "=")
		value, err := godbus.UnescapeBusAddressValue(value)
		switch {
		case err != nil:
			return "", fmt.Errorf("the address is malformed: %w", err)
		case key == "path":
			return value, nil
		case key == "abstract":
			return "@" + value, nil
		}
	}
	return "", errors.New("the address names no socket")
}
