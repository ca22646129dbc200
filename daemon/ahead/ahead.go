// Package ahead reads a leaving seed before the kernel does. A removal reads a
// stretch, writes it, updates what refers to it, and reads on; in between the
// stick has nothing to do. Asked for in the order in which the kernel will come
// to it, and only as far ahead as memory should be spent on, the content is in
// the page cache by then. Tree blocks come before all else: the kernel looks some
// of them up after each stretch.
//
//   - ahead.go   the loop, and the source as it sees it
//   - window.go  what to ask for next and what to drop: pure
package ahead

import (
	"context"
	"errors"
	"time"
)

// Source is a leaving seed.
type Source interface {
	// Left lists the groups that the kernel has not emptied yet, in the order in
	// which it will.
	Left() ([]Group, error)
	// Ranges lists what is in use of a group, in the order in which the kernel
	// reads it. A group that is gone has none.
	Ranges(Group) ([]Range, error)
	// Consumed is how much was read from the seed's device, in bytes; only
	// differences mean something.
	Consumed() (uint64, error)
	// Fetch has a range read into memory. It waits, for this range or for the
	// one before, so that little is on its way at any time: what the kernel
	// needs at once has to queue behind it.
	Fetch(Range) error
	// Drop tells that a range is not needed in memory any more.
	Drop(Range) error
}

// Group is a stretch of the seed that the kernel empties as one.
type Group struct {
	// Logical address, which names the group.
	Logical uint64
	// Used is how many bytes of it are in use.
	Used uint64
	// Tree is true for tree blocks: the kernel looks some of them up out of order.
	Tree bool
}

// Range is a stretch of the seed's device.
type Range struct {
	Start, Length uint64
}

const (
	// lookEvery is how often the groups are looked at that are left.
	lookEvery = 100 * time.Millisecond
	// pause is how long to wait while nothing is to be asked for.
	pause = 20 * time.Millisecond
)

// Run reads ahead of the kernel by at most limit bytes, until ctx ends or there
// is nothing more to ask for; then it drops what is left. The kernel begins when
// begun is closed. Run gives the number of bytes it asked for.
func Run(ctx context.Context, s Source, limit uint64, begun <-chan struct{}) (fetched uint64, err error) {
	groups, err := s.Left()
	if err != nil {
		return 0, err
	}
	w := newWindow(groups, limit)
	defer func() { err = errors.Join(err, w.dropAll(s)) }()
	ticker := time.NewTicker(pause)
	defer ticker.Stop()
	var looked time.Time // at the groups, since the kernel has begun
	for !w.done() && ctx.Err() == nil {
		select {
		case <-begun:
			consumed, err := s.Consumed()
			if err != nil {
				return w.fetched, err
			}
			switch {
			case looked.IsZero():
				w.began, looked = consumed, time.Now()
			case time.Since(looked) >= lookEvery:
				if groups, err = s.Left(); err != nil {
					return w.fetched, err
				}
				w.left(groups, consumed)
				looked = time.Now()
			}
			w.at(consumed)
		default: // nothing is consumed but by others
		}
		more, err := w.turn(s)
		if err != nil {
			return w.fetched, err
		}
		if !more {
			select {
			case <-ctx.Done():
			case <-ticker.C:
			}
		}
	}
	return w.fetched, nil
}
