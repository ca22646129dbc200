package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/seed"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// story is what is told, and what there is to undo.
type story struct {
	show printer
	tree int64  // how much of this machine's own files goes into the seed, in bytes
	dir  string // everything is in it
	undo []func() error

	stick  *seedtest.Stick
	disk   *seedtest.Disk
	mnt    string // where the sprout is mounted
	client *client.Client
	daemon *harness.Daemon
	spec   harness.Spec
	sprout string // its object
	before seedtest.Manifest
	writer *seedtest.Writer
	reader *seedtest.Reader
}

func (s *story) tell(ctx context.Context) error {
	stages := []struct {
		title string
		run   func(context.Context) error
	}{
		{"A live system on a stick, and an empty internal disk", s.prepare},
		{"A private bus, and sproutd on it", s.start},
		{"Volatile: the seed is mounted, and RAM takes what is written", s.create},
		{"Persistent: what was written moves from RAM to the stick", s.persist},
		{"Installed: everything moves to the internal disk", s.flatten},
		{"The stick is unplugged", s.unplug},
		{"Everything is read again, from the internal disk", s.compare},
	}
	times := [][]string{{"STAGE", "TIME"}}
	begin := time.Now()
	for i, stage := range stages {
		s.show.heading(i+1, stage.title)
		from := time.Now()
		if err := cmp.Or(context.Cause(ctx), stage.run(ctx)); err != nil {
			return err
		}
		times = append(times, []string{stage.title, seconds(time.Since(from))})
	}
	s.show.text("")
	s.show.table(append(times, []string{"all together", seconds(time.Since(begin))})...)
	s.show.text("\n%s", s.show.paint(bold+";"+green, fmt.Sprintf("All %d files are the same.", countFiles(s.before))))
	return nil
}

func (s *story) prepare(ctx context.Context) error {
	var err error
	if s.dir, err = os.MkdirTemp("", "sproutd-demo-"); err != nil {
		return err
	}
	// Low level: people watch this, and each of them waits for it.
	tree, image := filepath.Join(s.dir, "tree"), filepath.Join(s.dir, "root.img")
	if err := fill(ctx, tree, s.tree); err != nil {
		return err
	}
	built, err := seed.Build(ctx, seed.Options{Source: tree, Image: image, Label: "sproutd-demo", CompressLevel: 1})
	if err != nil {
		return err
	}
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	s.show.text("A seed of %s was built of this machine's own files: %s on disk, with zstd.", size(built.BytesIn), size(built.UsedBytes))

	// Not cut short: what was made half is hard to undo.
	if s.stick, err = seedtest.NewStick(context.WithoutCancel(ctx), seedtest.StickSpec{
		Dir: s.dir, Seed: image, PersistSize: seedtest.GiB,
	}); err != nil {
		return err
	}
	s.later(s.stick.Close)
	if s.disk, err = seedtest.NewDisk(context.WithoutCancel(ctx), seedtest.DiskSpec{Dir: s.dir}); err != nil {
		return err
	}
	s.later(s.disk.Close)
	s.show.text("")
	s.show.table(
		[]string{"DEVICE", "STANDS FOR"},
		[]string{s.stick.Path, "the stick, with a partition table"},
		[]string{s.stick.Media, "its first partition: ext4, mounted read-only, with the seed"},
		[]string{s.stick.Persist, "its second partition: empty, 1 GiB"},
		[]string{s.disk.Path, "the internal disk: empty, 2 GiB"},
	)
	s.show.text("\nThe seed is %s", s.stick.Seed)
	return os.Remove(image) // the stick has its own
}

// fill copies that many bytes of this machine's own files, of several places so
// that there are large and small ones, and makes /home.
func fill(ctx context.Context, dir string, bytes int64) error {
	left := bytes
	for _, src := range []string{"/usr/share", "/usr/lib", "/usr/bin", "/usr/local", "/opt"} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if info, err := os.Lstat(src); err != nil || !info.IsDir() {
			continue
		}
		limit := left
		if src == "/usr/share" {
			limit = bytes / 2
		}
		to := filepath.Join(dir, src)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		n, err := seedtest.CopyTree(to, src, limit)
		if left -= n; err != nil {
			return err
		}
		if left <= 0 {
			return os.MkdirAll(filepath.Join(dir, "home"), 0o755)
		}
	}
	return fmt.Errorf("cannot fill a seed: this machine's own files are %s short", size(uint64(left)))
}

func (s *story) start(ctx context.Context) error {
	bus, err := harness.StartBus(s.dir)
	if err != nil {
		return err
	}
	s.later(func() error { bus.Stop(); return nil })
	if err := os.Setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.Address); err != nil {
		return err
	}
	s.show.command("export", "DBUS_SYSTEM_BUS_ADDRESS="+bus.Address)

	binary, err := exec.LookPath("sproutd")
	if err != nil {
		return fmt.Errorf("cannot find what was built: %w", err)
	}
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return err
	}
	s.later(log.Close)
	s.spec = harness.Spec{Binary: binary, Address: bus.Address, Dir: s.dir, Log: log}
	from := time.Now()
	if s.daemon, err = harness.StartDaemon(ctx, s.spec); err != nil {
		return err
	}
	s.later(func() error { s.daemon.Stop(); return nil })
	s.show.command("sproutd", "--state-dir", filepath.Join(s.dir, "state"))
	s.show.text("It was on the bus after %d ms.\n", time.Since(from).Milliseconds())
	if s.client, err = client.Connect(ctx, client.Options{NoAutoStart: true}); err != nil {
		return err
	}
	s.later(s.client.Close)
	_, err = s.show.busctl("get-property", names.Bus, names.Root, names.Manager, "Version")
	return err
}

func (s *story) create(ctx context.Context) error {
	if _, err := s.show.busctl("call", names.Bus, names.Root, names.Manager, "InspectSeed", "s", s.stick.Seed); err != nil {
		return err
	}
	s.mnt = filepath.Join(s.dir, "live")
	if err := os.Mkdir(s.mnt, 0o755); err != nil {
		return err
	}
	s.later(s.tearDown)
	s.show.text("")
	answer, err := s.show.busctl("call", names.Bus, names.Root, names.Manager, "CreateSprout", "ssa{sv}", s.stick.Seed, s.mnt, "0")
	if err != nil {
		return err
	}
	s.sprout = object(answer)
	s.show.text("")
	if err := s.show.situation(s.sprout); err != nil {
		return err
	}
	if s.before, err = s.scan(ctx); err != nil {
		return err
	}
	s.show.text("\nAll that is in /usr, names and owners and times included, has the checksum\n   %s", s.show.paint(bold, checksum(s.before)))
	if s.writer, err = seedtest.StartWriter(filepath.Join(s.mnt, "home", "writer")); err != nil {
		return err
	}
	s.later(s.writer.Stop)
	if s.reader, err = seedtest.StartReader(filepath.Join(s.mnt, "usr"), s.before); err != nil {
		return err
	}
	s.later(s.reader.Stop)
	s.show.text("From here on a program appends, replaces, deletes and fsyncs files in /home,\nand another one reads files of /usr and compares them.")
	return s.writer.AwaitFsyncs(ctx, 20)
}

func (s *story) persist(ctx context.Context) error {
	return s.move(ctx, "Persist", "sa{sv}", s.stick.Persist, "0")
}

func (s *story) flatten(ctx context.Context) error {
	if err := s.move(ctx, "Flatten", "sa{sv}", s.disk.Path, "1", "bootloader", "s", "none"); err != nil {
		return err
	}
	return s.writer.AwaitFsyncs(ctx, 20)
}

// move calls a method that starts a job and follows the job to its end.
func (s *story) move(ctx context.Context, method string, args ...string) error {
	s.writer.Lap()
	answer, err := s.show.busctl(append([]string{"call", names.Bus, s.sprout, names.Sprout, method}, args...)...)
	if err != nil {
		return err
	}
	job := object(answer)
	watch, err := s.client.WatchJob(ctx, job)
	if err != nil {
		return err
	}
	defer watch.Close()
	step := ""
	for update := range watch.Updates() {
		if update.Step != step && update.Step != "" {
			step = update.Step
			s.show.text("   step %d of %d: %s", update.StepNumber, update.StepCount, step)
		}
		if update.BytesDone > 0 || update.Finished() {
			s.show.progress(update)
		}
	}
	if err := watch.Err(); err != nil {
		return err
	}
	lap := s.writer.Lap()
	if _, err := s.show.busctl("call", names.Bus, job, names.Job, "Wait"); err != nil {
		return err
	}
	s.show.text("")
	if err := s.show.situation(s.sprout); err != nil {
		return err
	}
	s.show.text("   meanwhile the writer did %d operations and %d fsyncs, the longest of %d ms",
		lap.Ops, lap.Fsyncs, lap.LongestFsync.Milliseconds())
	return nil
}

func (s *story) unplug(ctx context.Context) error {
	s.show.command("umount", s.stick.MountPoint)
	if err := s.stick.Unmount(); err != nil {
		return err
	}
	// The daemon hears of the unmount from the kernel, a moment later; and on a
	// desktop others have a look at every device.
	held := ""
	err := until(ctx, func() (bool, error) {
		sprout, err := s.client.Sprout(ctx, s.sprout)
		if now := strings.Join(sprout.MediaHolders, ", "); now != held && err == nil && !sprout.SafeToUnplug {
			held = now
			s.show.text("   still in use: %s", held)
		}
		return sprout.SafeToUnplug, err
	})
	if err != nil {
		return err
	}
	if err := s.show.situation(s.sprout); err != nil {
		return err
	}
	stick := s.stick.Path
	s.show.command("losetup", "--detach", stick)
	if err := s.stick.Close(); err != nil {
		return err
	}
	err = until(ctx, func() (bool, error) {
		_, err := os.Stat("/sys/block/" + filepath.Base(stick) + "/loop/backing_file")
		return errors.Is(err, fs.ErrNotExist), nil
	})
	if err != nil {
		return fmt.Errorf("cannot unplug the stick: %s is still attached: %w", stick, err)
	}
	s.show.text("   %s has no medium any more, and its image is deleted.", stick)
	return s.writer.AwaitFsyncs(ctx, 20)
}

// until asks again and again, and gives up after a while.
func until(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("this takes too long"))
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *story) compare(ctx context.Context) error {
	files, bytes := s.reader.Stats()
	total := s.writer.Stats()
	if err := errors.Join(s.reader.Stop(), s.writer.Stop(), s.writer.Verify(s.writer.Dir())); err != nil {
		return err
	}
	s.show.text("The writer did %d operations and %d fsyncs, the longest of %d ms; all it fsynced is there.",
		total.Ops, total.Fsyncs, total.LongestFsync.Milliseconds())
	s.show.text("The reader compared %d files (%s) on the way; all were right.", files, size(uint64(bytes)))
	if err := evict(filepath.Join(s.mnt, "usr")); err != nil {
		return err
	}
	read, err := readFrom(s.disk.Path)
	if err != nil {
		return err
	}
	after, err := s.scan(ctx)
	if err != nil {
		return err
	}
	now, err := readFrom(s.disk.Path)
	if err != nil {
		return err
	}
	s.show.text("Then everything was read again, %s from %s:\n", size(uint64(now-read)), s.disk.Path)
	s.show.table(
		[]string{"", "FILES", "CHECKSUM OF EVERYTHING"},
		[]string{"before", fmt.Sprint(countFiles(s.before)), checksum(s.before)},
		[]string{"after", fmt.Sprint(countFiles(after)), checksum(after)},
	)
	if lines := seedtest.Diff(s.before, after); len(lines) > 0 {
		return fmt.Errorf("cannot call this a success: %d differences:\n%s", len(lines), strings.Join(lines[:min(len(lines), 20)], "\n"))
	}
	return nil
}

func (s *story) scan(ctx context.Context) (seedtest.Manifest, error) {
	return seedtest.TakeManifest(ctx, filepath.Join(s.mnt, "usr"))
}

// tearDown ends the job that runs, if any, and takes the sprout down: through
// the daemon, for it alone knows what it made. A daemon that has ended is
// started over.
func (s *story) tearDown() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	select {
	case <-s.daemon.Ended():
		var err error
		if s.daemon, err = harness.StartDaemon(ctx, s.spec); err != nil {
			return err
		}
	default:
	}
	objects, err := s.client.Objects(ctx)
	if err != nil {
		return err
	}
	for _, job := range objects.Jobs {
		if !job.Finished() {
			_ = s.client.Cancel(ctx, job.Path) // it may end by itself meanwhile
			_, _ = s.client.Wait(ctx, job.Path)
		}
	}
	for _, sprout := range objects.Sprouts {
		if sprout.MountPoint != s.mnt {
			continue // another live system of this machine
		}
		err = s.client.Teardown(ctx, sprout.Path)
		for client.CodeOf(err) == "DeviceBusy" && ctx.Err() == nil {
			time.Sleep(100 * time.Millisecond) // somebody looks around in it
			err = s.client.Teardown(ctx, sprout.Path)
		}
	}
	return err
}

// checksum is one for everything that a manifest has.
func checksum(m seedtest.Manifest) string {
	h := sha256.New()
	for _, path := range slices.Sorted(maps.Keys(m)) {
		r := m[path]
		fmt.Fprintf(h, "%q %q %o %d %d %d %d %q %d %q %q %q %x %v %x %q\n", path, r.Type, r.Mode, r.UID, r.GID, r.Size,
			r.ModTime.UnixNano(), r.Device, r.Links, r.LinkOf, r.Target, r.Xattrs, r.Sum, r.Data, r.Flags, r.Subvolume)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// countFiles counts everything that has a name.
func countFiles(m seedtest.Manifest) int { return len(m) }

// evict drops the files of a tree from the page cache, so that they are read
// from the disk the next time.
func evict(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
	})
}

// readFrom gives the number of bytes read from a disk so far, as the kernel
// counts them (Documentation/block/stat.rst).
func readFrom(disk string) (int64, error) {
	raw, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	if err != nil {
		return 0, err
	}
	var requests, merged, sectors int64
	if _, err := fmt.Sscan(string(raw), &requests, &merged, &sectors); err != nil {
		return 0, fmt.Errorf("cannot read the counters of %s: %w", disk, err)
	}
	return 512 * sectors, nil
}
