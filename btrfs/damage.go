package btrfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
)

// UnreadableFiles names the files that keep the member from being removed,
// after [FS.Remove] failed with EIO: those that hold a data extent on it which
// cannot be read or does not match its checksum. The group the kernel would
// move next is looked at first, then the others, until limit files are found (0
// is no limit), all is read, or ctx ends; what was found is returned with the
// error. Paths are relative to the top of the filesystem, subvolumes included.
//
// The device is read past all caches and compared with the checksum tree, not
// the files with pread: a running system's files are in use and in the page
// cache, which shows them whole and cannot be emptied. The kernel moves extents
// as a whole, so a file counts also when the damaged sector is in a part of the
// extent that was overwritten since. Deleting or rewriting the files lets the
// removal go on.
//
// Only data groups with the profile single or dup are looked at. Files that are
// deleted but still open have no name to give.
func (f *FS) UnreadableFiles(ctx context.Context, devid uint64, limit int) ([]string, error) {
	info, err := f.Info()
	if err != nil {
		return nil, err
	}
	const op = "look for unreadable files"
	members, err := f.Members()
	if err != nil {
		return nil, err
	}
	var num block.DevNum
	for _, m := range members {
		if m.DevID == devid {
			num = m.Num
		}
	}
	disk, err := f.openDevice(num)
	if err != nil {
		return nil, opError(op, f.path, devid, err)
	}
	defer func() { _ = disk.Close() }() // It was only read.
	page, err := unix.Mmap(-1, 0, readSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, opError(op, f.path, devid, fmt.Errorf("cannot get memory: %w", err))
	}
	defer func() { _ = unix.Munmap(page) }()
	groups, err := f.Groups(devid)
	if err != nil {
		return nil, err
	}

	copies := make(map[uint64][]uint64) // device offsets by logical address
	for _, g := range groups {
		copies[g.Logical] = append(copies[g.Logical], g.DevOffset)
	}
	var files []string
	seen := make(map[string]bool)
	for _, g := range groups {
		offsets := copies[g.Logical]
		plain := g.Profile() == "single" || g.Profile() == "dup"
		if g.Flags&flagData == 0 || !plain || offsets == nil {
			continue
		}
		delete(copies, g.Logical) // The second copy was looked at with the first.
		check := extentCheck{fs: f, info: info, disk: disk, page: page, group: g, copies: offsets}
		err := f.dataExtents(g, func(start, length uint64) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			bad, err := check.bad(start, length)
			if bad && err == nil {
				// Again with fresh checksums: it may have been freed and
				// written anew in between.
				bad, err = check.bad(start, length)
			}
			if err != nil || !bad {
				return err
			}
			names, err := f.filesOf(start)
			if err != nil {
				return err
			}
			for _, name := range names {
				if !seen[name] {
					seen[name] = true
					files = append(files, name)
				}
				if limit > 0 && len(files) == limit {
					return errFull
				}
			}
			return nil
		})
		if errors.Is(err, errFull) {
			return files, nil
		}
		if err != nil {
			return files, opError(op, f.path, devid, err)
		}
	}
	return files, nil
}

// errFull ends the walk when enough files were found.
var errFull = errors.New("limit reached")

// readSize is how much is read from the device at once.
const readSize = 1 << 20

// openDevice opens a block device for reading without the page cache.
func (f *FS) openDevice(num block.DevNum) (*os.File, error) {
	if num.IsZero() {
		return nil, unix.ENODEV
	}
	uevent, err := readAttr(filepath.Join(f.sys, "dev/block", num.String(), "uevent"))
	if err != nil {
		return nil, err
	}
	name := ""
	for line := range strings.Lines(uevent) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			name = value
		}
	}
	file, err := os.OpenFile(filepath.Join(f.dev, name), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	var statErr error
	err = withFD(file, func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) })
	if err = errors.Join(err, statErr); err == nil && block.DevNumOf(uint64(st.Rdev)) != num { //nolint:unconvert // not 64 bits everywhere
		err = fmt.Errorf("%w: %s is another device now", unix.ENODEV, file.Name())
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// dataExtents calls visit for each data extent of a group.
func (f *FS) dataExtents(g Group, visit func(start, length uint64) error) error {
	const flagExtentData = 1 << 0
	end := g.Logical + g.Length - 1
	return f.search(treeExtent, key{g.Logical, 0, 0}, key{end, math.MaxUint8, math.MaxUint64},
		func(k key, item []byte) error {
			if k.typ != typeExtentItem || len(item) < 24 || binary.LittleEndian.Uint64(item[16:])&flagExtentData == 0 {
				return nil
			}
			return visit(k.object, k.offset)
		})
}

// extentCheck reads the extents of one group and compares their checksums.
type extentCheck struct {
	fs     *FS
	info   Info
	disk   *os.File
	page   []byte // aligned for direct reads
	group  Group
	copies []uint64 // where the group begins on the device, once or twice
}

// bad reports whether a sector of the extent is readable in no copy.
func (c *extentCheck) bad(start, length uint64) (bool, error) {
	sums, err := sumsOf(c.fs.search, uint64(c.info.SectorSize), uint64(c.info.CsumSize), uint64(c.info.NodeSize), start, length)
	if err != nil {
		return false, err
	}
	sector := uint64(c.info.SectorSize)
	for done := uint64(0); done < length; done += readSize {
		n := min(readSize, length-done)
		whole := c.read(c.copies[0], start+done, c.page[:n])
		for at := uint64(0); at < n; at += sector {
			want := sums[(done+at)/sector]
			if whole && c.matches(c.page[at:at+sector], want) {
				continue
			}
			if !c.sectorReadable(start+done+at, want) {
				return true, nil
			}
			whole = whole && c.read(c.copies[0], start+done, c.page[:n]) // sectorReadable used the page
		}
	}
	return false, nil
}

// sectorReadable tries one sector in every copy.
func (c *extentCheck) sectorReadable(logical uint64, want []byte) bool {
	for _, offset := range c.copies {
		if buf := c.page[:c.info.SectorSize]; c.read(offset, logical, buf) && c.matches(buf, want) {
			return true
		}
	}
	return false
}

func (c *extentCheck) read(offset, logical uint64, buf []byte) bool {
	at := int64(offset + logical - c.group.Logical)
	_, err := c.disk.ReadAt(buf, at)
	return err == nil
}

// matches compares; data without a checksum is right when it can be read.
func (c *extentCheck) matches(data, want []byte) bool {
	return want == nil || bytes.Equal(c.info.CsumType.Sum(data), want)
}

// searcher looks for items in the trees of a filesystem, as [FS.search] does.
type searcher func(tree uint64, from, to key, visit func(k key, item []byte) error) error

// sumsOf gives the checksum of each sector of the range, nil where there is none;
// size is that of a checksum. All sizes are in bytes.
func sumsOf(search searcher, sector, size, nodeSize, start, length uint64) ([][]byte, error) {
	if sector == 0 || size == 0 {
		return nil, unix.EINVAL
	}
	sums := make([][]byte, (length+sector-1)/sector)
	from, to := sumKeys(sector, size, nodeSize, start, length)
	err := search(treeCsum, from, to, func(k key, item []byte) error {
		for i := uint64(0); (i+1)*size <= uint64(len(item)); i++ {
			if at := k.offset + i*sector; at >= start && at < start+length {
				sums[(at-start)/sector] = bytes.Clone(item[i*size : (i+1)*size])
			}
		}
		return nil
	})
	return sums, err
}

// sumKeys says where the checksums of a range are. An item that covers the start can
// begin before it, by as much as one node has room for.
func sumKeys(sector, size, nodeSize, start, length uint64) (from, to key) {
	span := nodeSize / size * sector
	return key{objectExtentCsum, typeExtentCsum, start - min(start, span)}, key{objectExtentCsum, typeExtentCsum, start + length - 1}
}

// filesOf names the files that hold the data extent which begins at logical.
func (f *FS) filesOf(logical uint64) ([]string, error) {
	const ignoreOffset = 1 << 0 // all that refer to any part of the extent
	found := new(dataContainer)
	var pin runtime.Pinner // The kernel gets the address as a number.
	pin.Pin(found)
	defer pin.Unpin()
	args := logicalInoArgs{
		logical: logical, size: uint64(unsafe.Sizeof(*found)), flags: ignoreOffset,
		inodes: uint64(uintptr(unsafe.Pointer(found))),
	}
	if err := f.call(iocLogicalInoV2, unsafe.Pointer(&args)); errors.Is(err, unix.ENOENT) {
		return nil, nil // freed in the meantime
	} else if err != nil {
		return nil, f.fail("find the files of an extent", err)
	}
	var names []string
	done := make(map[[2]uint64]bool)
	// The container counts numbers, three for each reference.
	for _, ref := range found.refs[:min(int(found.count)/3, len(found.refs))] {
		id := [2]uint64{ref.root, ref.inode}
		if done[id] {
			continue
		}
		done[id] = true
		more, err := f.namesOf(ref.root, ref.inode)
		if errors.Is(err, unix.ENOENT) {
			continue // deleted in the meantime
		}
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
	}
	return names, nil
}

// namesOf gives every name of an inode of a subvolume.
func (f *FS) namesOf(root, inode uint64) ([]string, error) {
	if root != treeFS && root < objectFirstFree {
		return nil, nil // the kernel's own, such as a free space cache
	}
	top, err := f.subvolumePath(root)
	if err != nil {
		return nil, err
	}
	var names []string
	err = f.search(root, key{inode, typeInodeRef, 0}, key{inode, typeInodeExtref, math.MaxUint64},
		func(k key, item []byte) error {
			return eachLink(k, item, func(dir uint64, name string) error {
				path, err := f.dirPath(root, dir)
				if err == nil {
					names = append(names, filepath.Join(top, path, name))
				}
				return err
			})
		})
	return names, err
}

// eachLink goes through the names in one INODE_REF or INODE_EXTREF item.
func eachLink(k key, item []byte, visit func(dir uint64, name string) error) error {
	for len(item) > 0 {
		dir, head := k.offset, 10 // index, length
		if k.typ == typeInodeExtref {
			head = 18 // directory, index, length
		}
		if len(item) < head {
			return unix.EBADMSG
		}
		if k.typ == typeInodeExtref {
			dir = binary.LittleEndian.Uint64(item)
		}
		end := head + int(binary.LittleEndian.Uint16(item[head-2:]))
		if len(item) < end {
			return unix.EBADMSG
		}
		if err := visit(dir, string(item[head:end])); err != nil {
			return err
		}
		item = item[end:]
	}
	return nil
}

// dirPath gives the path of a directory below the top of its subvolume.
func (f *FS) dirPath(root, dir uint64) (string, error) {
	args := inoLookupArgs{treeID: root, objectID: dir}
	if err := f.call(iocInoLookup, unsafe.Pointer(&args)); err != nil {
		return "", f.fail("find the path of a directory", err)
	}
	return getString(args.name[:]), nil
}

// subvolumePath gives the path of a subvolume below the top of the filesystem.
func (f *FS) subvolumePath(root uint64) (string, error) {
	path := ""
	for depth := 0; root != treeFS; depth++ {
		if depth > 1000 {
			return "", f.fail("find the path of a subvolume", unix.ELOOP)
		}
		var parent, dir uint64
		name := ""
		err := f.search(treeRoot, key{root, typeRootBackref, 0}, key{root, typeRootBackref, math.MaxUint64},
			func(k key, item []byte) error {
				if len(item) < 18 {
					return unix.EBADMSG
				}
				parent, dir, name = k.offset, binary.LittleEndian.Uint64(item), string(item[18:])
				return errStop
			})
		if err != nil {
			return "", err
		}
		if name == "" {
			return "", f.fail("find the path of a subvolume", unix.ENOENT) // deleted
		}
		above, err := f.dirPath(parent, dir)
		if err != nil {
			return "", err
		}
		path, root = filepath.Join(above, name, path), parent
	}
	return path, nil
}
