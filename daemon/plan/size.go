package plan

const (
	mib = 1 << 20

	// MinFirstDevice is the least size of a sprout's first writable device, in
	// bytes: below it the kernel may abort the transaction of the sprout, and
	// 6.18 then oopses. Design §3.4.
	MinFirstDevice = 512 * mib
	// minAdded is the least size of a further member. The kernel takes anything
	// above 1 MiB, but what is below this has no room for a single chunk.
	minAdded = 64 * mib
)

// FirstDeviceSize gives the least size in bytes of the device that turns a
// seed with the given global reserve into a sprout.
func FirstDeviceSize(globalReserve uint64) uint64 {
	return max(MinFirstDevice, 20*globalReserve)
}

// Content is what has to fit on a device, in bytes.
type Content struct {
	Data, Metadata, System uint64 // used bytes, with every copy counted
	GlobalReserve          uint64
}

// MinSize gives the least size in bytes of a device that can hold c.
func MinSize(c Content) uint64 {
	return c.Data + c.Data/10 + c.Metadata + c.Metadata/4 + 64*mib + c.GlobalReserve + 16*mib
}

// size fills the sizes of the plan.
func (p *Plan) size(s Sprout, r Request, target *Target, gone []Member) {
	member, present := r.Target.find(s.Members)
	switch {
	case r.Operation == RemoveDevice || r.Target.Zram:
		return
	case present:
		p.TargetSize = member.Size
	case target != nil:
		p.TargetSize = target.Size
	default:
		return
	}
	p.MinTargetSize = minAdded
	if len(gone) > 0 {
		landing := gone
		if present {
			landing = append(landing[:len(landing):len(landing)], member)
		}
		p.MinTargetSize = max(minAdded, MinSize(content(s, landing)))
	}
}

// content adds up what lies on members.
func content(s Sprout, members []Member) Content {
	c := Content{GlobalReserve: s.Space.GlobalReserve}
	for _, m := range members {
		for _, g := range m.Groups {
			switch g.Type {
			case Data:
				c.Data += g.Used
			case Metadata:
				c.Metadata += g.Used
			case System:
				c.System += g.Used
			}
		}
	}
	return c
}

// stays lists what the writable members hold together once r is done.
func stays(s Sprout, r Request) []Member {
	var list []Member
	for _, m := range s.Members {
		if !m.Seed || r.Target.is(m) {
			list = append(list, m)
		}
	}
	return list
}
