package root

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
		sleeps(t, w)
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
		sleeps(t, w)
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

const (
	// restFor is how long wake-ups are counted, and restWithin how long to wait
	// for the daemon to come to rest: on a busy machine others mount and attach,
	// of which the kernel tells the daemon.
	restFor    = 2 * time.Second
	restWithin = 45 * time.Second
)

// sleeps checks that a process comes to a rest from which only an event wakes
// it. Wake-ups are counted as well, for the record: a machine that is not quiet
// has events all the time.
func sleeps(t *testing.T, w *harness.World) {
	t.Helper()
	pid, tick := w.Daemon.PID, false
	objects, err := w.Objects(w.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range objects.Sprouts {
		if s.State == "volatile" || s.State == "partial" {
			t.Logf("somebody's sprout at %s is looked at now and then", s.MountPoint)
			tick = true
		}
	}
	var awake []string
	for deadline := time.Now().Add(restWithin); ; time.Sleep(5 * time.Millisecond) {
		if awake = timed(t, pid, tick); len(awake) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there is nothing to do, but these threads do not sleep for good:\n%s", strings.Join(awake, "\n"))
		}
	}
	before := wakeUps(t, pid)
	time.Sleep(restFor) // this is the measurement
	t.Logf("asleep for good; then woken up %d times in %v, by events", wakeUps(t, pid)-before, restFor)
}

// timed lists the threads of a Go program that are at work, or asleep until a
// point in time. Timers of the program are waited for in epoll_pwait(2). The one
// thread that waits for a futex with a time limit is the runtime's own monitor,
// once a minute. With tick a timer of some seconds is allowed: that is how often
// the room left on a volatile sprout is looked at.
func timed(t *testing.T, pid int, tick bool) (list []string) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("the daemon has no threads (%v)", err)
	}
	monitors := 0
	for _, thread := range threads {
		data, err := os.ReadFile(thread)
		if err != nil {
			continue // it ended just now
		}
		// The number of the system call and its arguments, or "running".
		var number int
		var args [4]uint64
		n, _ := fmt.Sscanf(string(data), "%d %v %v %v %v", &number, &args[0], &args[1], &args[2], &args[3])
		switch {
		case n == 5 && number == unix.SYS_EPOLL_PWAIT && (int32(args[3]) == -1 || tick && args[3] > 5000): //nolint:gosec // it is an int there
		case n == 5 && number == unix.SYS_PPOLL && args[2] == 0:
		case n == 5 && number == unix.SYS_FUTEX && args[3] == 0:
		case n == 5 && number == unix.SYS_FUTEX && monitors == 0:
			monitors++
		default:
			list = append(list, strings.TrimSpace(string(data)))
		}
	}
	return list
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
