// Package probe says which file system is on a device, by what name: the few
// that a live medium can have. It exists since an initramfs need not have
// blkid(8), and the library at hand (siderolabs/go-blockdevice) gives no UUID
// for ISO 9660 and FAT, does not know Btrfs, and brings a logger along.
package probe

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"
)

// FS is a file system.
type FS struct {
	// Type is the name by which it is mounted.
	Type string
	// Label and UUID as blkid(8) gives them, "" where it has none.
	Label, UUID string
}

// headSize is as much of a device as has to be read for all of them but the
// label of a FAT.
const headSize = 72 << 10

// Probe reads what is on a device. The zero FS means that none of the known
// file systems is; an error, that it could not be read.
func Probe(r io.ReaderAt) (FS, error) {
	head := make([]byte, headSize)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return FS{}, fmt.Errorf("cannot read what is on it: %w", err)
	}
	head = head[:n]
	for _, known := range []func([]byte, io.ReaderAt) (FS, bool){btrfs, iso9660, ext, xfs, fat} {
		if fs, ok := known(head, r); ok {
			return fs, nil
		}
	}
	return FS{}, nil
}

// at gives n bytes of head, zeros where it ends before.
func at(head []byte, from, n int) []byte {
	field := make([]byte, n)
	if from < len(head) {
		copy(field, head[from:])
	}
	return field
}

func has(head []byte, from int, magic string) bool {
	return bytes.Equal(at(head, from, len(magic)), []byte(magic))
}

// text ends at the first zero byte.
func text(field []byte) string {
	field, _, _ = bytes.Cut(field, []byte{0})
	return string(field)
}

func uuid(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// btrfs: struct btrfs_super_block at 64 KiB.
func btrfs(head []byte, _ io.ReaderAt) (FS, bool) {
	const super = 64 << 10
	if !has(head, super+64, "_BHRfS_M") {
		return FS{}, false
	}
	return FS{Type: "btrfs", Label: text(at(head, super+299, 256)), UUID: uuid(at(head, super+32, 16))}, true
}

// iso9660: volume descriptors of 2 KiB from 32 KiB on (ECMA-119). The label is
// that of the Joliet descriptor where there is one, as for blkid; the UUID is
// the time of the last change, or of the creation.
func iso9660(head []byte, _ io.ReaderAt) (FS, bool) {
	const first, size = 32 << 10, 2 << 10
	var fs FS
	joliet := ""
	for from := first; from+size <= len(head); from += size {
		if !has(head, from+1, "CD001") {
			break
		}
		id := at(head, from+40, 32)
		switch kind := head[from]; {
		case kind == 1 && fs.Type == "":
			fs.Type = "iso9660"
			fs.Label = strings.TrimRight(text(id), " ")
			for _, when := range []int{830, 813} {
				if date := at(head, from+when, 16); len(bytes.Trim(date, "0\x00")) > 0 {
					fs.UUID = fmt.Sprintf("%s-%s-%s-%s-%s-%s-%s",
						date[0:4], date[4:6], date[6:8], date[8:10], date[10:12], date[12:14], date[14:16])
					break
				}
			}
		case kind == 2 && has(head, from+88, "%/"): // UCS-2
			var units []uint16
			for i := 0; i < len(id); i += 2 {
				units = append(units, binary.BigEndian.Uint16(id[i:]))
			}
			joliet = strings.TrimRight(strings.ReplaceAll(string(utf16.Decode(units)), "\x00", ""), " ")
		}
		if head[from] == 255 {
			break
		}
	}
	// The label of a Joliet descriptor is cut after 16 letters: then the other
	// one is the whole of it.
	if joliet != "" && !strings.HasPrefix(strings.ToUpper(fs.Label), strings.ToUpper(joliet)) {
		fs.Label = joliet
	}
	return fs, fs.Type != ""
}

// ext: struct ext2_super_block at 1 KiB. A file system with a journal or with
// extents is mounted as ext4, which knows all three.
func ext(head []byte, _ io.ReaderAt) (FS, bool) {
	const super = 1 << 10
	if !has(head, super+56, "\x53\xef") {
		return FS{}, false
	}
	return FS{Type: "ext4", Label: text(at(head, super+120, 16)), UUID: uuid(at(head, super+104, 16))}, true
}

// xfs: struct xfs_dsb at 0.
func xfs(head []byte, _ io.ReaderAt) (FS, bool) {
	if !has(head, 0, "XFSB") {
		return FS{}, false
	}
	return FS{Type: "xfs", Label: text(at(head, 108, 12)), UUID: uuid(at(head, 32, 16))}, true
}

// fat: the BIOS parameter block at 0. The label that counts is an entry of the
// root directory.
func fat(head []byte, r io.ReaderAt) (FS, bool) {
	var serial int
	switch {
	case has(head, 510, "\x55\xaa") && has(head, 82, "FAT32   "):
		serial = 67
	case has(head, 510, "\x55\xaa") && (has(head, 54, "FAT12   ") || has(head, 54, "FAT16   ") || has(head, 54, "FAT     ")):
		serial = 39
	default:
		return FS{}, false
	}
	id := at(head, serial, 4)
	fs := FS{Type: "vfat", UUID: strings.ToUpper(hex.EncodeToString([]byte{id[3], id[2]}) + "-" + hex.EncodeToString([]byte{id[1], id[0]}))}

	u16 := func(from int) int64 { return int64(binary.LittleEndian.Uint16(at(head, from, 2))) }
	sector, perCluster, reserved, copies := u16(11), int64(head[13]), u16(14), int64(head[16])
	entries, length := u16(17), u16(22)
	root, size := (reserved+copies*length)*sector, entries*32
	if serial == 67 {
		length = int64(binary.LittleEndian.Uint32(at(head, 36, 4)))
		cluster := int64(binary.LittleEndian.Uint32(at(head, 44, 4)))
		// The label comes first in all that formats: one cluster is enough.
		root = (reserved + copies*length + (cluster-2)*perCluster) * sector
		size = perCluster * sector
	}
	const most = 1 << 20
	if root <= 0 || size <= 0 || size > most {
		return fs, true
	}
	dir := make([]byte, size)
	n, _ := r.ReadAt(dir, root) // a label that cannot be read is none
	for dir = dir[:n/32*32]; len(dir) > 0 && dir[0] != 0; dir = dir[32:] {
		const attrVolume, attrDir, attrLong = 0x08, 0x10, 0x0f
		if attr := dir[11]; dir[0] != 0xe5 && attr&0x3f != attrLong && attr&(attrVolume|attrDir) == attrVolume {
			fs.Label = strings.TrimRight(string(dir[:11]), " ")
			break
		}
	}
	return fs, true
}
