package root

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

func TestVolatileToPersistentToInstalled(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{})
	stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
	disk := w.OpenDisk(seedtest.DiskSpec{})

	sprout := w.Create(stick.Seed, client.CreateOptions{})
	wantState(t, sprout, "volatile", "seed", "zram")
	w.Done(w.Persist(w.Context(), sprout.Path, stick.Persist, client.MoveOptions{}))
	wantState(t, w.Show(sprout.Path), "persistent", "seed", "persistent")
	w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
	wantState(t, w.Show(sprout.Path), "installed", "disk")
	must(t, stick.Unmount())
	w.Await(sprout.Path, func(s client.Sprout) bool { return s.SafeToUnplug })
}

func TestVolatileToInstalledDirectly(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(30)})
	disk := w.OpenDisk(seedtest.DiskSpec{})

	sprout := w.Create(seed.Path, client.CreateOptions{})
	must(t, save(filepath.Join(sprout.MountPoint, "written-to-ram"), noise(1, 10*seedtest.MiB)))
	want := manifest(t, sprout.MountPoint)
	w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))

	wantState(t, w.Show(sprout.Path), "installed", "disk")
	wantSame(t, "after flatten", want, sprout.MountPoint)
	for _, m := range sprout.Members {
		if m.Role == "zram" && zramThere(m.Path) {
			t.Errorf("%s is still there", m.Path)
		}
	}
	checkUnmounted(t, w, sprout.Path, disk.Path, want)
}

// TestAProgramAtWorkFindsAllItFsynced keeps a writer and a reader at work
// during each move.
func TestAProgramAtWorkFindsAllItFsynced(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{ImageSize: 512 * seedtest.MiB})
	stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
	disk := w.OpenDisk(seedtest.DiskSpec{})
	sprout := w.Create(stick.Seed, client.CreateOptions{})
	content := manifest(t, sprout.MountPoint)

	var writers []*seedtest.Writer
	during := func(move string, job func() (string, error)) {
		t.Helper()
		writer, err := seedtest.StartWriter(filepath.Join(sprout.MountPoint, "work-"+move))
		must(t, err)
		t.Cleanup(func() { _ = writer.Stop() })
		reader, err := seedtest.StartReader(sprout.MountPoint, content)
		must(t, err)
		t.Cleanup(func() { _ = reader.Stop() })
		must(t, writer.AwaitFsyncs(w.Context(), 100))
		w.Done(job())
		must(t, writer.AwaitFsyncs(w.Context(), 100)) // and it goes on
		must(t, reader.Stop())
		must(t, writer.Stop())
		if read, _ := reader.Stats(); read == 0 {
			t.Errorf("nothing was read during %s", move)
		}
		t.Logf("during %s: %+v", move, writer.Stats())
		writers = append(writers, writer)
		for _, earlier := range writers {
			must(t, earlier.Verify(earlier.Dir()))
		}
	}
	during("persist", func() (string, error) {
		return w.Persist(w.Context(), sprout.Path, stick.Persist, client.MoveOptions{})
	})
	during("flatten", func() (string, error) {
		return w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader)
	})

	must(t, w.Teardown(w.Context(), sprout.Path))
	must(t, seedtest.Check(w.Context(), disk.Path))
	again := mounted(t, disk.Path)
	for _, writer := range writers {
		must(t, writer.Verify(filepath.Join(again, filepath.Base(writer.Dir()))))
	}
}

// TestASeedOnABlockDeviceNeedsNoLoop sprouts a seed that is on a read-only
// device and one that is on a partition.
func TestASeedOnABlockDeviceNeedsNoLoop(t *testing.T) {
	image := seedtest.New(t, seedtest.Spec{Content: files(20), ImageSize: 512 * seedtest.MiB})
	for name, open := range map[string]func(t *testing.T, w *harness.World) (device, backing string){
		"a read-only device": func(t *testing.T, _ *harness.World) (string, string) { return losetup(t, image.Path), image.Path },
		"a partition": func(t *testing.T, w *harness.World) (string, string) {
			disk := w.OpenDisk(seedtest.DiskSpec{})
			part, err := disk.AddPartition(t.Context(), 1, seedtest.MiB, image.Size)
			must(t, err)
			command(t, "dd", "if="+image.Path, "of="+part, "bs=4M", "conv=fsync", "status=none")
			return part, part
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := harness.New(t, programs)
			seed, backing := open(t, w)
			before := sum(t, backing)
			disk := w.OpenDisk(seedtest.DiskSpec{})
			sprout := w.Create(seed, client.CreateOptions{})
			if got := memberWith(t, sprout, "seed").Path; got != seed {
				t.Errorf("the seed is the member %s, want %s itself", got, seed)
			}
			want := manifest(t, sprout.MountPoint)
			w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
			wantState(t, w.Show(sprout.Path), "installed", "disk")
			checkUnmounted(t, w, sprout.Path, disk.Path, want)
			if sum(t, backing) != before {
				t.Error("the seed was written to")
			}
		})
	}
}

// TestTwoSproutsMoveAtTheSameTime flattens two sprouts at once, of two seeds
// and of one.
func TestTwoSproutsMoveAtTheSameTime(t *testing.T) {
	one := seedtest.New(t, seedtest.Spec{Content: files(20)})
	other := seedtest.New(t, seedtest.Spec{Content: files(25)})
	for name, seeds := range map[string][]string{
		"of two seeds": {one.Path, other.Path},
		"of one seed":  {one.Path, one.Path},
	} {
		t.Run(name, func(t *testing.T) {
			w := harness.New(t, programs)
			var sprouts []client.Sprout
			var disks []*seedtest.Disk
			var wants []seedtest.Manifest
			for i, seed := range seeds {
				disks = append(disks, w.OpenDisk(seedtest.DiskSpec{}))
				sprout := w.Create(seed, client.CreateOptions{})
				must(t, save(filepath.Join(sprout.MountPoint, "mine"), noise(byte(i), seedtest.MiB)))
				sprouts = append(sprouts, sprout)
				wants = append(wants, manifest(t, sprout.MountPoint))
			}
			var both errgroup.Group
			for i, sprout := range sprouts {
				both.Go(func() error {
					job, err := w.Flatten(w.Context(), sprout.Path, disks[i].Path, noBootloader)
					if err == nil {
						_, err = w.Wait(w.Context(), job)
					}
					return err
				})
			}
			must(t, both.Wait())
			for i, sprout := range sprouts {
				wantState(t, w.Show(sprout.Path), "installed", "disk")
				checkUnmounted(t, w, sprout.Path, disks[i].Path, wants[i])
			}
		})
	}
}

// TestAFillingSproutGrowsByAZram swaps the first zram for a second one, which
// gives the memory of the first back, and persists.
func TestAFillingSproutGrowsByAZram(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(5)})
	disk := w.OpenDisk(seedtest.DiskSpec{})
	sprout := w.Create(seed.Path, client.CreateOptions{ZramSize: seedtest.GiB})
	must(t, save(filepath.Join(sprout.MountPoint, "big"), noise(9, 40*seedtest.MiB)))
	want := manifest(t, sprout.MountPoint)
	first := memberWith(t, sprout, "zram")

	w.Done(w.AddDevice(w.Context(), sprout.Path, "zram", client.MoveOptions{Size: 2 * seedtest.GiB}))
	grown := w.Show(sprout.Path)
	wantState(t, grown, "volatile", "seed", "zram", "zram")
	if grown.Size != sprout.Size+2*seedtest.GiB || grown.Free <= sprout.Free {
		t.Errorf("the sprout grew from %d bytes (%d free) to %d (%d free)", sprout.Size, sprout.Free, grown.Size, grown.Free)
	}
	w.Done(w.RemoveDevice(w.Context(), sprout.Path, first.Path))
	wantState(t, w.Show(sprout.Path), "volatile", "seed", "zram")
	if zramThere(first.Path) {
		t.Errorf("the memory of %s was not given back", first.Path)
	}
	w.Done(w.Persist(w.Context(), sprout.Path, disk.Path, client.MoveOptions{}))
	wantState(t, w.Show(sprout.Path), "persistent", "seed", "persistent")
	wantSame(t, "after all that", want, sprout.MountPoint)
}

// TestASproutCanBeginOnADevice uses a disk in the place of RAM.
func TestASproutCanBeginOnADevice(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(5)})
	disk, next := w.OpenDisk(seedtest.DiskSpec{}), w.OpenDisk(seedtest.DiskSpec{})
	sprout := w.Create(seed.Path, client.CreateOptions{Device: disk.Path})
	wantState(t, sprout, "persistent", "seed", "persistent")
	want := manifest(t, sprout.MountPoint)
	w.Done(w.Flatten(w.Context(), sprout.Path, next.Path, noBootloader))
	checkUnmounted(t, w, sprout.Path, next.Path, want)
}

// TestASproutThatSomebodyElseMounted is what the root of a live system is to
// the daemon: found and moved, but its zram is not ours to free, and nor is the
// mount.
func TestASproutThatSomebodyElseMounted(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(10)})
	stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
	disk := w.OpenDisk(seedtest.DiskSpec{})
	mnt, zram := sproutByHand(t, stick.Seed)

	sprout := w.AwaitSproutAt(mnt)
	path := sprout.Path
	wantState(t, w.Show(path), "volatile", "seed", "zram")
	want := manifest(t, mnt)

	result := w.Done(w.Persist(w.Context(), path, stick.Persist, client.MoveOptions{}))
	wantState(t, w.Show(path), "persistent", "seed", "persistent")
	if !zramThere(zram) {
		t.Errorf("%s was freed, but somebody else made it", zram)
	}
	notes, _ := result["notes"].([]string)
	if !strings.Contains(strings.Join(notes, "\n"), zram) {
		t.Errorf("the result does not tell that %s was left alone: %v", zram, result)
	}
	w.Done(w.Flatten(w.Context(), path, disk.Path, noBootloader))
	wantState(t, w.Show(path), "installed", "disk")
	wantSame(t, "after flatten", want, mnt)
	if err := w.Teardown(w.Context(), path); client.CodeOf(err) != "WrongState" {
		t.Errorf("teardown of a sprout that somebody else mounted gave %v, want WrongState", err)
	}
	wantWritable(t, mnt)
}

// sproutByHand makes a sprout as an initramfs does, without the daemon, and
// gives its mount point and its zram device.
func sproutByHand(t *testing.T, image string) (mnt, zram string) {
	t.Helper()
	loop, mnt := losetup(t, image), t.TempDir()
	number, err := os.ReadFile("/sys/class/zram-control/hot_add")
	must(t, err)
	zram = "/dev/zram" + strings.TrimSpace(string(number))
	sys := "/sys/block/" + filepath.Base(zram)
	t.Cleanup(func() {
		if err := os.WriteFile(sys+"/reset", []byte("1"), 0); err != nil {
			t.Errorf("cannot reset %s: %v", zram, err)
		}
		if err := os.WriteFile("/sys/class/zram-control/hot_remove", number, 0); err != nil {
			t.Errorf("cannot remove %s: %v", zram, err)
		}
	})
	must(t, os.WriteFile(sys+"/disksize", []byte("2G"), 0))
	must(t, unix.Mount(loop, mnt, "btrfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() {
		if err := seedtest.UnmountIdle(mnt); err != nil {
			t.Error(err)
		}
	})
	command(t, "btrfs", "device", "add", "--nodiscard", zram, mnt)
	must(t, unix.Mount("", mnt, "", unix.MS_REMOUNT, ""))
	return mnt, zram
}

// TestADamagedFileIsNamedAndCanBeDeleted flattens a seed with a block that
// cannot be read.
func TestADamagedFileIsNamedAndCanBeDeleted(t *testing.T) {
	for _, again := range []string{"resume", "flatten"} {
		t.Run("and then "+again, func(t *testing.T) {
			w := harness.New(t, programs)
			seed := seedtest.New(t, seedtest.Spec{Content: files(20), ImageSize: 512 * seedtest.MiB})
			damage(t, seed.Path, noise(7, seedtest.MiB)[:4096])
			disk := w.OpenDisk(seedtest.DiskSpec{})
			sprout := w.Create(seed.Path, client.CreateOptions{})

			job := w.Ends(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
			if job.State != client.Failed || client.CodeOf(job.Err()) != "IOError" || !strings.Contains(job.ErrorMessage, "file-07") {
				t.Errorf("the job is %s: %v; want an IOError that names file-07", job.State, job.Err())
			}
			if got := w.Show(sprout.Path); got.State != "partial" {
				t.Errorf("the sprout is %s", got.State)
			}
			must(t, os.Remove(filepath.Join(sprout.MountPoint, "file-07")))
			wantWritable(t, sprout.MountPoint)
			want := manifest(t, sprout.MountPoint)

			if again == "resume" {
				w.Done(w.Resume(w.Context(), sprout.Path))
			} else {
				w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
			}
			wantState(t, w.Show(sprout.Path), "installed", "disk")
			checkUnmounted(t, w, sprout.Path, disk.Path, want)
		})
	}
}

// damage changes a byte of what an image holds.
func damage(t *testing.T, image string, what []byte) {
	t.Helper()
	raw, err := os.ReadFile(image)
	must(t, err)
	at := bytes.Index(raw, what)
	if at < 0 {
		t.Fatalf("%s does not hold what is to be damaged", image)
	}
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte{^raw[at]}, int64(at))
	must(t, err)
}

// TestTheStickIsSafeToUnplugOnlyWhenNothingUsesIt watches what still holds the
// stick while it is given up step by step.
func TestTheStickIsSafeToUnplugOnlyWhenNothingUsesIt(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(5), ImageSize: 512 * seedtest.MiB})
	stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
	disk := w.OpenDisk(seedtest.DiskSpec{})
	sprout := w.Create(stick.Seed, client.CreateOptions{})
	held := func(when string, by ...string) {
		t.Helper()
		s := w.Show(sprout.Path)
		text := strings.Join(s.MediaHolders, "\n")
		if s.SafeToUnplug || slices.ContainsFunc(by, func(b string) bool { return !strings.Contains(text, b) }) {
			t.Errorf("%s it is %v that the stick is safe to unplug, held by %q, want %q", when, s.SafeToUnplug, s.MediaHolders, by)
		}
	}
	loop := memberWith(t, sprout, "seed").Path
	held("at first", loop, stick.MountPoint)
	w.Done(w.Persist(w.Context(), sprout.Path, stick.Persist, client.MoveOptions{}))
	held("with persistence", loop, stick.MountPoint, sprout.MountPoint)
	result := w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
	held("while it is mounted", stick.MountPoint)
	if safe, _ := result["safe_to_unplug"].(bool); safe {
		t.Errorf("the job's result says that a mounted stick can be unplugged: %v", result)
	}

	reader := openBySomebody(t, stick.Path)
	must(t, stick.Unmount())
	who := fmt.Sprint(reader.Process.Pid)
	s := w.Await(sprout.Path, func(s client.Sprout) bool {
		return !strings.Contains(strings.Join(s.MediaHolders, " "), stick.MountPoint)
	})
	if s.SafeToUnplug || !strings.Contains(strings.Join(s.MediaHolders, "\n"), who) {
		t.Errorf("process %s has the stick open, but the holders are %q", who, s.MediaHolders)
	}
	must(t, reader.Process.Kill())
	_ = reader.Wait() // killed, as it says
	must(t, poke(w.Dir))
	if s := w.Await(sprout.Path, func(s client.Sprout) bool { return s.SafeToUnplug }); len(s.MediaHolders) > 0 {
		t.Errorf("safe to unplug, but held by %q", s.MediaHolders)
	}
}

// openBySomebody starts a process that has a device open and nothing else to do.
func openBySomebody(t *testing.T, device string) *exec.Cmd {
	t.Helper()
	f, err := os.Open(device)
	must(t, err)
	defer f.Close()
	cmd := exec.Command("sleep", "300")
	cmd.Stdin = f
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be over
		_ = cmd.Wait()
	})
	return cmd
}

// poke changes the table of mounts, at which the daemon looks at the media
// again: the kernel tells nobody that a device was closed.
func poke(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}
