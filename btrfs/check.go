package btrfs

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Checker compares what was read of a filesystem with its checksums. It may be
// used concurrently.
type Checker struct {
	kind         SpaceType // Data, or Metadata and System, or a mix
	csum         CsumType
	sector, node uint32
	search       searcher
	// files names those that a data extent is of; nil names none.
	files func(logical uint64) ([]string, error)
}

// Checker gives the checker of a group.
func (f *FS) Checker(g Group) (*Checker, error) {
	info, err := f.Info()
	if err != nil {
		return nil, err
	}
	if info.SectorSize == 0 || info.NodeSize == 0 || info.CsumSize == 0 {
		return nil, f.fail("read how the filesystem is laid out", unix.EINVAL)
	}
	return &Checker{
		kind: g.Type(), csum: info.CsumType, sector: info.SectorSize, node: info.NodeSize, search: f.search, files: f.filesOf,
	}, nil
}

// ChecksumError says that what was read is not what was written there.
type ChecksumError struct {
	// Logical is the address of the first block that is wrong.
	Logical uint64
	// Files that have a part of it, relative to the top of the filesystem; none
	// for metadata, and for files that are deleted but open.
	Files []string
}

// Error implements error.
func (e *ChecksumError) Error() string {
	return fmt.Sprintf("the checksum of the block at %d does not match", e.Logical)
}

// Load reads the checksums of a range of data and keeps nothing: [Checker.Check]
// then finds them in the kernel's caches.
func (c *Checker) Load(start, length uint64) error {
	if c.kind != Data || length == 0 || c.csum.Size() == 0 {
		return nil
	}
	from, to := sumKeys(uint64(c.sector), uint64(c.csum.Size()), uint64(c.node), start, length) //nolint:gosec // a size
	return c.search(treeCsum, from, to, func(key, []byte) error { return nil })
}

// Check compares data, which was read from the logical address start and is in
// use all of it; tree blocks have to be whole. Data without a checksum is taken
// for right, and so is all of a group that mixes data and metadata. What does not
// match is a [ChecksumError].
//
// What is freed in the meantime is still right: nothing is written to a seed.
func (c *Checker) Check(start uint64, data []byte) error {
	switch c.kind {
	case Data:
		return c.data(start, data)
	case Metadata, System:
		return c.nodes(start, data)
	}
	return nil
}

func (c *Checker) data(start uint64, data []byte) error {
	sums, err := sumsOf(c.search, uint64(c.sector), uint64(c.csum.Size()), uint64(c.node), start, uint64(len(data))) //nolint:gosec // a size
	if err != nil {
		return err
	}
	sector := int(c.sector)
	for i, want := range sums {
		block := data[i*sector : min((i+1)*sector, len(data))]
		if want == nil || bytes.Equal(c.csum.Sum(block), want) {
			continue
		}
		bad := &ChecksumError{Logical: start + uint64(i*sector)}
		if c.files != nil { // what has no name any more is bad all the same
			bad.Files, _ = c.files(bad.Logical)
		}
		return bad
	}
	return nil
}

// nodes compares tree blocks. Each begins with its checksum, which is over the
// rest, and has its own address in it. Source: struct btrfs_header.
func (c *Checker) nodes(start uint64, data []byte) error {
	const sumSize, addressAt = 32, 48
	node := int(c.node)
	for at := 0; at+node <= len(data); at += node {
		block, logical := data[at:at+node], start+uint64(at)
		sum := c.csum.Sum(block[sumSize:])
		if sum == nil || !bytes.Equal(sum, block[:len(sum)]) || binary.LittleEndian.Uint64(block[addressAt:]) != logical {
			return &ChecksumError{Logical: logical}
		}
	}
	return nil
}
