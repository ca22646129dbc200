package root

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

const (
	// inRAM is how much a journey has to move out of RAM, in bytes, and inSeed
	// out of the seed.
	inRAM, inSeed = 40 * seedtest.MiB, 40 * seedtest.MiB
	// few bytes are enough to be sure that a removal has begun, and far from all.
	few = 8 * seedtest.MiB
)

// journey is a sprout on its way: a seed on a stick, something written to RAM
// and a disk. Writes to the stick's partition and to the disk can be held.
type journey struct {
	*harness.World
	t      *testing.T
	stick  *seedtest.Stick
	disk   *seedtest.Disk
	sprout client.Sprout
	want   seedtest.Manifest
}

func newJourney(t *testing.T) *journey {
	t.Helper()
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(inSeed / seedtest.MiB), ImageSize: 768 * seedtest.MiB})
	j := &journey{
		World: w, t: t,
		stick: w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB, Gate: true}),
		// Smaller than the stick's partition, so that this is moved and not copied.
		disk: w.OpenDisk(seedtest.DiskSpec{Size: seedtest.GiB - 16*seedtest.MiB, Gate: true}),
	}
	j.begin()
	return j
}

// begin makes a new sprout, with something in RAM that has to move.
func (j *journey) begin() {
	j.t.Helper()
	j.sprout = j.Create(j.stick.Seed, client.CreateOptions{})
	must(j.t, save(filepath.Join(j.sprout.MountPoint, "written-to-ram"), noise(99, inRAM)))
	j.want = manifest(j.t, j.sprout.MountPoint)
}

// The operations of a journey. What an earlier one left on the target may go.
func (j *journey) persist() (string, error) {
	return j.Persist(j.Context(), j.sprout.Path, j.stick.Persist, client.MoveOptions{Wipe: true})
}

func (j *journey) flatten() (string, error) {
	return j.Flatten(j.Context(), j.sprout.Path, j.disk.Path, client.MoveOptions{Wipe: true, Bootloader: "none"})
}

func (j *journey) resume() (string, error) { return j.Resume(j.Context(), j.sprout.Path) }

// inTheMiddle starts a job and holds the disk it moves to in the middle of the
// removal of the member with this role, after it took n bytes before that.
// [seedtest.Disk.Let] lets the job go on.
func (j *journey) inTheMiddle(start func(*journey) (string, error), disk *seedtest.Disk, role string, n int64) (job string) {
	j.t.Helper()
	path := memberWith(j.t, j.Show(j.sprout.Path), role).Path
	var holding errgroup.Group
	holding.Go(func() error { return disk.HoldAfter(j.Context(), n+few) })
	job, err := start(j)
	must(j.t, err)
	must(j.t, holding.Wait())
	j.AwaitJob(job, func(job client.Job) bool {
		return strings.Contains(job.Step, "off") && strings.Contains(job.Step, path)
	})
	return job
}

// cancelHeld cancels a job whose disk is held, and lets the disk go once the
// cancel is under way.
func (j *journey) cancelHeld(by *client.Client, job string, disk *seedtest.Disk) client.Job {
	j.t.Helper()
	must(j.t, by.Cancel(j.Context(), job))
	j.AwaitJob(job, func(job client.Job) bool { return job.State == "cancelling" })
	must(j.t, disk.Let())
	return j.Ends(job, nil)
}

// leg is one move of a journey, and which member is leaving in its middle.
type leg struct {
	name    string
	prepare func(j *journey) // nil for nothing
	start   func(j *journey) (string, error)
	target  func(j *journey) *seedtest.Disk
	leaving string
	before  int64    // bytes that move before that member leaves
	partial []string // the roles of the members in the middle
	state   string   // at the end
	members []string
}

func legs() []leg {
	stick := func(j *journey) *seedtest.Disk { return j.stick.Disk }
	disk := func(j *journey) *seedtest.Disk { return j.disk }
	return []leg{
		{
			"persist", nil, (*journey).persist, stick,
			"zram", 0, []string{"seed", "zram", "persistent"}, "persistent", []string{"seed", "persistent"},
		},
		{
			"flatten while RAM is emptied", nil, (*journey).flatten, disk,
			"zram", 0, []string{"seed", "zram", "disk"}, "installed", []string{"disk"},
		},
		{
			"flatten while the seed leaves", nil, (*journey).flatten, disk,
			"seed", inRAM, []string{"seed", "disk"}, "installed", []string{"disk"},
		},
		{
			"flatten while the stick's partition leaves", func(j *journey) { j.Done(j.persist()) }, (*journey).flatten, disk,
			"persistent", 0, []string{"seed", "persistent", "disk"}, "installed", []string{"disk"},
		},
	}
}

// TestAMoveCanBeCancelledInTheMiddle cancels each move; what is left is a
// mounted, writable filesystem, and the rest is done by Resume as well as by
// asking for the same again.
func TestAMoveCanBeCancelledInTheMiddle(t *testing.T) {
	for _, leg := range legs() {
		t.Run(leg.name, func(t *testing.T) {
			j := newJourney(t)
			for _, again := range []struct {
				name  string
				start func(*journey) (string, error)
			}{{"resume", (*journey).resume}, {"the same again", leg.start}} {
				if leg.prepare != nil {
					leg.prepare(j)
				}
				job := j.inTheMiddle(leg.start, leg.target(j), leg.leaving, leg.before)
				ended := j.cancelHeld(j.Client, job, leg.target(j))
				if ended.State != client.Cancelled || client.CodeOf(ended.Err()) != "Cancelled" || ended.Progress >= 1 {
					t.Errorf("the job is %s at %v with %v, want it cancelled, on its way", ended.State, ended.Progress, ended.Err())
				}
				wantState(t, j.Show(j.sprout.Path), "partial", leg.partial...)
				wantWritable(t, j.sprout.MountPoint)
				wantSame(t, "after the cancel", j.want, j.sprout.MountPoint)

				j.Done(again.start(j))
				wantState(t, j.Show(j.sprout.Path), leg.state, leg.members...)
				wantSame(t, "after "+again.name, j.want, j.sprout.MountPoint)
				if got, _ := j.Plan(j.Context(), j.sprout.Path, "resume", "", client.MoveOptions{}); len(got.Problems) != 1 || client.CodeOf(got.Err()) != "NothingToResume" {
					t.Errorf("after %s the plan to resume is %+v", again.name, got)
				}
				must(t, j.Teardown(j.Context(), j.sprout.Path))
				must(t, seedtest.Check(j.Context(), j.targetOf(leg)))
				j.begin()
			}
		})
	}
}

// targetOf gives the device a leg moves to. A sprout that still has its seed
// cannot be checked alone: the seed stands for it.
func (j *journey) targetOf(l leg) string {
	if l.state == "installed" {
		return j.disk.Path
	}
	return j.stick.Seed
}

// TestTheRemovalOfADeviceCanBeCancelled takes a single step, not a whole move.
func TestTheRemovalOfADeviceCanBeCancelled(t *testing.T) {
	j := newJourney(t)
	zram := memberWith(t, j.sprout, "zram").Path
	j.Done(j.AddDevice(j.Context(), j.sprout.Path, j.disk.Path, client.MoveOptions{}))
	remove := func(j *journey) (string, error) { return j.RemoveDevice(j.Context(), j.sprout.Path, zram) }
	job := j.inTheMiddle(remove, j.disk, "zram", 0)
	if ended := j.cancelHeld(j.Client, job, j.disk); ended.State != client.Cancelled {
		t.Errorf("the job is %s: %v", ended.State, ended.Err())
	}
	wantState(t, j.Show(j.sprout.Path), "partial", "seed", "zram", "persistent")
	wantWritable(t, j.sprout.MountPoint)
	j.Done(j.resume())
	wantState(t, j.Show(j.sprout.Path), "persistent", "seed", "persistent")
	wantSame(t, "after the removal", j.want, j.sprout.MountPoint)
}

// TestAnotherClientCanCancel cancels a job that somebody else waits for.
func TestAnotherClientCanCancel(t *testing.T) {
	j := newJourney(t)
	job := j.inTheMiddle((*journey).flatten, j.disk, "seed", inRAM)
	waited := make(chan error, 1)
	go func() {
		_, err := j.Wait(j.Context(), job)
		waited <- err
	}()
	other, err := client.Connect(j.Context(), client.Options{NoAutoStart: true})
	must(t, err)
	defer other.Close()
	j.cancelHeld(other, job, j.disk)
	if err := <-waited; client.CodeOf(err) != "Cancelled" {
		t.Errorf("the first client was told %v, want Cancelled", err)
	}
	if err := other.Cancel(j.Context(), job); client.CodeOf(err) != "WrongState" {
		t.Errorf("cancelling a job that has ended gave %v, want WrongState", err)
	}
	wantState(t, j.Show(j.sprout.Path), "partial", "seed", "disk")
}
