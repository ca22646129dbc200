package machine

import (
	"errors"
	"syscall"
	"testing"
	"time"
)

func TestTheGuardThawsWhatTheDaemonHasFrozen(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name  string
		told  string
		late  bool // and then it takes too long
		thaw  error
		thaws bool
		err   error
	}{
		{"the daemon dies before", "", false, nil, false, nil},
		{"while it freezes", "w", false, nil, true, nil},
		{"while it is frozen", "wf", false, nil, true, nil},
		{"after it was thawed", "wf", false, syscall.EINVAL, true, nil},
		{"somebody else has frozen it", "wn", false, nil, false, nil},
		{"it takes too long", "wf", true, nil, true, nil},
		{"it cannot be thawed", "wf", false, broken, true, broken},
	} {
		t.Run(c.name, func(t *testing.T) {
			told, late := make(chan byte, len(c.told)), make(chan time.Time, 1)
			for _, b := range []byte(c.told) {
				told <- b
			}
			if !c.late {
				close(told)
			}
			after := func(time.Duration) <-chan time.Time {
				if c.late {
					late <- time.Time{}
				}
				return late
			}
			thawed := false
			err := watchOver(told, after, func() error { thawed = true; return c.thaw })
			if thawed != c.thaws || !errors.Is(err, c.err) {
				t.Errorf("thawed %v, want %v (%v)", thawed, c.thaws, err)
			}
		})
	}
}
