package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// SeedFile implements [daemon.Looker].
func (m *Machine) SeedFile(_ context.Context, seed, media block.ID) (plan.SeedFile, error) {
	if !seed.Num.IsLoop() {
		return plan.SeedFile{}, nil
	}
	loop, err := m.blocks.LoopStatus(seed.Num)
	if errors.Is(err, fs.ErrNotExist) {
		return plan.SeedFile{}, nil // a partition of a loop, or gone
	}
	if err != nil {
		return plan.SeedFile{}, explain(err, "cannot tell what the seed is read from")
	}
	f := plan.SeedFile{Loop: true, Path: loop.BackingFile, Offset: loop.Offset, Limit: loop.SizeLimit}
	if f.Device, err = m.blocks.LoopOver(seed.Num); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return plan.SeedFile{}, explain(err, "cannot tell what the seed is read from")
	}
	if err := m.blocks.LoopFixed(seed.Num); errors.Is(err, block.ErrLoopWritable) {
		f.Fixed = fmt.Sprintf("%s can be written, and the kernel puts another file only behind a loop device that cannot", seed.Path)
	} else if err != nil {
		return plan.SeedFile{}, explain(err, "cannot look at %s", seed.Path)
	}
	if why := newKernel(m.kernel); why != "" {
		f.Fixed = why
	}
	memory, err := m.blocks.InMemory(seed.Num)
	if err != nil {
		return plan.SeedFile{}, explain(err, "cannot tell what the seed is read from")
	}
	// An image that somebody has in a tmpfs is none that was released.
	f.Memory = memory && strings.HasPrefix(loop.BackingFile, "/memfd:"+memoryName)
	f.Elsewhere = !media.Num.IsZero() && m.elsewhere(seed.Num, media.Num)
	return f, nil
}

// elsewhere reports whether it is certain that the file behind a loop is not on a
// disk. Where the device it is on is gone, nothing is.
func (m *Machine) elsewhere(loop, disk block.DevNum) bool {
	backing, err := m.blocks.BackingDevice(loop)
	if err != nil {
		return errors.Is(err, block.ErrNoDevice)
	}
	on, err := m.blocks.WholeDisk(backing.Num)
	return err == nil && on.Num != disk
}

// newKernel says why the file behind a mounted seed cannot be changed on a
// kernel of the given release, "" where it can. From 6.19 on a Btrfs may take the
// change for the loss of its device and shut itself down, which nobody can see
// before. Source: fs/btrfs/super.c, btrfs_remove_bdev.
func newKernel(release string) string {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil || major > 6 || major == 6 && minor > 18 {
		return "on the kernel " + release + " Btrfs may take the change for the loss of its device; this was tried up to 6.18"
	}
	return ""
}

// Destination implements [daemon.Looker].
func (m *Machine) Destination(ctx context.Context, path string, media block.ID) (*plan.Target, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(fault.NoSuchDevice, "there is no directory or device %s", path)
	case err != nil:
		return nil, explain(err, "cannot use %s", path)
	case info.Mode()&fs.ModeDevice != 0:
		d, err := m.Device(ctx, path)
		return &plan.Target{Device: d}, err
	case !info.IsDir():
		return nil, fault.New(fault.InvalidArgs, "%s is no directory and no device", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, explain(err, "cannot use %s", path)
	}
	t := &plan.Target{Device: block.Device{ID: block.ID{Path: real}}}
	var st unix.Statfs_t
	if err := unix.Statfs(real, &st); err != nil {
		return nil, explain(err, "cannot look at the file system of %s", real)
	}
	t.ReadOnly = st.Flags&unix.ST_RDONLY != 0
	t.Free = st.Bavail * uint64(st.Bsize) //nolint:gosec // a block size is never negative
	switch st.Type {
	case unix.MSDOS_SUPER_MAGIC, exfatMagic:
		return nil, fault.New(fault.NotSupported, "the file system of %s has no holes, so the copy would take as much room as the whole image", real)
	case unix.OVERLAYFS_SUPER_MAGIC:
		return nil, fault.New(fault.NotSupported, "%s is on an overlay, which cannot be told from the sprout below it", real)
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		available, err := meminfo("MemAvailable")
		if err != nil {
			return nil, explain(err, "cannot use %s", real)
		}
		t.Free = min(t.Free, available-min(available, leastMemory))
	case unix.BTRFS_SUPER_MAGIC:
		if t.MemberOf, err = fsidOf(real); err != nil {
			return nil, err
		}
	}
	on, err := m.blocks.Of(real)
	if errors.Is(err, block.ErrNoDevice) {
		return t, nil
	}
	if err != nil {
		return nil, explain(err, "cannot tell what %s is on", real)
	}
	disk, err := m.blocks.WholeDisk(on.Num)
	t.Media = err == nil && !media.Num.IsZero() && disk.Num == media.Num
	return t, explain(err, "cannot tell which disk %s is on", real)
}

// exfatMagic is EXFAT_SUPER_MAGIC. Source: linux/magic.h.
const exfatMagic = 0x2011BAB0

func fsidOf(dir string) (string, error) {
	f, err := btrfs.Open(dir)
	if err != nil {
		return "", explain(err, "cannot open the file system of %s", dir)
	}
	defer f.Close()
	info, err := f.Info()
	return info.FSID.String(), explain(err, "cannot look at the file system of %s", dir)
}

// memoryName is the name of a copy in memory, as the kernel shows it.
const memoryName = "sproutd-seed"

// partial is what the name of a copy ends with until the seed is read from it.
const partial = ".partial"

// Release implements [daemon.Changer].
func (m *Machine) Release(ctx context.Context, r daemon.Release) (_ daemon.SeedCopy, err error) {
	loop, err := m.blocks.LoopStatus(r.Seed.Num)
	if err != nil {
		return daemon.SeedCopy{}, explain(err, "cannot look at %s", r.Seed.Path)
	}
	if !loop.Same(r.Seed) {
		return daemon.SeedCopy{}, fault.New(fault.NoSuchDevice, "%s is another device now", r.Seed.Path)
	}
	f, err := btrfs.Open(r.MountPoint)
	if err != nil {
		return daemon.SeedCopy{}, explain(err, "cannot open the file system at %s", r.MountPoint)
	}
	defer f.Close()
	source, err := os.OpenFile(r.Seed.Path, os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return daemon.SeedCopy{}, explain(err, "cannot read the seed %s", r.Seed.Path)
	}
	defer source.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &st); err != nil || block.DevNumOf(st.Rdev) != r.Seed.Num {
		return daemon.SeedCopy{}, fault.New(fault.NoSuchDevice, "%s is another device now", r.Seed.Path)
	}
	to, n, err := m.makeCopy(ctx, r, &copier{fs: f, from: source, offset: loop.Offset, progress: r.Progress})
	if err != nil {
		return daemon.SeedCopy{}, err
	}
	changed := false
	defer func() {
		err = errors.Join(err, m.closeCopy(to, !changed))
	}()
	if err := m.change(ctx, r, to, &changed); err != nil {
		return daemon.SeedCopy{}, err
	}
	m.seen.forget(r.Seed.Num)
	return daemon.SeedCopy{Path: to.settle(), Bytes: n}, nil
}

// makeCopy makes the copy, with read-ahead where that can help; why it cannot does
// not matter to anybody. Nothing holds the file behind the seed afterwards.
func (m *Machine) makeCopy(ctx context.Context, r daemon.Release, c *copier) (to *seedCopy, bytes uint64, err error) {
	if ahead, err := m.openAhead(r.MountPoint, r.DevID, r.Seed); err == nil {
		defer ahead.close()
		ahead.askTrees()
		c.behind = ahead
	}
	if r.Device.Num.IsZero() {
		err = c.plan(r)
	} else {
		// Its trees are small, and are read more than once: through the cache.
		trees, openErr := os.Open(fmt.Sprintf("/proc/self/fd/%d", c.from.Fd()))
		if openErr != nil {
			return nil, 0, explain(openErr, "cannot read the seed %s", r.Seed.Path)
		}
		defer trees.Close()
		err = c.planAll(r, trees)
	}
	if err != nil {
		return nil, 0, err
	}
	if to, err = m.newCopy(ctx, r, c.offset+r.Seed.Size); err != nil {
		return nil, 0, err
	}
	c.to = to
	if bytes, err = c.run(ctx); err != nil {
		return nil, 0, errors.Join(err, m.closeCopy(to, true))
	}
	return to, bytes, nil
}

// closeCopy gives up the copy; with remove there is none any more.
func (m *Machine) closeCopy(to *seedCopy, remove bool) error {
	err := to.close(remove)
	if to.device != nil {
		m.seen.forget(to.device.ID().Num)
	}
	return err
}

// change makes the seed's loop read from the copy. The file system is frozen
// meanwhile: see [block.LoopChange].
func (m *Machine) change(ctx context.Context, r daemon.Release, to *seedCopy, changed *bool) error {
	const what = "cannot make the seed read from its copy"
	file, err := to.reopen()
	if err != nil {
		return explain(err, what)
	}
	defer file.Close()
	change, err := m.blocks.PrepareChange(r.Seed, file)
	if errors.Is(err, block.ErrLoopWritable) || errors.Is(err, block.ErrSizeDiffers) {
		return fault.Wrap(err, fault.NotSupported, what)
	}
	if err != nil {
		return explain(err, what)
	}
	defer change.Close()
	// Most is written out before anybody has to wait for it.
	if err := m.Sync(ctx, r.MountPoint); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fault.New(fault.Cancelled, "the copy was cancelled")
	}
	err = frozen(r.MountPoint, func() error {
		err := change.Do()
		*changed = err == nil
		return err
	})
	if err != nil && !*changed {
		return explain(err, what)
	}
	now, checkErr := change.Check()
	if err := errors.Join(err, checkErr); err != nil {
		return explain(err, what)
	}
	if !now.ReadOnly || now.Size != r.Seed.Size {
		return fault.New(fault.Internal, "the seed %s has another size now", r.Seed.Path)
	}
	return nil
}

// seedCopy is a copy that is being made.
type seedCopy struct {
	file *os.File
	// memory is true for a copy without a name.
	memory bool
	// name of the copy in dir, once it is in use.
	dir  *os.File
	name string
	// device is what the copy is on where it is on a block device itself; file has
	// that for nobody else.
	device *block.Handle
	// direct reads and writes it past all caches, nil where that cannot be done.
	direct *os.File
	// sealed is true once there may be a superblock on it.
	sealed bool
}

// newCopy makes the file of the copy, of its full size and all holes.
func (m *Machine) newCopy(ctx context.Context, r daemon.Release, size uint64) (_ *seedCopy, err error) {
	to := &seedCopy{memory: r.To == plan.RAM, name: plan.CopyName(r.SeedFSID)}
	defer func() {
		if err != nil {
			err = errors.Join(err, to.close(true))
		}
	}()
	switch {
	case !r.Device.Num.IsZero():
		return to, m.claim(ctx, r.Device, to)
	case to.memory:
		fd, err := unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			return nil, explain(err, "cannot make a file in memory")
		}
		to.file = os.NewFile(uintptr(fd), "memory")
	default:
		if err := m.SettleCopy(ctx, r.To, r.SeedFSID); err != nil {
			return nil, err
		}
		if to.dir, err = os.OpenFile(r.To, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return nil, explain(err, "cannot open %s", r.To)
		}
		fd, err := unix.Openat(int(to.dir.Fd()), to.name+partial, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, explain(err, "cannot make a file in %s", r.To)
		}
		to.file = os.NewFile(uintptr(fd), filepath.Join(r.To, to.name+partial))
		// It says that somebody is at it; see SettleCopy.
		if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return nil, explain(err, "cannot lock the copy in %s", r.To)
		}
		switch to.direct, err = directly(to.file); {
		case errors.Is(err, unix.EINVAL): // not every file system can
		case err != nil:
			return nil, explain(err, "cannot open the copy in %s", r.To)
		}
	}
	return to, explain(to.file.Truncate(int64(size)), "cannot make a file in %s", r.To) //nolint:gosec // of a device
}

// claim takes the block device for a copy, and makes sure that no superblock of
// another file system is on it, at whatever place.
func (m *Machine) claim(ctx context.Context, id block.ID, to *seedCopy) error {
	m.probing.Lock()
	defer m.probing.Unlock()
	h, d, err := m.hold(ctx, id)
	if err != nil {
		return err
	}
	to.device = h // which locks its disk to the end
	if len(d.Signatures) > 0 {
		return fault.New(fault.TargetNotEmpty, "%s is not empty any more: there is %s on it", id.Path, d.Signatures[0].Type)
	}
	if err := h.WipeBtrfs(); err != nil {
		return explain(err, "cannot wipe %s", id.Path)
	}
	if to.file, err = h.Claim(); err != nil {
		return explain(err, "cannot use %s", id.Path)
	}
	to.direct, err = directly(h.File())
	return explain(err, "cannot open %s", id.Path)
}

// directly opens a file once more, to read and write it past all caches.
func directly(f *os.File) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
}

// reopen gives the copy for reading only, as the loop is to have it: who has a
// file open for writing keeps its file system writable.
func (c *seedCopy) reopen() (*os.File, error) {
	if c.memory {
		const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
		if _, err := unix.FcntlInt(c.file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return nil, fmt.Errorf("cannot seal the copy: %w", err)
		}
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", c.file.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the copy: %w", err)
	}
	return os.NewFile(uintptr(fd), c.file.Name()), nil
}

// settle gives a copy that is in use its name, and gives its path. One that does
// not get it is as good, and gets it from the next life of the daemon.
func (c *seedCopy) settle() string {
	switch {
	case c.memory:
		return ""
	case c.device != nil:
		return c.device.ID().Path
	}
	path := filepath.Join(c.dir.Name(), c.name)
	if err := rename(c.dir, c.name); err != nil {
		return path + partial
	}
	return path
}

// rename gives a copy its name. Another of that name, which an earlier release
// has left, is of the same seed.
func rename(dir *os.File, name string) error {
	err := unix.Renameat(int(dir.Fd()), name+partial, int(dir.Fd()), name)
	if err == nil {
		err = dir.Sync()
	}
	return err
}

// close gives up the copy; with remove there is none any more.
func (c *seedCopy) close(remove bool) error {
	var errs []error
	if c.dir != nil {
		if remove && c.file != nil {
			if err := unix.Unlinkat(int(c.dir.Fd()), c.name+partial, 0); err != nil {
				errs = append(errs, explain(err, "cannot remove what is left of the copy in %s", c.dir.Name()))
			}
		}
		errs = append(errs, c.dir.Close())
	}
	if c.device != nil && remove && c.sealed {
		errs = append(errs, c.unseal())
	}
	if c.file != nil {
		_ = c.file.Close() // it was fsynced, or is of no use
	}
	if c.direct != nil {
		_ = c.direct.Close() // it was only read
	}
	if c.device != nil {
		errs = append(errs, c.device.Close())
	}
	return errors.Join(errs...)
}

// unseal takes the superblocks away again, so that it is a copy of nothing.
func (c *seedCopy) unseal() error {
	var errs []error
	for _, at := range block.BtrfsSuperblocks() {
		if at+superSize <= c.device.ID().Size {
			_, err := c.file.WriteAt(make([]byte, superSize), int64(at)) //nolint:gosec // within a device
			errs = append(errs, err)
		}
	}
	return explain(errors.Join(append(errs, c.file.Sync())...), "cannot wipe what is left of the copy on %s", c.place())
}

// SettleCopy implements [daemon.Changer].
func (m *Machine) SettleCopy(ctx context.Context, path, seedFSID string) error {
	name := plan.CopyName(seedFSID)
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // as when it is not mounted any more
	}
	if err != nil {
		return explain(err, "cannot open %s", path)
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), name+partial, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return explain(err, "cannot open what is left of a copy in %s", path)
	}
	file := os.NewFile(uintptr(fd), name+partial)
	defer file.Close()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fault.New(fault.DeviceBusy, "another copy of the same seed is being made in %s", path)
	} else if err != nil {
		return explain(err, "cannot lock what is left of a copy in %s", path)
	}
	loops, err := m.blocks.Loops(ctx)
	if err != nil {
		return explain(err, "cannot list the loop devices")
	}
	used := slices.ContainsFunc(loops, func(l block.Loop) bool {
		is, err := m.blocks.IsBehind(l.Num, file)
		return is && err == nil
	})
	if used {
		return explain(rename(dir, name), "cannot name the copy in %s", path)
	}
	return explain(unix.Unlinkat(int(dir.Fd()), name+partial, 0), "cannot remove what is left of a copy in %s", path)
}
