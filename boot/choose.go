package boot

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
)

// assembly is a filesystem as far as it was found: one device for each member.
type assembly struct {
	fsid    btrfs.UUID
	devices []found // sorted by devid
	// copies are devices with the same identity as one of these, as a stick has
	// that was copied as a whole. They are never mixed with them.
	copies []found
	// targets are devices that were to take a member's place when the power was
	// cut: the kernel goes on with that if it is told of them.
	targets []found
	// wiped is the path of a device in whose place one of these is, though the file
	// system does not say so yet, "" for none.
	wiped string
	// items are the devices that it consists of, or err why that is not known.
	items []btrfs.DevItem
	err   error
}

// group puts the found devices together. Of several copies of one member that
// on the disk preferred is taken, or else all from the disk with the most and
// newest members.
func group(list []found, preferred block.DevNum) []assembly {
	byFSID := map[btrfs.UUID][]found{}
	for _, f := range list {
		if f.isBtrfs() && !f.Super.Seeding {
			byFSID[f.Super.FSID] = append(byFSID[f.Super.FSID], f)
		}
	}
	var assemblies []assembly
	for fsid, all := range byFSID {
		order := diskOrder(all, preferred)
		a := assembly{fsid: fsid}
		// A disk and its only partition never show the same superblock: the
		// partition begins later. So two with one UUID are copies.
		slices.SortStableFunc(all, func(x, y found) int {
			return cmp.Or(cmp.Compare(x.Super.DevID, y.Super.DevID), cmp.Compare(order[x.Disk], order[y.Disk]), cmp.Compare(x.Path, y.Path))
		})
		taken := map[btrfs.UUID]bool{}
		for _, f := range all {
			if f.Super.DevID == 0 {
				a.targets = append(a.targets, f)
				continue
			}
			if taken[f.Super.DevUUID] {
				a.copies = append(a.copies, f)
				continue
			}
			taken[f.Super.DevUUID] = true
			a.devices = append(a.devices, f)
		}
		if len(a.devices) > 0 {
			assemblies = append(assemblies, a)
		}
	}
	slices.SortFunc(assemblies, func(a, b assembly) int { return strings.Compare(a.fsid.String(), b.fsid.String()) })
	return assemblies
}

// diskOrder numbers the disks, the one to take members from first.
func diskOrder(list []found, preferred block.DevNum) map[block.DevNum]int {
	members, newest, path := map[block.DevNum]int{}, map[block.DevNum]uint64{}, map[block.DevNum]string{}
	for _, f := range list {
		members[f.Disk]++
		newest[f.Disk] = max(newest[f.Disk], f.Super.Generation)
		if path[f.Disk] == "" || f.Path < path[f.Disk] {
			path[f.Disk] = f.Path
		}
	}
	disks := slices.Collect(maps.Keys(members))
	slices.SortFunc(disks, func(a, b block.DevNum) int {
		switch preferred {
		case a:
			return -1
		case b:
			return 1
		}
		return cmp.Or(cmp.Compare(members[b], members[a]), cmp.Compare(newest[b], newest[a]), cmp.Compare(path[a], path[b]))
	})
	order := map[block.DevNum]int{}
	for i, disk := range disks {
		order[disk] = i
	}
	return order
}

// consistsOf notes what the filesystem consists of. What else was found of it is
// no part of it any more: a device that had just been removed when the power was
// cut keeps its superblock.
func (a *assembly) consistsOf(items []btrfs.DevItem, err error) {
	a.items, a.err = items, err
	if err != nil {
		return
	}
	var parts []found
	for _, f := range a.devices {
		if slices.ContainsFunc(items, f.is) {
			parts = append(parts, f)
		}
	}
	if len(parts) == 0 {
		a.err = errors.New("it does not know the devices that it is on")
		return
	}
	a.devices = parts
}

// is reports whether f is the device of an item.
func (f found) is(item btrfs.DevItem) bool {
	return f.Super.FSID == item.FSID && f.Super.DevUUID == item.UUID && f.Super.DevID == item.DevID
}

// split gives the items of the filesystem itself and of its seeds.
func (a assembly) split() (own, seeds []btrfs.DevItem) {
	for _, item := range a.items {
		if item.FSID == a.fsid {
			own = append(own, item)
		} else {
			seeds = append(seeds, item)
		}
	}
	return own, seeds
}

// missing counts the members that were not found.
func (a assembly) missing() int {
	own, _ := a.split()
	n := 0
	for _, item := range own {
		if !slices.ContainsFunc(a.devices, func(f found) bool { return f.is(item) }) {
			n++
		}
	}
	return n
}

// complete reports whether it is a sprout that only its seed is missing from.
func (a assembly) complete() bool {
	_, seeds := a.split()
	return a.err == nil && len(seeds) > 0 && a.missing() == 0 && !a.uneven()
}

// uneven reports whether the members are of different times: one of them is an
// old copy. The superblocks are written one after the other, so a power cut can
// leave a difference of one.
func (a assembly) uneven() bool {
	low, high := a.devices[0].Super.Generation, uint64(0)
	for _, f := range a.devices {
		low, high = min(low, f.Super.Generation), max(high, f.Super.Generation)
	}
	return high-low > 1
}

func (a assembly) generation() uint64 {
	var high uint64
	for _, f := range a.devices {
		high = max(high, f.Super.Generation)
	}
	return high
}

func (a assembly) on(disk block.DevNum) bool {
	return slices.ContainsFunc(a.devices, func(f found) bool { return f.Disk == disk })
}

// uses reports whether a member is f or on it.
func (a assembly) uses(f found) bool {
	return a.on(f.Num) || slices.ContainsFunc(a.devices, func(d found) bool { return d.Num == f.Num })
}

// paths names its devices for messages.
func (a assembly) paths() string { return pathsOf(a.devices) }

func pathsOf(list []found) string {
	var paths []string
	for _, f := range list {
		paths = append(paths, f.Path)
	}
	return strings.Join(paths, " and ")
}

// situation is what the choice of a sprout depends on.
type situation struct {
	seed btrfs.Super
	// disk is that of the media.
	disk block.DevNum
	// only are the devices that the sprout must be on one of, none for any.
	only []found
	// found is what there is.
	found []assembly
}

// choice is what is to be done.
type choice struct {
	// sprout to mount, nil to begin a volatile one.
	sprout *assembly
	// ours are the sprouts of this seed with a member on the disk of the media,
	// usable or not: what a reset drops.
	ours []assembly
	// hopeful: a member is missing that may just be late.
	hopeful  bool
	warnings []string
}

// choose decides which sprout is mounted. Filesystems that are no sprouts are
// nobody's business here, an installed system above all.
func choose(s situation) choice {
	var c choice
	var usable []assembly
	say := func(format string, args ...any) { c.warnings = append(c.warnings, fmt.Sprintf(format, args...)) }
	for _, a := range s.found {
		own, seeds := a.split()
		near := a.on(s.disk)
		ours := len(seeds) > 0 && !slices.ContainsFunc(seeds, func(item btrfs.DevItem) bool { return item.FSID != s.seed.FSID })
		var lost *btrfs.MissingDeviceError
		switch {
		case a.err != nil:
			// What its seed is cannot be read. A sprout has the label of its seed.
			ours = s.seed.Label != "" && a.devices[0].Super.Label == s.seed.Label
			if !near && !ours {
				continue
			}
			if errors.As(a.err, &lost) {
				c.hopeful = true
				say("The sprout on %s lacks a device that is not plugged in, or it was cut off while it was made persistent, "+
					"and what was in memory is lost: it is not used.", a.paths())
			} else {
				say("The filesystem on %s is damaged and is not used: %v.", a.paths(), a.err)
			}
		case len(seeds) == 0:
			continue
		case !ours:
			say("The sprout on %s belongs to another seed (%s) and is left alone.", a.paths(), seeds[0].FSID)
		case !sameSeed(seeds, s.seed):
			say("The sprout on %s was made with another version of this seed and cannot be used with this one.", a.paths())
		case a.missing() > 0:
			c.hopeful = true
			say("The sprout on %s lacks %d of %d devices: they are not plugged in, or it was cut off while it was made persistent, "+
				"and what was in memory is lost. It is not used.", a.paths(), a.missing(), len(own))
		case a.uneven():
			say("The devices of the sprout on %s are of different times: one of them is an old copy. It is not used.", a.paths())
		case len(s.only) > 0 && !slices.ContainsFunc(s.only, a.uses):
			say("The sprout on %s is not used: rd.sprout.persist= names %s.", a.paths(), pathsOf(s.only))
		default:
			usable = append(usable, a)
		}
		if ours && near {
			c.ours = append(c.ours, a)
		}
	}
	if len(usable) == 0 {
		return c
	}
	slices.SortStableFunc(usable, func(a, b assembly) int {
		if a.on(s.disk) != b.on(s.disk) {
			if a.on(s.disk) {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.generation(), a.generation())
	})
	c.sprout = &usable[0]
	if len(usable) > 1 {
		why := "which was written to most often"
		if c.sprout.on(s.disk) && !usable[1].on(s.disk) {
			why = "which is on the disk of the media"
		}
		for _, a := range usable[1:] {
			say("There is more than one sprout of this seed: the one on %s is used, %s, and that on %s is left alone.",
				c.sprout.paths(), why, a.paths())
		}
	}
	if len(c.sprout.copies) > 0 {
		say("There are copies of the sprout on %s: %s. Only the former is used.", c.sprout.paths(), pathsOf(c.sprout.copies))
	}
	return c
}

// sameSeed reports whether the seed is the very one that the sprout was made with.
func sameSeed(items []btrfs.DevItem, seed btrfs.Super) bool {
	return len(items) == 1 && items[0].UUID == seed.DevUUID && items[0].DevID == seed.DevID && items[0].Generation == seed.Generation
}

// seedsOf gives the devices that are by themselves the seed of a complete sprout,
// those on the disk of such a one first.
func seedsOf(assemblies []assembly, list []found) []found {
	var near, far []found
	for _, f := range list {
		its := slices.DeleteFunc(slices.Clone(assemblies), func(a assembly) bool {
			_, seeds := a.split()
			return !f.isSeed() || !a.complete() || seeds[0].FSID != f.Super.FSID || !sameSeed(seeds, f.Super)
		})
		switch {
		case len(its) == 0:
		case slices.ContainsFunc(its, func(a assembly) bool { return a.on(f.Disk) }):
			near = append(near, f)
		default:
			far = append(far, f)
		}
	}
	return append(near, far...)
}
