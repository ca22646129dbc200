package plan

import (
	"slices"
	"strings"
)

// Lookout is what [Warnings] needs to know beside the sprout.
type Lookout struct {
	// Media is the path of the disk the seed comes from, "" where it is not
	// known; Unplugged is true once it is gone.
	Media     string
	Unplugged bool
	// TurnedReadOnly is true for a sprout that could be written before.
	TurnedReadOnly bool
}

// Warnings says what has gone wrong with s, one sentence or two each, for the
// user, who has to do something about it before the computer is switched off.
func Warnings(s Sprout, l Lookout) []string {
	const advice = " Copy what matters to another disk now, then restart with it plugged in."
	var list []string
	add := func(parts ...string) { list = append(list, strings.Join(parts, "")) }
	seeded := slices.ContainsFunc(s.Members, func(m Member) bool { return m.Seed })
	if l.Unplugged && seeded {
		add("The stick (", l.Media, ") was unplugged while the system still needs it: ",
			"what is not in memory cannot be read any more, and what is written from now on is lost.", advice)
	}
	for _, m := range s.Members {
		switch onStick := l.Unplugged && strings.HasPrefix(m.ID.Path, l.Media); {
		case !m.Missing || onStick: // said above
		case m.Seed:
			add("The seed (", m.ID.Path, ") was unplugged while the system still needs it: ",
				"what is not in memory cannot be read any more, and what is written from now on is lost.", advice)
		default:
			add("The device ", nameOf(m), " was unplugged while the file system is on it: ",
				"what is written from now on is lost, and so may be what was written just before.", advice)
		}
	}
	if l.TurnedReadOnly {
		add("The file system has become read-only, and nothing can be written to it any more. ",
			"If nobody asked for that, the kernel did it after an error: see 'journalctl -k'.")
	}
	return list
}
