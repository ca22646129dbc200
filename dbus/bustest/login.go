package bustest

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"

	godbus "github.com/godbus/dbus/v5"
)

// Inhibitor is one lock that [Login] gave out.
type Inhibitor struct {
	What, Who, Why, Mode string
	// Released is closed when the holder has let go.
	Released <-chan struct{}
}

// Login is a stand-in for the part of logind that gives out inhibitor locks.
type Login struct {
	deny atomic.Bool
	got  chan Inhibitor
}

// StartLogin puts a stand-in for logind on the bus.
func (b *Bus) StartLogin(t testing.TB) *Login {
	t.Helper()
	l := &Login{got: make(chan Inhibitor, 100)}
	conn := b.Conn(t)
	// The messages are answered by hand, because the descriptor in the reply
	// must be closed here once it is sent.
	messages := make(chan *godbus.Message, 100)
	reply, err := conn.RequestName("org.freedesktop.login1", godbus.NameFlagDoNotQueue)
	if err != nil || reply != godbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("cannot take the name of logind: %v %v", reply, err)
	}
	var work sync.WaitGroup
	stop := make(chan struct{})
	conn.Eavesdrop(messages)
	work.Go(func() {
		for m := range messages {
			if m.Type == godbus.TypeMethodCall {
				l.answer(conn, m, &work, stop)
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		_ = conn.Close() // closes messages as well
		work.Wait()
	})
	return l
}

// Deny makes it refuse locks from now on.
func (l *Login) Deny() { l.deny.Store(true) }

// Inhibitors receives each lock when it is given out.
func (l *Login) Inhibitors() <-chan Inhibitor { return l.got }

func (l *Login) answer(conn *godbus.Conn, m *godbus.Message, work *sync.WaitGroup, stop <-chan struct{}) {
	reply := &godbus.Message{Type: godbus.TypeMethodReply, Headers: map[godbus.HeaderField]godbus.Variant{
		godbus.FieldDestination: m.Headers[godbus.FieldSender],
		godbus.FieldReplySerial: godbus.MakeVariant(m.Serial()),
	}}
	refuse := func(name, text string) {
		reply.Type = godbus.TypeError
		reply.Headers[godbus.FieldErrorName] = godbus.MakeVariant(name)
		reply.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(text))
		reply.Body = []any{text}
		conn.Send(reply, nil)
	}
	var lock Inhibitor
	switch {
	case m.Headers[godbus.FieldMember].Value() != "Inhibit":
		refuse("org.freedesktop.DBus.Error.UnknownMethod", "only Inhibit is there")
		return
	case godbus.Store(m.Body, &lock.What, &lock.Who, &lock.Why, &lock.Mode) != nil:
		refuse("org.freedesktop.DBus.Error.InvalidArgs", "Inhibit takes four strings")
		return
	case l.deny.Load():
		refuse("org.freedesktop.DBus.Error.AccessDenied", "denied")
		return
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		refuse("org.freedesktop.DBus.Error.Failed", err.Error())
		return
	}
	fd := godbus.UnixFD(writer.Fd())
	reply.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(fd))
	reply.Body = []any{fd}
	conn.Send(reply, nil)
	_ = writer.Close() // the holder has the only copy now
	released := make(chan struct{})
	lock.Released = released
	gone := make(chan struct{})
	work.Go(func() { // the pipe ends when the holder lets go of it
		defer close(gone)
		_, _ = reader.Read(make([]byte, 1))
	})
	work.Go(func() {
		select {
		case <-gone:
			close(released)
		case <-stop:
		}
		_ = reader.Close() // ends the read above, if it is under way
		<-gone
	})
	l.got <- lock
}
