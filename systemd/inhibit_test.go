package systemd

import (
	"errors"
	"io"
	"os"
	"testing"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/bustest"
)

func connect(t *testing.T, address string) *godbus.Conn {
	t.Helper()
	conn, err := godbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// lock is one call of Inhibit as the fake logind saw it.
type lock struct {
	what, who, why, mode string
	// held sees the end of file when the caller has given the lock back.
	held *os.File
	// sent is logind's copy of what the caller holds. It is a bare number since
	// the library reads it at a moment that nothing here can wait for.
	sent int
}

// login1 plays logind.
type login1 struct {
	deny  bool
	calls chan lock
}

func (l *login1) Inhibit(what, who, why, mode string) (godbus.UnixFD, *godbus.Error) {
	if l.deny {
		return 0, godbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"Permission denied"})
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return 0, godbus.MakeFailedError(err)
	}
	l.calls <- lock{what, who, why, mode, os.NewFile(uintptr(pipe[0]), "lock"), pipe[1]}
	// The library sends the descriptor after this method has returned, so the
	// test closes it, once it has the reply.
	return godbus.UnixFD(pipe[1]), nil
}

// serveLogin1 puts a fake logind on the bus.
func serveLogin1(t *testing.T, address string, logind *login1) {
	t.Helper()
	conn := connect(t, address)
	if err := conn.Export(logind, "/org/freedesktop/login1", "org.freedesktop.login1.Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.login1", godbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
}

func TestInhibitorHoldsTheLockUntilRelease(t *testing.T) {
	address := bustest.Start(t).Address
	logind := &login1{calls: make(chan lock, 1)}
	serveLogin1(t, address, logind)

	release, err := NewInhibitor(connect(t, address)).Take(t.Context(), "The system is being moved to /dev/sdb1")
	if err != nil {
		t.Fatal(err)
	}
	got := <-logind.calls
	defer func() { _ = got.held.Close() }()
	if got.what != "shutdown:sleep" || got.who != "sproutd" || got.why != "The system is being moved to /dev/sdb1" || got.mode != "block" {
		t.Errorf("logind was asked for %q by %q for %q in mode %q", got.what, got.who, got.why, got.mode)
	}
	if err := unix.Close(got.sent); err != nil {
		t.Fatal(err)
	}

	// While the lock is held the pipe is silent; afterwards it is at its end.
	ended := make(chan error, 1)
	go func() {
		_, err := got.held.Read(make([]byte, 1))
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatalf("the lock was gone before its release: %v", err)
	default:
	}
	if err := release(); err != nil {
		t.Errorf("cannot release: %v", err)
	}
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("after the release the lock reads %v, want the end of file", err)
	}
	if err := release(); err != nil {
		t.Errorf("a second release: %v", err)
	}
}

func TestInhibitorReportsThatThereIsNoLogind(t *testing.T) {
	release, err := NewInhibitor(connect(t, bustest.Start(t).Address)).Take(t.Context(), "why")
	if !errors.Is(err, ErrNoLogind) {
		t.Errorf("got %v, want ErrNoLogind", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
}

func TestInhibitorReportsARefusal(t *testing.T) {
	address := bustest.Start(t).Address
	serveLogin1(t, address, &login1{deny: true})
	release, err := NewInhibitor(connect(t, address)).Take(t.Context(), "why")
	var refusal godbus.Error
	if !errors.As(err, &refusal) || errors.Is(err, ErrNoLogind) {
		t.Errorf("got %v, want logind's refusal", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
}
