package btrfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

// readItems reads the devices by way of path; the others are there as well.
func readItems(t *testing.T, path string, others ...string) ([]DevItem, error) {
	t.Helper()
	devices := map[UUID]io.ReaderAt{}
	var first io.ReaderAt
	for _, name := range append(others, path) {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		super, err := ReadSuper(f, 1<<40)
		if err != nil {
			t.Fatal(err)
		}
		devices[super.DevUUID], first = f, f
	}
	return ReadDevItems(first, 1<<40, func(device UUID) io.ReaderAt { return devices[device] })
}

func TestReadDevItemsOfMkfs(t *testing.T) {
	testenv.NeedTool(t, "mkfs.btrfs")
	for _, profile := range []string{"single", "dup", "raid1"} {
		t.Run(profile, func(t *testing.T) {
			a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
			truncate(t, a, 256<<20)
			truncate(t, b, 300<<20)
			run(t, "mkfs.btrfs", "-q", "-m", profile, "-d", "single", a, b)
			fs, err := superOf(t, a)
			if err != nil {
				t.Fatal(err)
			}
			second, err := superOf(t, b)
			if err != nil {
				t.Fatal(err)
			}
			want := []DevItem{
				{DevID: 1, UUID: fs.DevUUID, FSID: fs.FSID, Size: 256 << 20},
				{DevID: 2, UUID: second.DevUUID, FSID: fs.FSID, Size: 300 << 20},
			}
			for _, through := range [][2]string{{a, b}, {b, a}} {
				items, err := readItems(t, through[0], through[1])
				if err != nil || len(items) != 2 || items[0] != want[0] || items[1] != want[1] {
					t.Errorf("by way of %s: %+v (%v), wanted %+v", through[0], items, err, want)
				}
			}

			// With one device alone it depends on where the chunk tree lies.
			alone := 0
			var missing *MissingDeviceError
			for _, path := range []string{a, b} {
				if items, err := readItems(t, path); err == nil && len(items) == 2 {
					alone++
				} else if !errors.As(err, &missing) || missing.UUID != fs.DevUUID && missing.UUID != second.DevUUID {
					t.Errorf("%s alone: %v", path, err)
				}
			}
			if want := map[string]int{"single": 1, "dup": 1, "raid1": 2}[profile]; alone != want {
				t.Errorf("%d of the devices have a chunk tree, wanted %d", alone, want)
			}
		})
	}
}

func TestReadDevItemsOfDamagedImages(t *testing.T) {
	read := func(data []byte) ([]DevItem, error) {
		r := bytes.NewReader(data)
		return ReadDevItems(r, int64(len(data)), func(UUID) io.ReaderAt { return r })
	}
	single, err := os.ReadFile(image(t, "-m", "single"))
	if err != nil {
		t.Fatal(err)
	}
	if items, err := read(single); err != nil || len(items) != 1 {
		t.Fatalf("the whole image: %+v (%v)", items, err)
	}
	root := rootOffset(t, single, 0)
	for name, at := range map[string]int64{"checksum": root, "address": root + 48, "the last byte": root + 16383} {
		damaged := bytes.Clone(single)
		damaged[at] ^= 1
		if items, err := read(damaged); !errors.Is(err, ErrTreeCorrupt) {
			t.Errorf("a flipped bit in %s: %+v (%v)", name, items, err)
		}
	}
	// A block that was once right: all but the generation.
	damaged := bytes.Clone(single)
	binary.LittleEndian.PutUint64(damaged[root+80:], 1)
	copy(damaged[root:], CsumCRC32C.Sum(damaged[root+32:root+16384]))
	if items, err := read(damaged); !errors.Is(err, ErrTreeCorrupt) {
		t.Errorf("an old block: %+v (%v)", items, err)
	}
	if _, err := read(single[:root+100]); !errors.Is(err, ErrTreeCorrupt) {
		t.Errorf("cut in the chunk tree: %v", err)
	}
	if _, err := read(make([]byte, 1<<20)); !errors.Is(err, ErrNotBtrfs) {
		t.Errorf("no Btrfs: %v", err)
	}

	// One good copy is enough.
	dup, err := os.ReadFile(image(t, "-m", "dup"))
	if err != nil {
		t.Fatal(err)
	}
	dup[rootOffset(t, dup, 0)] ^= 1
	if items, err := read(dup); err != nil || len(items) != 1 {
		t.Errorf("one bad copy of two: %+v (%v)", items, err)
	}
	dup[rootOffset(t, dup, 1)] ^= 1
	if _, err := read(dup); !errors.Is(err, ErrTreeCorrupt) {
		t.Errorf("two bad copies: %v", err)
	}
}

// rootOffset says where a copy of the root of the chunk tree lies.
func rootOffset(t *testing.T, data []byte, copy int) int64 {
	t.Helper()
	raw := data[superOffset : superOffset+superSize]
	logical := binary.LittleEndian.Uint64(raw[88:])
	for _, c := range systemChunks(raw) {
		if logical >= c.logical && logical < c.logical+c.length {
			return int64(c.stripes[copy].offset + logical - c.logical)
		}
	}
	t.Fatal("the chunk tree is in no chunk")
	return 0
}

// withNode is a device that shows a superblock where one belongs, and one tree
// block everywhere else.
type withNode struct{ super, node []byte }

func (d withNode) ReadAt(p []byte, at int64) (int, error) {
	if at == superOffset {
		return copy(p, d.super), nil
	}
	return copy(p, d.node), nil
}

// hostile is such a device with valid checksums, computed after what change does.
func hostile(super, node []byte, change func(withNode)) withNode {
	d := withNode{make([]byte, superSize), make([]byte, 64<<10)}
	copy(d.super, super)
	copy(d.node, node)
	copy(d.super[64:], superMagic)
	change(d)
	typ := CsumType(binary.LittleEndian.Uint16(d.super[196:]))
	copy(d.super, typ.Sum(d.super[32:]))
	if size := binary.LittleEndian.Uint32(d.super[148:]); blockSize(size) {
		copy(d.node, typ.Sum(d.node[32:size]))
	}
	return d
}

// A hostile stick has valid checksums everywhere: nothing must panic, loop or
// take much memory.
func FuzzReadDevItems(f *testing.F) {
	path := filepath.Join(f.TempDir(), "image")
	if file, err := os.Create(path); err != nil || file.Truncate(256<<20) != nil {
		f.Fatal(err)
	}
	super, node := make([]byte, superSize), make([]byte, 16<<10)
	if out, err := exec.Command("mkfs.btrfs", "-q", "-m", "single", path).CombinedOutput(); err == nil {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		copy(super, data[superOffset:])
		c := systemChunks(super)[0]
		copy(node, data[c.stripes[0].offset+binary.LittleEndian.Uint64(super[88:])-c.logical:])
	} else {
		f.Logf("starting from nothing, without mkfs.btrfs: %v: %s", err, out)
	}
	f.Add(super, node)
	inner := bytes.Clone(node)
	super[199], inner[100] = 1, 1
	f.Add(super, inner)
	f.Fuzz(func(t *testing.T, super, node []byte) {
		d := hostile(super, node, func(withNode) {})
		items, err := ReadDevItems(d, 1<<40, func(UUID) io.ReaderAt { return d })
		if err == nil && len(items) > maxNodes*64<<10/devItem {
			t.Errorf("there are %d devices", len(items))
		}
		if s, raw, err := readSuper(d, 1<<40); err == nil {
			_, _ = newTrees(s, raw, func(UUID) io.ReaderAt { return d }).replace(raw)
		}
	})
}

func TestReadDevItemsOfASprout(t *testing.T) {
	b := newBench(t)
	image := b.seed(map[string][]byte{"file": noise(3, 1<<20)})
	seed, err := superOf(t, image)
	if err != nil {
		t.Fatal(err)
	}
	f, _ := b.sprout(image)
	info, err := f.Info()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	members := b.members(f)
	items, err := readItems(t, members[1].Path)
	want := []DevItem{
		{DevID: 1, UUID: seed.DevUUID, FSID: seed.FSID, Size: seedSize, Generation: seed.Generation},
		{DevID: 2, UUID: members[1].UUID, FSID: info.FSID, Size: 2 << 30},
	}
	if err != nil || len(items) != 2 || items[0] != want[0] || items[1] != want[1] {
		t.Errorf("the devices are %+v (%v), wanted %+v", items, err, want)
	}
}

func TestScrubFindsAFlippedByte(t *testing.T) {
	b := newBench(t)
	content := noise(4, 40<<20)
	image := b.seed(map[string][]byte{"good": []byte("hello"), "bad": content})
	scrub := func(name string, want func(*FS, ScrubResult)) {
		t.Run(name, func(t *testing.T) {
			b := &bench{t: t, dir: b.dir}
			f := b.open(b.mount(b.attach("--read-only", image), "ro"))
			result, err := f.Scrub(t.Context(), 1, func(ScrubResult) {})
			if err != nil {
				t.Fatal(err)
			}
			want(f, result)
		})
	}
	scrub("a good seed", func(_ *FS, r ScrubResult) {
		if r.Damaged() || r.Bytes < 40<<20 {
			t.Errorf("the result is %+v", r)
		}
	})
	flip(t, image, content[20<<20:][:4096])
	scrub("a flipped byte", func(f *FS, r ScrubResult) {
		if !r.Damaged() || r.CsumErrors != 1 || r.Uncorrectable != 1 || r.TreeErrors != 0 {
			t.Errorf("the result is %+v", r)
		}
		if files, err := f.UnreadableFiles(t.Context(), 1, 0); err != nil || !slices.Equal(files, []string{"bad"}) {
			t.Errorf("the unreadable files are %q (%v)", files, err)
		}
	})
	scrub("cancelled", func(f *FS, _ ScrubResult) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.Scrub(ctx, 1, nil); !errors.Is(err, ErrCancelled) {
			t.Errorf("the error is %v", err)
		}
		if _, err := f.Scrub(t.Context(), 77, nil); !errors.Is(err, unix.ENODEV) {
			t.Errorf("of a device that is not there: %v", err)
		}
	})
}
