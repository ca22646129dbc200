package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"slices"
	"testing"
)

const gptISO = "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"

// stickTable makes the first sectors of a stick on which an image of 8 MiB was
// copied: a table of 248 entries at sector 2, the usable space from 64 on.
func stickTable(entries map[int][2]uint64) []byte {
	raw := make([]byte, 64*512)
	le := binary.LittleEndian
	table := raw[2*512 : 2*512+248*128]
	for number, e := range entries {
		at := table[(number-1)*128:]
		// gptISO: the first three parts are little-endian.
		copy(at, []byte{0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7})
		at[16] = byte(number)
		le.PutUint64(at[32:], e[0])
		le.PutUint64(at[40:], e[1])
	}
	h := raw[512:]
	copy(h, "EFI PART")
	le.PutUint32(h[8:], 0x10000)
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[32:], 16383)
	le.PutUint64(h[40:], 64)
	le.PutUint64(h[48:], 16320)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 248)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	return raw
}

func TestAPartitionTableAndItsLargestGap(t *testing.T) {
	const mib = 1 << 20
	raw := stickTable(map[int][2]uint64{1: {64, 4095}, 2: {8192, 16319}})
	stick, err := readGPT(bytes.NewReader(raw), 512, 64*mib)
	want := []Entry{
		{Number: 1, Type: gptISO, UUID: "00000001-0000-0000-0000-000000000000", Start: 64 * 512, Size: 4032 * 512},
		{Number: 2, Type: gptISO, UUID: "00000002-0000-0000-0000-000000000000", Start: 8192 * 512, Size: 8128 * 512},
	}
	if err != nil || !slices.Equal(stick.Entries, want) {
		t.Errorf("the entries are\n%+v (%v), wanted\n%+v", stick.Entries, err, want)
	}
	// To the end of the stick but for the second copy, which is moved there.
	if wantFree := uint64(64*mib - 16320*512 - 63*512); stick.Free != wantFree {
		t.Errorf("%d bytes are free, wanted %d", stick.Free, wantFree)
	}
	image, err := readGPT(bytes.NewReader(raw), 512, 8*mib)
	if wantFree := uint64((8192 - 4096) * 512); err != nil || image.Free != wantFree {
		t.Errorf("on a stick of the image's own size %d bytes are free (%v), wanted %d", image.Free, err, wantFree)
	}
}

func TestWhatIsNoPartitionTableIsNotTakenForOne(t *testing.T) {
	for what, spoil := range map[string]func(raw []byte){
		"nothing":                    func(raw []byte) { clear(raw) },
		"a flipped bit in the head":  func(raw []byte) { raw[512+40] ^= 1 },
		"a flipped bit in the table": func(raw []byte) { raw[1024+40] ^= 1 },
		"a table beyond the end":     func(raw []byte) { binary.LittleEndian.PutUint64(raw[512+72:], 1<<60) },
		"too many entries":           func(raw []byte) { binary.LittleEndian.PutUint32(raw[512+80:], 1<<30) },
		"entries of no size":         func(raw []byte) { binary.LittleEndian.PutUint32(raw[512+84:], 0) },
	} {
		raw := stickTable(nil)
		spoil(raw)
		if table, err := readGPT(bytes.NewReader(raw), 512, 8<<20); !errors.Is(err, ErrNoGPT) {
			t.Errorf("%s: %+v, %v", what, table, err)
		}
	}
}

func TestAPartitionIsFoundByItsEntry(t *testing.T) {
	s := onPaper(t, nil)
	disk, err := s.numOf("sda")
	if err != nil {
		t.Fatal(err)
	}
	start, err := attrUint(s.classDir("sda2"), "start")
	if err != nil {
		t.Fatal(err)
	}
	num, _ := s.numOf("sda2")
	id, err := s.Identify(num)
	if err != nil {
		t.Fatal(err)
	}
	e := Entry{Number: 2, Start: start * 512, Size: id.Size}
	if got, err := s.PartitionOf(disk, e); err != nil || got != id {
		t.Errorf("it is %+v, %v", got, err)
	}
	e.Start++
	if _, err := s.PartitionOf(disk, e); !errors.Is(err, ErrChanged) {
		t.Errorf("one that lies elsewhere: %v", err)
	}
	e.Number = 77
	if _, err := s.PartitionOf(disk, e); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that is not there: %v", err)
	}
}
