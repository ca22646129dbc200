package machine

import (
	"testing"

	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
)

// A replace goes up from the start of the device; what it has passed is done.
func TestWhatIsLeftOfACopy(t *testing.T) {
	groups := []btrfs.Group{ // as Groups lists them, the highest offset first
		{DevOffset: 600 * mib, DevLength: 200 * mib, Used: 30 * mib},
		{DevOffset: 100 * mib, DevLength: 300 * mib, Used: 200 * mib},
		{DevOffset: mib, DevLength: 50 * mib, Used: 10 * mib},
	}
	for _, c := range []struct {
		perMille, left, next uint64
	}{{0, 240 * mib, 10 * mib}, {60, 230 * mib, 200 * mib}, {399, 230 * mib, 200 * mib}, {500, 30 * mib, 30 * mib}, {1000, 0, 0}} {
		got := replaced(btrfs.ReplaceStatus{State: btrfs.ReplaceStarted, PerMille: c.perMille}, groups, 1000*mib)
		if want := (daemon.Counters{Left: c.left, Group: c.next}); got != want {
			t.Errorf("at %d per mille it is %+v, not %+v", c.perMille, got, want)
		}
	}
}
