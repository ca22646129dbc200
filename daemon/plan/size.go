package plan

import (
	"fmt"
	"slices"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	// minAdded is the least size of a member that is only added. The kernel
	// takes anything above 1 MiB, but what is below this has no room for chunks.
	minAdded = 32 * mib
)

// Measured lists the members of s whose groups need their extents for planning
// r: those whose content comes together on one device.
func Measured(s Sprout, r Request) []uint64 {
	var devids []uint64
	for _, m := range landing(s, r) {
		devids = append(devids, m.DevID)
	}
	return devids
}

// landing lists the members whose content will be on the target, or for a
// removal on the members that stay, in the order in which the kernel moves it.
func landing(s Sprout, r Request) []Member {
	gone := leaving(s.Members, r)
	if len(gone) == 0 {
		return nil
	}
	if r.Operation != RemoveDevice {
		if m, present := r.Target.find(s.Members); present {
			gone = append(gone, m)
		}
		return gone
	}
	for _, m := range s.Members {
		if !m.Seed && !r.Target.is(m) {
			gone = append(gone, m)
		}
	}
	return gone
}

// size fills the sizes of the plan.
func (p *Plan) size(s Sprout, r Request, target *Target) {
	on, begun := r.Target.find(s.Members)
	source, copying := s.copying(r)
	switch {
	case r.Operation == RemoveDevice || r.Operation == Release || r.Target.Zram:
		return
	case begun: // a copy is as large as what was copied, until it is made to use all
		p.TargetSize = max(on.Size, on.ID.Size)
	case copying:
		on, begun = source, true
		p.TargetSize = s.Replace.Target.ID.Size
	case target != nil && r.Target.Free:
		p.TargetSize = target.Free
	case target != nil:
		p.TargetSize = target.Size
	default:
		return
	}
	p.MinTargetSize = minAdded
	if r.Operation != AddDevice {
		p.MinTargetSize = s.minSize(landing(s, r), p.TargetSize)
	}
	// A move that has begun goes on if the rest finds room beside what is there
	// already; moved to an empty device, all of it might take more.
	on.Size = p.TargetSize
	gone := without(leaving(s.Members, r), on.DevID)
	if begun && p.MinTargetSize > p.TargetSize && hasRoom(on, gone, s.Space.MetadataCopies) {
		p.MinTargetSize = p.TargetSize
	}
}

// hasRoom reports whether the content of gone fits on a member as it is.
func hasRoom(on Member, gone []Member, copies uint64) bool {
	c := contentOf(gone, max(1, copies))
	there := contentOf([]Member{on}, c.copies)
	c.metadata += there.metadata
	return c.fits(func(classes bool) *device {
		d := newDevice(on.Size, c.copies, classes)
		for _, g := range on.Groups {
			d.free -= min(d.free, g.Length)
			switch g.Type {
			case Metadata:
				d.metadata += g.Length / c.copies
			case Data:
				k := chunk{free: g.Length - min(g.Used, g.Length)}
				if len(g.Extents) > 0 {
					k.class = classOf(g.Extents[0].Length)
				}
				d.chunks = append(d.chunks, k)
			}
		}
		return d
	})
}

// minSize is [MinSize] of some members of s, worked out once for all targets; for
// a rough plan any size that suffices and that the target has.
func (s Sprout) minSize(members []Member, target uint64) uint64 {
	var devids []uint64
	for _, m := range members {
		devids = append(devids, m.DevID)
	}
	exact := fmt.Sprint(devids)
	rough := exact + " or less"
	if size, known := s.MinSizes[exact]; known {
		return size
	}
	var enough uint64
	if s.Rough {
		enough = target
		if size, known := s.MinSizes[rough]; known && size <= target {
			return size
		}
	}
	size := minSize(members, s.Space.MetadataCopies, enough)
	switch {
	case s.MinSizes == nil:
	case size <= enough:
		s.MinSizes[rough] = size
	default: // the target does not have it, so all was looked at
		s.MinSizes[exact] = size
	}
	return size
}

// MinSize gives the least size in bytes of a device onto which the content of
// members can be moved, metadata in the given number of copies; 0 for no
// content. Data groups should have their extents.
//
// Too small a device is worse than a refusal: the kernel can run out of
// metadata space in the middle of a transaction and then forces the file system
// read-only. So the kernel's allocator is imitated, with and without size
// classes (Linux 6.3), and with the metadata allocated before and after the
// data; a size counts only if all of them fit, and so does every larger size
// looked at. What fits is not monotone: chunks are a tenth of the device, and
// the largest extent has to fit into one.
func MinSize(members []Member, copies uint64) uint64 { return minSize(members, copies, 0) }

// minSize is MinSize, but for looking no further than to a size of enough.
func minSize(members []Member, copies, enough uint64) uint64 {
	c := contentOf(members, max(1, copies))
	if c.used() == 0 {
		return 0
	}
	least := max(c.data+c.copies*c.metadata, 24*mib)
	good := least + least/2 + 1600*mib
	fits := func(size uint64) bool {
		return c.fits(func(classes bool) *device { return newDevice(size, c.copies, classes) })
	}
	for !fits(good) {
		good *= 2
	}
	ample := func() uint64 { return (good + good/100 + 3*mib - 1) / mib * mib }
	for _, size := range candidates(least, good) {
		if ample() <= enough || !fits(size) {
			break
		}
		good = size
	}
	return ample()
}

// candidates gives the sizes to look at, from the largest down. A tenth of a
// multiple of 160 MiB is a multiple of 16 MiB, by which chunks grow: just above
// and below one the need changes most.
func candidates(from, to uint64) []uint64 {
	var list []uint64
	for size := to; size > from; size -= max(mib/2, size/256) {
		list = append(list, size)
	}
	const jump = 160 * mib
	for size := (from/jump + 1) * jump; size < to; size += jump {
		list = append(list, size, size+mib)
	}
	slices.Sort(list)
	slices.Reverse(list)
	return list
}

// item is what moves as one: an extent, or a run of small ones.
type item struct {
	bytes   uint64
	class   int // 1 small, 2 medium, 3 large
	small   bool
	reserve uint64 // bytes of the cluster that begins with this item, 0 inside of one
}

// content is what is to be moved, prepared for trying sizes.
type content struct {
	copies         uint64
	data, metadata uint64 // bytes used, one copy
	groups         []group
	mostExtents    uint64 // in one group
}

// group is what a block group has to move; a content has them in the order in
// which they move, by which the last to come gets what room is left.
type group struct {
	kind  GroupType
	items []item // of data only
}

func (c content) used() uint64 { return c.data + c.metadata }

// Extent sizes up to which the classes go. Source: fs/btrfs/block-group.c,
// btrfs_calc_block_group_size_class.
const (
	smallExtent  = 128 * kib
	mediumExtent = 8 * mib
	// maxCluster is how many adjoining extents relocation makes room for at
	// once. Source: fs/btrfs/relocation.c, MAX_EXTENTS.
	maxCluster = 128
)

func classOf(length uint64) int {
	switch {
	case length <= smallExtent:
		return 1
	case length <= mediumExtent:
		return 2
	}
	return 3
}

// contentOf adds up what lies on members. A group with two copies on a member
// counts once; the copies are made again on the target.
func contentOf(members []Member, copies uint64) content {
	c := content{copies: copies}
	seen := map[uint64]bool{}
	for _, m := range members {
		for _, g := range m.Groups {
			if g.Logical != 0 && seen[g.Logical] {
				continue
			}
			seen[g.Logical] = true
			moves := group{kind: g.Type}
			switch g.Type {
			case Metadata:
				c.metadata += g.Used
			case Data:
				c.data += g.Used
				moves.items = items(g)
				c.mostExtents = max(c.mostExtents, uint64(len(g.Extents)), g.Used/smallExtent)
			}
			c.groups = append(c.groups, moves)
		}
	}
	return c
}

// items turns the extents of a group into what moves as one.
func items(g Group) []item {
	if len(g.Extents) == 0 {
		return []item{{bytes: g.Used, class: 1, small: true, reserve: g.Used}}
	}
	var list []item
	head, count, end := 0, 0, uint64(0) // of the cluster
	for i, e := range g.Extents {
		begins := i == 0 || e.Start != end || count == maxCluster
		end, count = e.Start+e.Length, count+1
		class := classOf(e.Length)
		last := len(list) - 1
		if begins || class > 1 || !list[last].small {
			list = append(list, item{class: class, small: class == 1})
			last++
		}
		if begins {
			head, count = last, 1
		}
		list[last].bytes += e.Length
		list[head].reserve += e.Length
	}
	return list
}

// fits reports whether the content fits on a device, of which prepare makes a
// new one each time, however the kernel goes about it.
func (c content) fits(prepare func(classes bool) *device) bool {
	for _, classes := range []bool{true, false} {
		for _, late := range []bool{true, false} {
			if !c.try(prepare(classes), late) {
				return false
			}
		}
	}
	return true
}

// try moves the content onto a device. With late the metadata gets most of its
// chunks after the data.
func (c content) try(d *device, late bool) bool {
	// Moving grows the metadata: back references and checksums of the copies
	// live next to the old ones for a while, a few hundred bytes an extent.
	full := c.metadata + c.metadata/100 + 4*mib + 320*c.mostExtents
	toppedUp := c.metadata + c.metadata/64 + 4*mib + 512*c.mostExtents
	first := full
	if late {
		first = 1
	}
	pending := c.groups
	for round := 0; len(pending) > 0; round++ {
		if round == 2 { // the kernel tries a group twice
			return false
		}
		var failed []group
		for _, g := range pending {
			switch {
			case g.kind == System && d.chunk(32*mib, c.copies) == 0, g.kind == Metadata && !d.metadataUpTo(first):
				return false
			case g.kind == Data:
				if rest := d.move(g.items); len(rest) > 0 {
					failed = append(failed, group{kind: Data, items: rest})
				}
			}
		}
		pending = failed
	}
	if late && !d.metadataUpTo(full) {
		return false
	}
	var lack uint64
	if d.metadata < toppedUp {
		lack = (toppedUp - d.metadata) * c.copies
	}
	if !slices.ContainsFunc(d.chunks, func(k chunk) bool { return k.free >= mib }) {
		lack += mib // something must be left to write to
	}
	return lack <= d.free
}

// stripe is the granularity of chunks. Source: BTRFS_STRIPE_LEN.
const stripe = 64 * kib

func down(n, unit uint64) uint64 { return n / unit * unit }

// device is a device that is being filled.
type device struct {
	size, free uint64
	classes    bool
	copies     uint64
	metadata   uint64 // bytes of metadata chunks, one copy
	chunks     []chunk
}

// newDevice is empty. Its first MiB is never used.
// Source: fs/btrfs/fs.h, BTRFS_DEVICE_RANGE_RESERVED.
func newDevice(size, copies uint64, classes bool) *device {
	return &device{size: size, free: down(down(size, 4*kib)-mib, stripe), classes: classes, copies: copies}
}

// chunk is a data chunk.
type chunk struct {
	free  uint64
	class int // of what is in it, 0 while it is empty
}

// chunk allocates a chunk of at most limit bytes, or of a tenth of the device,
// in the given number of copies, and gives its size; 0 when there is no room.
// Source: fs/btrfs/volumes.c, init_alloc_chunk_ctl_policy_regular and
// decide_stripe_size_regular.
func (d *device) chunk(limit, copies uint64) uint64 {
	limit = min(limit, d.size/10)
	size := down(d.free, stripe) / copies
	if size > limit {
		size = min((limit+16*mib-1)/(16*mib)*(16*mib), size)
	}
	size = down(size, stripe)
	d.free -= size * copies
	return size
}

func (d *device) metadataUpTo(need uint64) bool {
	limit := uint64(256 * mib)
	if d.size > 50*gib {
		limit = gib
	}
	for d.metadata < need {
		n := d.chunk(limit, d.copies)
		if n == 0 {
			return false
		}
		d.metadata += n
	}
	return true
}

// newChunk allocates a data chunk.
func (d *device) newChunk() bool {
	n := d.chunk(gib, 1)
	if n > 0 {
		d.chunks = append(d.chunks, chunk{free: n})
	}
	return n > 0
}

func (d *device) dataFree() uint64 {
	var sum uint64
	for _, k := range d.chunks {
		sum += k.free
	}
	return sum
}

// move moves a group and gives what found no room.
func (d *device) move(group []item) []item {
	for i, it := range group {
		for d.dataFree() < it.reserve {
			if !d.newChunk() {
				return group[i:]
			}
		}
		if rest := d.put(it); rest.bytes > 0 {
			return append([]item{rest}, group[i+1:]...)
		}
	}
	return nil
}

// put finds room for one item: in a chunk of its class, in an empty one, in a
// new one, and at last anywhere. Small extents fill what is there; a large one
// needs room in one piece. It gives what found no room.
func (d *device) put(it item) item {
	fill := func(want func(k *chunk) bool) {
		for i := range d.chunks {
			k := &d.chunks[i]
			if it.bytes == 0 || !want(k) {
				continue
			}
			n := min(it.bytes, k.free)
			if !it.small && n < it.bytes || n == 0 {
				continue
			}
			k.free -= n
			it.bytes -= n
			if k.class == 0 {
				k.class = it.class
			}
		}
	}
	if d.classes {
		fill(func(k *chunk) bool { return k.class == it.class })
		fill(func(k *chunk) bool { return k.class == 0 })
	} else {
		fill(func(*chunk) bool { return true })
	}
	for it.bytes > 0 && d.newChunk() {
		last := &d.chunks[len(d.chunks)-1]
		fill(func(k *chunk) bool { return k == last })
	}
	fill(func(*chunk) bool { return true })
	return it
}
