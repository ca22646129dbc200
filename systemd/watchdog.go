package systemd

import (
	"context"
	"errors"
	"fmt"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
)

// ErrLate is reported when the liveness check succeeded, but took longer than
// its share of the watchdog's interval.
var ErrLate = errors.New("the liveness check took too long")

// Watchdog keeps the service manager's watchdog fed for as long as the daemon
// proves that it is alive. When the proof fails long enough, the manager
// aborts the daemon and starts it again.
type Watchdog struct {
	// Interval is the time after which an unfed service is killed, from
	// WATCHDOG_USEC. Zero means that nobody watches.
	Interval time.Duration
	// Missed is told why a beat was left out. It may be nil.
	Missed func(error)

	beat func() error
}

// NewWatchdog reads WATCHDOG_USEC and WATCHDOG_PID. An Interval of zero and no
// error mean that the manager does not watch this process.
func NewWatchdog() (*Watchdog, error) {
	interval, err := sdnotify.SdWatchdogEnabled(false)
	if err != nil {
		return nil, fmt.Errorf("cannot read the watchdog settings: %w", err)
	}
	return &Watchdog{Interval: interval, beat: func() error { return notify(sdnotify.SdNotifyWatchdog) }}, nil
}

// Run feeds the watchdog until ctx ends, and returns at once when nobody
// watches: an idle daemon then has no timer. At half the interval it asks alive,
// whose context ends half an interval later. Only a nil answer in time is a beat.
//
// Run does not outlive alive: an alive that hangs starves the watchdog, which is
// what the watchdog is for.
func (w *Watchdog) Run(ctx context.Context, alive func(context.Context) error) {
	if w.Interval <= 0 {
		return
	}
	half := w.Interval / 2
	ticker := time.NewTicker(half)
	defer ticker.Stop()
	for {
		if err := w.once(ctx, half, alive); err != nil && ctx.Err() == nil && w.Missed != nil {
			w.Missed(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// once asks alive and feeds the watchdog if the answer is good and in time.
func (w *Watchdog) once(ctx context.Context, limit time.Duration, alive func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, ErrLate)
	defer cancel()
	if err := alive(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return w.beat()
}
