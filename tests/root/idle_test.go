package root

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// maxResident is what an idle daemon may keep in memory, in KiB.
const maxResident = 25 << 10

func TestAnIdleDaemonIsSmallAndSleeps(t *testing.T) {
	testenv.NeedRoot(t)
	// As it is shipped: without the race detector, which takes memory and
	// wakes up by itself.
	t.Setenv("CGO_ENABLED", "0")
	shipped := t.TempDir()
	if err := harness.Build(t.Context(), shipped, false, "sproutd"); err != nil {
		t.Fatal(err)
	}
	w := harness.New(t, shipped)

	t.Run("fresh", func(t *testing.T) {
		isSmall(t, w.Daemon.PID)
		sleeps(t, w.Daemon.PID)
	})
	t.Run("after a sprout has come and gone", func(t *testing.T) {
		seed := seedtest.New(t, seedtest.Spec{})
		s := w.Create(seed.Path, client.CreateOptions{})
		disk := w.OpenDisk(seedtest.DiskSpec{})
		w.Done(w.Flatten(w.Context(), s.Path, disk.Path, client.MoveOptions{Bootloader: "none"}))
		if err := w.Teardown(w.Context(), s.Path); err != nil {
			t.Fatal(err)
		}
		isSmall(t, w.Daemon.PID)
		sleeps(t, w.Daemon.PID)
	})
}

// isSmall checks how much memory a process has.
func isSmall(t *testing.T, pid int) {
	t.Helper()
	kib := statusValue(t, fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
	t.Logf("%.1f MiB resident", float64(kib)/1024)
	if kib > maxResident {
		t.Errorf("%d KiB are resident, at most %d should be", kib, maxResident)
	}
}

// How long a daemon is watched, and how often at most: on a busy machine others
// mount and attach, of which the kernel tells the daemon.
const (
	watchFor = 2 * time.Second
	watches  = 30
)

// sleeps checks that no thread of a process wakes up by itself.
func sleeps(t *testing.T, pid int) {
	t.Helper()
	least := -1
	for range watches {
		before := wakeUps(t, pid)
		time.Sleep(watchFor) // this is the measurement
		n := wakeUps(t, pid) - before
		t.Logf("woke up %d times in %v", n, watchFor)
		if least < 0 || n < least {
			least = n
		}
		if least == 0 {
			return
		}
	}
	// A thread may be caught in going to sleep.
	if least > 2 {
		t.Errorf("there is nothing to do, but it wakes up %d times in %v, or others keep the machine busy", least, watchFor)
	}
}

// wakeUps gives how often the threads of a process have gone to sleep so far,
// which is how often they woke up.
func wakeUps(t *testing.T, pid int) int {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("the daemon has no threads (%v)", err)
	}
	sum := 0
	for _, thread := range threads {
		sum += statusValue(t, thread, "voluntary_ctxt_switches")
	}
	return sum
}

// statusValue gives a number from a status file of /proc.
func statusValue(t *testing.T, path, key string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if name, rest, _ := strings.Cut(line, ":"); name == key {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no %s", path, key)
	return 0
}
