package root

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
)

// contentOf gives what is in a seed that nobody uses, an image or a device.
func contentOf(t *testing.T, seed string) seedtest.Manifest {
	t.Helper()
	device := seed
	if !strings.HasPrefix(seed, "/dev/") {
		device = command(t, "losetup", "--read-only", "--find", "--show", seed)
		defer command(t, "losetup", "--detach", device)
	}
	dir := t.TempDir()
	must(t, unix.Mount(device, dir, "btrfs", unix.MS_RDONLY, ""))
	defer func() {
		must(t, seedtest.UnmountIdle(dir))
		_ = btrfs.Forget(device) // mostly it knows nothing of it
	}()
	return manifest(t, dir)
}

// partition makes a partition of a disk of its own.
func (p *parting) partition(size int64, spec seedtest.DiskSpec) (string, *seedtest.Disk) {
	p.t.Helper()
	disk := p.OpenDisk(spec)
	part, err := disk.AddPartition(p.t.Context(), 1, seedtest.MiB, size)
	must(p.t, err)
	return part, disk
}

// seedSize gives the size of the image.
func (p *parting) seedSize() int64 {
	p.t.Helper()
	size, _ := allocated(p.t, p.stick.Seed)
	return size
}

// holdsASeed reports whether a device would be taken for a seed.
func holdsASeed(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	super, err := btrfs.ReadSuper(f, 1<<40)
	if err != nil && !errors.Is(err, btrfs.ErrNotBtrfs) {
		t.Errorf("what is on %s: %v", path, err)
	}
	return err == nil && super.Seeding
}

func TestReleasedToAPartitionItIsASeedInItsOwnRight(t *testing.T) {
	for _, more := range []int64{0, 100 * seedtest.MiB} {
		t.Run(fmt.Sprint(more, " bytes larger"), func(t *testing.T) {
			image := seedtest.New(t, seedtest.Spec{Content: files(30)}).Path
			whole := contentOf(t, image)
			p := partingFrom(t, image)
			seedSum := sum(t, p.stick.Seed)
			// What the session deletes is in the seed all the same.
			must(t, os.Remove(filepath.Join(p.sprout.MountPoint, "file-07")))
			p.want = manifest(t, p.sprout.MountPoint)
			part, disk := p.partition(p.seedSize()+more, seedtest.DiskSpec{})
			written, err := disk.Written()
			must(t, err)
			result := p.Done(p.release(part))
			if got := p.backing(); got != part || result["copy"] != part {
				t.Errorf("the seed is read from %s, and the result is %v", got, result)
			}
			copied, _ := result["copy_bytes"].(uint64)
			if now, err := disk.Written(); err != nil || now-written > int64(copied)+seedtest.MiB || int64(copied) < 30*seedtest.MiB { //nolint:gosec // small
				t.Errorf("%d bytes were written to copy %d (%v)", now-written, copied, err)
			}
			wantState(t, p.Show(p.sprout.Path), "volatile", "seed", "zram")
			if sum(t, p.stick.Seed) != seedSum {
				t.Error("the seed on the stick has changed")
			}

			// udev tells the kernel of it.
			if err := btrfs.Scan(part); err != nil {
				t.Logf("the kernel does not want to know it: %v", err)
			}
			wantState(t, p.Show(p.sprout.Path), "volatile", "seed", "zram")
			p.pull()
			if err := btrfs.Scan(part); err != nil {
				t.Logf("the kernel does not want to know it without the stick: %v", err)
			}
			wantWritable(t, p.sprout.MountPoint)
			wantSame(t, "told of it", p.want, p.sprout.MountPoint)

			// Nobody else gets what the session reads from.
			if _, err := p.release(part); client.CodeOf(err) != "WrongState" || !strings.Contains(err.Error(), "already") {
				t.Errorf("a second release gave %v", err)
			}
			for _, target := range []string{part, disk.Path} {
				if _, err := p.Persist(p.Context(), p.sprout.Path, target, client.MoveOptions{Wipe: true}); client.CodeOf(err) != "DeviceIsMedia" && client.CodeOf(err) != "DeviceBusy" {
					t.Errorf("persist to %s gave %v", target, err)
				}
			}
			must(t, p.LookAtDevices(p.Context()))
			objects, err := p.Objects(p.Context())
			must(t, err)
			devices := objects.Devices
			i := slices.IndexFunc(devices, func(d client.Device) bool { return d.Path == part })
			if i < 0 || devices[i].Role != "media" || len(devices[i].EligibleFor) > 0 {
				t.Errorf("the devices are %+v", devices)
			}

			target := p.OpenDisk(seedtest.DiskSpec{})
			p.Done(p.Flatten(p.Context(), p.sprout.Path, target.Path, noBootloader))
			wantState(t, p.Show(p.sprout.Path), "installed", "disk")
			if now, err := os.ReadFile("/sys/block/" + filepath.Base(p.loop) + "/loop/backing_file"); err == nil && strings.Contains(string(now), part) {
				t.Errorf("%s is still over %s", p.loop, now)
			}
			checkUnmounted(t, p.World, p.sprout.Path, target.Path, p.want)

			// The copy stays, and has all that the stick had.
			if err := seedtest.Check(t.Context(), part); err != nil {
				t.Error(err)
			}
			for _, line := range seedtest.Diff(whole, contentOf(t, part)) {
				t.Errorf("the copy: %s", line)
			}
		})
	}
}

func TestAReleaseToADeviceDestroysNothingUnasked(t *testing.T) {
	w := newParting(t, seedtest.Spec{Content: files(20), ImageSize: 512 * seedtest.MiB})
	part, disk := w.partition(w.seedSize(), seedtest.DiskSpec{})
	second, err := disk.AddPartition(t.Context(), 2, 1024*seedtest.MiB, 256*seedtest.MiB)
	must(t, err)
	third, err := disk.AddPartition(t.Context(), 3, 1300*seedtest.MiB, 600*seedtest.MiB)
	must(t, err)
	refused := func(name, to string, wipe bool, code, words string) {
		t.Helper()
		o := client.MoveOptions{Wipe: wipe}
		p, err := w.Plan(w.Context(), w.sprout.Path, "release", to, o)
		must(t, err)
		if client.CodeOf(p.Err()) != code || !strings.Contains(p.Err().Error(), words) {
			t.Errorf("%s: the plan says %v, want %s with %q", name, p.Err(), code, words)
		}
		if _, err := w.Release(w.Context(), w.sprout.Path, to, o); client.CodeOf(err) != code {
			t.Errorf("%s: %v, want %s", name, err, code)
		}
	}
	refused("a partition that is too small", second, true, "TargetTooSmall", "512.0 MiB")
	refused("a disk with partitions", disk.Path, true, "TargetNotEmpty", "whole disk")
	refused("the stick", w.stick.Path, true, "DeviceIsMedia", "stick")
	refused("the partition of the stick", w.stick.Media, true, "DeviceIsMedia", "stick")
	refused("memory that is to be wiped", "ram", true, "InvalidArgs", "wiped")
	refused("a member", w.loop, true, "DeviceIsMember", "member")
	command(t, "mke2fs", "-q", "-F", "-t", "ext4", third)
	dir := w.mount(third, "ext4", "")
	refused("a partition that is mounted", third, true, "DeviceBusy", dir)
	command(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "precious", part)
	refused("a partition with something on it", part, false, "TargetNotEmpty", "precious")

	p, err := w.Plan(w.Context(), w.sprout.Path, "release", part, client.MoveOptions{Wipe: true})
	must(t, err)
	if len(p.Destroys) != 1 || !strings.Contains(p.Destroys[0], "precious") {
		t.Errorf("the plan destroys %q", p.Destroys)
	}
	w.Done(w.Release(w.Context(), w.sprout.Path, part, client.MoveOptions{Wipe: true}))
	if got := w.backing(); got != part {
		t.Errorf("the seed is read from %s", got)
	}
	w.pull()
}

func TestAReleaseToADeviceThatFailsLeavesNoSeed(t *testing.T) {
	p := newParting(t, seedtest.Spec{Content: files(60)})
	const shutdown = 0x8004587d // FS_IOC_SHUTDOWN: from now on every access is an error
	lost := p.filesystem(p.OpenDisk(seedtest.DiskSpec{Size: 4 * seedtest.GiB}))
	image := filepath.Join(lost, "disk.img")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, p.seedSize()))
	loop := command(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() { // its file system is unmounted next
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("cannot detach %s: %v: %s", loop, err, out)
		}
	})
	before := bytesWritten(t, loop)
	job, err := p.release(loop)
	must(t, err)
	p.await(func() bool { return bytesWritten(t, loop) > before+few })
	f, err := os.Open(lost)
	must(t, err)
	must(t, errors.Join(unix.IoctlSetPointerInt(int(f.Fd()), shutdown, 0), f.Close()))
	if ended := p.Ends(job, nil); client.CodeOf(ended.Err()) != "IOError" {
		t.Errorf("the job ended with %v", ended.Err())
	}
	p.unchanged("after the destination was lost")

	gate, disk := p.partition(p.seedSize(), seedtest.DiskSpec{Gate: true})
	var holding errgroup.Group
	holding.Go(func() error { return disk.HoldAfter(p.Context(), few) })
	job, err = p.release(gate)
	must(t, err)
	must(t, holding.Wait())
	must(t, p.Cancel(p.Context(), job))
	p.AwaitJob(job, func(job client.Job) bool { return job.State == "cancelling" })
	must(t, disk.Let())
	if ended := p.Ends(job, nil); ended.State != client.Cancelled {
		t.Errorf("the job is %s", ended.State)
	}
	p.unchanged("after it was cancelled")
	if holdsASeed(t, gate) {
		t.Error("a part of a copy would be taken for a seed")
	}
	p.Done(p.Resume(p.Context(), p.sprout.Path))
	if got := p.backing(); got != gate {
		t.Errorf("after it was resumed the seed is read from %s", got)
	}
	p.pull()
}

// bytesWritten to a disk since it appeared.
func bytesWritten(t *testing.T, disk string) int64 {
	t.Helper()
	raw, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	must(t, err)
	var sectors, skip int64
	_, err = fmt.Sscan(string(raw), &skip, &skip, &skip, &skip, &skip, &skip, &sectors)
	must(t, err)
	return sectors * 512
}

// copying is a release to a partition under way.
type copying struct {
	*parting
	disk, part string
	before     int64 // bytes that were written to the disk
}

func (c copying) wrote(n int64) bool { return bytesWritten(c.t, c.disk) > c.before+n }

func TestAReleaseToADeviceCanBeKilledAtAnyMoment(t *testing.T) {
	for _, c := range []struct {
		when string
		so   func(c copying) bool
	}{
		{"when the copy begins", func(c copying) bool { return c.wrote(few) }},
		{"in its middle", func(c copying) bool { return c.wrote(40 * seedtest.MiB) }},
		{"when it is a seed", func(c copying) bool { return holdsASeed(c.t, c.part) }},
		{"when the seed is held still", func(c copying) bool { return c.guarded() }},
		{"when the seed has changed place", func(c copying) bool { return c.backing() != c.stick.Seed }},
	} {
		t.Run(c.when, func(t *testing.T) {
			p := newParting(t, seedtest.Spec{Content: files(60)})
			part, disk := p.partition(p.seedSize(), seedtest.DiskSpec{})
			writer, err := seedtest.StartWriter(filepath.Join(p.sprout.MountPoint, "work"))
			must(t, err)
			t.Cleanup(func() { _ = writer.Stop() })
			release := copying{p, disk.Path, part, bytesWritten(t, disk.Path)}
			job, err := p.release(part)
			must(t, err)
			p.await(func() bool { return c.so(release) })
			p.Daemon.Kill()
			must(t, writer.AwaitFsyncs(p.Context(), 20)) // it is not frozen for good
			left, seed := p.backing(), holdsASeed(t, part)
			t.Logf("killed while the seed was read from %s; the copy is a seed: %v", left, seed)
			if seed { // then it is all of it
				if err := seedtest.Check(t.Context(), part); err != nil {
					t.Error(err)
				}
			}
			p.Restart()
			shown, err := p.Job(p.Context(), job)
			must(t, err)
			if shown.State != "interrupted" {
				t.Errorf("the job is shown as %s", shown.State)
			}
			p.Done(p.Resume(p.Context(), p.sprout.Path))
			if got := p.backing(); got != part {
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
