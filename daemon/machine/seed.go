package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/mount"
)

// openSeed opens an image file or a block device for reading. Anybody may ask
// for this, so nothing else is ever opened: opening a watchdog, for example,
// starts it. The path is followed once.
func openSeed(path string) (*os.File, os.FileMode, error) {
	named, err := os.OpenFile(path, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fault.New(fault.NoSuchDevice, "there is no %s", path)
	}
	if err != nil {
		return nil, 0, explain(err, "cannot open %s", path)
	}
	defer named.Close()
	info, err := named.Stat()
	if err != nil {
		return nil, 0, explain(err, "cannot use %s", path)
	}
	block := info.Mode().Type()&(fs.ModeDevice|fs.ModeCharDevice) == fs.ModeDevice
	if !info.Mode().IsRegular() && !block {
		return nil, 0, fault.New(fault.NotSeed, "%s is neither an image file nor a block device", path)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", named.Fd()), os.O_RDONLY|unix.O_NONBLOCK, 0)
	return f, info.Mode(), explain(err, "cannot open %s", path)
}

// InspectSeed implements [daemon.Seeder].
func (m *Machine) InspectSeed(_ context.Context, path string) (daemon.SeedReport, error) {
	f, _, err := openSeed(path)
	if err != nil {
		return daemon.SeedReport{}, err
	}
	defer f.Close()
	return inspect(f, path)
}

// inspect reads the superblock of an opened image or device.
func inspect(f *os.File, path string) (daemon.SeedReport, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return daemon.SeedReport{}, explain(err, "cannot read the size of %s", path)
	}
	super, err := btrfs.ReadSuper(f, size)
	switch {
	case errors.Is(err, btrfs.ErrNotBtrfs):
		return daemon.SeedReport{}, fault.New(fault.NotSeed,
			"%s holds no Btrfs file system; a seed is made with `mkfs.btrfs --rootdir DIR IMAGE` and `btrfstune -S 1 IMAGE`", path)
	case errors.Is(err, btrfs.ErrTruncated):
		return daemon.SeedReport{}, fault.New(fault.SeedDamaged,
			"%s is truncated: it has %d bytes, its file system %d", path, size, super.Size)
	case errors.Is(err, btrfs.ErrSuperCorrupt):
		return daemon.SeedReport{}, fault.Wrap(err, fault.SeedDamaged, "the superblock of %s is damaged", path)
	case err != nil:
		return daemon.SeedReport{}, fault.Wrap(err, fault.IOError, "cannot read %s", path)
	}
	report := daemon.SeedReport{
		Seeding: super.Seeding, FSID: super.FSID.String(), Label: super.Label, Size: super.Size, Used: super.Used,
		CsumType: super.CsumType.String(), MetadataProfile: super.MetadataProfile, Reasons: super.Unsupported("/"),
	}
	if super.NumDevices > 1 {
		report.Reasons = append(report.Reasons, fmt.Sprintf("it is one of %d devices of a file system; a seed must be a single device", super.NumDevices))
	}
	report.Supported = len(report.Reasons) == 0
	return report, nil
}

// AttachSeed implements [daemon.Seeder].
func (m *Machine) AttachSeed(ctx context.Context, path string) (block.ID, bool, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	f, mode, err := openSeed(path)
	if err != nil {
		return block.ID{}, false, err
	}
	defer f.Close()
	// Looked at again through the descriptor that is used: the path may name
	// something else by now.
	report, err := inspect(f, path)
	if err == nil && !report.Seeding {
		err = fault.New(fault.NotSeed, "%s is no seed any more", path)
	}
	if err != nil {
		return block.ID{}, false, err
	}
	if !mode.IsRegular() {
		d, err := m.blocks.ByPath(ctx, path)
		if err != nil {
			return block.ID{}, false, explain(err, "cannot use %s", path)
		}
		if len(d.Holders) > 0 {
			return block.ID{}, false, fault.New(fault.DeviceBusy, "%s is in use: %s", path, plan.HoldersText(d.Holders))
		}
		return d.ID, false, nil
	}
	info, err := f.Stat()
	if err != nil {
		return block.ID{}, false, explain(err, "cannot read the size of %s", path)
	}
	loop, err := m.blocks.AttachLoop(ctx, f, block.LoopOptions{
		ReadOnly: true, SizeLimit: uint64(info.Size()), //nolint:gosec // a size is never negative
		// Until it is mounted the loop goes with this process, if that dies.
		Autoclear: true,
	})
	if err != nil {
		return block.ID{}, false, explain(err, "cannot attach %s to a loop device", path)
	}
	m.mu.Lock()
	m.held[loop.Num] = &loop
	m.mu.Unlock()
	return loop.ID, true, nil
}

// letGo closes the descriptor that keeps a loop which is not mounted yet.
func (m *Machine) letGo(id block.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if loop, ok := m.held[id.Num]; ok && loop.Same(id) {
		delete(m.held, id.Num)
		_ = loop.Close() // opened for reading only: nothing is lost
	}
}

// MountSeed implements [daemon.Seeder].
func (m *Machine) MountSeed(_ context.Context, seed block.ID, mountpoint string, options []string) error {
	o := mount.ParseOptions(strings.Join(options, ","))
	o.ReadOnly = true
	err := mount.Mount(seed.Path, mountpoint, "btrfs", o)
	switch {
	case err == nil:
		m.letGo(seed) // the mount keeps it from now on
		return nil
	case errors.Is(err, unix.EINVAL):
		return fault.Wrap(err, fault.InvalidArgs, "cannot mount the seed with these options")
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY):
		return fault.Wrap(err, fault.DeviceBusy, "the seed is mounted elsewhere, and not as a sprout")
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EIO):
		return fault.Wrap(err, fault.SeedDamaged, "the seed is damaged")
	}
	return explain(err, "cannot mount the seed at %s", mountpoint)
}

// unmountFor is how long an unmount waits for those who only have a look, and
// unmountEvery how often it tries.
const (
	unmountFor   = 2 * time.Second
	unmountEvery = 20 * time.Millisecond
)

// Unmount implements [daemon.Seeder]. The daemon itself has a file system open
// for the moment in which it looks at it.
func (m *Machine) Unmount(ctx context.Context, mountpoint string) error {
	trying, cancel := context.WithTimeout(ctx, unmountFor)
	defer cancel()
	ticker := time.NewTicker(unmountEvery)
	defer ticker.Stop()
	for {
		err := mount.Unmount(mountpoint, false)
		var busy *mount.BusyError
		if !errors.As(err, &busy) || len(busy.Mounts) > 0 ||
			slices.ContainsFunc(busy.Users, func(u mount.User) bool { return u.PID != os.Getpid() }) {
			return explain(err, "cannot unmount %s", mountpoint)
		}
		select {
		case <-ticker.C:
		case <-trying.Done():
			return explain(err, "cannot unmount %s", mountpoint)
		}
	}
}

// Adopt implements [daemon.Seeder].
func (m *Machine) Adopt(_ context.Context, zrams []block.ID) []block.ID {
	var ours []block.ID
	for _, id := range zrams {
		if id.Num.IsLoop() { // what detaches it looks at it again
			ours = append(ours, id)
		} else if now, err := m.zrams.Adopt(id); err == nil {
			ours = append(ours, now)
		}
	}
	return ours
}
