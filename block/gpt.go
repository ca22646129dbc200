package block

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"strconv"

	siderolabs "github.com/siderolabs/go-blockdevice/v2/block"
	"golang.org/x/sys/unix"
)

// ErrNoGPT says that the disk has no GUID partition table, or a damaged one.
var ErrNoGPT = errors.New("there is no sound GUID partition table")

// Table is what a GUID partition table says.
type Table struct {
	Entries []Entry // by number
	// Free is the size in bytes of the largest stretch that belongs to no
	// partition. It reaches to the end of the disk, also where the table was
	// made for a smaller one, as that of an image that was copied to a stick.
	Free uint64
}

// Entry is one partition of a [Table].
type Entry struct {
	Number      int    // from 1
	Type, UUID  string // with dashes, in lower case
	Start, Size uint64 // bytes
}

// GPT reads the partition table of a whole disk.
func (h *Handle) GPT() (Table, error) {
	sector, err := unix.IoctlGetInt(int(h.f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return Table{}, fmt.Errorf("cannot read the sector size of %s: %w", h.id.Path, err)
	}
	t, err := readGPT(h.f, uint64(sector), h.id.Size) //nolint:gosec // a sector is never negative
	if err != nil {
		return Table{}, fmt.Errorf("cannot read the partition table of %s: %w", h.id.Path, err)
	}
	return t, nil
}

// readGPT reads the first of the two copies. Source: UEFI specification 2.10,
// section 5.3.
func readGPT(r io.ReaderAt, sector, size uint64) (Table, error) {
	header := make([]byte, 92)
	if _, err := r.ReadAt(header, int64(sector)); err != nil { //nolint:gosec // small
		return Table{}, err
	}
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(header[at:]) }
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(header[at:]) }
	count, length, headerSize := uint64(u32(80)), uint64(u32(84)), u32(12)
	sum, tableSum, table, usable := u32(16), u32(88), u64(72), u64(40)
	const most = 4096
	if string(header[:8]) != "EFI PART" || headerSize < 92 || uint64(headerSize) > sector || length < 128 || length > most || count > most ||
		table > size/sector || usable > size/sector {
		return Table{}, ErrNoGPT
	}
	whole := make([]byte, headerSize)
	if _, err := r.ReadAt(whole, int64(sector)); err != nil { //nolint:gosec // small
		return Table{}, err
	}
	clear(whole[16:20])
	if crc32.ChecksumIEEE(whole) != sum {
		return Table{}, ErrNoGPT
	}
	raw := make([]byte, count*length)
	if _, err := r.ReadAt(raw, int64(table*sector)); err != nil { //nolint:gosec // below the size of the disk
		return Table{}, err
	}
	if crc32.ChecksumIEEE(raw) != tableSum {
		return Table{}, ErrNoGPT
	}
	var t Table
	for i := range count {
		e := raw[i*length : (i+1)*length]
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if [16]byte(e) == [16]byte{} || last < first || last >= size/sector {
			continue
		}
		t.Entries = append(t.Entries, Entry{
			Number: int(i) + 1, Type: guid(e), UUID: guid(e[16:]), Start: first * sector, Size: (last - first + 1) * sector, //nolint:gosec // small
		})
	}
	// The second copy, entries and header, takes up the end of the disk.
	end := size/sector*sector - min(size, sector+(count*length+sector-1)/sector*sector)
	t.Free = largestGap(t.Entries, usable*sector, end)
	return t, nil
}

// guid reads an identifier, the first three parts of which are little-endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func largestGap(entries []Entry, from, to uint64) uint64 {
	sorted := slices.SortedFunc(slices.Values(entries), func(a, b Entry) int { return cmp.Compare(a.Start, b.Start) })
	var most uint64
	for _, e := range append(sorted, Entry{Start: to}) {
		if e.Start > from {
			most = max(most, min(e.Start, to)-min(from, to))
		}
		from = max(from, e.Start+e.Size)
	}
	return most
}

// PartitionOf gives the partition of a disk that the kernel has for an entry of
// its table. The error wraps [os.ErrNotExist] when the kernel has none, and
// [ErrChanged] when it has another one of that number.
func (s *System) PartitionOf(disk DevNum, e Entry) (ID, error) {
	dir, _, err := s.dirs(disk)
	if err != nil {
		return ID{}, err
	}
	names, err := partitions(dir)
	if err != nil {
		return ID{}, fmt.Errorf("cannot list the partitions of block device %s: %w", disk, err)
	}
	for _, name := range names {
		if attr(s.classDir(name), "partition") != strconv.Itoa(e.Number) {
			continue
		}
		num, err := s.numOf(name)
		if err != nil {
			return ID{}, err
		}
		id, err := s.Identify(num)
		if err != nil {
			return ID{}, err
		}
		start, err := attrUint(s.classDir(name), "start")
		if err == nil && (start*sectorSize != e.Start || id.Size != e.Size) {
			err = ErrChanged
		}
		if err != nil {
			return ID{}, fmt.Errorf("cannot use %s: %w", id.Path, err)
		}
		return id, nil
	}
	return ID{}, fmt.Errorf("cannot find partition %d of block device %s: %w", e.Number, disk, os.ErrNotExist)
}

// AddPartition tells the kernel of a partition that it has not.
func (h *Handle) AddPartition(e Entry) error {
	if err := siderolabs.NewFromFile(h.f).KernelPartitionAdd(e.Number, e.Start, e.Size); err != nil {
		return fmt.Errorf("cannot tell the kernel of partition %d of %s: %w", e.Number, h.id.Path, err)
	}
	return nil
}
