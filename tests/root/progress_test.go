package root

import (
	"path/filepath"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// TestProgressIsSteadyAndTrue flattens onto a disk that takes several seconds
// for it, and looks at each PropertiesChanged signal of the job.
func TestProgressIsSteadyAndTrue(t *testing.T) {
	w := harness.New(t, programs)
	// mkfs --rootdir makes block groups of 8 MiB, so that a slowed disk does
	// not get all in one burst.
	seed := seedtest.New(t, seedtest.Spec{Method: seedtest.RootDir, Content: files(120), ImageSize: 512 * seedtest.MiB})
	disk := w.OpenDisk(seedtest.DiskSpec{Gate: true})
	sprout := w.Create(seed.Path, client.CreateOptions{})
	must(t, save(filepath.Join(sprout.MountPoint, "written-to-ram"), noise(1, 20*seedtest.MiB)))
	must(t, disk.Slow(32*seedtest.MiB))

	changes := w.Signals(names.Properties, "PropertiesChanged", "")
	defer changes.Close()
	job, err := w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader)
	must(t, err)

	// The signals tell what changes; what the job began with comes from it.
	first, err := w.Job(w.Context(), job)
	must(t, err)
	last := client.Job{StepCount: first.StepCount, BytesTotal: first.BytesTotal}
	var signals, moves int // signals with no news but progress, and those in which it moved
	var lastMove time.Time
	var longest time.Duration
	begin := time.Now()
	for !last.Finished() {
		signal := <-changes.C
		now := time.Now()
		if string(signal.Path) != job {
			continue
		}
		before := last
		takeIn(t, &last, signal)
		if last.Progress < before.Progress || last.BytesDone < before.BytesDone || last.StepNumber < before.StepNumber {
			t.Errorf("went back from %+v to %+v", before, last)
		}
		if last.Progress > 1 || last.Progress == 1 && last.State != client.Done || last.StepNumber > last.StepCount {
			t.Errorf("too much of it: %+v", last)
		}
		if last.Step == before.Step && last.State == before.State {
			signals++
		} else {
			lastMove = now // steps that move nothing have nothing to show
		}
		if last.BytesDone > before.BytesDone {
			moves++
			longest = max(longest, now.Sub(lastMove))
			lastMove = now
		}
	}
	took := time.Since(begin)
	t.Logf("%v, %d signals for progress, %d moves, at most %v between two", took, signals, moves, longest)
	if last.State != client.Done || last.Progress != 1 {
		t.Errorf("the job ended %s at %v", last.State, last.Progress)
	}
	if longest > time.Second {
		t.Errorf("for %v nothing was seen to move", longest)
	}
	if limit := int(4*took.Seconds()) + 2; signals > limit {
		t.Errorf("%d signals in %v, want at most 4 a second", signals, took)
	}

	held := used(t, sprout.MountPoint)
	for name, bytes := range map[string]uint64{"total": last.BytesTotal, "done": last.BytesDone} {
		if bytes < held-held/20 || bytes > held+held/20 {
			t.Errorf("the %s is %d bytes, but the disk holds %d", name, bytes, held)
		}
	}
}

// takeIn changes job as a PropertiesChanged signal says.
func takeIn(t *testing.T, job *client.Job, signal *godbus.Signal) {
	t.Helper()
	var iface string
	var values map[string]godbus.Variant
	var invalidated []string
	must(t, godbus.Store(signal.Body, &iface, &values, &invalidated))
	for name, into := range map[string]any{
		"State": &job.State, "Step": &job.Step, "StepNumber": &job.StepNumber, "StepCount": &job.StepCount,
		"Progress": &job.Progress, "BytesDone": &job.BytesDone, "BytesTotal": &job.BytesTotal,
	} {
		if value, ok := values[name]; ok {
			must(t, value.Store(into))
		}
	}
}

// used gives the bytes that a filesystem holds, each copy counted.
func used(t *testing.T, mnt string) uint64 {
	t.Helper()
	f, err := btrfs.Open(mnt)
	must(t, err)
	defer f.Close()
	s, err := f.Spaces()
	must(t, err)
	return s.DataUsed() + uint64(s.MetadataCopies())*(s.MetadataUsed()+s.SystemUsed()) //nolint:gosec // 1 or 2
}
