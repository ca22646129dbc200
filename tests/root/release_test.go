package root

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// parting is a live session that is about to give its stick back.
type parting struct {
	*harness.World
	t      *testing.T
	stick  *seedtest.Stick
	sprout client.Sprout
	want   seedtest.Manifest
	loop   string
}

func newParting(t *testing.T, spec seedtest.Spec) *parting {
	t.Helper()
	return partingFrom(t, seedtest.New(t, spec).Path)
}

func partingFrom(t *testing.T, image string) *parting {
	t.Helper()
	w := harness.New(t, programs)
	p := &parting{World: w, t: t}
	p.stick = w.OpenStick(seedtest.StickSpec{Seed: image})
	p.sprout = w.Create(p.stick.Seed, client.CreateOptions{})
	must(t, save(filepath.Join(p.sprout.MountPoint, "written-before"), noise(7, seedtest.MiB)))
	p.want = manifest(t, p.sprout.MountPoint)
	p.loop = memberWith(t, p.sprout, "seed").Path
	return p
}

// release releases the seed.
func (p *parting) release(to string) (string, error) {
	return p.Release(p.Context(), p.sprout.Path, to, client.MoveOptions{})
}

// backing is what the kernel says is behind the seed's loop.
func (p *parting) backing() string {
	p.t.Helper()
	name, err := os.ReadFile("/sys/block/" + filepath.Base(p.loop) + "/loop/backing_file")
	must(p.t, err)
	return strings.TrimSpace(string(name))
}

// detached fails while the seed's loop is over its copy. The loop's number may
// serve somebody else by now.
func (p *parting) detached() {
	p.t.Helper()
	name, err := os.ReadFile("/sys/block/" + filepath.Base(p.loop) + "/loop/backing_file")
	if err == nil && (strings.Contains(string(name), "sproutd-seed") || strings.Contains(string(name), plan.CopyName(p.sprout.SeedFsid))) {
		p.t.Errorf("%s is still over %s", p.loop, name)
	}
}

// pull takes the stick away, and looks whether everything is still there.
func (p *parting) pull() {
	p.t.Helper()
	must(p.t, p.stick.Unmount())
	s := p.Await(p.sprout.Path, func(s client.Sprout) bool { return s.SafeToUnplug })
	if len(s.MediaHolders) > 0 {
		p.t.Errorf("the stick is safe to unplug and held by %q", s.MediaHolders)
	}
	must(p.t, p.stick.Close())
	wantSame(p.t, "without the stick", p.want, p.sprout.MountPoint)
	wantWritable(p.t, p.sprout.MountPoint)
}

// allocated gives how many bytes of a file are no hole.
func allocated(t *testing.T, path string) (size, bytes int64) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st.Size, st.Blocks * 512
}

// empty fails unless nothing is in a directory.
func empty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("%s is left in %s", entries[0].Name(), dir)
	}
}

func TestReleasedTheSessionNeedsNoStick(t *testing.T) {
	for _, to := range []string{"ram", "a directory"} {
		t.Run(to, func(t *testing.T) {
			p := newParting(t, seedtest.Spec{})
			dir, at := "ram", "/memfd:"
			if to != "ram" {
				dir = t.TempDir()
				at = filepath.Join(dir, plan.CopyName(p.sprout.SeedFsid))
			}
			seedSum := sum(t, p.stick.Seed)
			result := p.Done(p.release(dir))
			if got := p.backing(); !strings.HasPrefix(got, at) {
				t.Errorf("the seed is read from %s", got)
			}
			where := at
			if to == "ram" {
				where = "ram"
			}
			if result["copy"] != where || result["safe_to_unplug"] != false { // it is still mounted
				t.Errorf("the result is %v", result)
			}
			if to != "ram" {
				size, bytes := allocated(t, at)
				copied, _ := result["copy_bytes"].(uint64)
				if seed, _ := allocated(t, p.stick.Seed); size != seed || bytes > int64(copied)+seedtest.MiB || bytes < int64(copied)/2 { //nolint:gosec // small
					t.Errorf("the copy has %d bytes and takes %d; the seed has %d, of which %d were copied", size, bytes, seed, copied)
				}
			}
			wantState(t, p.Show(p.sprout.Path), "volatile", "seed", "zram")
			if sum(t, p.stick.Seed) != seedSum {
				t.Error("the seed on the stick has changed")
			}
			p.pull()
			if _, err := p.release(dir); client.CodeOf(err) != "WrongState" {
				t.Errorf("a second release gave %v", err)
			}

			disk := p.OpenDisk(seedtest.DiskSpec{})
			p.Done(p.Flatten(p.Context(), p.sprout.Path, disk.Path, noBootloader))
			wantState(t, p.Show(p.sprout.Path), "installed", "disk")
			p.detached()
			checkUnmounted(t, p.World, p.sprout.Path, disk.Path, p.want)
		})
	}
}

// TestNothingWrittenIsLostWhenTheSeedChangesPlace writes to files that are not
// fsynced and closed at once, which the kernel would throw away.
func TestNothingWrittenIsLostWhenTheSeedChangesPlace(t *testing.T) {
	p := newParting(t, seedtest.Spec{Content: files(30)})
	writer, err := seedtest.StartWriter(filepath.Join(p.sprout.MountPoint, "work"))
	must(t, err)
	t.Cleanup(func() { _ = writer.Stop() })
	must(t, writer.AwaitFsyncs(p.Context(), 50))
	dir := filepath.Join(p.sprout.MountPoint, "loose")
	must(t, os.Mkdir(dir, 0o755))
	written, stop := make(chan int), make(chan struct{})
	go func() {
		n := 0
		defer func() { written <- n }()
		for ; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), noise(byte(n), 4096), 0o644) != nil {
				return
			}
		}
	}()
	p.Done(p.release("ram"))
	must(t, writer.AwaitFsyncs(p.Context(), 50)) // and it goes on
	close(stop)
	n := <-written
	for i := range n {
		if got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i))); err != nil || string(got) != string(noise(byte(i), 4096)) {
			t.Fatalf("of %d files, the one with number %d has lost what was written to it: %d bytes (%v)", n, i, len(got), err)
		}
	}
	t.Logf("%d files were written meanwhile", n)
	must(t, writer.Stop())
	must(t, writer.Verify(writer.Dir()))
}

// filesystem makes a file system of a disk and mounts it until the sprouts are gone.
func (p *parting) filesystem(disk *seedtest.Disk) string {
	p.t.Helper()
	command(p.t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=1", disk.Path)
	return p.mount(disk.Path, "ext4", "")
}

func (p *parting) mount(source, fstype, options string) string {
	p.t.Helper()
	dir := p.t.TempDir()
	must(p.t, unix.Mount(source, dir, fstype, 0, options))
	p.t.Cleanup(func() {
		p.TearDown() // a sprout that is left may be read from it
		if err := seedtest.UnmountIdle(dir); err != nil {
			p.t.Error(err)
		}
	})
	return dir
}

// await waits until it is so. The kernel tells nobody of these things.
func (p *parting) await(so func() bool) {
	p.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-tick.C:
		case <-p.Context().Done():
			p.t.Fatal("it does not come")
		}
	}
}

// begun reports whether there is a part of a copy in a directory.
func begun(dir string) bool {
	parts, _ := filepath.Glob(filepath.Join(dir, "*.partial")) // the pattern is right
	return len(parts) > 0
}

// unchanged fails unless the session is as it was before a release.
func (p *parting) unchanged(when string) {
	p.t.Helper()
	if got := p.backing(); got != p.stick.Seed {
		p.t.Errorf("%s the seed is read from %s", when, got)
	}
	wantState(p.t, p.Show(p.sprout.Path), "volatile", "seed", "zram")
	wantSame(p.t, when, p.want, p.sprout.MountPoint)
	wantWritable(p.t, p.sprout.MountPoint)
}

func TestAReleaseThatFailsChangesNothing(t *testing.T) {
	p := newParting(t, seedtest.Spec{Content: files(60)})
	const shutdown = 0x8004587d // FS_IOC_SHUTDOWN: from now on every access is an error
	fails := func(name, dir, code string, when func()) {
		t.Run(name, func(*testing.T) {
			job, err := p.release(dir)
			must(t, err)
			p.await(func() bool { return begun(dir) })
			when()
			if ended := p.Ends(job, nil); client.CodeOf(ended.Err()) != code {
				t.Errorf("the job ended with %v, want %s", ended.Err(), code)
			}
			p.unchanged("after it failed")
		})
	}
	small := p.mount("tmpfs", "tmpfs", "size=200M")
	fails("the destination gets full", small, "NoSpace", func() {
		must(t, unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=8M"))
	})
	empty(t, small)
	lost := p.filesystem(p.OpenDisk(seedtest.DiskSpec{}))
	fails("the destination is lost", lost, "IOError", func() {
		f, err := os.Open(lost)
		must(t, err)
		defer f.Close()
		must(t, unix.IoctlSetPointerInt(int(f.Fd()), shutdown, 0))
	})
	gate := p.OpenDisk(seedtest.DiskSpec{Gate: true})
	slow := p.filesystem(gate)
	var holding errgroup.Group
	holding.Go(func() error { return gate.HoldAfter(p.Context(), few) })
	job, err := p.release(slow)
	must(t, err)
	must(t, holding.Wait())
	must(t, p.Cancel(p.Context(), job))
	p.AwaitJob(job, func(job client.Job) bool { return job.State == "cancelling" })
	must(t, gate.Let())
	if ended := p.Ends(job, nil); ended.State != client.Cancelled || ended.Progress >= 1 {
		t.Errorf("the job is %s at %v", ended.State, ended.Progress)
	}
	p.unchanged("after it was cancelled")
	must(t, os.Remove(filepath.Join(slow, "lost+found")))
	empty(t, slow)

	p.Done(p.Resume(p.Context(), p.sprout.Path))
	if got := p.backing(); filepath.Dir(got) != slow {
		t.Errorf("after it was resumed the seed is read from %s", got)
	}
	p.pull()
}

// guarded reports whether somebody stands by to let the file system go on.
func (p *parting) guarded() bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Daemon.PID))
	for _, path := range tasks {
		children, _ := os.ReadFile(path)
		for pid := range strings.FieldsSeq(string(children)) { // wipefs is one for a moment, too
			if line, _ := os.ReadFile("/proc/" + pid + "/cmdline"); bytes.Contains(line, []byte("thaw-when-alone")) {
				return true
			}
		}
	}
	return false
}

func TestAReleaseCanBeKilledAtAnyMoment(t *testing.T) {
	for _, c := range []struct {
		when string
		so   func(p *parting, dir string) bool
	}{
		{"when the copy begins", func(_ *parting, dir string) bool { return begun(dir) }},
		{"in its middle", func(_ *parting, dir string) bool {
			parts, _ := filepath.Glob(filepath.Join(dir, "*.partial"))
			if len(parts) == 0 {
				return false
			}
			var st unix.Stat_t
			return unix.Stat(parts[0], &st) == nil && st.Blocks*512 > 30*seedtest.MiB
		}},
		{"when the seed is held still", func(p *parting, _ string) bool { return p.guarded() }},
		{"when the seed has changed place", func(p *parting, _ string) bool { return p.backing() != p.stick.Seed }},
	} {
		t.Run(c.when, func(t *testing.T) {
			p := newParting(t, seedtest.Spec{Content: files(60)})
			dir := t.TempDir()
			writer, err := seedtest.StartWriter(filepath.Join(p.sprout.MountPoint, "work"))
			must(t, err)
			t.Cleanup(func() { _ = writer.Stop() })
			job, err := p.release(dir)
			must(t, err)
			p.await(func() bool { return c.so(p, dir) })
			p.Daemon.Kill()
			must(t, writer.AwaitFsyncs(p.Context(), 20)) // it is not frozen for good
			left := p.backing()
			p.Restart()
			t.Logf("killed while the seed was read from %s", left)

			shown, err := p.Job(p.Context(), job)
			must(t, err)
			if shown.State != "interrupted" {
				t.Errorf("the job is shown as %s", shown.State)
			}
			if begun(dir) {
				t.Error("a part of a copy is left")
			}
			copied := filepath.Join(dir, plan.CopyName(p.sprout.SeedFsid))
			if got := p.backing(); got != p.stick.Seed && got != copied {
				t.Errorf("the seed is read from %s", got)
			}
			p.Done(p.Resume(p.Context(), p.sprout.Path))
			if got := p.backing(); got != copied || begun(dir) {
				t.Errorf("after it was resumed the seed is read from %s", got)
			}
			must(t, writer.Stop())
			must(t, writer.Verify(writer.Dir()))
			must(t, os.RemoveAll(writer.Dir()))
			p.want = manifest(t, p.sprout.MountPoint)
			p.pull()
		})
	}
}

// TestNobodyIsLeftFrozen lets the guard be alone at the worst moment.
func TestNobodyIsLeftFrozen(t *testing.T) {
	p := newParting(t, seedtest.Spec{Content: files(20)})
	dir, err := os.Open(p.sprout.MountPoint)
	must(t, err)
	defer dir.Close()
	guard := exec.CommandContext(t.Context(), filepath.Join(programs, "sproutd"), "thaw-when-alone")
	guard.ExtraFiles = []*os.File{dir}
	alive, err := guard.StdinPipe()
	must(t, err)
	ready, err := guard.StdoutPipe()
	must(t, err)
	must(t, guard.Start())
	_, err = ready.Read(make([]byte, 1))
	must(t, err)
	_, err = alive.Write([]byte("w")) // the daemon is going to freeze it
	must(t, err)
	must(t, mount.Freeze(dir))
	must(t, guard.Process.Signal(unix.SIGTERM)) // as when the whole service is stopped
	must(t, alive.Close())
	must(t, guard.Wait())
	wantWritable(t, p.sprout.MountPoint)
	if err := mount.Thaw(dir); !errors.Is(err, unix.EINVAL) {
		t.Errorf("it was still frozen: %v", err)
	}
}

func TestWhatCannotBeReleased(t *testing.T) {
	image := seedtest.New(t, seedtest.Spec{Content: files(20), ImageSize: 512 * seedtest.MiB})
	w := harness.New(t, programs)
	refused := func(name string, s client.Sprout, to, code, words string) {
		t.Helper()
		p, err := w.Plan(w.Context(), s.Path, "release", to, client.MoveOptions{})
		must(t, err)
		if client.CodeOf(p.Err()) != code || !strings.Contains(p.Err().Error(), words) {
			t.Errorf("%s: the plan says %v, want %s with %q", name, p.Err(), code, words)
		}
		if _, err := w.Release(w.Context(), s.Path, to, client.MoveOptions{}); client.CodeOf(err) != code {
			t.Errorf("%s: %v, want %s", name, err, code)
		}
	}
	loop := command(t, "losetup", "--find", "--show", image.Path)
	t.Cleanup(func() {
		w.TearDown()
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("cannot detach %s: %v: %s", loop, err, out)
		}
	})
	writable := w.Create(loop, client.CreateOptions{})
	refused("a loop that can be written", writable, "ram", "NotSupported", "can be written")
	must(t, w.Teardown(w.Context(), writable.Path))

	stick := w.OpenStick(seedtest.StickSpec{Seed: image.Path})
	live := w.Create(stick.Seed, client.CreateOptions{})
	inside := filepath.Join(live.MountPoint, "inside")
	must(t, os.Mkdir(inside, 0o755))
	file := filepath.Join(w.Dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	refused("a directory of the sprout", live, inside, "DeviceIsMember", "itself")
	refused("a directory of the stick", live, filepath.Dir(stick.Seed), "DeviceIsMedia", "stick")
	refused("no directory", live, filepath.Join(w.Dir, "none"), "NoSuchDevice", "no directory")
	refused("a file", live, file, "InvalidArgs", "is no directory")
	refused("a device with a seed on it", live, loop, "TargetNotEmpty", "btrfs")
	refused("no block device", live, "/dev/null", "NoSuchDevice", "character device")
	refused("a relative path", live, "copies", "InvalidArgs", "absolute")
	refused("nothing", live, "", "InvalidArgs", "absolute")
	tiny := t.TempDir()
	must(t, unix.Mount("tmpfs", tiny, "tmpfs", 0, "size=20M"))
	t.Cleanup(func() { must(t, unix.Unmount(tiny, 0)) })
	refused("a directory that is too small", live, tiny, "NoSpace", "free")

	disk := w.OpenDisk(seedtest.DiskSpec{})
	part, err := disk.AddPartition(t.Context(), 1, seedtest.MiB, image.Size)
	must(t, err)
	command(t, "dd", "if="+image.Path, "of="+part, "bs=4M", "conv=fsync", "status=none")
	must(t, w.Teardown(w.Context(), live.Path)) // the kernel takes a seed once
	bare := w.Create(part, client.CreateOptions{})
	refused("a seed without a loop", bare, "ram", "NotSupported", "block device")
}

// TestADamagedSeedIsNotReleased: what cannot be read from the stick is no reason
// to lose where it was.
func TestADamagedSeedIsNotReleased(t *testing.T) {
	p := newParting(t, seedtest.Spec{Content: files(20)})
	content := noise(5, seedtest.MiB)
	must(t, unix.Mount("", p.stick.MountPoint, "", unix.MS_REMOUNT, ""))
	image, err := os.ReadFile(p.stick.Seed)
	must(t, err)
	at := bytes.Index(image, content[:4096])
	if at < 0 {
		t.Fatal("the seed compresses what cannot be compressed")
	}
	f, err := os.OpenFile(p.stick.Seed, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("damaged"), int64(at))
	must(t, errors.Join(err, f.Sync(), f.Close()))
	must(t, unix.Mount("", p.stick.MountPoint, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	job := p.Ends(p.release("ram"))
	if client.CodeOf(job.Err()) != "IOError" || !strings.Contains(job.Err().Error(), "file-05") {
		t.Errorf("it ended with %v", job.Err())
	}
	if got := p.backing(); got != p.stick.Seed {
		t.Errorf("the seed is read from %s", got)
	}
}

// TestAFlattenCanBeginWithARelease kills the daemon once the stick is free, too.
func TestAFlattenCanBeginWithARelease(t *testing.T) {
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed %v", killed), func(t *testing.T) {
			p := newParting(t, seedtest.Spec{Content: files(60)})
			disk := p.OpenDisk(seedtest.DiskSpec{Gate: true})
			var holding errgroup.Group
			holding.Go(func() error { return disk.HoldAfter(p.Context(), few) })
			job, err := p.Flatten(p.Context(), p.sprout.Path, disk.Path, client.MoveOptions{Bootloader: "none", ReleaseFirst: true})
			must(t, err)
			must(t, holding.Wait()) // in the middle of what comes after the release
			must(t, p.stick.Unmount())
			p.Await(p.sprout.Path, func(s client.Sprout) bool { return s.SafeToUnplug })
			must(t, p.stick.Close())
			if killed {
				ended := make(chan struct{})
				go func() { defer close(ended); p.Daemon.Kill() }()
				must(t, disk.Let())
				<-ended
				p.Restart()
				p.Done(p.Resume(p.Context(), p.sprout.Path))
			} else {
				must(t, disk.Let())
				result := p.Done(job, nil)
				if result["safe_to_unplug"] != true || result["copy"] != "ram" || !strings.Contains(fmt.Sprint(result["read_ahead"]), "memory") {
					t.Errorf("the result is %v", result)
				}
			}
			wantState(t, p.Show(p.sprout.Path), "installed", "disk")
			p.detached()
			wantSame(t, "after flatten", p.want, p.sprout.MountPoint)
		})
	}
}
