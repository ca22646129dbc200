package ahead

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

const mib = 1 << 20

// seed is a seed in memory, and the kernel that empties it.
type seed struct {
	groups []Group
	ranges map[uint64][]Range
	gone   int    // groups the kernel is done with
	read   uint64 // bytes the kernel read of the group it is at
	noise  uint64 // bytes that others read

	fetched, dropped []Range
	// onFetch is called after each Fetch.
	onFetch func() error
	// onConsumed is called before each Consumed.
	onConsumed func()
}

func (s *seed) Left() ([]Group, error)          { return s.groups[s.gone:], nil }
func (s *seed) Ranges(g Group) ([]Range, error) { return s.ranges[g.Logical], nil }
func (s *seed) Drop(r Range) error              { s.dropped = append(s.dropped, r); return nil }
func (s *seed) before() (sum uint64)            { return s.sum(s.gone) + s.read }
func (s *seed) add(logical uint64, ranges ...Range) {
	s.groups, s.ranges[logical] = append(s.groups, group(logical, ranges)), ranges
}

func (s *seed) Consumed() (uint64, error) {
	if s.onConsumed != nil {
		s.onConsumed()
	}
	return s.before() + s.noise, nil
}

func (s *seed) Fetch(r Range) error {
	s.fetched = append(s.fetched, r)
	if s.onFetch != nil {
		return s.onFetch()
	}
	return nil
}

// sum is what is in use in the first n groups.
func (s *seed) sum(n int) (sum uint64) {
	for _, g := range s.groups[:n] {
		sum += g.Used
	}
	return sum
}

func group(logical uint64, ranges []Range) Group {
	g := Group{Logical: logical}
	for _, r := range ranges {
		g.Used += r.Length
	}
	return g
}

func length(ranges []Range) (sum uint64) {
	for _, r := range ranges {
		sum += r.Length
	}
	return sum
}

// joined gives ranges with those that adjoin as one.
func joined(ranges []Range) []Range {
	var list []Range
	for _, r := range ranges {
		if last := len(list) - 1; last >= 0 && list[last].Start+list[last].Length == r.Start {
			list[last].Length += r.Length
		} else {
			list = append(list, r)
		}
	}
	return list
}

func TestAllIsAskedForInTheOrderOfTheKernelAndDropped(t *testing.T) {
	s := &seed{ranges: map[uint64][]Range{}}
	s.add(30, Range{70 * mib, 5 * mib}, Range{80 * mib, 4096}) // the highest address first
	s.add(10, Range{40 * mib, 8 * mib})
	s.add(20, Range{10 * mib, mib}, Range{12 * mib, 3 * mib})
	s.onFetch = func() error { // the kernel is close behind
		s.read = length(s.fetched) - s.sum(s.gone)
		if s.read == s.groups[s.gone].Used {
			s.gone, s.read = s.gone+1, 0
		}
		return nil
	}
	n, err := Run(t.Context(), s, 64*mib, begun())
	want := slices.Concat(s.ranges[30], s.ranges[10], s.ranges[20])
	if err != nil || n != length(want) || !slices.Equal(joined(s.fetched), joined(want)) {
		t.Errorf("asked for %d bytes (%v): %v, want %v", n, err, joined(s.fetched), want)
	}
	if !slices.Equal(s.dropped, s.fetched) {
		t.Errorf("dropped were %v of %v", s.dropped, s.fetched)
	}
}

func TestItWaitsForTheKernelAndStopsWithIt(t *testing.T) {
	s := &seed{ranges: map[uint64][]Range{}}
	s.add(1, Range{0, 100 * mib})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.onFetch = func() error {
		if length(s.fetched) > 10*mib { // as much as it may before the kernel has read anything
			cancel()
		}
		return nil
	}
	if n, err := Run(ctx, s, 10*mib, begun()); err != nil || n > 10*mib+atOnce || !slices.Equal(s.dropped, s.fetched) {
		t.Errorf("%d bytes were asked for (%v), and dropped were %v", n, err, s.dropped)
	}
}

// TestTreeBlocksComeFirst asks for them before the content: the kernel looks
// them up all the time, from the first extent on.
func TestTreeBlocksComeFirst(t *testing.T) {
	s := &seed{ranges: map[uint64][]Range{}}
	s.add(3, Range{60 * mib, 20 * mib})
	s.add(2, Range{40 * mib, 6 * mib})
	s.add(4, Range{20 * mib, 30 * mib}) // too many for the memory
	s.add(1, Range{0, 20 * mib})
	s.groups[1].Tree, s.groups[2].Tree = true, true
	s.onConsumed = func() {
		switch g := s.groups[min(s.gone, 3)]; {
		case length(s.fetched) < 30*mib: // the kernel takes its time
		case s.read < g.Used:
			s.read += mib
		case s.gone < 4:
			s.gone, s.read = s.gone+1, 0
		}
	}
	n, err := Run(t.Context(), s, 30*mib, begun())
	want := []Range{s.ranges[2][0], s.ranges[3][0], s.ranges[4][0], s.ranges[1][0]}
	if err != nil || n != 76*mib || !slices.Equal(joined(s.fetched), joined(want)) {
		t.Errorf("asked for %d bytes (%v): %v, want %v", n, err, joined(s.fetched), want)
	}
}

// TestItIsAheadOfAKernelThatHasNotBegun lets others read what is on the seed
// meanwhile: that is not taken for the kernel's progress.
func TestItIsAheadOfAKernelThatHasNotBegun(t *testing.T) {
	s := &seed{ranges: map[uint64][]Range{}}
	s.add(1, Range{0, 200 * mib})
	kernel := make(chan struct{})
	s.onFetch = func() error {
		if s.read > 0 {
			return nil
		}
		s.noise += mib
		if length(s.fetched) > 40*mib { // as much as it may be ahead
			if len(s.dropped) > 0 {
				t.Errorf("%v was dropped before the kernel had it", s.dropped)
			}
			s.read = mib
			close(kernel)
		}
		return nil
	}
	s.onConsumed = func() {
		if s.read = min(s.read+mib, length(s.fetched)); s.read == 200*mib {
			s.gone, s.read = 1, 0
		}
	}
	n, err := Run(t.Context(), s, 40*mib, kernel)
	if err != nil || n != 200*mib || !slices.Equal(s.dropped, s.fetched) {
		t.Errorf("%d bytes, %v; dropped were %v", n, err, s.dropped)
	}
}

func begun() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func TestAnErrorEndsIt(t *testing.T) {
	pulled := errors.New("the stick was pulled")
	s := &seed{ranges: map[uint64][]Range{}, onFetch: func() error { return pulled }}
	s.add(1, Range{0, mib})
	if n, err := Run(t.Context(), s, mib, begun()); n != 0 || !errors.Is(err, pulled) {
		t.Errorf("%d bytes, %v", n, err)
	}
	empty := &seed{}
	if n, err := Run(t.Context(), empty, mib, begun()); n != 0 || err != nil {
		t.Errorf("of nothing %d bytes, %v", n, err)
	}
}

// TestWhateverTheKernelDoes lets the kernel go on as it likes, and others read
// meanwhile: nothing is asked for twice, nothing that is not in use, nothing too
// far ahead, and all that was asked for is dropped.
func TestWhateverTheKernelDoes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := &seed{ranges: map[uint64][]Range{}}
		at := uint64(0)
		used := map[uint64]bool{} // by MiB
		for i := range rapid.IntRange(0, 5).Draw(t, "groups") {
			var ranges []Range
			for range rapid.IntRange(0, 4).Draw(t, "ranges") {
				at += uint64(rapid.IntRange(0, 3).Draw(t, "gap")) * mib //nolint:gosec // small
				n := uint64(rapid.IntRange(1, 40).Draw(t, "MiB"))       //nolint:gosec // small
				ranges = append(ranges, Range{at, n * mib})
				for j := range n {
					used[at/mib+j] = true
				}
				at += n * mib
			}
			s.add(uint64(i), ranges...) //nolint:gosec // small
			s.groups[i].Tree = rapid.Bool().Draw(t, "tree")
		}
		limit := uint64(rapid.IntRange(1, 64).Draw(t, "limit")) * mib //nolint:gosec // small
		w := newWindow(s.groups, limit)
		for round := 0; !w.done(); round++ {
			switch rapid.IntRange(0, 3).Draw(t, "next") {
			case 0:
				if s.gone < len(s.groups) {
					s.read = min(s.read+uint64(rapid.IntRange(0, 20).Draw(t, "read"))*mib, s.groups[s.gone].Used) //nolint:gosec // small
				}
			case 1:
				s.noise += uint64(rapid.IntRange(0, 5).Draw(t, "noise")) * mib //nolint:gosec // small
			case 2:
				if s.gone < len(s.groups) {
					s.gone, s.read = s.gone+1, 0
				}
			}
			consumed, _ := s.Consumed()
			if rapid.Bool().Draw(t, "look") || round > 100 {
				s.gone = max(s.gone, min(round/100, len(s.groups))) // it comes to its end
				left, _ := s.Left()
				w.left(left, consumed)
			}
			w.at(consumed)
			before := len(s.fetched)
			if _, err := w.turn(s); err != nil {
				t.Fatal(err)
			}
			for _, p := range w.kept[max(0, len(w.kept)-(len(s.fetched)-before)):] {
				if p.start > w.pos+limit {
					t.Fatalf("asked for what is at %d while the kernel is at %d", p.start, w.pos)
				}
			}
			if s.gone < len(s.groups) && w.pos > s.sum(s.gone+1) {
				t.Fatalf("the kernel is believed at %d, beyond its group", w.pos)
			}
		}
		seen := map[uint64]bool{}
		for _, r := range s.fetched {
			for b := r.Start; b < r.Start+r.Length; b += atOnce {
				if !used[b/mib] || seen[b] {
					t.Fatalf("asked for %d, in use: %v, before: %v", b, used[b/mib], seen[b])
				}
				seen[b] = true
			}
		}
		for _, list := range [][]Range{s.fetched, s.dropped} {
			slices.SortFunc(list, func(a, b Range) int { return cmp.Compare(a.Start, b.Start) })
		}
		if !slices.Equal(s.fetched, s.dropped) {
			t.Fatalf("fetched %v, dropped %v", s.fetched, s.dropped)
		}
	})
}
