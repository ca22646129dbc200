package btrfs

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Checker compares what was read of a block group with its checksums. It may be
// used concurrently.
type Checker struct {
	fs    *FS
	info  Info
	group Group
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
	return &Checker{fs: f, info: info, group: g}, nil
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

// Check compares data, which was read from the logical address start and is in
// use all of it; tree blocks have to be whole. Data without a checksum is taken
// for right, and so is all of a group that mixes data and metadata. What does not
// match is a [ChecksumError].
//
// What is freed in the meantime is still right: nothing is written to a seed.
func (c *Checker) Check(start uint64, data []byte) error {
	switch c.group.Type() {
	case Data:
		return c.data(start, data)
	case Metadata, System:
		return c.nodes(start, data)
	}
	return nil
}

func (c *Checker) data(start uint64, data []byte) error {
	sums, err := (&extentCheck{fs: c.fs, info: c.info}).sums(start, uint64(len(data)))
	if err != nil {
		return err
	}
	sector := int(c.info.SectorSize)
	for i, want := range sums {
		block := data[i*sector : min((i+1)*sector, len(data))]
		if want == nil || bytes.Equal(c.info.CsumType.Sum(block), want) {
			continue
		}
		bad := &ChecksumError{Logical: start + uint64(i*sector)}
		// What has no name any more is bad all the same.
		bad.Files, _ = c.fs.filesOf(bad.Logical)
		return bad
	}
	return nil
}

// nodes compares tree blocks. Each begins with its checksum, which is over the
// rest, and has its own address in it. Source: struct btrfs_header.
func (c *Checker) nodes(start uint64, data []byte) error {
	const sumSize, addressAt = 32, 48
	node := int(c.info.NodeSize)
	for at := 0; at+node <= len(data); at += node {
		block, logical := data[at:at+node], start+uint64(at)
		sum := c.info.CsumType.Sum(block[sumSize:])
		if sum == nil || !bytes.Equal(sum, block[:len(sum)]) || binary.LittleEndian.Uint64(block[addressAt:]) != logical {
			return &ChecksumError{Logical: logical}
		}
	}
	return nil
}
