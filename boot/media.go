package boot

import (
	"cmp"
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
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
)

// candidates gives the devices that may be the media, the best first: those that
// are named, and two kinds that only count where none of those is there. Copies
// are seeds by themselves with the label that is named, as the image has that
// they were made from. Stand-ins are not named at all, but a complete sprout that
// was kept can be used with them.
func (b *boot) candidates(ctx context.Context) (named, copies, standIns []found, err error) {
	list, err := b.scan.list(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	named = mediaOf(b.request.Media, list, deviceAt)
	if slices.ContainsFunc(named, func(f found) bool { return f.Num == f.Disk }) {
		// The kernel shows a disk before its partitions. When it lets the disk be
		// read it has them all, so the second look is the right one.
		if list, err = b.scan.list(ctx); err != nil {
			return nil, nil, nil, err
		}
		named = mediaOf(b.request.Media, list, deviceAt)
	}
	var assemblies []assembly
	if len(named) > 1 || slices.ContainsFunc(list, found.isSeed) {
		assemblies = b.assemble(ctx, list, block.DevNum{})
	}
	if len(named) > 1 {
		complete := map[block.DevNum]bool{}
		for _, a := range assemblies {
			for _, d := range a.devices {
				complete[d.Disk] = complete[d.Disk] || a.complete()
			}
		}
		named = rank(named, complete)
	}
	if b.request.Media.By == byLabel {
		copies = slices.DeleteFunc(slices.Clone(named), func(f found) bool { return !f.isSeed() })
		named = slices.DeleteFunc(named, found.isSeed)
	}
	if !b.request.NoPersist && !b.request.Reset {
		standIns = slices.DeleteFunc(seedsOf(assemblies, list), func(f found) bool {
			return slices.ContainsFunc(slices.Concat(named, copies), func(n found) bool { return n.Num == f.Num })
		})
	}
	return named, copies, standIns, nil
}

// mediaOf gives the devices that spec names as the media. A Btrfs that is no seed
// is never meant by its label: whatever was made from a seed has the label of
// that, sprouts and installed systems alike.
func mediaOf(spec Spec, list []found, at func(path string) block.DevNum) []found {
	return slices.DeleteFunc(matches(spec, list, at), func(f found) bool {
		return spec.By == byLabel && f.isBtrfs() && !f.Super.Seeding
	})
}

// matches gives the devices that spec names. at finds the device of a path.
func matches(spec Spec, list []found, at func(path string) block.DevNum) []found {
	var matching []found
	for _, f := range list {
		var ok bool
		switch spec.By {
		case byLabel:
			ok = f.FS.Label == spec.Value
		case byUUID:
			ok = strings.EqualFold(f.FS.UUID, spec.Value)
		case byPartUUID:
			// Before 6.10 the kernel does not tell, but udev's link does.
			ok = strings.EqualFold(f.PartUUID, spec.Value) ||
				f.PartUUID == "" && f.Num == at("/dev/disk/by-partuuid/"+strings.ToLower(spec.Value))
		case byPartLabel:
			ok = f.PartLabel == spec.Value
		case byPath:
			ok = f.Num == at(spec.Value)
		}
		if ok {
			matching = append(matching, f)
		}
	}
	return matching
}

// rank puts the media into the order in which they are tried: first those whose
// disk also holds a complete sprout, and then by name. A stick that was written
// from an isohybrid image shows one file system as the disk and as its first
// partition; then the partition is meant, since the kernel lets nobody use a
// disk and its partitions at once.
func rank(list []found, complete map[block.DevNum]bool) []found {
	ranked := slices.DeleteFunc(slices.Clone(list), func(f found) bool {
		return f.Num == f.Disk && slices.ContainsFunc(list, func(p found) bool { return p.Disk == f.Num && p.Num != f.Num })
	})
	slices.SortStableFunc(ranked, func(a, b found) int {
		if complete[a.Disk] != complete[b.Disk] {
			if complete[a.Disk] {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(len(a.Path), len(b.Path)), cmp.Compare(a.Path, b.Path))
	})
	return ranked
}

// media is a device with a seed on it, ready for use.
type media struct {
	b      *boot
	device found
	// mountPoint is where the device is mounted, and image the path of the seed on
	// it; both "" where the device is the seed.
	mountPoint, image string
	seed              block.ID
	super             btrfs.Super
	loop              *block.Loop
	// standIn is true for a copy of the seed that was not named.
	standIn bool
}

// name says in messages which seed it is.
func (m *media) name() string {
	if m.image == "" {
		return m.device.Path
	}
	return m.image + " on " + m.device.Path
}

// open mounts the media and attaches the seed on it.
func (b *boot) open(ctx context.Context, device found) (*media, error) {
	if device.isSeed() {
		m := &media{b: b, device: device, seed: device.ID, super: device.Super}
		return m, usable(m.super, nil, m.name())
	}
	if device.FS.Type == "" {
		return nil, fmt.Errorf("%s holds no file system that is known", device.Path)
	}
	if device.Err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", device.Path, device.Err)
	}
	dir := filepath.Join(b.Dir, filepath.Base(handover.MediaMount))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the mount point of the media: %w", err)
	}
	options := mount.Options{ReadOnly: true, Flags: []string{"nosuid", "nodev", "noexec"}}
	// A journal that was not written out is left alone: nothing is written to the media.
	switch device.FS.Type {
	case "ext4":
		options.Data = []string{"noload"}
	case "xfs":
		options.Data = []string{"norecovery", "nouuid"}
	case "btrfs":
		options.Data = []string{"rescue=nologreplay"}
	}
	if err := mount.Mount(device.Path, dir, device.FS.Type, options); err != nil {
		return nil, fmt.Errorf("cannot use the media: %w", err)
	}
	m := &media{b: b, device: device, mountPoint: dir, image: b.request.Image}
	if err := m.attach(ctx); err != nil {
		return nil, errors.Join(err, m.close(ctx))
	}
	return m, nil
}

// attach puts a loop over the image.
func (m *media) attach(ctx context.Context) error {
	root, err := os.OpenRoot(m.mountPoint)
	if err != nil {
		return fmt.Errorf("cannot read the media: %w", err)
	}
	defer func() { _ = root.Close() }()
	file, err := root.Open(strings.TrimPrefix(m.image, "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no rd.sprout.image=%s", m.name())
	}
	if err != nil {
		return fmt.Errorf("cannot read rd.sprout.image=%s: %w", m.name(), err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no file")
	}
	if err != nil {
		return fmt.Errorf("cannot use rd.sprout.image=%s: %w", m.name(), err)
	}
	m.super, err = btrfs.ReadSuper(file, info.Size())
	if err := usable(m.super, err, m.name()); err != nil {
		return err
	}
	loop, err := m.b.blocks.AttachLoop(ctx, file, block.LoopOptions{
		// The limit is what lets the loop be switched over to a copy later.
		ReadOnly: true, SizeLimit: uint64(info.Size()), //nolint:gosec // a size is never negative
		// It goes with its last user: this process, and then the root's mount.
		Autoclear: true,
	})
	if err != nil {
		return fmt.Errorf("cannot attach the seed: %w", err)
	}
	m.loop, m.seed = &loop, loop.ID
	return nil
}

// usable says whether what was read is the superblock of a seed for this kernel.
func usable(super btrfs.Super, err error, name string) error {
	switch {
	case errors.Is(err, btrfs.ErrNotBtrfs):
		return fmt.Errorf("%s is no seed: there is no Btrfs in it", name)
	case err != nil:
		return fmt.Errorf("cannot use the seed %s: %w", name, err)
	case !super.Seeding:
		return fmt.Errorf("%s is no seed: `btrfstune -S 1` makes one of it", name)
	case super.NumDevices > 1:
		return fmt.Errorf("%s is no seed to boot from: it is one of %d devices", name, super.NumDevices)
	}
	if reasons := super.Unsupported("/"); len(reasons) > 0 {
		return fmt.Errorf("cannot use the seed %s: %s", name, strings.Join(reasons, "; "))
	}
	return nil
}

// release lets go of the loop. What is mounted keeps it.
func (m *media) release() {
	if m.loop != nil {
		_ = m.loop.Close() // it was only read
	}
}

// close undoes open.
func (m *media) close(ctx context.Context) error {
	m.release()
	if m.mountPoint == "" {
		return nil
	}
	return unmount(ctx, m.mountPoint)
}

// unmountFor is how long those are waited for who look at a new mount in passing.
const unmountFor = 100

// unmount takes a mount away, for good: what keeps it busy still keeps it, out
// of sight.
func unmount(ctx context.Context, dir string) error {
	for range unmountFor {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || pause(ctx) != nil {
			break
		}
	}
	return mount.Unmount(dir, true)
}
