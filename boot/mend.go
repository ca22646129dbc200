package boot

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"sproutd.org/sproutd/btrfs"
)

// cutOff is a member that seems to have been copied, and the device that was to
// take its place, when the power was cut at the very end: the kernel had wiped the
// superblocks of the one and had not yet written those of the other.
type cutOff struct{ member, target found }

// cutOffs finds them among what is there. Where there are copies of either nobody
// can say which belong together, and a member that somebody is in the place of
// stays wiped.
func cutOffs(list []found) []cutOff {
	var cuts []cutOff
	for _, f := range list {
		if !f.Scratched || f.Super.DevID == 0 {
			continue
		}
		var members, targets []found
		for _, o := range list {
			switch {
			case o.isBtrfs() && o.Super.FSID == f.Super.FSID && o.Super.DevID == 0:
				targets = append(targets, o)
			case (o.isBtrfs() || o.Scratched) && o.Super.FSID == f.Super.FSID && o.Super.DevID == f.Super.DevID:
				members = append(members, o)
			}
		}
		if len(members) == 1 && len(targets) == 1 && targets[0].Super.Generation == f.Super.Generation {
			cuts = append(cuts, cutOff{f, targets[0]})
		}
	}
	return cuts
}

// mend puts back the superblocks of such members of sprouts of this seed, and what
// it then finds on them into the list; the kernel goes on with the copy once the
// sprout is writable. Nobody asked for that write, and there is no other such: it
// changes nothing but what the kernel would have had to write in another order.
func (b *boot) mend(ctx context.Context, m *media, list []found) {
	for _, c := range cutOffs(list) {
		i := slices.IndexFunc(list, func(f found) bool { return f.Num == c.member.Num })
		done, err := b.mendOne(ctx, m, list, c)
		var late *btrfs.MissingDeviceError
		switch {
		case done:
			b.warn(fmt.Sprintf("The power was cut when %s had just been copied to %s: its superblocks, which the kernel had wiped, were put back, "+
				"and the copy is brought to its end.", c.member.Path, c.target.Path))
			list[i] = b.scan.read(ctx, c.member.ID)
		case errors.As(err, &late):
			continue
		case err != nil && !errors.Is(err, btrfs.ErrNotCutOff):
			b.warn(sentence(fmt.Sprintf("cannot put back the superblocks of %s: %v", c.member.Path, err)))
			fallthrough
		default:
			list[i].Scratched = false // once is enough
		}
		b.scan.known[c.member.ID] = list[i]
	}
}

// mendOne reports whether it put back the superblocks of a member. It leaves alone
// what is no such cut, and what belongs to other seeds or none.
func (b *boot) mendOne(ctx context.Context, m *media, list []found, c cutOff) (done bool, err error) {
	var parts []found
	for _, f := range list {
		if f.Super.FSID == c.member.Super.FSID && (f.isBtrfs() || f.Num == c.member.Num) {
			parts = append(parts, f)
		}
	}
	open, err := b.scan.openAll(ctx, parts...)
	if err != nil {
		return false, err
	}
	defer open.close()
	member, target := open[c.member.Super.DevUUID], open[c.target.Super.DevUUID]
	locking, cancel := context.WithTimeout(ctx, lockFor)
	defer cancel()
	if err := member.Lock(locking); err != nil {
		return false, err
	}
	items, err := btrfs.ReadCutOff(member.File(), target.File(), open.file)
	if err != nil {
		return false, err
	}
	if _, seeds := (assembly{fsid: c.member.Super.FSID, items: items}).split(); !sameSeed(seeds, m.super) {
		return false, nil
	}
	err = member.RestoreBtrfs(func(at uint64, block []byte) []byte {
		whole, super, err := btrfs.Unscratch(block, at)
		if err != nil || super.DevUUID != c.member.Super.DevUUID || super.FSID != c.member.Super.FSID || super.Generation != c.member.Super.Generation {
			return nil
		}
		return whole
	})
	return err == nil, err
}

// replaceOf reads the state of the replace from one device of a sprout.
func (b *boot) replaceOf(ctx context.Context, a assembly, f found) (btrfs.ReplaceStatus, error) {
	open, err := b.scan.openAll(ctx, slices.Concat([]found{f}, a.devices)...)
	if err != nil {
		return btrfs.ReplaceStatus{}, err
	}
	defer open.close()
	return btrfs.ReadReplace(open.file(f.Super.DevUUID), open.file)
}

// replaced reports whether old was copied in the replace by which f has its place
// now: by the trees on old that has not ended, and by those on f it is in one of
// the given states. What cannot be read is no such replace.
func (b *boot) replaced(ctx context.Context, a assembly, old, f found, states ...btrfs.ReplaceState) bool {
	if old.Super.FSID != f.Super.FSID || old.Super.DevUUID != f.Super.DevUUID || old.Super.DevID != f.Super.DevID {
		return false
	}
	was, err := b.replaceOf(ctx, a, old)
	if err != nil || was.Over() || was.DevID != old.Super.DevID {
		return false
	}
	now, err := b.replaceOf(ctx, a, f)
	return err == nil && slices.Contains(states, now.State) && now.Started.Equal(was.Started)
}

// succeed puts the copies of members in their places that took them in a replace,
// where the kernel's wipe of the member never reached the medium: the kernel waits
// for that write, but has it flushed by nobody.
func (b *boot) succeed(ctx context.Context, a *assembly) {
	for i, old := range a.devices {
		for j, f := range a.copies {
			if f.Super.Generation > old.Super.Generation && b.replaced(ctx, *a, old, f, btrfs.ReplaceFinished) {
				a.devices[i], a.copies = f, slices.Delete(a.copies, j, j+1)
				break
			}
		}
	}
}

// tookPlace gives the path of the device in whose place a member of the sprout is,
// though the trees do not say so: an fsync writes a superblock as well, with the
// devid that the target has from then on, and the trees of the commit before. The
// kernel takes it for a replace without a target, and mounts it as degraded only.
//
// That it is complete is known from the one that it replaced: the kernel let go of
// that, in the same replace. A member whose target is only not there is not mounted.
func (b *boot) tookPlace(ctx context.Context, a assembly, list []found) string {
	if a.err != nil || len(a.targets) > 0 {
		return ""
	}
	for _, f := range a.devices {
		for _, old := range list {
			// What was under way can have become suspended since, by a mount.
			if old.Scratched && b.replaced(ctx, a, old, f, btrfs.ReplaceStarted, btrfs.ReplaceSuspended) {
				return old.Path
			}
		}
	}
	return ""
}

// endReplace has the kernel take a replace as over that has no target any more.
func endReplace(dir string) error {
	f, err := btrfs.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return f.CancelReplace()
}
