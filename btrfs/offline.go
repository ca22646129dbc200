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
)

// DevItem is one device of a filesystem as its chunk tree lists it.
type DevItem struct {
	DevID uint64 // unique in the filesystem
	UUID  UUID   // of the device
	FSID  UUID   // of the filesystem the device was made for: of the seed, for a seed's device
	Size  uint64 // of what the filesystem uses of it, bytes
	// Generation is the one that a seed's device must have, 0 for all others.
	Generation uint64
}

// MissingDeviceError says that the chunk tree lies on a device which is not
// there.
type MissingDeviceError struct{ UUID UUID }

func (e *MissingDeviceError) Error() string {
	return fmt.Sprintf("the device %s, which holds the list of all devices, is not there", e.UUID)
}

// ReadDevItems lists the devices of an unmounted filesystem, its seeds' among
// them, by devid. r is one of its devices; open gives another one by its UUID,
// nil if it is not there, and is asked for r's as well. The chunk tree that is
// read is the one that r's superblock points at.
//
// Nothing is believed: every block is compared with its checksum, its address
// and its generation, and the work is bounded. The error is or wraps a
// [*MissingDeviceError], [ErrNotBtrfs], [ErrSuperCorrupt] or [ErrTreeCorrupt].
func ReadDevItems(r io.ReaderAt, size int64, open func(device UUID) io.ReaderAt) ([]DevItem, error) {
	super, raw, err := readSuper(r, size)
	if err != nil && !errors.Is(err, ErrTruncated) {
		return nil, err
	}
	t := newTrees(super, raw, open)
	items, err := t.devItems(raw)
	if err != nil {
		return nil, fmt.Errorf("cannot read the list of devices: %w", err)
	}
	return items, nil
}

// ErrTreeCorrupt says that a block of the filesystem's own trees is damaged.
var ErrTreeCorrupt = errors.New("a tree block is damaged")

// stripe is one copy of a chunk.
type stripe struct {
	offset uint64
	device UUID
}

// chunk says where a stretch of logical addresses lies.
type chunk struct {
	logical, length uint64
	stripes         []stripe // every one of them holds all of it
}

// systemChunks reads the array of the superblock, which parseSuper has been
// through.
func systemChunks(raw []byte) []chunk {
	const head = 17
	array := raw[811 : 811+binary.LittleEndian.Uint32(raw[160:])]
	var chunks []chunk
	for len(array) > 0 {
		length := chunkSize(array[head:])
		chunks = append(chunks, readChunk(binary.LittleEndian.Uint64(array[9:]), array[head:][:length])...)
		array = array[head+length:]
	}
	return chunks
}

const (
	chunkBody   = 48
	chunkStripe = 32
)

// chunkSize is the length of a chunk item by its number of stripes.
func chunkSize(item []byte) int {
	return chunkBody + int(binary.LittleEndian.Uint16(item[44:]))*chunkStripe
}

// readChunk reads a chunk item of the right length. Chunks that are not stored in
// whole copies are left out: mkfs makes none for its trees unless told to.
func readChunk(logical uint64, item []byte) []chunk {
	n := (len(item) - chunkBody) / chunkStripe
	if n != 1 && n != copies(profile(binary.LittleEndian.Uint64(item[24:]))) {
		return nil
	}
	c := chunk{logical: logical, length: binary.LittleEndian.Uint64(item)}
	for at := item[chunkBody:]; len(at) > 0; at = at[chunkStripe:] {
		c.stripes = append(c.stripes, stripe{offset: binary.LittleEndian.Uint64(at[8:]), device: UUID(at[16:32])})
	}
	return []chunk{c}
}

// maxNodes bounds how much of the trees is read: device items come first in the
// chunk tree, and a leaf has room for thirty at the least.
const maxNodes = 256

// trees reads the trees of an unmounted filesystem.
type trees struct {
	super  Super
	open   func(UUID) io.ReaderAt
	chunks []chunk
	nodes  int // read so far
	limit  int // of them
	// ask is told where the blocks below those that are walked lie, and the leaves
	// are not walked then; nil for nobody.
	ask func(offset, length uint64)
}

// newTrees knows the chunks that raw, the superblock, lists.
func newTrees(super Super, raw []byte, open func(UUID) io.ReaderAt) *trees {
	return &trees{super: super, open: open, chunks: systemChunks(raw), limit: maxNodes}
}

// Offsets in a block of a tree. Source: linux/btrfs_tree.h, btrfs_header and
// what follows it.
const (
	nodeHeader = 101
	leafItem   = 25 // key, offset, size
	nodePtr    = 33 // key, address, generation
	devItem    = 98

	objectDevItems = 1
	typeDevItem    = 216
	maxTreeLevel   = 7
)

// devItems reads the device items of the chunk tree, by devid.
func (t *trees) devItems(raw []byte) ([]DevItem, error) {
	var items []DevItem
	at := key{objectDevItems, typeDevItem, 0}
	err := t.walk(chunkRoot(raw), at, key{at.object, at.typ, math.MaxUint64}, func(_ key, item []byte) error {
		if len(item) < devItem {
			return fmt.Errorf("%w: a device item is too short", ErrTreeCorrupt)
		}
		items = append(items, DevItem{
			DevID: binary.LittleEndian.Uint64(item), UUID: UUID(item[66:82]), FSID: UUID(item[82:98]),
			Size: binary.LittleEndian.Uint64(item[8:]), Generation: binary.LittleEndian.Uint64(item[44:]),
		})
		return nil
	})
	slices.SortFunc(items, func(a, b DevItem) int { return cmp.Compare(a.DevID, b.DevID) })
	return items, err
}

// root is where a tree begins, or a part of one.
type root struct {
	logical, generation uint64
	level               uint8
}

// chunkRoot is the root of the chunk tree by the superblock.
func chunkRoot(raw []byte) root {
	return root{binary.LittleEndian.Uint64(raw[88:]), binary.LittleEndian.Uint64(raw[164:]), raw[199]}
}

// allChunks lists the chunks of all kinds.
func (t *trees) allChunks(raw []byte) ([]chunk, error) {
	const typeChunk = 228
	var chunks []chunk
	at := key{256, typeChunk, 0} // BTRFS_FIRST_CHUNK_TREE_OBJECTID
	err := t.walk(chunkRoot(raw), at, key{at.object, at.typ, math.MaxUint64}, func(k key, item []byte) error {
		if len(item) < chunkBody || len(item) != chunkSize(item) {
			return fmt.Errorf("%w: a chunk is cut off", ErrTreeCorrupt)
		}
		chunks = append(chunks, readChunk(k.offset, item)...)
		return nil
	})
	return chunks, err
}

// rootOf finds the root of another tree, zero for none; the chunks it may be in
// must be known. Offsets in the item: struct btrfs_root_item in linux/btrfs_tree.h.
func (t *trees) rootOf(raw []byte, tree uint64) (r root, err error) {
	const typeRootItem, rootItem = 132, 239
	top := root{binary.LittleEndian.Uint64(raw[80:]), t.super.Generation, raw[198]}
	err = t.walk(top, key{tree, typeRootItem, 0}, key{tree, typeRootItem, 0}, func(_ key, item []byte) error {
		if len(item) < rootItem {
			return fmt.Errorf("%w: a root item is too short", ErrTreeCorrupt)
		}
		r = root{binary.LittleEndian.Uint64(item[176:]), binary.LittleEndian.Uint64(item[160:]), item[238]}
		return nil
	})
	return r, err
}

// walk visits the items of a tree whose keys are in a range, both ends included.
func (t *trees) walk(at root, from, to key, visit func(key, []byte) error) error {
	if at.level > maxTreeLevel {
		return fmt.Errorf("%w: its level %d is impossible", ErrTreeCorrupt, at.level)
	}
	node, err := t.node(at)
	if err != nil {
		return err
	}
	count, size := int(binary.LittleEndian.Uint32(node[96:])), leafItem
	if at.level > 0 {
		size = nodePtr
	}
	if count > (len(node)-nodeHeader)/size {
		return fmt.Errorf("%w: %d items are too many", ErrTreeCorrupt, count)
	}
	keyAt := func(i int) key {
		k := node[nodeHeader+i*size:]
		return key{binary.LittleEndian.Uint64(k), k[8], binary.LittleEndian.Uint64(k[9:])}
	}
	child := func(i int) root {
		entry := node[nodeHeader+i*size:]
		return root{binary.LittleEndian.Uint64(entry[17:]), binary.LittleEndian.Uint64(entry[25:]), at.level - 1}
	}
	if at.level > 0 && t.ask != nil {
		var blocks []uint64
		for i := range count {
			blocks = append(blocks, child(i).logical)
		}
		t.askFor(blocks)
		if at.level == 1 {
			return nil
		}
	}
	for i := range count {
		k, entry := keyAt(i), node[nodeHeader+i*size:]
		switch {
		case k.compare(to) > 0:
			return nil
		case at.level > 0 && i+1 < count && keyAt(i+1).compare(from) <= 0:
			continue // all of this child is before the range
		case at.level > 0:
			err = t.walk(child(i), from, to, visit)
		case k.compare(from) >= 0:
			var item []byte
			if item, err = itemOf(node, entry); err == nil {
				err = visit(k, item)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// itemOf gives the data of a leaf's entry.
func itemOf(node, entry []byte) ([]byte, error) {
	offset, length := uint64(binary.LittleEndian.Uint32(entry[17:])), uint64(binary.LittleEndian.Uint32(entry[21:]))
	if nodeHeader+offset+length > uint64(len(node)) {
		return nil, fmt.Errorf("%w: an item lies outside", ErrTreeCorrupt)
	}
	return node[nodeHeader+offset:][:length], nil
}

// askFor tells where the first copies of blocks lie that will be read. What adjoins
// is one.
func (t *trees) askFor(blocks []uint64) {
	size := uint64(t.super.NodeSize)
	var offsets []uint64
	for _, logical := range blocks {
		if i := slices.IndexFunc(t.chunks, func(c chunk) bool { return c.holds(logical, size) }); i >= 0 {
			offsets = append(offsets, t.chunks[i].stripes[0].offset+logical-t.chunks[i].logical)
		}
	}
	slices.Sort(offsets)
	for i := 0; i < len(offsets); {
		start, length := offsets[i], size
		for i++; i < len(offsets) && offsets[i] == start+length; i++ {
			length += size
		}
		t.ask(start, length)
	}
}

// node reads one block from the first copy that is right.
func (t *trees) node(at root) ([]byte, error) {
	if t.nodes++; t.nodes > t.limit {
		return nil, fmt.Errorf("%w: it has no end", ErrTreeCorrupt)
	}
	size := uint64(t.super.NodeSize)
	for _, c := range t.chunks {
		if !c.holds(at.logical, size) {
			continue
		}
		var errs []error
		for _, s := range c.stripes {
			device := t.open(s.device)
			if device == nil {
				errs = append(errs, &MissingDeviceError{s.device})
				continue
			}
			node := make([]byte, size)
			offset := s.offset + (at.logical - c.logical)
			if n, err := device.ReadAt(node, int64(offset)); n < len(node) { //nolint:gosec // a reader refuses what is below zero
				errs = append(errs, fmt.Errorf("%w: %w", ErrTreeCorrupt, err))
				continue
			}
			if err := t.check(node, at); err != nil {
				errs = append(errs, err)
				continue
			}
			return node, nil
		}
		return nil, errors.Join(errs...)
	}
	return nil, fmt.Errorf("%w: the address %d is in no chunk", ErrTreeCorrupt, at.logical)
}

// holds reports whether a stretch of addresses lies in the chunk.
func (c chunk) holds(logical, length uint64) bool {
	return logical >= c.logical && logical-c.logical <= c.length && c.length-(logical-c.logical) >= length
}

// check compares a block with what its parent says of it.
func (t *trees) check(node []byte, at root) error {
	var wrong string
	switch {
	case !bytes.Equal(t.super.CsumType.Sum(node[32:]), node[:t.super.CsumType.Size()]):
		wrong = "checksum"
	case binary.LittleEndian.Uint64(node[48:]) != at.logical:
		wrong = "address"
	case binary.LittleEndian.Uint64(node[80:]) != at.generation:
		wrong = "generation"
	case node[100] != at.level:
		wrong = "level"
	default:
		return nil
	}
	return fmt.Errorf("%w: the %s of the one at %d is wrong", ErrTreeCorrupt, wrong, at.logical)
}
