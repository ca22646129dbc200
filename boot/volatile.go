package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/zram"
)

// options of a volatile sprout: deleting gives memory back, and what is written
// is compressed before zram does it again.

func options() []string { return []string{"discard=async", "compress=zstd:1"} }

// volatile makes a sprout of the seed and memory.
func (b *boot) volatile(ctx context.Context, m *media) error {
	if err := b.mountSeed(ctx, m, options()...); err != nil {
		return err
	}
	fsid, err := b.grow(ctx)
	if err != nil {
		return errors.Join(err, unmount(ctx, b.NewRoot), b.free(ctx))
	}
	b.note.Mode, b.note.FSID = handover.Volatile, fsid
	return nil
}

// mountSeed mounts the seed by itself, again where others (udev) told the kernel of
// a copy at that very moment.
func (b *boot) mountSeed(ctx context.Context, m *media, data ...string) error {
	var err error
	for range mountTries {
		err = mount.Mount(m.seed.Path, b.NewRoot, "btrfs", mount.Options{ReadOnly: true, Data: data})
		// Before the kernel has mounted it, that is what it says of a damaged block.
		if errors.Is(err, unix.EIO) || errors.Is(err, unix.EUCLEAN) {
			return fmt.Errorf("the seed %s is damaged: %w", m.name(), err)
		}
		if err != nil {
			return fmt.Errorf("cannot use the seed %s: %w", m.name(), err)
		}
		if err = b.isFrom(m); err == nil {
			return nil
		}
		if e := unmount(ctx, b.NewRoot); e != nil {
			return errors.Join(err, e)
		}
	}
	return err
}

// isFrom makes sure that the kernel mounted the seed from the device meant.
func (b *boot) isFrom(m *media) error {
	f, err := btrfs.Open(b.NewRoot)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	members, err := f.Members()
	if err == nil && (len(members) != 1 || members[0].Num != m.seed.Num) {
		err = fmt.Errorf("cannot use the seed: the kernel mounted it from %s", members[0].Path)
	}
	return err
}

// grow gives the mounted seed its first device.
func (b *boot) grow(ctx context.Context) (fsid string, err error) {
	f, err := btrfs.Open(b.NewRoot)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	reserve, err := f.GlobalReserve()
	if err != nil {
		return "", err
	}
	memory, err := meminfo("MemTotal")
	if err != nil {
		return "", err
	}
	size, warning := sizeFor(b.request.Zram, memory, reserve)
	if warning != "" {
		b.warn(warning)
	}
	first, err := b.firstDevice(ctx, size)
	if err != nil {
		return "", err
	}
	if err := f.Add(first.Path); err != nil {
		return "", fmt.Errorf("cannot make a sprout of the seed: %w", err)
	}
	if err := mount.SetWritable(b.NewRoot, options()...); err != nil {
		return "", err
	}
	info, err := f.Info()
	return info.FSID.String(), err
}

// littleMemory is how much should be available for a session to get far.
const littleMemory = 128 << 20

// sizeFor gives the size of the first device on a machine with that much memory,
// for a seed with the given global reserve.
func sizeFor(asked Size, memory, reserve uint64) (size uint64, warning string) {
	const mib = 1 << 20
	least := max(btrfs.MinZram, btrfs.FirstDeviceSize(reserve))
	size = asked.of(memory) / mib * mib
	// The table of its pages alone would take a good part of the memory.
	if most := memory * maxPercent / 100; size > max(most, least) {
		size = max(defaultSize().of(memory)/mib*mib, least)
		return size, fmt.Sprintf("rd.sprout.zram=%s is more than %d%% of the memory: %d MiB are used.", asked, maxPercent, size/mib)
	}
	if size >= least {
		return size, ""
	}
	// The default on a small machine is nothing to complain about.
	if asked != defaultSize() {
		warning = fmt.Sprintf("rd.sprout.zram=%s is too small for this seed: %d MiB are used, which cost no memory until they are written to.", asked, least/mib)
	}
	return least, warning
}

func defaultSize() Size { return Size{Percent: defaultPercent} }

// firstDevice makes a zram device, or what comes next to it.
func (b *boot) firstDevice(ctx context.Context, size uint64) (block.ID, error) {
	if available, err := meminfo("MemAvailable"); err == nil && available < littleMemory {
		b.warn(fmt.Sprintf("Only %d MiB of memory are available: this session has little room.", available>>20))
	}
	var err error
	if b.NoZram {
		err = errors.New("the kernel has no zram")
	} else {
		var d zram.Device
		if d, err = b.zrams.Create(ctx, zram.Config{Size: size}); err == nil {
			b.note.Zram = d.ID
			return d.ID, nil
		}
	}
	b.warn(sentence(fmt.Sprintf("%v: a file in memory is used instead, which is not compressed", err)))
	loop, e := b.memoryLoop(ctx, size)
	if e != nil {
		return block.ID{}, fmt.Errorf("cannot begin a session in memory: %w", e)
	}
	b.note.MemoryLoop = loop
	return loop, nil
}

// memoryLoop makes a loop device over a file in memory that nobody else can get
// at: it has no name, and its file system is out of sight.
func (b *boot) memoryLoop(ctx context.Context, size uint64) (block.ID, error) {
	dir := filepath.Join(b.Dir, "memory")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return block.ID{}, err
	}
	err := mount.Mount("sprout", dir, "tmpfs", mount.Options{
		Flags: []string{"nosuid", "nodev", "noexec"},
		Data:  []string{"size=" + strconv.FormatUint(size, 10), "nr_inodes=4", "mode=0700"},
	})
	if err != nil {
		return block.ID{}, err
	}
	defer func() { _ = errors.Join(mount.Unmount(dir, true), os.Remove(dir)) }() // the loop keeps it
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return block.ID{}, err
	}
	file := os.NewFile(uintptr(fd), "memory")
	defer func() { _ = file.Close() }()
	if err := file.Truncate(int64(size)); err != nil { //nolint:gosec // far less than that
		return block.ID{}, err
	}
	loop, err := b.blocks.AttachLoop(ctx, file, block.LoopOptions{})
	return loop.ID, err
}

// free takes the first device away again.
func (b *boot) free(ctx context.Context) error {
	var errs []error
	if id := b.note.Zram; !id.Num.IsZero() {
		errs = append(errs, b.zrams.Remove(ctx, id))
	}
	if id := b.note.MemoryLoop; !id.Num.IsZero() {
		errs = append(errs, b.blocks.DetachLoop(ctx, id))
	}
	b.note.Zram, b.note.MemoryLoop = block.ID{}, block.ID{}
	return errors.Join(errs...)
}

// meminfo reads one value of /proc/meminfo, in bytes.
func meminfo(key string) (uint64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("cannot read the size of the memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("cannot find %s in /proc/meminfo", key)
}
