package root

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// kept is how much a [home] has to copy off the stick's partition, in bytes.
const kept = 120 * seedtest.MiB

// home is a session that is kept on a stick, with something in it, and a disk.
type home struct {
	*journey
	partition client.Member
}

func newHome(t *testing.T, disk seedtest.DiskSpec) *home {
	t.Helper()
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(20), ImageSize: 512 * seedtest.MiB})
	h := &home{journey: &journey{
		World: w, t: t,
		stick: w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB}),
		disk:  w.OpenDisk(disk),
	}}
	h.sprout = h.Create(h.stick.Seed, client.CreateOptions{Device: h.stick.Persist})
	for i := range 4 {
		must(t, save(filepath.Join(h.sprout.MountPoint, fmt.Sprint("kept-", i)), noise(byte(100+i), kept/4)))
	}
	h.want, h.partition = manifest(t, h.sprout.MountPoint), memberWith(t, h.sprout, "persistent")
	return h
}

// whileCopying starts to flatten and holds the disk in the middle of the copy.
func (h *home) whileCopying() (job string) {
	h.t.Helper()
	var holding errgroup.Group
	holding.Go(func() error { return h.disk.HoldAfter(h.Context(), kept/4) })
	job, err := h.flatten()
	must(h.t, err)
	must(h.t, holding.Wait())
	h.AwaitJob(job, func(job client.Job) bool { return strings.HasPrefix(job.Step, "copy ") })
	s := h.Await(h.sprout.Path, func(s client.Sprout) bool { return s.State == "partial" })
	wantState(h.t, s, "partial", "seed", "persistent", "disk")
	if target := memberWith(h.t, s, "disk"); target.DevID != 0 || target.Path != h.disk.Path || s.SafeToUnplug {
		h.t.Errorf("while it is copied the sprout is shown as %+v", s)
	}
	return job
}

// arrived asserts that all is on the disk, and uses all of it, and that nothing
// of the stick is in use.
func (h *home) arrived(result map[string]any, way string) {
	h.t.Helper()
	if got, _ := result["way"].(string); got != way {
		h.t.Errorf("the result says the way was %q, want %s: %v", got, way, result)
	}
	s := h.Show(h.sprout.Path)
	wantState(h.t, s, "installed", "disk")
	if size := memberWith(h.t, s, "disk").Size; size != sizeOf(h.t, h.disk.Path) {
		h.t.Errorf("%d bytes of the disk are used, of %d", size, sizeOf(h.t, h.disk.Path))
	}
	wantSame(h.t, "after flatten", h.want, h.sprout.MountPoint)
	must(h.t, h.stick.Unmount())
	h.Await(h.sprout.Path, func(s client.Sprout) bool { return s.SafeToUnplug })
	if super := read(h.t, h.stick.Persist, 64<<10, 4096); bytes.Contains(super, []byte("_BHRfS_M")) {
		h.t.Error("the stick's partition still says that it is a member")
	}
}

// tornDown unmounts the session and looks at the disk.
func (h *home) tornDown() {
	h.t.Helper()
	must(h.t, h.Teardown(h.Context(), h.sprout.Path))
	h.whole()
}

// whole asserts that the disk alone has everything.
func (h *home) whole() {
	h.t.Helper()
	must(h.t, seedtest.Check(h.Context(), h.disk.Path))
	wantSame(h.t, "mounted again", h.want, mounted(h.t, h.disk.Path))
}

func sizeOf(t *testing.T, device string) uint64 {
	t.Helper()
	f, err := os.Open(device)
	must(t, err)
	defer f.Close()
	size, err := f.Seek(0, 2)
	must(t, err)
	return uint64(size)
}

func read(t *testing.T, device string, at int64, size int) []byte {
	t.Helper()
	f, err := os.Open(device)
	must(t, err)
	defer f.Close()
	b := make([]byte, size)
	_, err = f.ReadAt(b, at)
	must(t, err)
	return b
}

// TestWhatIsKeptIsCopiedWhileAProgramWrites flattens a session that is kept on a
// stick.
func TestWhatIsKeptIsCopiedWhileAProgramWrites(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{})
	media := sum(t, h.stick.Media)
	plan, err := h.Plan(h.Context(), h.sprout.Path, "flatten", h.disk.Path, noBootloader)
	must(t, err)
	var kinds []string
	for _, step := range plan.Steps {
		kinds = append(kinds, step.Kind)
	}
	if want := []string{"replace", "check", "resize", "remove", "detach-loop", "compress"}; !slices.Equal(kinds, want) {
		t.Errorf("the steps are %v, want %v", kinds, want)
	}
	writer, err := seedtest.StartWriter(filepath.Join(h.sprout.MountPoint, "work"))
	must(t, err)
	t.Cleanup(func() { _ = writer.Stop() })
	must(t, writer.AwaitFsyncs(h.Context(), 50))
	result := h.Done(h.flatten())
	must(t, writer.AwaitFsyncs(h.Context(), 50))
	must(t, writer.Stop())
	must(t, writer.Verify(writer.Dir()))
	t.Logf("meanwhile: %+v", writer.Stats())
	if sum(t, h.stick.Media) != media {
		t.Error("something was written to the partition that holds the seed")
	}
	command(t, "btrfs", "filesystem", "sync", h.sprout.MountPoint) // which decides what is compressed
	h.want = manifest(t, h.sprout.MountPoint)
	h.arrived(result, "replace")
	h.tornDown()
	must(t, writer.Verify(filepath.Join(mounted(t, h.disk.Path), "work")))
}

// TestACopyCanBeCancelledInTheMiddle leaves the session as it was.
func TestACopyCanBeCancelledInTheMiddle(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{Gate: true})
	for range 2 {
		ended := h.cancelHeld(h.Client, h.whileCopying(), h.disk)
		if ended.State != client.Cancelled || ended.Progress >= 1 {
			t.Errorf("the job is %s at %v: %v", ended.State, ended.Progress, ended.Err())
		}
		s := h.Show(h.sprout.Path)
		wantState(t, s, "persistent", "seed", "persistent")
		if got := memberWith(t, s, "persistent"); got.Path != h.partition.Path || s.Intent["operation"] != "flatten" {
			t.Errorf("after the cancel the sprout is %+v", s)
		}
		wantWritable(t, h.sprout.MountPoint)
		wantSame(t, "after the cancel", h.want, h.sprout.MountPoint)
	}
	h.arrived(h.Done(h.resume()), "replace")
	h.tornDown()
}

// TestKilledInTheMiddleOfACopy kills the daemon. The kernel goes on with the copy
// or stops it, and Resume does the rest.
func TestKilledInTheMiddleOfACopy(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{Gate: true})
	job := h.whileCopying()
	h.Daemon.Signal(os.Kill)
	must(t, h.disk.Let()) // only now can it die
	<-h.Daemon.Ended()
	h.Restart()
	s := h.Show(h.sprout.Path)
	t.Logf("after the kill the sprout is %s with %+v", s.State, s.Members)
	if kernel := h.memberNames(); s.State == "partial" && kernel[filepath.Base(h.partition.Path)] || s.Intent["operation"] != "flatten" {
		t.Errorf("the kernel has %v, and shown is %+v", kernel, s)
	}
	wantWritable(t, h.sprout.MountPoint)
	if ended := h.Ends(job, nil); ended.State != client.Interrupted {
		t.Errorf("the job that was cut off is %s: %v", ended.State, ended.Err())
	}
	plan, err := h.Plan(h.Context(), h.sprout.Path, "resume", "", client.MoveOptions{})
	must(t, err)
	if s.State == "partial" && (len(plan.Steps) == 0 || plan.Steps[0].Kind != "check") {
		t.Errorf("what nobody has read is not checked: %+v", plan.Steps)
	}
	result := h.Done(h.resume())
	way, _ := result["way"].(string) // the copy may be of the job before
	h.arrived(result, way)
	h.tornDown()
}

// TestKilledAtEachStepOfACopyItIsFinishedByTheNextDaemon is about the steps before
// and after the copy, too.
func TestKilledAtEachStepOfACopyItIsFinishedByTheNextDaemon(t *testing.T) {
	steps := uint32(1)
	for step := uint32(1); step <= steps; step++ {
		t.Run(fmt.Sprint("step ", step), func(t *testing.T) {
			h := newHome(t, seedtest.DiskSpec{})
			job, err := h.flatten()
			must(t, err)
			last := killedAt(t, h.World, job, step)
			if last.Finished() {
				return // it has no more steps
			}
			steps = last.StepCount
			h.Restart()
			wantWritable(t, h.sprout.MountPoint)
			wantSame(t, "after the kill", h.want, h.sprout.MountPoint)
			result := map[string]any{}
			if h.Show(h.sprout.Path).Intent["operation"] != nil { // else all was done, and recorded
				result = h.Done(h.resume())
			}
			way, _ := result["way"].(string) // it is of the job before that the copy is
			h.arrived(result, way)
			h.tornDown()
		})
	}
}

// memberNames are the names of the devices that the kernel has for the sprout.
func (h *home) memberNames() map[string]bool {
	h.t.Helper()
	entries, err := os.ReadDir("/sys/fs/btrfs/" + h.sprout.Fsid + "/devices")
	must(h.t, err)
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	return names
}

// TestACopyGoesOnAfterACrash takes the disks back to what they held in the middle
// of a copy and mounts them, as it is after a crash. The kernel goes on when the
// file system becomes writable; Resume waits for that.
func TestACopyGoesOnAfterACrash(t *testing.T) {
	for name, flags := range map[string]uintptr{"mounted read-only": unix.MS_RDONLY, "mounted writable": 0} {
		t.Run(name, func(t *testing.T) {
			h := newHome(t, seedtest.DiskSpec{Gate: true})
			job := h.whileCopying()
			// Not the disk itself: a write that is held locks pages of its cache.
			partition, disk := filepath.Join(h.Dir, "crash-partition"), filepath.Join(h.Dir, "crash-disk")
			command(t, "dd", "if="+h.stick.Persist, "of="+partition, "bs=4M", "iflag=direct", "conv=sparse", "status=none")
			command(t, "cp", "--sparse=always", h.disk.Image, disk)
			h.cancelHeld(h.Client, job, h.disk)
			must(t, h.Teardown(h.Context(), h.sprout.Path))
			for image, device := range map[string]string{partition: h.stick.Persist, disk: h.disk.Path} {
				command(t, "dd", "if="+image, "of="+device, "bs=4M", "conv=notrunc,fsync", "status=none")
			}

			must(t, h.disk.Slow(20*seedtest.MiB)) // so that it can be seen
			loop, mnt := losetup(t, h.stick.Seed), t.TempDir()
			must(t, unix.Mount(h.stick.Persist, mnt, "btrfs", flags, "device="+loop+",device="+h.disk.Path))
			unmount := sync.OnceValue(func() error { return seedtest.UnmountIdle(mnt) })
			t.Cleanup(func() { must(t, unmount()) })
			h.sprout = h.AwaitSproutAt(mnt)
			wantState(t, h.sprout, "partial", "seed", "persistent", "disk")
			if h.sprout.SafeToUnplug || h.sprout.Intent["operation"] != "flatten" {
				t.Errorf("after the crash the sprout is shown as %+v", h.sprout)
			}
			other := h.OpenDisk(seedtest.DiskSpec{})
			if _, err := h.Flatten(h.Context(), h.sprout.Path, other.Path, noBootloader); client.CodeOf(err) != "Busy" {
				t.Errorf("a flatten to another disk gave %v, want Busy", err)
			}
			result := h.Done(h.resume())
			must(t, h.disk.Fast())
			h.arrived(result, "replace")
			must(t, unmount())
			h.whole()
		})
	}
}

// TestADamagedFileIsNamedAndNotCopied has a block on the stick that cannot be
// read. A copy would end well without it.
func TestADamagedFileIsNamedAndNotCopied(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{})
	damage(t, h.stick.Image, noise(101, kept/4)[:4096])
	job := h.Ends(h.flatten())
	if job.State != client.Failed || client.CodeOf(job.Err()) != "IOError" || !strings.Contains(job.ErrorMessage, "kept-1") {
		t.Errorf("the job is %s: %v; want an IOError that names kept-1", job.State, job.Err())
	}
	must(t, os.Remove(filepath.Join(h.sprout.MountPoint, "kept-1")))
	wantWritable(t, h.sprout.MountPoint)
	h.want = manifest(t, h.sprout.MountPoint)
	result := h.Done(h.resume())
	way, _ := result["way"].(string) // it may have been seen in the middle or at the end
	h.arrived(result, way)
	h.tornDown()
}

// TestWhatCannotBeCopiedIsMoved flattens to a disk that is smaller than the
// stick's partition.
func TestWhatCannotBeCopiedIsMoved(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{Size: 900 * seedtest.MiB})
	h.arrived(h.Done(h.flatten()), "remove")
	h.tornDown()
}

// TestADiskThatFailsIsNotTakenForACopy copies to a disk that takes the first part
// only. Linux 6.18 itself says that such a replace has ended well. Whatever becomes
// of the job, the partition has everything.
func TestADiskThatFailsIsNotTakenForACopy(t *testing.T) {
	h := newHome(t, seedtest.DiskSpec{})
	tmp := t.TempDir()
	must(t, unix.Mount("none", tmp, "tmpfs", 0, fmt.Sprintf("size=%d", kept/2)))
	t.Cleanup(func() { must(t, unix.Unmount(tmp, 0)) })
	disk := h.OpenDisk(seedtest.DiskSpec{Dir: tmp})
	job := h.Ends(h.Flatten(h.Context(), h.sprout.Path, disk.Path, noBootloader))
	t.Logf("the job is %s: %v", job.State, job.Err())
	if job.State != client.Failed || h.Show(h.sprout.Path).SafeToUnplug {
		t.Errorf("the job is %s: %v", job.State, job.Err())
	}
	if super := read(t, h.stick.Persist, 64<<10, 4096); !bytes.Contains(super, []byte("_BHRfS_M")) {
		t.Error("the stick's partition is no member any more")
	}
}
