package plan

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
)

// spareMemory is what has to be available beside a copy in memory, and
// spareSpace beside one in a directory, in bytes: for programs, and for what a
// file system keeps for itself.
const (
	spareMemory = 256 * mib
	spareSpace  = 16 * mib
)

// SeedOf gives the seed among members, false where there is none.
func SeedOf(members []Member) (Member, bool) {
	for _, m := range members {
		if m.Seed {
			return m, true
		}
	}
	return Member{}, false
}

// destination gives where r wants the seed to be copied to, zero for nowhere.
func destination(r Request) TargetRef {
	switch {
	case r.Operation == Release:
		return r.Target
	case r.Operation == Flatten && r.Options.ReleaseFirst:
		return TargetRef{ReleaseTo: RAM}
	}
	return TargetRef{}
}

// releases reports whether r wants the seed of s to be read from somewhere else
// than it is.
func releases(s Sprout, r Request) bool {
	to := destination(r)
	return to.ReleaseTo != "" && !s.SeedFile.at(to, s.SeedFSID)
}

// at reports whether a seed is read from a copy at a destination of a release.
func (f SeedFile) at(to TargetRef, seedFSID string) bool {
	switch {
	case to.ReleaseTo == RAM:
		return f.Memory
	case to.onDevice():
		return f.Device.Same(to.ID)
	}
	// A copy that was cut off just before it got its name has another ending.
	return filepath.Dir(f.Path) == to.ReleaseTo && strings.HasPrefix(filepath.Base(f.Path), CopyName(seedFSID))
}

// release adds the steps that copy the seed. To a block device all of it is
// copied, which is more than what the sprout still has of it.
func (p *Plan) release(r Request, seed Member, target *Target) {
	bytes, to := usedOn(seed), destination(r).ReleaseTo
	if r.Operation == Release && r.Target.onDevice() {
		p.ready(r, target)
	}
	p.BytesToMove += bytes
	p.add(Step{Kind: StepRelease, DevID: seed.DevID, Device: seed.ID, Bytes: bytes, Value: to,
		Text: fmt.Sprintf("copy %s of %s to %s and read it there", BytesText(bytes), nameOf(seed), placeText(to))})
}

func placeText(to string) string {
	if to == RAM {
		return "memory"
	}
	return to
}

// refuseRelease adds every reason why the seed of s cannot be released as r asks.
func (p *Plan) refuseRelease(s Sprout, r Request, target *Target) {
	seed, ok := SeedOf(s.Members)
	switch done := ok && !releases(s, r); {
	case !ok:
		p.refuse(fault.New(fault.WrongState, "the seed has left this sprout; there is nothing to release"))
		return
	case done && resumes(s, r):
		return // all that is left is to let the media go
	case s.SeedFile.Elsewhere && s.SeedFile.Memory, done && s.SeedFile.Memory:
		p.refuse(fault.New(fault.WrongState, "the seed is in memory already"))
		return
	case s.SeedFile.Elsewhere, done:
		p.refuse(fault.New(fault.WrongState, "the seed was released already: it is read from %s", s.SeedFile.Path))
		return
	}
	p.refuseCopy(s)
	switch need := usedOn(seed); {
	case r.Target.onDevice():
		p.refuseDevice(s, r, target, seed)
		return
	case r.Target.ReleaseTo == RAM:
		p.refuseMemory(s, need)
	default:
		p.refuseDirectory(s, r, target, need)
	}
	if r.Options.Wipe {
		p.refuse(fault.New(fault.InvalidArgs, "only a block device can be wiped, and %s is none", r.Target.ReleaseTo))
	}
}

// refuseDevice refuses a block device that must not be written, or on which the
// copy would be no seed in its own right.
func (p *Plan) refuseDevice(s Sprout, r Request, t *Target, seed Member) {
	if m, present := r.Target.find(s.Members); present {
		p.refuse(fault.New(fault.DeviceIsMember, "%s is a member of this sprout", nameOf(m)))
		return
	}
	if t == nil {
		p.refuse(fault.New(fault.NoSuchDevice, "there is no device %s", r.Target.ReleaseTo))
		return
	}
	p.TargetSize, p.MinTargetSize = t.Size, seed.ID.Size
	if t.Media || t.SameDisk {
		p.refuse(fault.New(fault.DeviceIsMedia, "%s is on the stick that is to be set free", t.Path))
		return
	}
	table := func(sig block.Signature) bool { return sig.Usage == "partition-table" }
	if len(t.Partitions) > 0 || t.Name == t.Disk && slices.ContainsFunc(t.Signatures, table) {
		p.refuse(fault.New(fault.TargetNotEmpty, "%s is a whole disk with partitions; a seed goes to one of them", t.Path))
	}
	// What an earlier try left there is as good as nothing.
	r.Options.Wipe = r.Options.Wipe || resumes(s, r) && t.copyOf(s.SeedFSID)
	p.refuseTarget(r, t)
	f, size := s.SeedFile, seed.ID.Size
	switch {
	case f.Offset != 0:
		p.refuse(fault.New(fault.NotSupported, "the seed begins in the middle of %s, and on a device it has to be at the beginning", f.Path))
	case t.Size < size:
		p.refuse(fault.New(fault.TargetTooSmall, "%s has %s, but the seed needs %s", t.Path, BytesText(t.Size), BytesText(size)))
	case t.Size > size && (f.Limit == 0 || f.Limit-f.Limit%sector != size):
		p.refuse(fault.New(fault.NotSupported, "%s has no limit, so %s would have to have %d bytes, as the seed has, and not %d",
			nameOf(seed), t.Path, size, t.Size))
	}
}

// sector is the unit in which the kernel counts the size of a device, in bytes.
const sector = 512

// copyOf reports whether a seed is on t, and nothing else.
func (t *Target) copyOf(seedFSID string) bool {
	return len(t.Partitions) == 0 && len(t.Signatures) == 1 && t.Signatures[0].Type == "btrfs" && t.Signatures[0].UUID == seedFSID
}

// refuseReleaseFirst does the same for a flatten that is to begin with it.
func (p *Plan) refuseReleaseFirst(s Sprout, r Request) {
	seed, ok := SeedOf(s.Members)
	if r.Operation != Flatten || !ok || s.SeedFile.Elsewhere || !releases(s, r) {
		return
	}
	p.refuseCopy(s)
	p.refuseMemory(s, usedOn(seed))
}

// refuseCopy refuses a seed of which no copy could be used, or made.
func (p *Plan) refuseCopy(s Sprout) {
	switch {
	case !s.SeedFile.Loop:
		p.refuse(fault.New(fault.NotSupported, "the seed is on a block device itself; only a seed behind a loop device can be released"))
	case s.SeedFile.Fixed != "":
		p.refuse(fault.New(fault.NotSupported, "the seed cannot be released: %s", s.SeedFile.Fixed))
	}
	if s.Unplugged && !s.SeedFile.Elsewhere {
		p.refuse(fault.New(fault.IOError, "the stick was unplugged, and what is on it cannot be read any more"))
	}
}

func (p *Plan) refuseMemory(s Sprout, need uint64) {
	if need += spareMemory; need > s.MemoryAvailable {
		p.refuse(fault.New(fault.NoMemory, "a copy of the seed in memory needs %s to be available, and %s is",
			BytesText(need), BytesText(s.MemoryAvailable)))
	}
}

// refuseDirectory refuses a directory that cannot take the copy, or from which
// reading it would help nobody.
func (p *Plan) refuseDirectory(s Sprout, r Request, t *Target, need uint64) {
	switch {
	case t == nil:
		p.refuse(fault.New(fault.NoSuchDevice, "there is no directory %s", r.Target.ReleaseTo))
		return
	case t.MemberOf != "" && t.MemberOf == s.FSID:
		p.refuse(fault.New(fault.DeviceIsMember, "%s is on this sprout itself, which would then be read from itself", t.Path))
	case t.Media:
		p.refuse(fault.New(fault.DeviceIsMedia, "%s is on the stick that is to be set free", t.Path))
	}
	if t.ReadOnly {
		p.refuse(fault.New(fault.DeviceReadOnly, "the file system of %s is read-only", t.Path))
	}
	if need += spareSpace; need > t.Free {
		p.refuse(fault.New(fault.NoSpace, "a copy of the seed needs %s in %s, and %s is free", BytesText(need), t.Path, BytesText(t.Free)))
	}
}
