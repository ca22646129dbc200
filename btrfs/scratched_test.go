package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"testing"
)

// scratch does to a superblock what the kernel does.
func scratch(data []byte, at int) { clear(data[at+superMagicAt:][:len(superMagic)]) }

func TestReadScratched(t *testing.T) {
	for _, csum := range []string{"crc32c", "blake2"} {
		data, err := os.ReadFile(image(t, "--csum", csum))
		if err != nil {
			t.Fatal(err)
		}
		before, err := ReadSuper(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ReadScratched(bytes.NewReader(data), int64(len(data))); !errors.Is(err, ErrNotBtrfs) {
			t.Errorf("not scratched: %v", err)
		}
		original := bytes.Clone(data)
		const second = 64 << 20
		scratch(data, superOffset)
		scratch(data, second)
		if s, err := ReadScratched(bytes.NewReader(data), int64(len(data))); err != nil || s != before {
			t.Errorf("read %+v (%v), wanted %+v", s, err, before)
		}
		for _, at := range []int{superOffset, second} {
			whole, s, err := Unscratch(data[at:at+superSize], uint64(at))
			if err != nil || s.DevUUID != before.DevUUID || !bytes.Equal(whole, original[at:at+superSize]) {
				t.Errorf("at %d: %+v (%v)", at, s, err)
			}
		}
		if _, _, err := Unscratch(data[second:second+superSize], superOffset); !errors.Is(err, ErrSuperCorrupt) {
			t.Errorf("of another place: %v", err)
		}
		if _, err := ReadScratched(bytes.NewReader(data), 128<<20); !errors.Is(err, ErrTruncated) {
			t.Errorf("of a shorter device: %v", err)
		}
		// Whatever else is not as it was, by one bit.
		block := data[superOffset : superOffset+superSize]
		for bit := range 8 * superSize {
			if size := before.CsumType.Size(); bit/8 >= size && bit/8 < 32 {
				continue // what a shorter checksum leaves of its place is nothing
			}
			block[bit/8] ^= 1 << (bit % 8)
			if _, _, err := Unscratch(block, superOffset); err == nil {
				t.Fatalf("with bit %d flipped it is taken", bit)
			}
			block[bit/8] ^= 1 << (bit % 8)
		}
	}
	for name, data := range map[string][]byte{"zeroes": make([]byte, 1<<20), "too short": make([]byte, 100)} {
		if _, err := ReadScratched(bytes.NewReader(data), int64(len(data))); err == nil {
			t.Errorf("%s were taken for a superblock", name)
		}
	}
}

// What a superblock says is not enough: this one of a filesystem in which nothing
// was replaced has all that is looked for before its trees are.
func TestReadCutOffBelievesTheTreesOnly(t *testing.T) {
	data, err := os.ReadFile(image(t, "-m", "single"))
	if err != nil {
		t.Fatal(err)
	}
	member, target := bytes.Clone(data), bytes.Clone(data)
	scratch(member, superOffset)
	read := func() ([]DevItem, error) {
		copy(target[superOffset:], CsumCRC32C.Sum(target[superOffset+32:superOffset+superSize]))
		return ReadCutOff(bytes.NewReader(member), bytes.NewReader(target), func(UUID) io.ReaderAt { return bytes.NewReader(member) })
	}
	if items, err := read(); !errors.Is(err, ErrNotCutOff) {
		t.Errorf("a target with a devid: %+v (%v)", items, err)
	}
	binary.LittleEndian.PutUint64(target[superOffset+superDevItem:], replaceDevID)
	if items, err := read(); !errors.Is(err, ErrNotCutOff) || items != nil {
		t.Errorf("nothing was replaced: %+v (%v)", items, err)
	}
	for name, r := range map[string][]byte{"the member": member, "the target": target} {
		status, err := ReadReplace(bytes.NewReader(r), func(UUID) io.ReaderAt { return bytes.NewReader(member) })
		if err != nil || status != (ReplaceStatus{}) {
			t.Errorf("by %s the replace is %+v (%v)", name, status, err)
		}
	}
	member[rootOffset(t, data, 0)] ^= 1
	if items, err := read(); !errors.Is(err, ErrTreeCorrupt) {
		t.Errorf("a damaged chunk tree: %+v (%v)", items, err)
	}
}

func TestReplaceItem(t *testing.T) {
	item := make([]byte, 72)
	binary.LittleEndian.PutUint64(item, 3)
	for state, want := range map[ReplaceState]uint64{
		ReplaceNeverStarted: 0, ReplaceStarted: 3, ReplaceFinished: 0, ReplaceCancelled: 0, ReplaceSuspended: 3,
	} {
		binary.LittleEndian.PutUint64(item[32:], uint64(state))
		binary.LittleEndian.PutUint64(item[40:], 1000)
		if got := replaceItem(item); got.DevID != want || got.State != state || got.Started.Unix() != 1000 {
			t.Errorf("in state %d it is %+v, wanted member %d", state, got, want)
		}
	}
	if got := replaceItem(item[:47]); got != (ReplaceStatus{}) {
		t.Errorf("half an item says %+v", got)
	}
}
