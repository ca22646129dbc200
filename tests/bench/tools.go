package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/tests/seedtest"
)

// errSkip is an error for what cannot be measured here, and no failure.
var errSkip = errors.New("left out")

// bout is what a tool works on: an image on a source, and a target that is empty.
type bout struct {
	*bench
	source source
	stick  stick
	image  image
	target *seedtest.Disk
	check  bool // compare the number of files afterwards
}

// path of the image.
func (r bout) path() string { return r.stick.path(r.image) }

// tool is one way to get a system from a source to a target.
type tool struct {
	name  string // on the command line and in the JSON file
	label string // in tables
	image string
	run   func(ctx context.Context, r bout) (outcome, error)
}

// tools are all of them, in the order of the table and of the rounds: those whose
// ratio is to be within some percent run one right after the other, for the
// machine is faster in one minute than in the next.
func tools() []tool {
	return []tool{
		{"flatten", "sproutd flatten", built, flattenBy(nil)},
		{"bare", "bare ioctls", built, bareFlatten},
		{"flatten-release", "sproutd flatten, release_first", built, flattenBy(map[string]any{"release_first": true})},
		{"release-ram", "sproutd release to RAM", built, releaseToRAM},
		{"release-dir", "sproutd release to a directory", built, releaseToDir},
		{"flatten-plain", "sproutd flatten, plain seed", plain, flattenBy(nil)},
		{"bare-plain", "bare ioctls, plain seed", plain, bareFlatten},
		{"flatten-8m", "sproutd flatten, 8 MiB groups, not compressed", rootdir, flattenBy(nil)},
		{"flatten-dup", "sproutd flatten, plain, dup metadata", plainDup, flattenBy(nil)},
		{"rsync-ext4", "rsync (Anaconda) to ext4", plain, copier("ext4", rsync)},
		{"rsync-btrfs", "rsync (Anaconda) to Btrfs zstd:1", plain, copier("btrfs", rsync)},
		{"unsquashfs-ext4", "unsquashfs (Calamares) to ext4", squash, copier("ext4", unsquashfs)},
		{"unsquashfs-btrfs", "unsquashfs (Calamares) to Btrfs zstd:1", squash, copier("btrfs", unsquashfs)},
		{"cp-ext4", "cp -a to ext4", plain, copier("ext4", func(from, to string) []string { return []string{"cp", "-a", from + "/.", to} })},
		{"tar-ext4", "tar, piped, to ext4", plain, copier("ext4", tarPipe)},
		{"send", "btrfs send and receive", single, copier("btrfs", sendReceive)},
		{"replace", "btrfs replace", single, replace},
		{"dd", "dd of the image", built, dd},
	}
}

// rsync as Anaconda calls it for a live image: InstallFromImageTask in
// pyanaconda/modules/payloads/payload/live_image/installation.py.
func rsync(from, to string) []string {
	args := []string{"rsync", "-pogAXtlHrDx", "--stats", "--info=flist2,name,progress2", "--no-inc-recursive"}
	for _, pattern := range []string{
		"/dev/", "/proc/", "/tmp/*", "/sys/", "/run/", "/boot/*rescue*", "/boot/loader/", "/boot/efi/", "/etc/machine-id", "/etc/machine-info",
	} {
		args = append(args, "--exclude", pattern)
	}
	return append(args, from+"/", to)
}

// unsquashfs as an installer calls it, without what it would print.
func unsquashfs(from, to string) []string {
	return []string{"unsquashfs", "-no-progress", "-quiet", "-force", "-dest", to, from}
}

func tarPipe(from, to string) []string {
	return []string{
		"bash", "-c", `set -o pipefail; tar -C "$1" --xattrs --acls -cf - . | tar -C "$2" --xattrs --acls --numeric-owner -xpf -`, "tar", from, to,
	}
}

// sendReceive sends extents compressed as they are, which is the fastest way.
func sendReceive(from, to string) []string {
	return []string{
		"bash", "-c", `set -o pipefail; btrfs -q send --proto 2 --compressed-data "$1" | btrfs -q receive "$2"`, "send",
		filepath.Join(from, snapshotName), to,
	}
}

// copier measures a program that copies files onto a new file system. The
// source could be unplugged when it ends.
func copier(fstype string, args func(from, to string) []string) func(context.Context, bout) (outcome, error) {
	return func(ctx context.Context, r bout) (o outcome, err error) {
		to, err := r.format(ctx, fstype)
		if err != nil {
			return o, err
		}
		defer func() { err = errors.Join(err, unmount(to)) }()
		g := gauge{stick: r.stick, target: r.target}
		from := r.path()
		if r.image.Name != squash {
			seen, err := r.attach(ctx, from, "btrfs", false)
			if err != nil {
				return o, err
			}
			defer func() { err = errors.Join(err, seen.detach()) }()
			from, g.loops = seen.dir, []string{seen.loop}
		}
		argv := args(from, to)
		o, err = g.run(func() (time.Time, error) {
			err := command(ctx, argv[0], argv[1:]...)
			return time.Now(), err
		}, func() error { return syncfs(to) })
		return o, cmp.Or(err, r.compare(to, 1))
	}
}

// format makes a file system as an installer does, with its defaults.
func (r bout) format(ctx context.Context, fstype string) (string, error) {
	var o mount.Options
	force := "-F"
	if fstype == "btrfs" {
		force, o.Data = "-f", []string{"compress=zstd:1"}
	}
	if err := command(ctx, "mkfs."+fstype, "-q", force, r.target.Path); err != nil {
		return "", err
	}
	return r.mount(r.target.Path, fstype, o)
}

// compare counts the files: none of the tools may get away with fewer. They are
// there so many times.
func (r bout) compare(dir string, times int64) error {
	if !r.check {
		return nil
	}
	n, err := countFiles(dir)
	if err == nil && n != times*r.image.Tree.Files {
		err = fmt.Errorf("there are %d files on the target, and %d times %d in the image", n, times, r.image.Tree.Files)
	}
	return err
}

func syncfs(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// dd copies the whole image, which its length has to be read for.
func dd(ctx context.Context, r bout) (outcome, error) {
	g := gauge{stick: r.stick, target: r.target}
	return g.run(func() (time.Time, error) {
		err := command(ctx, "dd", "if="+r.path(), "of="+r.target.Path, "bs=4M", "conv=fsync", "status=none")
		return time.Now(), err
	}, func() error { return nil })
}

// replace moves a filesystem that is no seed. It writes to the source, so it gets
// one of its own.
func replace(ctx context.Context, r bout) (o outcome, err error) {
	own, err := os.MkdirTemp(filepath.Dir(r.image.path), "own-")
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(own)) }()
	mine := r.image
	mine.path = filepath.Join(own, filepath.Base(r.image.path))
	if err := command(ctx, "cp", "--sparse=always", "--reflink=auto", r.image.path, mine.path); err != nil {
		return o, err
	}
	mineStick, err := r.plug(r.source, own)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, mineStick.unplug()) }()
	seen, err := r.attach(ctx, mineStick.path(mine), "btrfs", true)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, seen.detach()) }()
	g := gauge{stick: mineStick, target: r.target, loops: []string{seen.loop}}
	o, err = g.run(func() (time.Time, error) {
		// -B: it stays until it is done.
		err := command(ctx, "btrfs", "-q", "replace", "start", "-B", "-f", "1", r.target.Path, seen.dir)
		return time.Now(), err
	}, func() error { return syncfs(seen.dir) })
	return o, cmp.Or(err, r.compare(seen.dir, 2)) // with the snapshot
}

// bareFlatten is what the daemon does, without the daemon.
func bareFlatten(ctx context.Context, r bout) (o outcome, err error) {
	err = r.bareSprout(ctx, r.path(), "", func(s bareSprout) error {
		g := gauge{stick: r.stick, target: r.target, loops: []string{s.members[0].Path}}
		o, err = g.run(func() (time.Time, error) {
			err := s.flatten(r.target.Path)
			return time.Now(), err
		}, func() error { return nil })
		return cmp.Or(err, r.compare(s.mnt, 1))
	})
	return o, err
}

// flattenBy measures a flatten by the daemon with further options.
func flattenBy(further map[string]any) func(context.Context, bout) (outcome, error) {
	return func(ctx context.Context, r bout) (outcome, error) {
		options := map[string]any{"bootloader": "none"}
		maps.Copy(options, further)
		return r.byDaemon(ctx, "Flatten", r.target.Path, options, "")
	}
}

func releaseToRAM(ctx context.Context, r bout) (outcome, error) {
	return r.byDaemon(ctx, "Release", "ram", nil, "")
}

// releaseToDir lets the copy lie on a file system of the target disk.
func releaseToDir(ctx context.Context, r bout) (o outcome, err error) {
	to, err := r.format(ctx, "ext4")
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, unmount(to)) }()
	return r.byDaemon(ctx, "Release", to, nil, to)
}

// byDaemon measures from the call of a method of a sprout to the reply of Wait,
// and when the stick was free. What is written to the file system at sync, if
// that is not "", has to be out as well.
func (r bout) byDaemon(ctx context.Context, method, destination string, options map[string]any, sync string) (o outcome, err error) {
	whole := context.WithoutCancel(ctx) // as the bare ioctls cannot be cut short
	err = r.live(ctx, r.path(), client.CreateOptions{}, func(l live) error {
		conn, err := godbus.ConnectSystemBus()
		if err != nil {
			return err
		}
		defer conn.Close()
		object := conn.Object(names.Bus, godbus.ObjectPath(l.sprout))
		var xml string
		if err := object.CallWithContext(ctx, names.Introspectable+".Introspect", 0).Store(&xml); err != nil {
			return err
		}
		_, first := options["release_first"]
		if (method == "Release" || first) && !strings.Contains(xml, `method name="Release"`) {
			return fmt.Errorf("%w: this sproutd has no Release", errSkip)
		}
		loops, err := loopsOn(r.path())
		if err != nil || len(loops) != 1 {
			return fmt.Errorf("cannot find the loop device of %s: there are %q: %w", r.path(), loops, err)
		}
		variants := map[string]godbus.Variant{}
		for key, value := range options {
			variants[key] = godbus.MakeVariant(value)
		}
		g := gauge{stick: r.stick, target: r.target, loops: loops, pid: l.daemon.PID}
		o, err = g.run(func() (at time.Time, err error) {
			free, stop := watchLoop(whole, loops[0], r.path())
			defer func() { err = errors.Join(err, stop()) }()
			var job godbus.ObjectPath
			if err := object.CallWithContext(whole, names.Sprout+"."+method, 0, destination, variants).Store(&job); err != nil {
				return time.Time{}, err
			}
			if _, err := l.bus.Wait(whole, string(job)); err != nil {
				return time.Time{}, err
			}
			select {
			case at := <-free:
				return at, nil
			case <-time.After(time.Second):
				return time.Time{}, fmt.Errorf("%s has ended, and %s is still on %s", method, loops[0], r.path())
			}
		}, func() error {
			if sync == "" {
				return nil
			}
			return syncfs(sync)
		})
		return cmp.Or(err, r.compare(l.mnt, 1))
	})
	if err != nil {
		return o, err
	}
	polling, err := r.log.polling() // the daemon has ended
	o.Polling = polling.Seconds()
	return o, err
}

// watchLoop says when a loop device has left its backing file. The kernel tells of
// it: to look every few ms slowed down by a twentieth what is measured.
func watchLoop(ctx context.Context, loop, path string) (free <-chan time.Time, stop func() error) {
	at := make(chan time.Time, 1)
	ctx, cancel := context.WithCancel(ctx)
	var watching errgroup.Group
	watching.Go(func() error {
		return block.New().Watch(ctx, func(block.Event) {
			if !backed(loop, path) {
				select {
				case at <- time.Now():
				default: // it had left before
				}
			}
		})
	})
	return at, func() error {
		cancel()
		return watching.Wait()
	}
}
