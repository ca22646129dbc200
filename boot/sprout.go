package boot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
)

// errNothingKept says that there is no sprout to go on with.
var errNothingKept = errors.New("there is no sprout to go on with")

// resetFile is left in a sprout by the daemon to have it dropped at the next boot.
const resetFile = "var/lib/sproutd/reset"

// kept mounts the sprout that an earlier session left, if there is one.
func (b *boot) kept(ctx context.Context, m *media, changes <-chan struct{}) error {
	if b.request.NoPersist && !b.request.Reset {
		b.Say(Info, "rd.sprout.persist=no: what was kept is left alone.")
		return errNothingKept
	}
	c, list, err := b.look(ctx, m, changes)
	if err != nil {
		return err
	}
	for _, w := range c.warnings {
		b.warn(w)
	}
	if b.request.Reset {
		b.reset(ctx, m, c.ours, "rd.sprout.reset")
		return errNothingKept
	}
	if b.request.NoPersist || c.sprout == nil {
		return errNothingKept
	}
	err = b.goOn(ctx, m, *c.sprout, list)
	if err == nil {
		b.note.Mode, b.note.FSID = handover.Persistent, c.sprout.fsid.String()
		b.Say(Info, fmt.Sprintf("Going on with the sprout on %s.", c.sprout.paths()))
		return nil
	}
	b.forget(m, list)
	if errors.Is(err, errResetAsked) {
		b.reset(ctx, m, []assembly{*c.sprout}, "asked for in the last session")
	} else {
		b.warn(sentence(err.Error()))
	}
	return errNothingKept
}

// errResetAsked says that the sprout is to be dropped.
var errResetAsked = errors.New("a reset was asked for in the last session")

// goOn mounts the sprout as the root. With an error nothing is mounted.
func (b *boot) goOn(ctx context.Context, m *media, a assembly, list []found) error {
	if err := b.mountSprout(ctx, m, a, list); err != nil {
		return err
	}
	asked, err := asksForReset(b.NewRoot)
	switch {
	case err != nil:
		b.warn(sentence(fmt.Sprintf("cannot see whether a reset was asked for: %v", err)))
	case asked && a.on(m.device.Disk) && !m.standIn:
		return errors.Join(errResetAsked, unmount(ctx, b.NewRoot))
	case asked:
		b.warn(fmt.Sprintf("The last session asked for a reset, but the sprout on %s is not on the disk of the media: it is used as it is.", a.paths()))
	}
	if err := mount.SetWritable(b.NewRoot, "discard=async", "compress=zstd:3"); err != nil {
		return errors.Join(err, unmount(ctx, b.NewRoot))
	}
	if a.wiped != "" {
		b.warn(fmt.Sprintf("The power was cut when %s had just been copied to %s, which takes its place.", a.wiped, a.paths()))
		if err := endReplace(b.NewRoot); err != nil {
			return errors.Join(err, unmount(ctx, b.NewRoot))
		}
	}
	return nil
}

// look finds out what is there, and waits a while for what may be late.
func (b *boot) look(ctx context.Context, m *media, changes <-chan struct{}) (choice, []found, error) {
	waiting, cancel := context.WithTimeout(ctx, b.Late)
	defer cancel()
	for {
		list, err := b.scan.list(ctx)
		if err != nil {
			return choice{}, nil, err
		}
		b.mend(ctx, m, list)
		s := situation{seed: m.super, disk: m.device.Disk, found: b.assemble(ctx, list, m.device.Disk)}
		missing := false
		if spec := b.request.Persist; !spec.IsZero() {
			s.only = matches(spec, list, deviceAt)
			missing = len(s.only) == 0
		}
		c := choose(s)
		if missing {
			c.sprout = nil
			c.warnings = []string{fmt.Sprintf("rd.sprout.persist=%s is not there: nothing that was kept is used.", b.request.Persist)}
		}
		if c.sprout != nil || !c.hopeful && !missing || b.request.Reset {
			return c, list, nil
		}
		select {
		case <-changes:
		case <-waiting.Done():
			return c, list, ctx.Err()
		}
	}
}

// assemble groups what was found and reads what each filesystem consists of.
func (b *boot) assemble(ctx context.Context, list []found, preferred block.DevNum) []assembly {
	assemblies := group(list, preferred)
	for i := range assemblies {
		b.succeed(ctx, &assemblies[i])
		assemblies[i].consistsOf(b.itemsOf(ctx, assemblies[i]))
		assemblies[i].wiped = b.tookPlace(ctx, assemblies[i], list)
	}
	return assemblies
}

// itemsOf reads the devices of a filesystem from the newest of its members.
func (b *boot) itemsOf(ctx context.Context, a assembly) ([]btrfs.DevItem, error) {
	open, err := b.scan.openAll(ctx, a.devices...)
	if err != nil {
		return nil, err
	}
	defer open.close()
	newest := slices.MaxFunc(a.devices, func(x, y found) int { return cmp.Compare(x.Super.Generation, y.Super.Generation) })
	return btrfs.ReadDevItems(open.file(newest.Super.DevUUID), int64(newest.Size), open.file) //nolint:gosec // sysfs counts in sectors
}

// mountTries bounds how often a mount is tried again when others (udev) told
// the kernel of a copy at the same time.
const mountTries = 3

// mountSprout mounts the sprout read-only and makes sure that the kernel put it
// together from the devices meant.
func (b *boot) mountSprout(ctx context.Context, m *media, a assembly, list []found) error {
	options := mount.Options{ReadOnly: true}
	if a.wiped != "" {
		options.Data = []string{"degraded"}
	}
	var err error
	for range mountTries {
		b.forget(m, list)
		err = btrfs.Scan(m.seed.Path)
		for _, f := range slices.Concat(a.devices, a.targets) {
			err = errors.Join(err, btrfs.Scan(f.Path))
		}
		if err == nil {
			err = mount.Mount(a.devices[0].Path, b.NewRoot, "btrfs", options)
		}
		if err != nil {
			err = fmt.Errorf("cannot use the sprout on %s: %w", a.paths(), err)
			if pause(ctx) != nil {
				return err
			}
			continue
		}
		if err = b.verify(m, a); err == nil {
			return nil
		}
		if e := unmount(ctx, b.NewRoot); e != nil {
			return errors.Join(err, e)
		}
	}
	return err
}

// forget makes the kernel drop what it knows of all devices with the seed or a
// sprout on them, copies above all: of two it would take the one it saw last.
func (b *boot) forget(m *media, list []found) {
	for _, f := range list {
		if f.FS.Type == "btrfs" && f.Num != m.seed.Num {
			_ = btrfs.Forget(f.Path) // mostly it knows nothing of it
		}
	}
}

// verify compares the members of the mounted filesystem with the devices meant.
func (b *boot) verify(m *media, a assembly) error {
	f, err := btrfs.Open(b.NewRoot)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	members, err := f.Members()
	if err != nil {
		return err
	}
	want := []block.DevNum{m.seed.Num}
	for _, d := range a.devices {
		want = append(want, d.Num)
	}
	for _, member := range members {
		i := slices.Index(want, member.Num)
		if i < 0 {
			return fmt.Errorf("cannot use the sprout on %s: the kernel mounted it with %s", a.paths(), member.Path)
		}
		want = slices.Delete(want, i, i+1)
	}
	if len(want) > 0 {
		return fmt.Errorf("cannot use the sprout on %s: the kernel mounted it without device %s", a.paths(), want[0])
	}
	return nil
}

// asksForReset looks for the daemon's mark, in this filesystem and nowhere else.
func asksForReset(dir string) (bool, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, err
	}
	defer func() { _ = root.Close() }()
	if _, err := root.Lstat(filepath.FromSlash(resetFile)); err != nil {
		if os.IsNotExist(err) {
			err = nil
		}
		return false, err
	}
	return true, nil
}

// lockFor bounds the wait for udev to let go of a disk.
const lockFor = 5 * time.Second

// reset makes the members of sprouts that are on the disk of the media no
// members any more. Nothing else is ever written to it.
func (b *boot) reset(ctx context.Context, m *media, sprouts []assembly, why string) {
	if len(sprouts) == 0 {
		b.warn(fmt.Sprintf("There was nothing to reset (%s): no sprout of this seed is on the disk of %s.", why, m.device.Path))
	}
	for _, a := range sprouts {
		for _, f := range a.devices {
			if f.Disk != m.device.Disk {
				b.warn(fmt.Sprintf("%s was left alone: it is not on the disk of the media.", f.Path))
				continue
			}
			if err := b.drop(ctx, f); err != nil {
				b.warn(sentence(fmt.Sprintf("cannot reset (%s): %v", why, err)))
				continue
			}
			b.warn(fmt.Sprintf("What was kept on %s was dropped (%s).", f.Path, why))
		}
	}
}

// drop wipes the superblocks of one member.
func (b *boot) drop(ctx context.Context, f found) error {
	h, err := b.scan.open(ctx, f.ID)
	if err != nil {
		return err
	}
	defer func() { _ = h.Close() }()
	locking, cancel := context.WithTimeout(ctx, lockFor)
	defer cancel()
	if err := h.Lock(locking); err != nil {
		return err
	}
	// Whoever came in between, it must still be the member that was found.
	super, err := btrfs.ReadSuper(h.File(), int64(f.Size)) //nolint:gosec // sysfs counts in sectors
	if err != nil {
		return fmt.Errorf("cannot look at %s again: %w", f.Path, err)
	}
	if super.FSID != f.Super.FSID || super.DevUUID != f.Super.DevUUID {
		return fmt.Errorf("cannot wipe %s: something else is on it now", f.Path)
	}
	return h.WipeBtrfs()
}

// pause waits a moment, or gives the error of ctx when that ends first.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(20 * time.Millisecond):
		return nil
	}
}
