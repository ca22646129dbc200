package plan

import (
	"fmt"
	"slices"

	"sproutd.org/sproutd/block"
)

// copying gives the member that is being copied to the target of r already.
func (s Sprout) copying(r Request) (Member, bool) {
	if s.Replace == nil || !moves(r) || !r.Target.is(s.Replace.Target) {
		return Member{}, false
	}
	for _, m := range s.Members {
		if m.DevID == s.Replace.DevID {
			return m, true
		}
	}
	return Member{}, false
}

// copied gives the member that is copied to the target as a whole: the kernel
// does that several times faster than moving what is on it. It copies no seed.
//
// Where there is RAM among what leaves, nothing is copied: RAM leaves first, and
// a removal gives its memory back all the time, a copy only at its end.
func copied(s Sprout, r Request, target *Target, gone []Member) (Member, bool) {
	if m, ok := s.copying(r); ok {
		return m, true
	}
	_, present := r.Target.find(s.Members)
	zram := slices.ContainsFunc(gone, func(m Member) bool { return m.Zram })
	if !moves(r) || present || zram || target == nil || r.NoReplace {
		return Member{}, false
	}
	size := target.Size
	if r.Target.Free {
		size = target.Free
	}
	var best Member
	for _, m := range gone {
		// The kernel refuses a target that is smaller than the member. What is on it
		// stays as spread as it is, so that there can be less room for the rest than
		// after moving.
		if m.Seed || size < m.Size || !hasFreeChunks(m, s.Space.MetadataCopies) {
			continue
		}
		there := m
		there.Size = size
		if !hasRoom(there, without(gone, m.DevID), s.Space.MetadataCopies) {
			continue
		}
		if best.DevID == 0 || usedOn(m) > usedOn(best) {
			best = m
		}
	}
	return best, best.DevID != 0
}

// hasFreeChunks reports whether a chunk of data and one of metadata can still be
// made on m: a group that is being copied takes no writes meanwhile, and others
// have to. Without, the kernel gives up with ENOSPC.
// Source: fs/btrfs/block-group.c, btrfs_inc_block_group_ro.
func hasFreeChunks(m Member, copies uint64) bool {
	d := newDevice(m.Size, max(1, copies), false)
	for _, g := range m.Groups {
		d.free -= min(d.free, g.Length)
	}
	limit := uint64(256 * mib)
	if m.Size > 50*gib {
		limit = gib
	}
	tenth := m.Size / 10
	return d.free >= min(gib, tenth)+d.copies*min(limit, tenth)
}

// without gives members but for one.
func without(members []Member, devid uint64) []Member {
	return slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.DevID == devid })
}

// replace adds the steps that copy m to the target, in whose place it is then.
func (p *Plan) replace(s Sprout, r Request, target *Target, m Member) {
	var id block.ID
	var name string
	if _, going := s.copying(r); going {
		id, name = s.Replace.Target.ID, s.Replace.Target.ID.Path
	} else {
		id, name = p.ready(r, target)
	}
	used := usedOn(m)
	p.BytesToMove += used
	p.add(Step{Kind: StepReplace, DevID: m.DevID, Device: id, From: m.ID, Copy: m.UUID, Bytes: used,
		Text: fmt.Sprintf("copy %s from %s to %s, which takes its place", BytesText(used), nameOf(m), name)})
	r.Target.Copy = m.UUID
	p.settle(r, Member{DevID: m.DevID, Size: m.Size, ID: block.ID{Path: name, Size: p.TargetSize}}, id)
}

// settle adds the steps that a target needs which has become a member by a copy:
// m is the member, and id the device for the steps.
func (p *Plan) settle(r Request, m Member, id block.ID) {
	if r.Target.Copy != "" {
		p.add(Step{Kind: StepCheck, DevID: m.DevID, Device: id, Text: "compare what is on " + m.ID.Path + " with its checksums"})
	}
	if m.Grows() {
		p.add(Step{Kind: StepResize, DevID: m.DevID, Device: id, Text: "use all of " + m.ID.Path})
	}
}
