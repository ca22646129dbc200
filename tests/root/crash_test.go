package root

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// TestKilledAtEachStepTheMoveIsFinishedByTheNextDaemon kills the daemon when it
// says that it begins the n-th step, for each n.
func TestKilledAtEachStepTheMoveIsFinishedByTheNextDaemon(t *testing.T) {
	for _, leg := range legs() {
		if leg.before > 0 {
			continue // the same operation as the one before
		}
		t.Run(leg.name, func(t *testing.T) {
			j := newJourney(t)
			for _, target := range []string{j.stick.Persist, j.disk.Path} {
				command(t, "mkswap", target) // to be wiped: that is a step too
			}
			for step := uint32(1); ; step++ {
				if leg.prepare != nil {
					leg.prepare(j)
				}
				job, err := leg.start(j)
				must(t, err)
				last := killedAt(t, j.World, job, step)
				if last.Finished() {
					break // it has no more steps
				}
				j.Restart()
				j.afterTheKill(job, leg)
				must(t, j.Teardown(j.Context(), j.sprout.Path))
				j.begin()
				if step == last.StepCount {
					break
				}
			}
		})
	}
}

// killedAt follows a job and kills the daemon at its n-th step. It gives the
// job as it was seen last.
func killedAt(t *testing.T, w *harness.World, path string, n uint32) (last client.Job) {
	t.Helper()
	watch, err := w.WatchJob(w.Context(), path)
	must(t, err)
	defer watch.Close()
	for last = range watch.Updates() {
		if last.StepNumber >= n && !last.Finished() {
			w.Daemon.Kill()
			t.Logf("killed at step %d of %d: %s", last.StepNumber, last.StepCount, last.Step)
			break
		}
	}
	return last
}

// afterTheKill looks at what a new daemon makes of a move that was cut off, and
// has it finished.
func (j *journey) afterTheKill(job string, leg leg) {
	j.t.Helper()
	shown := j.Show(j.sprout.Path)
	wantTruth(j.t, shown, leg)
	wantWritable(j.t, j.sprout.MountPoint)

	cut, err := j.Job(j.Context(), job)
	must(j.t, err)
	// The very last step may be over, and its end recorded, before the kill.
	if cut.State != client.Done || shown.State != leg.state {
		ended := j.Ends(job, nil)
		if ended.State != client.Interrupted || client.CodeOf(ended.Err()) != "Interrupted" {
			j.t.Errorf("the job that was cut off is %s: %v", ended.State, ended.Err())
		}
		j.Done(j.resume())
	}
	wantState(j.t, j.Show(j.sprout.Path), leg.state, leg.members...)
	wantSame(j.t, "after the resume", j.want, j.sprout.MountPoint)
}

// wantTruth compares what is shown with what the kernel says.
func wantTruth(t *testing.T, s client.Sprout, leg leg) {
	t.Helper()
	entries, err := os.ReadDir("/sys/fs/btrfs/" + s.Fsid + "/devices")
	must(t, err)
	var kernel, shown []string
	for _, e := range entries {
		kernel = append(kernel, e.Name())
	}
	for _, m := range s.Members {
		if m.Role == "seed" {
			continue // the kernel lists the seed with its own fsid
		}
		shown = append(shown, filepath.Base(m.Path))
	}
	slices.Sort(kernel)
	slices.Sort(shown)
	kernel = slices.DeleteFunc(kernel, func(name string) bool { return s.SeedFsid != "" && isSeedOf(s, name) })
	if !slices.Equal(kernel, shown) {
		t.Errorf("shown are the members %v, the kernel has %v", shown, kernel)
	}
	roles := map[string]bool{}
	for _, m := range s.Members {
		roles[m.Role] = true
	}
	want := leg.state
	switch {
	case roles["disk"] && len(s.Members) > 1, roles["zram"] && len(s.Members) > 2:
		want = "partial"
	case roles["zram"]:
		want = "volatile"
	case roles["seed"]:
		want = "persistent"
	}
	if s.State != want {
		t.Errorf("the sprout is shown as %s with %+v, want %s", s.State, s.Members, want)
	}
}

func isSeedOf(s client.Sprout, name string) bool {
	return slices.ContainsFunc(s.Members, func(m client.Member) bool {
		return m.Role == "seed" && filepath.Base(m.Path) == name
	})
}

// TestKilledInTheMiddleOfARemoval kills the daemon while the kernel moves: the
// kernel stops, what was moved stays moved.
func TestKilledInTheMiddleOfARemoval(t *testing.T) {
	for _, leg := range legs() {
		t.Run(leg.name, func(t *testing.T) {
			j := newJourney(t)
			if leg.prepare != nil {
				leg.prepare(j)
			}
			job := j.inTheMiddle(leg.start, leg.target(j), leg.leaving, leg.before)
			before := j.Show(j.sprout.Path)
			j.Daemon.Signal(os.Kill)
			must(t, leg.target(j).Let()) // only now can it die
			<-j.Daemon.Ended()
			j.Restart()

			after := j.Show(j.sprout.Path)
			wantState(t, after, "partial", leg.partial...)
			if after.State != before.State || after.Intent["operation"] != strings.Fields(leg.name)[0] {
				t.Errorf("the daemon before showed %+v, the one after shows %+v", before, after)
			}
			// A daemon that starts with nothing to do changes nothing.
			j.Daemon.Stop()
			j.Restart()
			if again := j.Show(j.sprout.Path); !reflect.DeepEqual(state(again), state(after)) {
				t.Errorf("one daemon shows %+v, the next %+v", after, again)
			}
			wantSame(t, "after the kill", j.want, j.sprout.MountPoint)
			j.afterTheKill(job, leg)
		})
	}
}

// state gives what of a sprout does not change by itself.
func state(s client.Sprout) client.Sprout {
	s.Free, s.MediaHolders, s.Members = 0, nil, slices.Clone(s.Members)
	for i := range s.Members {
		s.Members[i].Used = 0
	}
	return s
}

// TestATerminatedDaemonStopsTheMoveAndEnds is what systemd does at an update
// or at shutdown.
func TestATerminatedDaemonStopsTheMoveAndEnds(t *testing.T) {
	j := newJourney(t)
	leg := legs()[2]
	job := j.inTheMiddle(leg.start, leg.target(j), leg.leaving, leg.before)
	waited := make(chan error, 1)
	go func() {
		_, err := j.Wait(j.Context(), job)
		waited <- err
	}()
	j.Daemon.Signal(syscall.SIGTERM)
	<-j.Daemon.Stopping()
	must(t, leg.target(j).Let())
	if err := <-waited; client.CodeOf(err) != "Interrupted" {
		t.Errorf("who waited for the job was told %v, want Interrupted", err)
	}
	select {
	case <-j.Daemon.Ended():
	case <-time.After(10 * time.Second): // systemd's patience is 90 s
		t.Error("the daemon did not end")
		j.Daemon.Kill()
	}
	j.Restart()
	wantState(t, j.Show(j.sprout.Path), "partial", leg.partial...)
	j.afterTheKill(job, leg)
}

// TestKilledDuringCreateNothingOrAWholeSproutIsLeft kills the daemon as soon as
// it has come to a certain point of CreateSprout, between two system calls.
func TestKilledDuringCreateNothingOrAWholeSproutIsLeft(t *testing.T) {
	seed := seedtest.New(t, seedtest.Spec{Content: files(5), ImageSize: 512 * seedtest.MiB})
	all, sized := zrams(false), zrams(true)
	for name, come := range map[string]func(mnt string) bool{
		"called":           func(string) bool { return true },
		"a loop":           func(string) bool { return attached(seed.Path) },
		"a mount":          func(mnt string) bool { return writable(mnt) != nil },
		"a zram":           func(string) bool { return zrams(false) > all },
		"a zram with size": func(string) bool { return zrams(true) > sized },
		"writable":         func(mnt string) bool { w := writable(mnt); return w != nil && *w },
		"all of that":      func(string) bool { return false },
	} {
		t.Run("at "+name, func(t *testing.T) {
			w := harness.New(t, programs)
			mnt := t.TempDir()
			created := make(chan error, 1)
			go func() {
				_, err := w.CreateSprout(w.Context(), seed.Path, mnt, client.CreateOptions{})
				created <- err
			}()
			// The kernel tells nobody when these appear.
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			var err error
			for done := false; !done && !come(mnt); {
				select {
				case <-tick.C:
				case err = <-created:
					done = true
					created <- err
				}
			}
			must(t, w.Daemon.KillBetweenCalls())
			err = <-created
			w.Restart()

			objects, listErr := w.Objects(w.Context())
			must(t, listErr)
			i := slices.IndexFunc(objects.Sprouts, func(s client.Sprout) bool { return s.MountPoint == mnt })
			if i < 0 {
				if err == nil {
					t.Error("the call returned, but there is no sprout")
				}
				if w := writable(mnt); w != nil {
					t.Error("something is mounted that is not shown")
				}
				return // that nothing is left is looked at after each test
			}
			t.Log("a whole sprout is left")
			wantState(t, objects.Sprouts[i], "volatile", "seed", "zram")
			wantWritable(t, mnt)
			must(t, w.Teardown(w.Context(), objects.Sprouts[i].Path))
		})
	}
}

// attached reports whether a file is behind a loop device.
func attached(image string) bool {
	left, err := testenv.Leftovers()
	if err != nil {
		return false
	}
	for _, file := range left.Loops {
		if file == image {
			return true
		}
	}
	return false
}

// zrams counts the zram devices, or those that have a size.
func zrams(sized bool) (n int) {
	sizes, _ := filepath.Glob("/sys/block/zram*/disksize") // the pattern is right
	for _, path := range sizes {
		if size, err := os.ReadFile(path); err == nil && (!sized || strings.TrimSpace(string(size)) != "0") {
			n++
		}
	}
	return n
}

// writable tells whether a Btrfs mounted at mnt is writable, nil if there is none.
func writable(mnt string) *bool {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !bytes.Contains(mounts, fmt.Appendf(nil, " %s ", mnt)) {
		return nil
	}
	var st unix.Statfs_t
	if unix.Statfs(mnt, &st) != nil {
		return nil
	}
	yes := st.Flags&unix.ST_RDONLY == 0
	return &yes
}
