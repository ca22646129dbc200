package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
	t := chunkTree{super: super, open: open, chunks: systemChunks(raw)}
	root := binary.LittleEndian.Uint64(raw[88:])
	generation := binary.LittleEndian.Uint64(raw[164:])
	if err := t.walk(root, generation, raw[199]); err != nil && !errors.Is(err, errStop) {
		return nil, fmt.Errorf("cannot read the list of devices: %w", err)
	}
	slices.SortFunc(t.items, func(a, b DevItem) int { return (key{object: a.DevID}).compare(key{object: b.DevID}) })
	return t.items, nil
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
// through. Chunks that are not stored in whole copies are left out: mkfs makes
// none for the chunk tree unless told to.
func systemChunks(raw []byte) []chunk {
	const head, body, stripeSize = 17, 48, 32
	array := raw[811 : 811+binary.LittleEndian.Uint32(raw[160:])]
	var chunks []chunk
	for len(array) > 0 {
		c := chunk{
			logical: binary.LittleEndian.Uint64(array[9:]),
			length:  binary.LittleEndian.Uint64(array[head:]),
		}
		name := profile(binary.LittleEndian.Uint64(array[head+24:]))
		n := int(binary.LittleEndian.Uint16(array[head+44:]))
		for i := range n {
			at := array[head+body+i*stripeSize:]
			c.stripes = append(c.stripes, stripe{offset: binary.LittleEndian.Uint64(at[8:]), device: UUID(at[16:32])})
		}
		if n == 1 || copies(name) == n {
			chunks = append(chunks, c)
		}
		array = array[head+body+n*stripeSize:]
	}
	return chunks
}

// maxNodes bounds how much of a chunk tree is read: device items come first in
// it, and a leaf has room for thirty at the least.
const maxNodes = 256

// chunkTree reads the device items of a chunk tree.
type chunkTree struct {
	super  Super
	open   func(UUID) io.ReaderAt
	chunks []chunk
	nodes  int
	items  []DevItem
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

// walk goes through the blocks from left to right until the device items end.
func (t *chunkTree) walk(logical, generation uint64, level uint8) error {
	if level > maxTreeLevel {
		return fmt.Errorf("%w: its level %d is impossible", ErrTreeCorrupt, level)
	}
	node, err := t.node(logical, generation, level)
	if err != nil {
		return err
	}
	count, size := int(binary.LittleEndian.Uint32(node[96:])), leafItem
	if level > 0 {
		size = nodePtr
	}
	if count > (len(node)-nodeHeader)/size {
		return fmt.Errorf("%w: %d items are too many", ErrTreeCorrupt, count)
	}
	for i := range count {
		at := node[nodeHeader+i*size:]
		k := key{binary.LittleEndian.Uint64(at), at[8], binary.LittleEndian.Uint64(at[9:])}
		if k.object > objectDevItems {
			return errStop
		}
		if level > 0 {
			err = t.walk(binary.LittleEndian.Uint64(at[17:]), binary.LittleEndian.Uint64(at[25:]), level-1)
		} else if k.object == objectDevItems && k.typ == typeDevItem {
			err = t.item(node, uint64(binary.LittleEndian.Uint32(at[17:])), binary.LittleEndian.Uint32(at[21:]))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// item reads one device item of a leaf.
func (t *chunkTree) item(node []byte, offset uint64, size uint32) error {
	if size < devItem || nodeHeader+offset+uint64(size) > uint64(len(node)) {
		return fmt.Errorf("%w: an item lies outside", ErrTreeCorrupt)
	}
	raw := node[nodeHeader+offset:]
	t.items = append(t.items, DevItem{
		DevID: binary.LittleEndian.Uint64(raw), UUID: UUID(raw[66:82]), FSID: UUID(raw[82:98]),
		Size: binary.LittleEndian.Uint64(raw[8:]), Generation: binary.LittleEndian.Uint64(raw[44:]),
	})
	return nil
}

// node reads one block from the first copy that is right.
func (t *chunkTree) node(logical, generation uint64, level uint8) ([]byte, error) {
	if t.nodes++; t.nodes > maxNodes {
		return nil, fmt.Errorf("%w: it has no end", ErrTreeCorrupt)
	}
	size := uint64(t.super.NodeSize)
	for _, c := range t.chunks {
		if logical < c.logical || logical-c.logical > c.length || c.length-(logical-c.logical) < size {
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
			at := s.offset + (logical - c.logical)
			if n, err := device.ReadAt(node, int64(at)); n < len(node) { //nolint:gosec // a reader refuses what is below zero
				errs = append(errs, fmt.Errorf("%w: %w", ErrTreeCorrupt, err))
				continue
			}
			if err := t.check(node, logical, generation, level); err != nil {
				errs = append(errs, err)
				continue
			}
			return node, nil
		}
		return nil, errors.Join(errs...)
	}
	return nil, fmt.Errorf("%w: the address %d is in no system chunk", ErrTreeCorrupt, logical)
}

// check compares a block with what its parent says of it.
func (t *chunkTree) check(node []byte, logical, generation uint64, level uint8) error {
	var wrong string
	switch {
	case !bytes.Equal(t.super.CsumType.Sum(node[32:]), node[:t.super.CsumType.Size()]):
		wrong = "checksum"
	case binary.LittleEndian.Uint64(node[48:]) != logical:
		wrong = "address"
	case binary.LittleEndian.Uint64(node[80:]) != generation:
		wrong = "generation"
	case node[100] != level:
		wrong = "level"
	default:
		return nil
	}
	return fmt.Errorf("%w: the %s of the one at %d is wrong", ErrTreeCorrupt, wrong, logical)
}
