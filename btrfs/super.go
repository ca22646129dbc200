package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	superOffset = 64 << 10
	superSize   = 4096
	superMagic  = "_BHRfS_M"

	superFlagSeeding = 1 << 32

	incompatMetadataUUID = 1 << 10
)

// Super is what the primary superblock of a file or device says.
type Super struct {
	FSID         UUID
	MetadataUUID UUID // equal to FSID unless the feature metadata-uuid is set
	DevUUID      UUID // of this device
	Label        string
	Size         uint64 // of the filesystem over all devices, bytes
	Used         uint64 // bytes in use, all copies counted
	DevSize      uint64 // what the filesystem uses of this device, bytes
	DevID        uint64 // of this device
	NumDevices   uint64 // seeds included
	Generation   uint64
	Seeding      bool // made a seed with `btrfstune -S 1`
	CsumType     CsumType
	NodeSize     uint32 // bytes
	SectorSize   uint32 // bytes
	Compat       uint64 // feature bits
	CompatRO     uint64 // feature bits a kernel must know to write
	Incompat     uint64 // feature bits a kernel must know to mount
	LogRoot      uint64 // not 0: there is a log to replay, so it cannot be mounted read-only as a seed must be
	// MetadataProfile is the profile of the chunk tree's block groups, "single"
	// or "dup" and so on, which mkfs gives to all metadata; the superblock does
	// not say more. "" when there is no system chunk.
	MetadataProfile string
}

// ReadSuper reads and checks the primary superblock of a file or device of size
// bytes.
//
// The error wraps [ErrNotBtrfs] when there is none, [ErrSuperCorrupt] when its
// checksum or a value in it is wrong, and [ErrTruncated] when the file is
// shorter than the filesystem; in the last case the Super is valid. The
// checksum of an unknown type cannot be verified: [Super.Unsupported] says so.
func ReadSuper(r io.ReaderAt, size int64) (Super, error) {
	s, _, err := readSuper(r, size)
	return s, err
}

// readSuper gives the block itself as well.
func readSuper(r io.ReaderAt, size int64) (Super, []byte, error) {
	raw, err := superBlock(r, size)
	if err != nil {
		return Super{}, nil, err
	}
	if string(raw[64:72]) != superMagic {
		return Super{}, nil, fmt.Errorf("%w: no superblock at 64 KiB", ErrNotBtrfs)
	}
	s, err := parseSuper(raw, superOffset)
	if err != nil {
		return Super{}, nil, fmt.Errorf("%w: %w", ErrSuperCorrupt, err)
	}
	if s.DevSize > uint64(size) {
		return s, raw, fmt.Errorf("%w: %d of %d bytes", ErrTruncated, size, s.DevSize)
	}
	return s, raw, nil
}

// superBlock reads what is where the primary superblock belongs.
func superBlock(r io.ReaderAt, size int64) ([]byte, error) {
	if size < superOffset+superSize {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrNotBtrfs, size)
	}
	raw := make([]byte, superSize)
	if _, err := io.ReadFull(io.NewSectionReader(r, superOffset, superSize), raw); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("%w: it ends before the superblock", ErrNotBtrfs)
		}
		return nil, fmt.Errorf("cannot read the superblock: %w", err)
	}
	return raw, nil
}

// parseSuper reads a block that has the magic and lies at a byte of its device.
// The offsets are those of struct btrfs_super_block in the kernel's
// fs/btrfs/fs.h.
func parseSuper(raw []byte, at uint64) (Super, error) {
	u16 := func(at int) uint16 { return binary.LittleEndian.Uint16(raw[at:]) }
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(raw[at:]) }
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(raw[at:]) }
	const dev = superDevItem

	s := Super{
		FSID:     UUID(raw[32:48]),
		DevUUID:  UUID(raw[dev+66 : dev+82]),
		Label:    getString(raw[299:555]),
		Size:     u64(112),
		Used:     u64(120),
		DevSize:  u64(dev + 8),
		DevID:    u64(dev),
		Compat:   u64(172),
		CompatRO: u64(180),
		Incompat: u64(188),
		LogRoot:  u64(96),

		NumDevices: u64(136),
		Generation: u64(72),
		Seeding:    u64(56)&superFlagSeeding != 0,
		CsumType:   CsumType(u16(196)),
		NodeSize:   u32(148),
		SectorSize: u32(144),
	}
	s.MetadataUUID = s.FSID
	if s.Incompat&incompatMetadataUUID != 0 {
		s.MetadataUUID = UUID(raw[571:587])
	}
	if n := s.CsumType.Size(); !bytes.Equal(s.CsumType.Sum(raw[32:]), raw[:n]) {
		return Super{}, fmt.Errorf("its %s checksum is wrong", s.CsumType)
	}
	// What the kernel refuses as well, in btrfs_validate_super.
	switch {
	case u64(48) != at:
		return Super{}, fmt.Errorf("it says that it lies at %d", u64(48))
	case !blockSize(s.SectorSize):
		return Super{}, fmt.Errorf("the sector size %d is impossible", s.SectorSize)
	case !blockSize(s.NodeSize) || s.NodeSize < s.SectorSize:
		return Super{}, fmt.Errorf("the node size %d is impossible", s.NodeSize)
	case s.NumDevices == 0:
		return Super{}, errors.New("it has no devices")
	case s.Size == 0 || s.DevSize == 0:
		return Super{}, errors.New("it has no size")
	case UUID(raw[dev+82:dev+98]) != s.MetadataUUID:
		return Super{}, errors.New("its device belongs to another filesystem")
	}
	length := u32(160)
	if length > 2048 {
		return Super{}, fmt.Errorf("%d bytes of system chunks are too many", length)
	}
	var err error
	s.MetadataProfile, err = systemProfile(raw[811 : 811+length])
	return s, err
}

// blockSize reports whether n is a power of two from 4 KiB to 64 KiB.
func blockSize(n uint32) bool { return n >= 4096 && n <= 65536 && n&(n-1) == 0 }

// systemProfile gives the profile with the most copies in an array of system
// chunks, each a key and a chunk item.
func systemProfile(array []byte) (string, error) {
	const head, chunk, stripe = 17, 48, 32
	best := ""
	for len(array) > 0 {
		if len(array) < head+chunk {
			return "", errors.New("its system chunks are cut off")
		}
		if array[8] != 228 { // BTRFS_CHUNK_ITEM_KEY
			return "", errors.New("its system chunks are no chunks")
		}
		flags := binary.LittleEndian.Uint64(array[head+24:])
		stripes := int(binary.LittleEndian.Uint16(array[head+44:]))
		length := head + chunk + stripes*stripe
		if stripes == 0 || len(array) < length {
			return "", errors.New("its system chunks are cut off")
		}
		if name := profile(flags); best == "" || copies(name) > copies(best) {
			best = name
		}
		array = array[length:]
	}
	return best, nil
}

// The features by bit. Those without a name in sysfs are in every kernel: the
// first and sixth have been since before sysfs had names, and a valid free
// space tree comes with the tree. Source: fs/btrfs/sysfs.c.
var (
	incompatNames = map[int]string{
		0: "", 1: "default_subvol", 2: "mixed_groups", 3: "compress_lzo", 4: "compress_zstd", 5: "",
		6: "extended_iref", 7: "raid56", 8: "skinny_metadata", 9: "no_holes", 10: "metadata_uuid",
		11: "raid1c34", 12: "zoned", 13: "extent_tree_v2", 14: "raid_stripe_tree", 16: "simple_quota",
	}
	compatRONames = map[int]string{0: "free_space_tree", 1: "", 2: "verity", 3: "block_group_tree"}
)

// Unsupported gives the reasons why the running kernel cannot mount the
// filesystem and make a sprout of it, none when it can. root is where to find
// /sys, "/" but in tests.
func (s Super) Unsupported(root string) []string {
	dir := filepath.Join(root, "sys/fs/btrfs/features")
	if _, err := os.Stat(dir); err != nil {
		return []string{"this kernel has no Btrfs, or its module is not loaded"}
	}
	var reasons []string
	refuse := func(format string, args ...any) { reasons = append(reasons, fmt.Sprintf(format, args...)) }
	lists := func(name, word string) bool {
		text, err := readAttr(filepath.Join(dir, name))
		return err != nil || slices.Contains(strings.Fields(text), word) // a kernel without the list decides itself
	}
	if s.CsumType.Size() == 0 {
		refuse("the checksum type %d is not known", uint16(s.CsumType))
	} else if !lists("supported_checksums", s.CsumType.String()) {
		refuse("this kernel does not know the checksum %s", s.CsumType)
	}
	if !lists("supported_sectorsizes", strconv.FormatUint(uint64(s.SectorSize), 10)) {
		refuse("this kernel does not support sectors of %d bytes", s.SectorSize)
	}
	features := func(bits uint64, names map[int]string, kind string) {
		for bit := range 64 {
			if bits&(1<<bit) == 0 {
				continue
			}
			name, known := names[bit]
			if !known {
				refuse("it uses an unknown feature (%s bit %d)", kind, bit)
			} else if name != "" {
				if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
					refuse("this kernel does not have the feature %s", name)
				}
			}
		}
	}
	features(s.Incompat, incompatNames, "incompat")
	features(s.CompatRO, compatRONames, "compat_ro")
	if s.Seeding && s.Incompat&incompatMetadataUUID != 0 {
		refuse("the kernel refuses a seed whose filesystem id was changed afterwards (metadata-uuid)")
	}
	if s.LogRoot != 0 {
		refuse("it was not unmounted cleanly and has a log to replay")
	}
	return reasons
}
