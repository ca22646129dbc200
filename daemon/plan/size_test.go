package plan_test

import (
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/plan"
)

const kib = 1 << 10

// layout makes a member with data in extents of one size, and metadata.
func layout(data, extent, metadata uint64) []plan.Member {
	m := plan.Member{DevID: 1, Seed: true}
	m.Groups = append(m.Groups, plan.Group{Type: plan.System, Logical: 1 * mib, Length: 8 * mib, Used: 16 * kib})
	if metadata > 0 {
		m.Groups = append(m.Groups, plan.Group{Type: plan.Metadata, Logical: 16 * mib, Length: 256 * mib, Used: metadata})
	}
	for at := uint64(gib); data > 0; at += gib {
		g := plan.Group{Type: plan.Data, Logical: at, Length: gib}
		for g.Used < gib && data > 0 {
			n := min(extent, data)
			g.Extents = append(g.Extents, plan.Extent{Start: at + g.Used, Length: n})
			g.Used += n
			data -= n
		}
		m.Groups = append(m.Groups, g)
	}
	return []plan.Member{m}
}

// TestMinSizeAgainstTheKernel holds the planner's least size against what was
// found on Linux 6.18 by trying sizes on such layouts: never less, and at most
// 15 % more. tests/root tries it on the kernel it runs on.
func TestMinSizeAgainstTheKernel(t *testing.T) {
	for _, c := range []struct {
		what                 string
		data, extent, meta   uint64
		copies, need, atMost uint64 // need in MiB as found
	}{
		{"few large files: the largest extent needs a chunk", 700 * mib, 128 * mib, 800 * kib, 1, 1127, 1296},
		{"a seed in a large image", 175 * mib, 16 * mib, 1500 * kib, 1, 242, 278},
		{"small compressed files, dup", 645 * mib, 128 * kib, 50 * mib, 2, 903, 1038},
	} {
		t.Run(c.what, func(t *testing.T) {
			got := plan.MinSize(layout(c.data, c.extent, c.meta), c.copies) / mib
			if got < c.need || got > c.atMost {
				t.Errorf("the least size is %d MiB, not between %d and %d", got, c.need, c.atMost)
			}
		})
	}
}

func TestMinSizeOfNothingIsNothing(t *testing.T) {
	if got := plan.MinSize(nil, 1); got != 0 {
		t.Errorf("nothing needs %d bytes", got)
	}
}

func TestSizesKeptForOneTargetAreRightForTheNext(t *testing.T) {
	s := plan.Sprout{Members: append(layout(gib, 100*kib, 20*mib), plan.Member{
		DevID: 2, Zram: true, Writable: true, Size: 4 * gib,
		Groups: []plan.Group{{Type: plan.Data, Logical: 9 * gib, Length: gib, Used: 300 * mib}},
	})}
	kept := map[string]uint64{}
	for _, op := range []plan.Operation{plan.Flatten, plan.Persist, plan.AddDevice, plan.Persist, plan.Flatten} {
		target := &plan.Target{Device: block.Device{ID: block.ID{Num: block.DevNum{Major: 8, Minor: 16}, Path: "/dev/sdb", Size: 64 * gib}}}
		r := plan.Request{Operation: op, Target: plan.TargetRef{ID: target.ID}, Options: plan.Options{Bootloader: "none"}}
		s.MinSizes = nil
		want := plan.Make(s, r, target).MinTargetSize
		s.MinSizes = kept
		if got := plan.Make(s, r, target).MinTargetSize; got != want || want == 0 {
			t.Errorf("%s needs %d bytes, with sizes kept %d", op, want, got)
		}
	}
}

// Who asks whether a target suffices gets the same answer as who asks how large it
// has to be.
func TestARoughPlanRefusesTheSameTargets(t *testing.T) {
	s := plan.Sprout{Members: layout(gib, 100*kib, 20*mib)}
	least := plan.MinSize(s.Members, 1)
	sizes := []uint64{64 * gib, 2 * least, least + mib, least, 64 * gib, least - mib, least, 2 * least}
	for i, size := range append(sizes, sizes...) {
		if i == len(sizes) {
			s.MinSizes = map[string]uint64{} // each with what was found for those before
		}
		target := &plan.Target{Device: block.Device{ID: block.ID{Num: block.DevNum{Major: 8, Minor: 16}, Path: "/dev/sdb", Size: size}}}
		r := plan.Request{Operation: plan.Flatten, Target: plan.TargetRef{ID: target.ID}, Options: plan.Options{Bootloader: "none"}}
		s.Rough = true
		got := plan.Make(s, r, target)
		if (len(got.Problems) > 0) != (size < least) || size < least && got.MinTargetSize != least {
			t.Errorf("with %d bytes, where %d are needed, a rough plan has %v and %d", size, least, got.Problems, got.MinTargetSize)
		}
	}
}

func BenchmarkMinSize(b *testing.B) {
	members := layout(8*gib, 100*kib, 200*mib)
	for b.Loop() {
		plan.MinSize(members, 1)
	}
}

// TestAMoveThatHasBegunGoesOnBesideWhatIsThere: as found on Linux 6.18, a target
// of 170 MiB suffices when the system chunk comes last and gets the rest. It must
// not be refused half-way because all of it in another order would need more.
func TestAMoveThatHasBegunGoesOnBesideWhatIsThere(t *testing.T) {
	target := plan.Member{
		DevID: 3, Writable: true, Size: 170 * mib,
		ID: block.ID{Num: block.DevNum{Major: 8, Minor: 16}, Path: "/dev/sdb", Size: 170 * mib},
		Groups: []plan.Group{
			{Type: plan.System, Logical: 20 * gib, Length: 9 * mib, Used: 16 * kib},
			{Type: plan.Metadata, Logical: 19 * gib, Length: 32 * mib, Used: 200 * kib},
		},
	}
	for i := range uint64(4) {
		g := plan.Group{Type: plan.Data, Logical: (15 + i) * gib, Length: 32 * mib}
		for range 30 {
			g.Extents = append(g.Extents, plan.Extent{Start: g.Used, Length: mib})
			g.Used += mib
		}
		target.Groups = append(target.Groups, g)
	}
	ask := func(left uint64) plan.Plan {
		seed := layout(left, mib, 200*kib)[0]
		seed.Groups = seed.Groups[1:] // there is one system chunk only
		r := plan.Request{Operation: plan.Flatten, Target: plan.TargetRef{ID: target.ID}, Options: plan.Options{Bootloader: "none"}}
		return plan.Make(plan.Sprout{
			Members: []plan.Member{seed, target}, Space: plan.Space{MetadataCopies: 1}, Intent: &r,
		}, r, nil)
	}
	if err := ask(4 * mib).Err(); err != nil {
		t.Errorf("with room for what is left: %v", err)
	}
	if p := ask(12 * mib); p.Err() == nil || p.MinTargetSize <= p.TargetSize {
		t.Errorf("with no room for what is left the plan is %+v", p)
	}
}
