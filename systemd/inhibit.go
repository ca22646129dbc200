package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	godbus "github.com/godbus/dbus/v5"
)

// ErrNoLogind is in the chain of what [Inhibitor.Take] returns where no logind
// is on the bus.
var ErrNoLogind = errors.New("logind is not running")

// Inhibitor takes locks of systemd-logind against shutdown and sleep.
//
// A lock is advice. Before systemd 257 root passes block locks, and no lock
// stops a power cut (systemd's docs/INHIBITOR_LOCKS.md), so nothing may depend
// on it for safety.
type Inhibitor struct {
	conn *godbus.Conn
}

// NewInhibitor makes an Inhibitor that calls logind over conn, a connection to
// the system bus, which stays the caller's.
func NewInhibitor(conn *godbus.Conn) *Inhibitor { return &Inhibitor{conn: conn} }

// Take takes a lock that blocks shutdown and sleep until release is called; why
// is shown to the person who tries to shut down.
//
// release is never nil and may be called more than once. After an error it does
// nothing, so that a caller may report the error and go on with its work. The
// error has [ErrNoLogind] in its chain where there is no logind, and a
// [godbus.Error] where logind refused. The lock also ends with the process.
func (i *Inhibitor) Take(ctx context.Context, why string) (release func() error, err error) {
	none := func() error { return nil }
	var fd godbus.UnixFD
	// A logind that would have to be started first guards nobody's session, and
	// waiting for its start would hold up the job.
	err = i.conn.Object("org.freedesktop.login1", "/org/freedesktop/login1").CallWithContext(ctx,
		"org.freedesktop.login1.Manager.Inhibit", godbus.FlagNoAutoStart,
		"shutdown:sleep", "sproutd", why, "block").Store(&fd)
	if err != nil {
		if isAbsent(err) {
			err = fmt.Errorf("%w: %w", ErrNoLogind, err)
		}
		return none, fmt.Errorf("cannot keep the machine from shutting down or sleeping: %w", err)
	}
	lock := os.NewFile(uintptr(fd), "logind inhibitor lock")
	return sync.OnceValue(lock.Close), nil
}

// isAbsent reports whether err means that nobody owns the name called.
func isAbsent(err error) bool {
	var reply godbus.Error
	if !errors.As(err, &reply) {
		return false
	}
	switch reply.Name {
	case "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner":
		return true
	}
	return false
}
