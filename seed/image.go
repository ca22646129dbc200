package seed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
)

const (
	nodeSize = 16 * kib
	// groupSize of data: smaller ones cost time when they are moved, larger
	// ones make the image longer.
	groupSize = 256 * mib
	// firstGroup is the size of the data group that lies below the metadata.
	firstGroup = 128 * mib
	// minLength is what the kernel shrinks a device to at least;
	// fs/btrfs/ioctl.c, btrfs_ioctl_resize.
	minLength = 256 * mib
	// only is the devid of the only device.
	only = 1
)

// image is a filesystem that is being built.
type image struct {
	path    string // of the file
	dir     string // where to mount it
	options Options
	frames  *frames
}

// make builds the filesystem and checks what came of it.
func (m *image) make(ctx context.Context, src *source, size sizes, p *meter, r *Report) error {
	p.phase(PhaseWrite)
	f, err := os.OpenFile(m.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // what matters is synced below
	if err := f.Truncate(int64(size.virtual)); err != nil {
		return fmt.Errorf("cannot make an image of %d bytes: %w", size.virtual, err)
	}
	o := m.options
	args := []string{
		"-q", "-f", "-K", "-d", "single", "-m", "single", "-n", strconv.Itoa(nodeSize), "-s", strconv.Itoa(blockSize),
		"--csum", o.Csum, "-L", o.Label,
	}
	if !o.FSID.IsZero() {
		args = append(args, "-U", o.FSID.String())
	}
	if err := run(ctx, "mkfs.btrfs", append(args, m.path)...); err != nil {
		return err
	}
	compress := "zstd:" + strconv.Itoa(o.CompressLevel)
	options := mount.Options{
		Flags: []string{"noatime", "nosuid", "nodev", "noexec"},
		// Few commits make metadata that is moved around little; what is free
		// at the end is trimmed at once.
		Data: []string{"compress-force=" + compress, "max_inline=" + strconv.Itoa(maxInline), "commit=300", "nodiscard"},
	}
	var length uint64
	err = mounted(ctx, f, m.dir, options, func(fsys *btrfs.FS) error {
		var err error
		length, err = m.fill(ctx, fsys, src, size, p, r)
		return err
	})
	if err != nil {
		return err
	}
	if err := f.Truncate(int64(length)); err != nil {
		return err
	}
	if err := run(ctx, "btrfstune", "-S", "1", "-f", m.path); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	super, err := btrfs.ReadSuper(f, int64(length))
	if err != nil {
		return err
	}
	if !super.Seeding || super.DevSize != length {
		return fmt.Errorf("the image is not as it should be: seeding %v, %d of %d bytes", super.Seeding, super.DevSize, length)
	}
	r.FSID, r.ImageSize, r.UsedBytes = super.FSID, length, super.Used
	return nil
}

// fill writes everything and gives the length that the filesystem has then.
func (m *image) fill(ctx context.Context, fsys *btrfs.FS, src *source, size sizes, p *meter, r *Report) (uint64, error) {
	if err := setGroupSize(fsys); err != nil {
		return 0, err
	}
	// No group is larger than a tenth of the filesystem.
	if err := fsys.Resize(only, 10*firstGroup); err != nil {
		return 0, err
	}
	reserved, err := reserve(fsys, m.dir)
	if err != nil {
		return 0, err
	}
	defer func() { _ = reserved.Close() }() // unless it was closed below
	// A group for metadata is 256 MiB or a tenth of the filesystem: while the
	// names are written it is small enough to make that what will be needed.
	few := min(max(10*size.metadata/mib*mib, minLength), size.virtual)
	if err := fsys.Resize(only, few); err != nil {
		return 0, err
	}
	w := &writer{source: src, ctx: ctx, root: m.dir, meter: p, buf: make([]byte, mib), frames: m.frames}
	var small, large, smallStored, largeStored []*entry
	for _, e := range src.entries {
		if !e.regular() || e.same != nil || e.inline() {
			continue
		}
		switch pack := packable(e); {
		case pack && e.stored:
			smallStored = append(smallStored, e)
		case pack:
			small = append(small, e)
		case e.stored:
			largeStored = append(largeStored, e)
		default:
			large = append(large, e)
		}
	}
	for _, step := range []func() error{
		w.create,
		func() error { return giveBack(reserved) },
		fsys.Sync,
		func() error { return fsys.Resize(only, size.virtual) },
		func() error { return w.rest(large) },
		func() error { return w.packAll(small, m.options.PackTimes) },
		fsys.Sync,
		func() error { return limit(fsys, slices.Concat(smallStored, largeStored)) },
		// Extents that were compressed, or that the kernel tried to, are
		// never longer than 128 KiB. What gains nothing is better off long.
		func() error { return mount.Reconfigure(m.dir, "compress=no") },
		func() error { return w.pack(smallStored, storedSlot) },
		func() error { return w.rest(largeStored) },
		w.share,
		w.directories,
		reserved.Close,
		func() error { p.phase(PhaseFinish); return fsys.Sync() },
		// Only now is what the packs held in vain really free.
		fsys.Sync,
	} {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if err := step(); err != nil {
			return 0, err
		}
	}
	length, err := shrink(ctx, fsys)
	if err != nil {
		return 0, err
	}
	if err := trim(m.dir); err != nil {
		return 0, err
	}
	r.Geometry, err = measure(ctx, fsys)
	return length, err
}

// reserve makes the first group for content before any names are written. A seed
// leaves from its end to its beginning. If the metadata came last, the stick would
// have nothing to do meanwhile; if it came first, it would be moved in vain, since
// moving content writes it anew. The file has no name; the room is free when it
// was closed.
func reserve(fsys *btrfs.FS, dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_WRONLY|unix.O_TMPFILE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot reserve room for content: %w", err)
	}
	// In pieces as long as what comes there: the kernel keeps groups for extents of
	// one class of sizes; fs/btrfs/block-group.h, btrfs_block_group_size_class.
	for at := int64(0); at < firstGroup && err == nil; at += maxPacked {
		err = unix.Fallocate(int(f.Fd()), 0, at, maxPacked)
	}
	if err = errors.Join(err, fsys.Sync()); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot reserve room for content: %w", err), f.Close())
	}
	return f, nil
}

// giveBack frees what was reserved but for its ends: the kernel takes a group away
// in which nothing is.
func giveBack(f *os.File) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, maxPacked, firstGroup-2*maxPacked)
}

// setGroupSize has the kernel make data groups of the size that is best. It
// would make them a tenth of the filesystem and up to 1 GiB; before Linux 6.0
// it cannot be told. Source: sysfs allocation/data/chunk_size.
func setGroupSize(fsys *btrfs.FS) error {
	info, err := fsys.Info()
	if err != nil {
		return err
	}
	name := filepath.Join("/sys/fs/btrfs", info.FSID.String(), "allocation/data/chunk_size")
	if err := os.WriteFile(name, []byte(strconv.Itoa(groupSize)), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot set the size of data groups: %w", err)
	}
	return nil
}

// limit leaves the filesystem just as much space as these files need, which is
// known since they are not compressed. The kernel would else make a new group
// for each of the three classes of extent sizes, and the image longer than it
// has to be; see fs/btrfs/block-group.h, btrfs_block_group_size_class.
func limit(fsys *btrfs.FS, files []*entry) error {
	groups, err := fsys.Groups(only)
	if err != nil || len(groups) == 0 {
		return err
	}
	var room, metadata, used, need uint64
	for _, g := range groups {
		switch g.Type() {
		case btrfs.Data:
			room += g.Length - g.Used
		case btrfs.Metadata:
			metadata, used = metadata+g.Length, used+g.Used
		}
	}
	for _, e := range files {
		need += uint64(blocks(e.size))
	}
	// Metadata must not need another group then, nor reckon with one.
	if metadata < 64*mib || used > metadata/10*7 {
		return nil
	}
	end := groups[0].DevOffset + groups[0].DevLength
	if need += need/32 + 32*mib; need > room {
		end += need - room
	}
	return fsys.Resize(only, max(end, minLength)/mib*mib)
}

// shrink cuts off what lies behind the last group, moves groups from the end to
// the room that others have, and makes the last one as short as can be. It gives
// the length that is left.
func shrink(ctx context.Context, fsys *btrfs.FS) (uint64, error) {
	if err := dropEmpty(ctx, fsys); err != nil {
		return 0, err
	}
	for shorter := true; ; {
		groups, err := fsys.Groups(only)
		if err != nil || len(groups) == 0 {
			return 0, err
		}
		last := groups[0] // the highest
		end := max(last.DevOffset+last.DevLength, minLength)
		if err := fsys.Resize(only, end); err != nil {
			return 0, err
		}
		// Metadata is never that full, and needs room to be moved at all.
		if !shorter || end == minLength || last.Type() != btrfs.Data || ctx.Err() != nil {
			return end, ctx.Err()
		}
		var room uint64
		for _, g := range groups[1:] {
			if g.Flags == last.Flags {
				room += g.Length - g.Used
			}
		}
		if last.Used+last.Used/32+4*mib <= room && last.DevOffset >= minLength {
			if err := fsys.Resize(only, last.DevOffset); err == nil {
				continue
			} else if !errors.Is(err, unix.ENOSPC) {
				return 0, err
			}
		}
		if shorter, err = tighten(ctx, fsys, last); err != nil {
			return 0, err
		}
	}
}

// dropEmpty has the groups go in which nothing is. The kernel would do that when
// it likes, and what is moved later would lie here or there.
func dropEmpty(ctx context.Context, fsys *btrfs.FS) error {
	groups, err := fsys.Groups(only)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if g.Type() == btrfs.Data && g.Used == 0 {
			if err := orLonger(fsys.Relocate(ctx, g)); err != nil {
				return err
			}
		}
	}
	return nil
}

// worthIt is how much shorter the last group has to become to be moved for that.
const worthIt = 32 * mib

// tighten moves what is in the last group, if that is far from full, into one that
// is just long enough: up, behind it, and from there down into its place or a lower
// one. It says whether that has made anything shorter.
func tighten(ctx context.Context, fsys *btrfs.FS, last btrfs.Group) (shorter bool, err error) {
	need := (last.Used + last.Used/16 + 24*mib) / (16 * mib) * (16 * mib)
	if need+worthIt > last.DevLength {
		return false, nil
	}
	// No group is larger than a tenth of the filesystem.
	end := last.DevOffset + last.DevLength
	if err := fsys.Resize(only, max(end+need, 10*need, minLength)); err != nil {
		return false, err
	}
	if err := fsys.Relocate(ctx, last); err != nil {
		return false, orLonger(err)
	}
	// Its place is free for others from the next transaction on.
	if err := fsys.Sync(); err != nil {
		return false, err
	}
	groups, err := fsys.Groups(only)
	if err != nil || len(groups) == 0 {
		return false, err
	}
	switch up := groups[0]; {
	case up.DevOffset < end: // there was room for it in others
		return true, nil
	case up.Type() == btrfs.Data:
		err = fsys.Relocate(ctx, up)
	default: // the kernel has made one more for itself
		err = fsys.Resize(only, max(end, minLength))
	}
	if err != nil {
		return false, orLonger(err)
	}
	groups, err = fsys.Groups(only)
	return err == nil && len(groups) > 0 && groups[0].DevOffset+groups[0].DevLength < end, err
}

// orLonger takes it for no error that a group found no room: the image is as good,
// only longer.
func orLonger(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}

// trim makes holes of all that is free.
func trim(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	// struct fstrim_range and FITRIM of linux/fs.h, which x/sys has not.
	all := struct{ start, length, minimum uint64 }{length: 1<<64 - 1}
	const fitrim = 0xc0185879
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrim, uintptr(unsafe.Pointer(&all)))
	err = f.Close()
	if errno != 0 && errno != unix.EOPNOTSUPP { // the target knows no holes
		return fmt.Errorf("cannot trim the image: %w", errno)
	}
	return err
}

// mounted runs do while the image in f is mounted on dir, which is made for it
// and taken away again, as is the loop device.
func mounted(ctx context.Context, f *os.File, dir string, o mount.Options, do func(*btrfs.FS) error) (err error) {
	system := block.New()
	loop, err := system.AttachLoop(ctx, f, block.LoopOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, system.DetachLoop(context.WithoutCancel(ctx), loop.ID)) }()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	if err := mount.Mount(loop.Path, dir, "btrfs", o); err != nil {
		return err
	}
	defer func() {
		e := mount.Unmount(dir, false)
		if e != nil { // it must not stay
			e = errors.Join(e, mount.Unmount(dir, true))
		}
		// The kernel must not take the next filesystem on this loop for it.
		_ = btrfs.Forget(loop.Path)
		err = errors.Join(err, e)
	}()
	fsys, err := btrfs.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(do(fsys), fsys.Close())
}

// run runs a program of btrfs-progs. The error has its own words.
func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%w: %s", ErrNoTool, name)
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("cannot run %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
