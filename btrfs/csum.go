package btrfs

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// CsumType is a checksum algorithm, by the number it has on disk.
type CsumType uint16

// The checksum algorithms of Btrfs. Source: enum btrfs_csum_type.
const (
	CsumCRC32C CsumType = iota
	CsumXXHash
	CsumSHA256
	CsumBlake2b
)

// String gives the name that sysfs uses in features/supported_checksums.
func (t CsumType) String() string {
	switch t {
	case CsumCRC32C:
		return "crc32c"
	case CsumXXHash:
		return "xxhash64"
	case CsumSHA256:
		return "sha256"
	case CsumBlake2b:
		return "blake2b"
	}
	return fmt.Sprintf("unknown checksum type %d", uint16(t))
}

// Size is the length of a checksum in bytes, 0 for an unknown type.
func (t CsumType) Size() int {
	switch t {
	case CsumCRC32C:
		return 4
	case CsumXXHash:
		return 8
	case CsumSHA256, CsumBlake2b:
		return 32
	}
	return 0
}

// Sum gives the checksum of data in the form it has on disk, nil for an unknown
// type.
func (t CsumType) Sum(data []byte) []byte {
	switch t {
	case CsumCRC32C:
		return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)))
	case CsumXXHash:
		return binary.LittleEndian.AppendUint64(nil, xxhash64(data))
	case CsumSHA256:
		sum := sha256.Sum256(data)
		return sum[:]
	case CsumBlake2b:
		sum := blake2b256(data)
		return sum[:]
	}
	return nil
}
