package btrfs

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The trees and item types that are searched. Source: linux/btrfs_tree.h.
const (
	treeRoot       = 1
	treeExtent     = 2
	treeDev        = 4
	treeFS         = 5
	treeCsum       = 7
	treeBlockGroup = 11

	typeInodeRef    = 12
	typeInodeExtref = 13
	typeExtentCsum  = 128
	typeRootBackref = 144
	typeExtentItem  = 168
	typeTreeBlock   = 169 // BTRFS_METADATA_ITEM_KEY, a tree block whose length goes without saying
	typeBlockGroup  = 192
	typeDevExtent   = 204
	typeDevReplace  = 250

	objectExtentCsum = math.MaxUint64 - 9 // -10
	objectFirstFree  = 256                // the root directory of a subvolume
)

// key is a position in a tree.
type key struct {
	object uint64
	typ    uint8
	offset uint64
}

// next is the position right after k; false at the end of the tree.
func (k key) next() (key, bool) {
	switch {
	case k.offset < math.MaxUint64:
		k.offset++
	case k.typ < math.MaxUint8:
		k.typ, k.offset = k.typ+1, 0
	case k.object < math.MaxUint64:
		k = key{object: k.object + 1}
	default:
		return k, false
	}
	return k, true
}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.object, o.object), cmp.Compare(k.typ, o.typ), cmp.Compare(k.offset, o.offset))
}

// searchBuffer holds at least one item: none is longer than a node, which is
// 64 KiB at most.
const searchBuffer = 80 << 10

// errStop, returned by a visitor, ends a search without an error.
var errStop = errors.New("enough")

// search calls visit with the items of a tree from one key to another, both
// included, in order. Keys of any type that lie between the two are passed as
// well. The item is only valid during the call. Needs CAP_SYS_ADMIN.
func (f *FS) search(tree uint64, from, to key, visit func(k key, item []byte) error) error {
	// Words, so that the structures in it are aligned.
	buf := make([]uint64, searchBuffer/8)
	args := (*searchArgsV2)(unsafe.Pointer(&buf[0]))
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(&buf[0])), searchBuffer)[unsafe.Sizeof(*args):]
	for more := true; more && from.compare(to) <= 0; {
		args.key = searchKey{
			treeID:      tree,
			minObjectID: from.object, maxObjectID: to.object,
			minType: uint32(from.typ), maxType: uint32(to.typ),
			minOffset: from.offset, maxOffset: to.offset,
			maxTransID: math.MaxUint64, nrItems: math.MaxUint32,
		}
		args.bufSize = uint64(len(bytes))
		if err := f.call(iocTreeSearchV2, unsafe.Pointer(args)); err != nil {
			return f.fail("search the filesystem's trees", err)
		}
		if args.key.nrItems == 0 {
			return nil
		}
		rest := bytes
		for range args.key.nrItems {
			const head = int(unsafe.Sizeof(searchHeader{}))
			if len(rest) < head {
				return f.fail("search the filesystem's trees", unix.EBADMSG)
			}
			// Not cast: items follow each other at any alignment.
			at := key{
				object: binary.NativeEndian.Uint64(rest[8:]),
				offset: binary.NativeEndian.Uint64(rest[16:]),
				typ:    uint8(binary.NativeEndian.Uint32(rest[24:])),
			}
			length := int(binary.NativeEndian.Uint32(rest[28:]))
			if length > len(rest)-head {
				return f.fail("search the filesystem's trees", unix.EBADMSG)
			}
			if err := visit(at, rest[head:head+length]); errors.Is(err, errStop) {
				return nil
			} else if err != nil {
				return err
			}
			rest = rest[head+length:]
			from, more = at.next()
		}
	}
	return nil
}

// Group is a block group, or one copy of it, on a device.
type Group struct {
	Logical   uint64 // its address in the filesystem
	Length    uint64 // bytes of the group
	DevOffset uint64 // where the device extent begins on the device
	DevLength uint64 // bytes of the device extent
	Flags     uint64 // BTRFS_BLOCK_GROUP_*: what it holds and its profile
	// Used is how many bytes of the group are in use, as of the last commit.
	Used uint64
}

// Type says what the group holds.
func (g Group) Type() SpaceType { return spaceType(g.Flags) }

// Profile gives the redundancy profile, "single" when there is no redundancy.
func (g Group) Profile() string { return profile(g.Flags) }

// Groups lists the device extents of the member in the order in which the
// kernel empties it: the highest device offset first. A group with two copies
// on the device (dup) is listed twice. Source: fs/btrfs/volumes.c,
// btrfs_shrink_device.
func (f *FS) Groups(devid uint64) ([]Group, error) {
	var groups []Group
	err := f.search(treeDev, key{devid, typeDevExtent, 0}, key{devid, typeDevExtent, math.MaxUint64},
		func(k key, item []byte) error {
			if k.typ != typeDevExtent || len(item) < 32 {
				return nil
			}
			groups = append(groups, Group{
				Logical:   binary.LittleEndian.Uint64(item[16:]),
				DevOffset: k.offset,
				DevLength: binary.LittleEndian.Uint64(item[24:]),
			})
			return nil
		})
	if err != nil {
		return nil, err
	}
	// Block group items live in a tree of their own with the feature
	// block-group-tree (Linux 6.1), else among the extents.
	tree := uint64(treeBlockGroup)
	if err := f.search(tree, key{}, key{}, func(key, []byte) error { return nil }); errors.Is(err, unix.ENOENT) {
		tree = treeExtent
	} else if err != nil {
		return nil, err
	}
	known := groups[:0]
	for _, g := range groups {
		found := false
		err := f.search(tree, key{g.Logical, typeBlockGroup, 0}, key{g.Logical, typeBlockGroup, math.MaxUint64},
			func(k key, item []byte) error {
				if k.typ != typeBlockGroup || len(item) < 24 {
					return nil
				}
				found = true
				g.Length = k.offset
				g.Used = binary.LittleEndian.Uint64(item)
				g.Flags = binary.LittleEndian.Uint64(item[16:])
				return errStop
			})
		if err != nil {
			return nil, err
		}
		if found { // else it was moved away in the meantime
			known = append(known, g)
		}
	}
	slices.SortFunc(known, func(a, b Group) int { return cmp.Compare(b.DevOffset, a.DevOffset) })
	return known, nil
}

// Extent is a stretch of a data block group that is in use.
type Extent struct {
	Start  uint64 // logical address
	Length uint64 // bytes
}

// Extents lists the extents of a data block group in order of their address, as
// of the last commit but for changes that wait to be written. A group that was
// moved away in the meantime has none.
func (f *FS) Extents(g Group) ([]Extent, error) {
	var list []Extent
	err := f.dataExtents(g, func(start, length uint64) error {
		list = append(list, Extent{Start: start, Length: length})
		return nil
	})
	return list, err
}

// InUse lists what is in use in a group of any kind, extents and tree blocks,
// in order of their address; what adjoins is one. As with [FS.Extents] a group
// that was moved away has none.
func (f *FS) InUse(g Group) ([]Extent, error) {
	info, err := f.Info()
	if err != nil {
		return nil, err
	}
	var list []Extent
	err = f.search(treeExtent, key{g.Logical, 0, 0}, key{g.Logical + g.Length - 1, math.MaxUint8, math.MaxUint64},
		func(k key, _ []byte) error {
			length := k.offset
			switch k.typ {
			case typeExtentItem:
			case typeTreeBlock:
				length = uint64(info.NodeSize)
			default:
				return nil
			}
			if last := len(list) - 1; last >= 0 && list[last].Start+list[last].Length == k.object {
				list[last].Length += length
			} else {
				list = append(list, Extent{Start: k.object, Length: length})
			}
			return nil
		})
	return list, err
}
