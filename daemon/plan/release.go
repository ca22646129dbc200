package plan

import (
	"fmt"
	"path/filepath"
	"strings"

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

// destination gives where r wants the seed to be copied to, "" for nowhere.
func destination(r Request) string {
	switch {
	case r.Operation == Release:
		return r.Target.ReleaseTo
	case r.Operation == Flatten && r.Options.ReleaseFirst:
		return RAM
	}
	return ""
}

// releases reports whether r wants the seed of s to be read from somewhere else
// than it is.
func releases(s Sprout, r Request) bool {
	to := destination(r)
	return to != "" && !s.SeedFile.at(to, s.SeedFSID)
}

// at reports whether a seed is read from a copy at a destination of a release.
func (f SeedFile) at(to, seedFSID string) bool {
	if to == RAM {
		return f.Memory
	}
	// A copy that was cut off just before it got its name has another ending.
	return filepath.Dir(f.Path) == to && strings.HasPrefix(filepath.Base(f.Path), CopyName(seedFSID))
}

// release adds the step that copies the seed.
func (p *Plan) release(r Request, seed Member) {
	bytes, to := usedOn(seed), destination(r)
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
	if need := usedOn(seed); r.Target.ReleaseTo == RAM {
		p.refuseMemory(s, need)
	} else {
		p.refuseDirectory(s, r, target, need)
	}
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
