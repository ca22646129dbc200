package plan

import (
	"fmt"
	"strings"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
)

// Make plans r on s. target is what r names as it is now; it may be nil if the
// device is gone or is a member, and for a new zram device.
//
// A plan without problems and without steps means that all is done. Making a
// plan of the state that any prefix of its steps leaves, gives the rest of the
// steps: that is how a job goes on after each step and after a crash.
func Make(s Sprout, r Request, target *Target) Plan {
	p := Plan{Operation: r.Operation}
	if r.Operation == Resume {
		if s.Intent == nil {
			p.refuse(fault.New(fault.NothingToResume, "no earlier job left anything undone"))
			return p
		}
		r = *s.Intent
		p.Operation = r.Operation
	}
	member, present := r.Target.find(s.Members)
	gone := leaving(s.Members, r)
	_, copying := s.copying(r)
	p.Resumes = s.Intent != nil && sameRequest(*s.Intent, r) || copying ||
		moves(r) && present && len(gone) > 0
	p.size(s, r, target)
	p.refuseRequest(s, r, target, gone)
	if len(p.Problems) > 0 {
		return p
	}

	p.free(s.Leftovers)
	seed, seeded := SeedOf(s.Members)
	left := !seeded || s.SeedFile.Elsewhere
	if seeded && !left && releases(s, r) {
		p.release(r, seed, target)
		left = true
	}
	if left {
		p.unmount(s.MediaMount)
	}
	if r.Operation == Release {
		return p
	}
	if s.ReadOnly && (len(gone) > 0 || !present && r.Operation != RemoveDevice) {
		p.add(Step{Kind: StepWritable, Text: "make the file system writable"})
	}
	source, replaces := copied(s, r, target, gone)
	switch {
	case r.Operation == RemoveDevice:
	case replaces:
		gone = without(gone, source.DevID)
		p.replace(s, r, target, source)
	case !present:
		p.bring(r, target)
	case moves(r):
		p.settle(r, member, member.ID)
	}
	for _, m := range gone {
		p.take(m)
		if m.Seed && !left {
			p.unmount(s.MediaMount)
		}
	}
	if moves(r) {
		id := member.ID
		if target != nil {
			id = target.ID
		}
		p.finish(s, r, id)
	}
	return p
}

// moves reports whether r brings everything, or all but the seed, to a target.
func moves(r Request) bool { return r.Operation == Persist || r.Operation == Flatten }

// bring adds the steps that make the target a member.
func (p *Plan) bring(r Request, target *Target) {
	if r.Target.Zram {
		p.add(Step{Kind: StepAddZram, Text: "add a new zram device of " + BytesText(r.Options.Size)})
		return
	}
	id, name := p.ready(r, target)
	p.add(Step{Kind: StepAdd, Device: id, Text: "add " + name})
}

// ready adds the steps that make the target an empty device, and gives the
// device, which is zero where it is still to be made, and its name.
func (p *Plan) ready(r Request, target *Target) (id block.ID, name string) {
	if r.Target.Free {
		p.add(Step{Kind: StepPartition, Device: target.ID, Text: "make a partition in the free space of " + target.Path})
		return block.ID{}, "the new partition"
	}
	if len(target.Signatures) > 0 || len(target.Partitions) > 0 {
		p.Destroys = append(p.Destroys, fmt.Sprintf("%s: %s", target.Path, contents(target)))
		p.add(Step{Kind: StepWipe, Device: target.ID, Text: fmt.Sprintf("destroy what is on %s (%s)", target.Path, contents(target))})
	}
	return target.ID, target.Path
}

// take adds the steps that move everything off m and give it back.
func (p *Plan) take(m Member) {
	moves := usedOn(m)
	p.BytesToMove += moves
	p.add(Step{Kind: StepRemove, DevID: m.DevID, Device: m.ID, Bytes: moves,
		Text: fmt.Sprintf("move %s off %s and remove it", BytesText(moves), nameOf(m))})
	switch {
	case m.Zram:
		p.free([]Leftover{{Zram: true, ID: m.ID}})
	case m.Seed && m.ID.Num.IsLoop():
		p.free([]Leftover{{ID: m.ID}})
	}
}

// free adds the steps that give devices back which are no members any more.
func (p *Plan) free(leftovers []Leftover) {
	for _, l := range leftovers {
		step := Step{Kind: StepFreeZram, Device: l.ID, Text: "give the memory of " + l.ID.Path + " back"}
		if l.ID.Num.IsLoop() {
			step.Kind = StepDetach
		}
		if !l.Zram {
			step.Text = "detach the seed from " + l.ID.Path
		}
		p.add(step)
	}
}

// unmount adds the step that lets the media go.
func (p *Plan) unmount(mountpoint string) {
	if mountpoint != "" {
		p.add(Step{Kind: StepUnmount, Value: mountpoint, Text: "unmount the stick's file system at " + mountpoint})
	}
}

// finish adds the steps that set what the file system is to be from now on.
func (p *Plan) finish(s Sprout, r Request, target block.ID) {
	o := r.Options
	if o.MetadataProfile != "" && o.MetadataProfile != profile(s.Space.MetadataCopies) {
		p.add(Step{Kind: StepConvert, Device: target, Value: o.MetadataProfile,
			Text: "convert the metadata to " + o.MetadataProfile})
	}
	if want := compression(o.Compress); o.Compress != "" && want != compression(s.Compress) {
		p.add(Step{Kind: StepCompress, Value: want, Text: "compress what is written from now on with " + want})
	}
	if o.Label != "" && o.Label != s.Label {
		p.add(Step{Kind: StepLabel, Value: o.Label, Text: fmt.Sprintf("set the label to %q", o.Label)})
	}
}

// compression gives the form in which the kernel shows a compress= value, so
// that two of them can be compared: levels are spelled out. zstd's default
// level is 3 and zlib's is 3. Source: btrfs(5), compress.
func compression(value string) string {
	switch value {
	case "zstd", "zlib":
		return value + ":3"
	case "none", "": // the kernel shows no option at all
		return "no"
	}
	return value
}

func profile(copies uint64) string {
	if copies > 1 {
		return "dup"
	}
	return "single"
}

func (p *Plan) add(s Step) { p.Steps = append(p.Steps, s) }

func (p *Plan) refuse(problem *fault.Error) { p.Problems = append(p.Problems, problem) }

// usedOn gives the bytes that have to move when m leaves.
func usedOn(m Member) uint64 {
	var sum uint64
	for _, g := range m.Groups {
		sum += g.Used
	}
	return sum
}

func sameRequest(a, b Request) bool {
	if a.Operation != b.Operation || a.Target.Zram != b.Target.Zram || a.Target.ReleaseTo != b.Target.ReleaseTo {
		return false
	}
	if a.Operation == Release && !a.Target.onDevice() {
		return true
	}
	if a.Target.Free && b.Target.Free {
		return true
	}
	return a.Target.UUID != "" && a.Target.UUID == b.Target.UUID || a.Target.ID.Same(b.Target.ID)
}

func nameOf(m Member) string {
	switch {
	case m.ID.Path == "":
		return fmt.Sprintf("member %d", m.DevID)
	case m.Seed:
		return "the seed " + m.ID.Path
	}
	return m.ID.Path
}

// contents describes what is on t, for people.
func contents(t *Target) string {
	var parts []string
	for _, s := range t.Signatures {
		part := s.Type
		if s.Label != "" {
			part += fmt.Sprintf(" %q", s.Label)
		}
		switch {
		case s.Type != "btrfs":
		case t.BtrfsDevices == 2:
			part += ", one of the 2 devices of a file system, as it is where a live system keeps what it writes"
		case t.BtrfsDevices > 2:
			part += fmt.Sprintf(", one of the %d devices of a file system, as it is left by a move that was cut off", t.BtrfsDevices)
		}
		parts = append(parts, part)
	}
	if n := len(t.Partitions); n > 0 {
		parts = append(parts, fmt.Sprintf("%d partition(s)", n))
	}
	return strings.Join(parts, ", ")
}

// BytesText gives n in the largest binary unit that leaves a readable number.
func BytesText(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, suffixes := float64(n)/unit, "KMGTPE"
	i := 0
	for value >= unit && i < len(suffixes)-1 {
		value /= unit
		i++
	}
	return fmt.Sprintf("%.1f %ciB", value, suffixes[i])
}
