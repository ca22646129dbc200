package machine

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/ahead"
	"sproutd.org/sproutd/daemon/fault"
)

// aheadLimit is how much of the memory read-ahead may fill at most, and
// aheadShare which part of what is available. What it reads can be dropped at
// any time, so it takes nothing from programs; but read twice it is slower than
// not read ahead at all.
const (
	aheadLimit = 256 << 20
	aheadShare = 8
)

// ReadAhead implements [daemon.Changer].
func (m *Machine) ReadAhead(ctx context.Context, mountpoint string, devid uint64, seed block.ID, begun <-chan struct{}) (uint64, error) {
	s, err := m.openAhead(mountpoint, devid, seed)
	if err != nil {
		return 0, err
	}
	defer s.close()
	available, err := meminfo("MemAvailable")
	if err != nil {
		return 0, err
	}
	n, err := ahead.Run(ctx, s, min(aheadLimit, available/aheadShare), begun)
	return n, explain(err, "cannot read ahead")
}

// leaving is a seed behind a loop whose file can be read ahead: of its removal, for
// which it implements [ahead.Source], or of a release.
type leaving struct {
	blocks *block.System
	fs     *btrfs.FS
	devid  uint64
	seed   block.ID
	file   *os.File // behind the loop
	null   *os.File
	offset uint64 // where the device begins in the file
	// direct: the loop read past the page cache and is to do so again.
	direct bool
	groups map[uint64]btrfs.Group // by logical address
	onWay  []ahead.Range
}

// openAhead prepares to read ahead, or says in a fault.NotSupported why that
// cannot help.
func (m *Machine) openAhead(mountpoint string, devid uint64, seed block.ID) (_ *leaving, err error) {
	no := func(why string) error { return fault.New(fault.NotSupported, "%s", why) }
	if !seed.Num.IsLoop() {
		return nil, no("the seed is a block device, which is read past all caches")
	}
	s := &leaving{blocks: m.blocks, devid: devid, seed: seed, groups: map[uint64]btrfs.Group{}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	switch memory, err := m.blocks.InMemory(seed.Num); {
	case err != nil:
		return nil, explain(err, "cannot look at the seed's image")
	case memory:
		return nil, no("the seed's image lies in memory")
	}
	switch s.file, err = m.blocks.OpenBacking(seed.Num); {
	case errors.Is(err, block.ErrOutOfSight):
		return nil, no("the seed's image cannot be reached by a name")
	case err != nil:
		return nil, explain(err, "cannot open the seed's image")
	}
	switch spins, err := m.blocks.Spins(seed.Num); {
	case err != nil:
		return nil, explain(err, "cannot look at the media")
	case spins:
		return nil, no("the media turns, and jumping to and fro would cost more")
	}
	// Jumping about, the kernel would read more than what is asked for.
	if err := unix.Fadvise(int(s.file.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return nil, explain(err, "cannot read ahead")
	}
	if s.null, err = os.OpenFile("/dev/null", os.O_WRONLY, 0); err != nil {
		return nil, explain(err, "cannot read ahead")
	}
	if s.fs, err = btrfs.Open(mountpoint); err != nil {
		return nil, explain(err, "cannot open the file system at %s", mountpoint)
	}
	loop, err := m.blocks.LoopStatus(seed.Num)
	if err != nil {
		return nil, explain(err, "cannot look at %s", seed.Path)
	}
	s.offset = loop.Offset
	// What is read ahead is found in the page cache only.
	if loop.DirectIO {
		if err := m.blocks.SetDirectIO(seed, false); err != nil {
			return nil, no("the seed's loop device reads past all caches")
		}
		s.direct = true
	}
	return s, nil
}

// askTrees asks for what lists all that is in use, and for the checksums: the file
// system would ask for one block after the other. What cannot be read is told by
// who needs it.
func (s *leaving) askTrees() {
	offset, size := int64(s.offset), int64(s.seed.Size) //nolint:gosec // of a device
	_ = btrfs.AskTrees(io.NewSectionReader(s.file, offset, size), size, func(at, length uint64) {
		_ = s.ask(ahead.Range{Start: s.offset + at, Length: length})
	})
}

func (s *leaving) close() {
	if s.direct {
		_ = s.blocks.SetDirectIO(s.seed, true) // it may be detached by now; either way it works
	}
	if s.fs != nil {
		_ = s.fs.Close()
	}
	for _, f := range []*os.File{s.file, s.null} {
		if f != nil {
			_ = f.Close() // it was only read
		}
	}
}

// Left implements [ahead.Source]. A group with two copies on the device counts
// once: the kernel reads one of them, which is the first.
func (s *leaving) Left() ([]ahead.Group, error) {
	groups, err := s.fs.Groups(s.devid)
	if err != nil {
		return nil, err
	}
	var left []ahead.Group
	seen := map[uint64]bool{}
	for _, g := range groups { // the highest offset first
		if !seen[g.Logical] {
			left = append(left, ahead.Group{Logical: g.Logical, Used: g.Used, Tree: g.Type() != btrfs.Data})
		}
		seen[g.Logical], s.groups[g.Logical] = true, g
	}
	return left, nil
}

// Ranges implements [ahead.Source].
func (s *leaving) Ranges(a ahead.Group) ([]ahead.Range, error) {
	g := s.groups[a.Logical]
	if profile := g.Profile(); profile != "single" && profile != "dup" {
		return nil, nil // a seed of one device has no other
	}
	extents, err := s.fs.InUse(g)
	var ranges []ahead.Range
	for _, e := range extents {
		ranges = append(ranges, ahead.Range{Start: s.offset + g.DevOffset + e.Start - g.Logical, Length: e.Length})
	}
	return ranges, err
}

// Consumed implements [ahead.Source].
func (s *leaving) Consumed() (uint64, error) {
	st, err := s.blocks.IOStat(s.seed.Num)
	return st.ReadBytes, err
}

const (
	// adviseAtOnce is how much is asked for with one call: the kernel leaves out
	// what is beyond a limit of the device, which is this at the least.
	adviseAtOnce = 128 << 10
	// onWayLimit is how much is on its way. More of it would keep the kernel
	// waiting for what it needs at once, less would let the stick pause.
	onWayLimit = 2 << 20
)

// Fetch implements [ahead.Source].
func (s *leaving) Fetch(r ahead.Range) error {
	if err := s.ask(r); err != nil {
		return err
	}
	s.onWay = append(s.onWay, r)
	var sum uint64
	for _, r := range s.onWay {
		sum += r.Length
	}
	for ; sum > onWayLimit; s.onWay = s.onWay[1:] {
		if err := s.await(s.onWay[0]); err != nil {
			return err
		}
		sum -= s.onWay[0].Length
	}
	return nil
}

// of gives where a piece lies in the file behind the loop.
func (s *leaving) of(p *piece) ahead.Range {
	return ahead.Range{Start: s.offset + p.at, Length: p.length}
}

// ask has a range read into memory, and does not wait.
func (s *leaving) ask(r ahead.Range) error {
	for at := uint64(0); at < r.Length; at += adviseAtOnce {
		if err := s.advise(ahead.Range{Start: r.Start + at, Length: min(r.Length-at, adviseAtOnce)}, unix.FADV_WILLNEED); err != nil {
			return err
		}
	}
	return nil
}

// await waits until a range is in memory. Nothing is copied, and what the kernel
// did not follow the advice for is read now.
func (s *leaving) await(r ahead.Range) error {
	at := int64(r.Start) //nolint:gosec // within a device
	for left := int(r.Length); left > 0; {
		n, err := unix.Sendfile(int(s.null.Fd()), int(s.file.Fd()), &at, left)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err == nil && n == 0 {
			return nil // the file is shorter
		}
		left -= max(n, 0)
	}
	return nil
}

// Drop implements [ahead.Source].
func (s *leaving) Drop(r ahead.Range) error { return s.advise(r, unix.FADV_DONTNEED) }

func (s *leaving) advise(r ahead.Range, advice int) error {
	return unix.Fadvise(int(s.file.Fd()), int64(r.Start), int64(r.Length), advice) //nolint:gosec // within a device
}
