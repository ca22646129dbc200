package btrfs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"sproutd.org/sproutd/block"
)

// Image is an unmounted filesystem on one device, a seed above all, as its own
// trees describe it: whatever a sprout of it has deleted is there. It may be used
// concurrently.
type Image struct {
	Super Super
	// Used is what is in use of the device besides the superblocks, in order of
	// the addresses; each copy of what is there twice.
	Used []Stretch

	trees        trees
	extents, sum root
}

// Stretch is a part of a device that is in use.
type Stretch struct {
	Offset, Length uint64 // on the device, bytes
	Logical        uint64 // address in the filesystem
	Tree           bool   // tree blocks, else data
}

// ErrUnknownLayout says that a filesystem is not laid out in a way that is known.
var ErrUnknownLayout = errors.New("it is laid out in a way that is not known")

// plainLayout are the incompat features with which data and trees are where the
// chunk and extent trees say, one superblock at each of its places. Those that
// are missing are metadata_uuid, which no seed has, zoned, extent_tree_v2 and
// raid_stripe_tree. Source: linux/btrfs.h.
const plainLayout = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<9 | 1<<11 | 1<<16

// ReadImage reads what is in use of an unmounted filesystem of one device, of size
// bytes. Nothing is believed, as with [ReadDevItems], and nothing may be written
// to it as long as the Image is used.
//
// The error is or wraps one of those of [ReadSuper], [ErrTreeCorrupt] or
// [ErrUnknownLayout].
func ReadImage(r io.ReaderAt, size int64) (*Image, error) {
	m, err := openImage(r, size)
	if err != nil {
		return nil, err
	}
	if err := m.inUse(); err != nil {
		return nil, fmt.Errorf("cannot read the extent tree: %w", err)
	}
	return m, nil
}

// AskTrees tells ask where the leaves of the trees lie that say what is in use of
// such a filesystem and what its checksums are, and all between the leaves and the
// root, in bytes from the start of the device. So they can be on their way all at
// once, where whoever reads the trees would wait for one after the other. The
// errors are those of [ReadImage].
func AskTrees(r io.ReaderAt, size int64, ask func(offset, length uint64)) error {
	m, err := openImage(r, size)
	if err != nil {
		return err
	}
	m.trees.ask = ask
	for _, at := range []root{m.extents, m.sum} {
		if err := m.walkAll(at, func(key, []byte) error { return nil }); err != nil {
			return err
		}
	}
	return nil
}

// openImage finds the trees of an image.
func openImage(r io.ReaderAt, size int64) (*Image, error) {
	super, raw, err := readSuper(r, size)
	if err != nil {
		return nil, err
	}
	if super.NumDevices != 1 || super.LogRoot != 0 || super.Incompat&^plainLayout != 0 {
		return nil, fmt.Errorf("%w: devices %d, log %d, features %#x", ErrUnknownLayout, super.NumDevices, super.LogRoot, super.Incompat)
	}
	m := &Image{Super: super, trees: *newTrees(super, raw, func(device UUID) io.ReaderAt {
		if device == super.DevUUID {
			return r
		}
		return nil
	})}
	m.trees.limit = int(super.DevSize/uint64(super.NodeSize)) + 1 //nolint:gosec // of a device
	if m.trees.chunks, err = m.allChunks(raw); err != nil {
		return nil, fmt.Errorf("cannot read the chunk tree: %w", err)
	}
	for tree, at := range map[uint64]*root{treeExtent: &m.extents, treeCsum: &m.sum} {
		if *at, err = m.trees.rootOf(raw, tree); err == nil && *at == (root{}) {
			err = fmt.Errorf("%w: there is none", ErrTreeCorrupt)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot find tree %d: %w", tree, err)
		}
	}
	return m, nil
}

// walk is [trees.walk] with a count of its own.
func (m *Image) walk(at root, from, to key, visit func(k key, item []byte) error) error {
	t := m.trees
	t.nodes = 0
	return t.walk(at, from, to, visit)
}

// walkAll visits all items of a tree.
func (m *Image) walkAll(at root, visit func(k key, item []byte) error) error {
	return m.walk(at, key{}, key{math.MaxUint64, math.MaxUint8, math.MaxUint64}, visit)
}

// allChunks lists the chunks in order of their addresses.
func (m *Image) allChunks(raw []byte) ([]chunk, error) {
	chunks, err := m.trees.allChunks(raw)
	if err != nil {
		return nil, err
	}
	for _, c := range chunks {
		if c.length == 0 || c.logical+c.length < c.logical {
			return nil, fmt.Errorf("%w: the chunk at %d is impossible", ErrTreeCorrupt, c.logical)
		}
		for _, s := range c.stripes {
			if s.device != m.Super.DevUUID || s.offset > m.Super.DevSize || m.Super.DevSize-s.offset < c.length {
				return nil, fmt.Errorf("%w: the chunk at %d lies outside", ErrTreeCorrupt, c.logical)
			}
		}
	}
	slices.SortFunc(chunks, func(a, b chunk) int { return cmp.Compare(a.logical, b.logical) })
	return chunks, nil
}

// inUse lists what the extent tree says is in use. What adjoins is one stretch.
func (m *Image) inUse() error {
	const flagsAt, flagTree = 16, 2 // struct btrfs_extent_item
	var start, end uint64           // of the stretch before
	var in chunk
	tree := false
	flush := func() error {
		for _, s := range in.stripes {
			used := Stretch{Offset: s.offset + start - in.logical, Length: end - start, Logical: start, Tree: tree}
			for _, at := range block.BtrfsSuperblocks() {
				if used.Offset < at+superSize && at < used.Offset+used.Length {
					return fmt.Errorf("%w: the extent at %d lies on a superblock", ErrTreeCorrupt, start)
				}
			}
			m.Used = append(m.Used, used)
		}
		return nil
	}
	err := m.walkAll(m.extents, func(k key, item []byte) error {
		length, isTree := k.offset, true
		switch {
		case k.typ == typeTreeBlock:
			length = uint64(m.Super.NodeSize)
		case k.typ != typeExtentItem:
			return nil
		case len(item) < flagsAt+8:
			return fmt.Errorf("%w: an item is too short", ErrTreeCorrupt)
		default:
			isTree = binary.LittleEndian.Uint64(item[flagsAt:])&flagTree != 0
		}
		sector := uint64(m.Super.SectorSize)
		if length == 0 || k.object%sector != 0 || length%sector != 0 || k.object < end || isTree && length != uint64(m.Super.NodeSize) {
			return fmt.Errorf("%w: the extent at %d is impossible", ErrTreeCorrupt, k.object)
		}
		if k.object == end && isTree == tree && in.holds(k.object, length) {
			end += length
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		i, found := slices.BinarySearchFunc(m.trees.chunks, k.object, func(c chunk, at uint64) int { return cmp.Compare(c.logical, at) })
		if !found {
			i--
		}
		if i < 0 || !m.trees.chunks[i].holds(k.object, length) {
			return fmt.Errorf("%w: the extent at %d is in no chunk", ErrTreeCorrupt, k.object)
		}
		start, end, in, tree = k.object, k.object+length, m.trees.chunks[i], isTree
		return nil
	})
	return errors.Join(err, flush())
}

// IsSuper reports whether a block is the superblock of this very filesystem that
// belongs at a place, in bytes from the start of the device.
func (m *Image) IsSuper(at uint64, raw []byte) bool {
	return len(raw) == superSize && string(raw[64:72]) == superMagic &&
		bytes.Equal(m.Super.CsumType.Sum(raw[32:]), raw[:m.Super.CsumType.Size()]) && binary.LittleEndian.Uint64(raw[48:]) == at &&
		UUID(raw[32:48]) == m.Super.FSID && binary.LittleEndian.Uint64(raw[72:]) == m.Super.Generation
}

// Checker gives the checker of what is in use, of tree blocks or of data. A sprout
// of the filesystem names the files that are damaged, as far as it has them; nil
// names none.
func (m *Image) Checker(tree bool, sprout *FS) *Checker {
	c := &Checker{kind: Data, csum: m.Super.CsumType, sector: m.Super.SectorSize, node: m.Super.NodeSize}
	if tree {
		c.kind = Metadata
	}
	c.search = func(_ uint64, from, to key, visit func(k key, item []byte) error) error {
		return m.walk(m.sum, from, to, visit)
	}
	if sprout != nil {
		c.files = sprout.filesOf
	}
	return c
}
