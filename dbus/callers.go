package dbus

import (
	"context"
	"errors"
	"fmt"
	"sync"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// How many calls of one sender may be in flight. Waiting is counted apart, so
// that a client that waits for many jobs can still ask about them.
const (
	maxCalls = 64
	maxWaits = 64
)

// errGone ends what is done for a caller who has left the bus.
var errGone = errors.New("the caller has left the bus")

// callers keeps count of the calls in flight and notices when a caller leaves.
type callers struct {
	bus func() godbus.BusObject

	work sync.WaitGroup // every call in flight

	mu      sync.Mutex
	closing bool
	loads   map[string]*load

	watching sync.Mutex // held while the match rule comes or goes
	watches  int        // how many need the match rule
}

// load is what one sender has in flight.
type load struct {
	calls, waits int
	watches      map[*watch]struct{}
}

type watch struct{ gone context.CancelCauseFunc }

func newCallers(bus func() godbus.BusObject) *callers {
	return &callers{bus: bus, loads: map[string]*load{}}
}

// begin counts a call in. The call must be counted out with end, unless begin
// fails.
func (c *callers) begin(sender string, waits bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return errStopping()
	}
	l := c.load(sender)
	n, limit := &l.calls, maxCalls
	if waits {
		n, limit = &l.waits, maxWaits
	}
	if *n >= limit {
		return busError(names.ErrorLimitsExceeded, "too many calls at once: at most %d may be unanswered", limit)
	}
	*n++
	c.work.Add(1)
	return nil
}

// end counts a call out.
func (c *callers) end(sender string, waits bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.load(sender)
	if waits {
		l.waits--
	} else {
		l.calls--
	}
	c.tidy(sender, l)
	c.work.Done()
}

// close refuses calls from now on and waits for those in flight.
func (c *callers) close() {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	c.work.Wait()
}

// open reports whether calls are still taken.
func (c *callers) open() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.closing
}

func (c *callers) load(sender string) *load {
	l := c.loads[sender]
	if l == nil {
		l = &load{watches: map[*watch]struct{}{}}
		c.loads[sender] = l
	}
	return l
}

// tidy forgets a sender who has nothing in flight.
func (c *callers) tidy(sender string, l *load) {
	if l.calls == 0 && l.waits == 0 && len(l.watches) == 0 {
		delete(c.loads, sender)
	}
}

// watch gives a context that ends, with errGone, when sender leaves the bus,
// and the user who sender is. The bus daemon is told to report leaving callers
// only while somebody watches.
func (c *callers) watch(ctx context.Context, sender string) (_ context.Context, uid uint32, stop func(), err error) {
	watched, cancel := context.WithCancelCause(ctx)
	w := &watch{gone: cancel}
	c.mu.Lock()
	c.load(sender).watches[w] = struct{}{}
	c.mu.Unlock()
	matched := false
	stop = func() {
		cancel(nil)
		c.mu.Lock()
		l := c.load(sender)
		delete(l.watches, w)
		c.tidy(sender, l)
		c.mu.Unlock()
		if matched {
			c.match(ctx, -1) //nolint:errcheck // it fails only with the connection
		}
	}
	if err := c.match(ctx, +1); err != nil {
		stop()
		return nil, 0, nil, fmt.Errorf("cannot watch the caller: %w", err)
	}
	matched = true
	// The question fails for a caller who left before the rule was in place.
	if uid, err = c.uid(ctx, sender); err != nil {
		stop()
		return nil, 0, nil, err
	}
	return watched, uid, stop, nil
}

// uid asks the bus daemon who sender is.
func (c *callers) uid(ctx context.Context, sender string) (uid uint32, err error) {
	err = c.bus().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionUnixUser", 0, sender).Store(&uid)
	if err != nil {
		return 0, fmt.Errorf("cannot tell who the caller is: %w", err)
	}
	return uid, nil
}

// leavingRule matches each unique name that leaves the bus.
const leavingRule = "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"

func (c *callers) match(ctx context.Context, change int) error {
	c.watching.Lock()
	defer c.watching.Unlock()
	switch {
	case change > 0 && c.watches == 0:
		if err := c.bus().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, leavingRule).Err; err != nil {
			return err
		}
	case change < 0 && c.watches == 1:
		c.bus().Go("org.freedesktop.DBus.RemoveMatch", godbus.FlagNoReplyExpected, nil, leavingRule)
	}
	c.watches += change
	return nil
}

// left ends everything that is done for name.
func (c *callers) left(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.loads[name]; l != nil {
		for w := range l.watches {
			w.gone(errGone)
		}
	}
}
