package systemd

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// kennel counts the beats of a watchdog and the reasons for those left out.
type kennel struct {
	beats  atomic.Int32
	missed chan error
}

// start runs a watchdog of one minute until the test ends.
func start(t *testing.T, alive func(context.Context) error) *kennel {
	t.Helper()
	k := &kennel{missed: make(chan error, 100)}
	watchdog := &Watchdog{
		Interval: time.Minute,
		Missed:   func(err error) { k.missed <- err },
		beat:     func() error { k.beats.Add(1); return nil },
	}
	go watchdog.Run(t.Context(), alive)
	return k
}

// pass lets fake time go by until everything has settled.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestWatchdogBeatsAtHalfTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		watchdog := start(t, func(context.Context) error { return nil })
		synctest.Wait()
		if got := watchdog.beats.Load(); got != 1 {
			t.Errorf("%d beats at the start, want 1", got)
		}
		pass(5 * time.Minute)
		if got := watchdog.beats.Load(); got != 11 {
			t.Errorf("%d beats after five minutes, want 11", got)
		}
	})
}

func TestWatchdogStarvesWhileTheEngineIsIll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errIll := errors.New("the engine does not answer")
		var ill atomic.Bool
		watchdog := start(t, func(context.Context) error {
			if ill.Load() {
				return errIll
			}
			return nil
		})
		synctest.Wait()

		ill.Store(true)
		pass(time.Minute)
		if got := watchdog.beats.Load(); got != 1 {
			t.Errorf("%d beats while ill, want none", got-1)
		}
		for range 2 {
			if err := <-watchdog.missed; !errors.Is(err, errIll) {
				t.Errorf("reported %v, want the engine's own error", err)
			}
		}

		ill.Store(false)
		pass(30 * time.Second)
		if watchdog.beats.Load() != 2 {
			t.Error("no beat after the recovery")
		}
	})
}

func TestWatchdogTakesNoLateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		watchdog := start(t, func(ctx context.Context) error {
			<-ctx.Done() // a check that runs into its limit and then claims success
			return nil
		})
		pass(10 * time.Minute)
		if got := watchdog.beats.Load(); got != 0 {
			t.Errorf("%d beats, want none", got)
		}
		if err := <-watchdog.missed; !errors.Is(err, ErrLate) {
			t.Errorf("reported %v, want that the answer was late", err)
		}
	})
}

func TestWatchdogWithoutAManagerHasNoTimer(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	watchdog, err := NewWatchdog()
	if err != nil {
		t.Fatal(err)
	}
	watchdog.Run(t.Context(), func(context.Context) error {
		t.Error("asked, though nobody watches")
		return nil
	})
}

func TestWatchdogForAnotherProcessIsNotOurs(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "1000")
	t.Setenv("WATCHDOG_PID", "1")
	watchdog, err := NewWatchdog()
	if err != nil || watchdog.Interval != 0 {
		t.Errorf("got %+v, %v; want no interval", watchdog, err)
	}
}

func TestWatchdogRefusesNonsense(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "soon")
	if _, err := NewWatchdog(); err == nil {
		t.Error("accepted WATCHDOG_USEC=soon")
	}
}
