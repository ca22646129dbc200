package plan

import (
	"fmt"
	"slices"
	"strings"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/fault"
)

// refuseRequest adds every reason why r cannot be done on s.
func (p *Plan) refuseRequest(s Sprout, r Request, target *Target, gone []Member) {
	_, copying := s.copying(r)
	switch {
	case copying: // it goes on with that
	case s.Replace != nil:
		p.refuse(fault.New(fault.Busy, "the kernel is busy with copying member %d to %s", s.Replace.DevID, nameOf(s.Replace.Target)))
	case s.Exclusive != "":
		p.refuse(fault.New(fault.Busy, "the kernel is busy with a %s on this file system", s.Exclusive))
	}
	if s.WillReset {
		// It is in the file system that would move: the next boot would find it,
		// and drop a part of what is whole only with another disk.
		p.refuse(fault.New(fault.WrongState, "what is kept will be dropped at the next boot; take that back first (reset --undo)"))
	}
	if len(gone) > 0 && len(s.Swapfiles) > 0 {
		p.refuse(fault.New(fault.DeviceBusy, "the swap file %s is in use", strings.Join(s.Swapfiles, ", ")))
	}
	for _, m := range s.Members {
		if m.Missing {
			p.refuse(fault.New(fault.IOError, "member %d of the file system is missing", m.DevID))
		}
	}
	switch r.Operation {
	case Release:
		p.refuseRelease(s, r, target)
		return
	case Persist, Flatten:
		if s.Unplugged {
			p.refuse(fault.New(fault.IOError, "the stick was unplugged, and what is on it cannot be read any more"))
		}
		p.refuseMove(s, r)
	case RemoveDevice:
		p.refuseRemoval(s, r, gone)
	case AddDevice:
		if _, present := r.Target.find(s.Members); present && !resumes(s, r) {
			p.refuse(fault.New(fault.DeviceIsMember, "%s is already a member of this sprout", r.Target.ID.Path))
		}
		if state := StateOf(s.Members, s.Intent); r.Target.Zram && state != Volatile {
			p.refuse(fault.New(fault.WrongState, "the sprout is %s; with memory added, it would be lost at power-off", state))
		}
	default:
		p.refuse(fault.New(fault.InvalidArgs, "there is no operation %q", r.Operation))
		return
	}
	p.refuseOptions(r)
	p.refuseReleaseFirst(s, r)
	if _, present := r.Target.find(s.Members); !present && !copying && r.Operation != RemoveDevice && !r.Target.Zram {
		p.refuseTarget(r, target)
	}
	name := r.Target.ID.Path
	if r.Target.Free && target != nil {
		name = "the free space of " + target.Path
	}
	if (p.TargetSize > 0 || r.Target.Free) && p.TargetSize < p.MinTargetSize {
		p.refuse(fault.New(fault.TargetTooSmall, "%s has %s, but at least %s is needed",
			name, BytesText(p.TargetSize), BytesText(p.MinTargetSize)))
	}
}

// resumes reports whether r is what an earlier job left, or a part of it.
func resumes(s Sprout, r Request) bool {
	if s.Intent == nil {
		return false
	}
	return sameRequest(*s.Intent, r) || sameRequest(Request{Operation: r.Operation, Target: s.Intent.Target}, r)
}

// refuseMove refuses a persist or flatten that makes no sense in the present state.
func (p *Plan) refuseMove(s Sprout, r Request) {
	state := StateOf(s.Members, s.Intent)
	member, present := r.Target.find(s.Members)
	if present && (member.Seed || member.Zram) {
		p.refuse(fault.New(fault.DeviceIsMember, "%s is a member of this sprout already", nameOf(member)))
		return
	}
	hasSeed := slices.ContainsFunc(s.Members, func(m Member) bool { return m.Seed })
	if r.Operation == Persist && !hasSeed {
		p.refuse(fault.New(fault.WrongState, "the seed has left this sprout, it is installed; there is nothing to persist"))
		return
	}
	// A member may be named again only to go on with a move that was cut off.
	if present && state != Partial && !resumes(s, r) {
		p.refuse(fault.New(fault.DeviceIsMember, "%s is a member of this sprout already (the sprout is %s)", member.ID.Path, state))
	}
}

// refuseRemoval refuses to remove a member the file system cannot be without.
func (p *Plan) refuseRemoval(s Sprout, r Request, gone []Member) {
	if len(gone) == 0 {
		if !resumes(s, r) {
			p.refuse(fault.New(fault.NoSuchDevice, "%s is no member of this sprout", r.Target.ID.Path))
		}
		return
	}
	writableLeft, onlyRAM := 0, true
	var room uint64
	for _, m := range s.Members {
		if m.Writable && !m.Seed && !r.Target.is(m) {
			writableLeft++
			room += m.Size
			onlyRAM = onlyRAM && m.Zram
		}
	}
	if writableLeft == 0 {
		p.refuse(fault.New(fault.WrongState, "%s is the only writable member of this sprout", nameOf(gone[0])))
		return
	}
	if need := MinSize(landing(s, r), s.Space.MetadataCopies); room < need {
		p.refuse(fault.New(fault.NoSpace, "the other members have %s, but at least %s is needed", BytesText(room), BytesText(need)))
	}
	if moves := usedOn(gone[0]); onlyRAM && moves > s.MemoryAvailable {
		p.refuse(fault.New(fault.NoMemory, "%s would move into memory, but only %s is available", BytesText(moves), BytesText(s.MemoryAvailable)))
	}
}

// refuseOptions refuses values that the kernel would refuse later, or that this
// build cannot carry out.
func (p *Plan) refuseOptions(r Request) {
	o := r.Options
	if err := CheckCompress(o.Compress); err != nil {
		p.refuse(err)
	}
	if o.MetadataProfile != "" && o.MetadataProfile != "single" && o.MetadataProfile != "dup" {
		p.refuse(fault.New(fault.InvalidArgs, "the metadata profile is single or dup, not %q", o.MetadataProfile))
	}
	// 256 bytes with the final zero. Source: BTRFS_LABEL_SIZE in linux/btrfs.h.
	if len(o.Label) > 255 || strings.ContainsAny(o.Label, "\x00/\n") {
		p.refuse(fault.New(fault.InvalidArgs, "a label has at most 255 bytes and no slash or line break"))
	}
	if r.Operation == Flatten && o.Bootloader != "none" {
		p.refuse(fault.New(fault.NotSupported, "this version installs no boot loader; bootloader must be \"none\""))
	}
	if r.Target.Zram && r.Operation == AddDevice && o.Size < btrfs.MinFirstDevice {
		p.refuse(fault.New(fault.InvalidArgs, "a zram device has at least %s", BytesText(btrfs.MinFirstDevice)))
	}
}

// CheckCompress refuses a compress= value that the kernel does not know.
func CheckCompress(value string) *fault.Error {
	algorithm, level, hasLevel := strings.Cut(value, ":")
	known := map[string]int{"": 0, "none": 0, "no": 0, "lzo": 0, "zlib": 9, "zstd": 15}
	highest, ok := known[algorithm]
	if ok && hasLevel {
		var n int
		_, err := fmt.Sscanf(level, "%d", &n)
		ok = err == nil && n >= 1 && n <= highest && level == fmt.Sprint(n)
	}
	if !ok {
		return fault.New(fault.InvalidArgs, "compress is none, lzo, zlib[:1-9] or zstd[:1-15], not %q", value)
	}
	return nil
}

// refuseTarget refuses a device that must not or cannot become a member.
func (p *Plan) refuseTarget(r Request, t *Target) {
	if t == nil {
		p.refuse(fault.New(fault.NoSuchDevice, "there is no device %s", r.Target.ID.Path))
		return
	}
	if r.Target.Free { // the disk is the media itself, and in use
		if t.ReadOnly {
			p.refuse(fault.New(fault.DeviceReadOnly, "%s is read-only", t.Path))
		}
		return
	}
	if t.MemberOf != "" {
		p.refuse(fault.New(fault.DeviceIsMember, "%s belongs to the mounted file system %s", t.Path, t.MemberOf))
	}
	if t.Media {
		p.refuse(fault.New(fault.DeviceIsMedia, "%s holds the seed of this sprout", t.Path))
	}
	if t.ReadOnly {
		p.refuse(fault.New(fault.DeviceReadOnly, "%s is read-only", t.Path))
	}
	if len(t.Holders) > 0 {
		p.refuse(fault.New(fault.DeviceBusy, "%s is in use: %s", t.Path, HoldersText(t.Holders)))
	}
	if t.ProbeError != nil {
		p.refuse(&fault.Error{Code: fault.IOError, Message: "cannot read what is on " + t.Path, Err: t.ProbeError})
	}
	if (len(t.Signatures) > 0 || len(t.Partitions) > 0) && !r.Options.Wipe {
		p.refuse(fault.New(fault.TargetNotEmpty, "%s is not empty: %s", t.Path, contents(t)))
	}
}

// RefuseDevice gives the first reason why t must not become a member, nil if
// there is none.
func RefuseDevice(t *Target, wipe bool) error {
	var p Plan
	p.refuseTarget(Request{Options: Options{Wipe: wipe}}, t)
	return p.Err()
}

// HoldersText describes holders for people.
func HoldersText(holders []block.Holder) string {
	var parts []string
	for _, h := range holders {
		switch h.Kind {
		case "mount":
			if !strings.HasPrefix(h.Name, "/") { // in another mount namespace
				parts = append(parts, "a mount "+h.Name)
				continue
			}
			parts = append(parts, "mounted at "+h.Name)
		case "swap":
			parts = append(parts, "swap")
		case "loop":
			parts = append(parts, "loop device "+h.Name)
		default:
			parts = append(parts, strings.TrimSpace(h.Kind+" "+h.Name))
		}
	}
	return strings.Join(parts, ", ")
}
