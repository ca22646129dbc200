package ahead

import (
	"errors"
	"slices"
)

// window says what to ask for next. Positions count the bytes in use from the
// first group to the last, in the order in which the kernel takes them.
type window struct {
	limit   uint64
	groups  []span
	order   []span // in which they are asked for
	current int    // the group the kernel is at
	began   uint64 // what had been consumed when it came to that
	pos     uint64 // how far the kernel is, as well as can be told

	listed  int     // groups that were looked into
	queue   []piece // what is in them and was not asked for yet
	kept    []piece // what was asked for and is not dropped yet
	fetched uint64
}

// span is a group with its place.
type span struct {
	Group
	start, end uint64
	// early is true if it is asked for before all others.
	early bool
}

// piece is a range with its place.
type piece struct {
	Range
	start, end uint64 // start is 0 for what is asked for early
	// dropAt is the position of the kernel at which it surely is behind.
	dropAt uint64
}

func newWindow(groups []Group, limit uint64) *window {
	w := &window{limit: limit}
	var at, early uint64
	for _, g := range groups {
		s := span{Group: g, start: at, end: at + g.Used}
		// For each extent that it has moved, the kernel looks up tree blocks, one after
		// the other: each would wait for all that is on its way from the stick.
		if g.Tree && early+g.Used <= limit {
			s.early = true
			early += g.Used
			w.order = append(w.order, s)
		}
		w.groups = append(w.groups, s)
		at += g.Used
	}
	for _, s := range w.groups {
		if !s.early {
			w.order = append(w.order, s)
		}
	}
	return w
}

// left takes in which groups are left. The kernel works on the first of them;
// but one that found no room is tried again after all others, so what counts is
// the last group that is gone.
func (w *window) left(groups []Group, consumed uint64) {
	there := make(map[uint64]bool, len(groups))
	for _, g := range groups {
		there[g.Logical] = true
	}
	current := len(w.groups)
	for current > w.current && there[w.groups[current-1].Logical] {
		current--
	}
	if current > w.current {
		w.current, w.began = current, consumed
	}
}

// at takes in how much was consumed. Others read as well, so the kernel is never
// believed to be beyond the group it is at.
func (w *window) at(consumed uint64) {
	if w.current == len(w.groups) {
		if w.current > 0 {
			w.pos = w.groups[w.current-1].end
		}
		return
	}
	g := w.groups[w.current]
	w.pos = max(w.pos, min(g.start+consumed-min(w.began, consumed), g.end))
}

const (
	// atOnce is how much is asked for with one call.
	atOnce = 512 << 10
	// behind is how much is kept that the kernel should have read: how far it is
	// is not known to the byte.
	behind = 32 << 20
)

// turn asks for the next piece that has come within the limit, if there is one,
// and drops what lies behind.
func (w *window) turn(s Source) (more bool, err error) {
	for len(w.queue) == 0 && w.listed < len(w.order) && (w.order[w.listed].early || w.order[w.listed].start <= w.pos+w.limit) {
		if err := w.list(s); err != nil {
			return false, err
		}
	}
	if len(w.queue) > 0 && w.queue[0].start <= w.pos+w.limit {
		p := w.queue[0]
		w.queue = w.queue[1:]
		more = true
		if p.end > w.pos { // else the kernel was there before
			if err := s.Fetch(p.Range); err != nil {
				return false, err
			}
			w.fetched += p.Length
			w.kept = append(w.kept, p)
		}
	}
	var errs []error
	w.kept = slices.DeleteFunc(w.kept, func(p piece) bool {
		behind := p.dropAt <= w.pos || w.current == len(w.groups)
		if behind {
			errs = append(errs, s.Drop(p.Range))
		}
		return behind
	})
	return more, errors.Join(errs...)
}

// dropAll drops what was asked for and is still there.
func (w *window) dropAll(s Source) error {
	var errs []error
	for _, p := range w.kept {
		errs = append(errs, s.Drop(p.Range))
	}
	w.kept = nil
	return errors.Join(errs...)
}

// list puts what is in the next group into the queue, in pieces.
func (w *window) list(s Source) error {
	g := w.order[w.listed]
	w.listed++
	ranges, err := s.Ranges(g.Group)
	if err != nil {
		return err
	}
	at := g.start
	for _, r := range ranges {
		for r.Length > 0 {
			p := piece{Range: Range{Start: r.Start, Length: min(r.Length, atOnce)}}
			if !g.early {
				p.start = at
			}
			at = min(at+p.Length, g.end)
			p.end, p.dropAt = at, at+behind
			if g.Tree {
				p.dropAt = g.end + behind
			}
			w.queue = append(w.queue, p)
			r.Start, r.Length = r.Start+p.Length, r.Length-p.Length
		}
	}
	return nil
}

// done reports whether there is nothing left to ask for or to drop.
func (w *window) done() bool {
	return w.listed == len(w.order) && len(w.queue) == 0 && len(w.kept) == 0
}
