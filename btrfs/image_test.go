package btrfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/tests/testenv"
)

// filled makes a file system with some files in it, which nobody mounts.
func filled(t testing.TB, args ...string) string {
	t.Helper()
	dir, path := t.TempDir(), filepath.Join(t.TempDir(), "filled.img")
	for i := range 300 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file-", i)), noise(byte(i), i*i), 0o600); err != nil { //nolint:gosec // it wraps
			t.Fatal(err)
		}
	}
	file, err := os.Create(path)
	if err == nil {
		err = errors.Join(file.Truncate(256<<20), file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("mkfs.btrfs", append([]string{"-q", "--rootdir", dir, path}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.btrfs: %v: %s", err, out)
	}
	return path
}

// checked reads all that is in use and compares it.
func checked(m *Image, r io.ReaderAt) error {
	for _, s := range m.Used {
		data := make([]byte, s.Length)
		if _, err := r.ReadAt(data, int64(s.Offset)); err != nil { //nolint:gosec // of an image
			return err
		}
		if err := m.Checker(s.Tree, nil).Check(s.Logical, data); err != nil {
			return err
		}
	}
	return nil
}

// recorder notes where it is read.
type recorder struct {
	io.ReaderAt
	at []int64
}

func (r *recorder) ReadAt(p []byte, at int64) (int, error) {
	r.at = append(r.at, at)
	return r.ReaderAt.ReadAt(p, at)
}

func TestAllBlocksOfTheTreesAreAskedForAtOnce(t *testing.T) {
	testenv.NeedTool(t, "mkfs.btrfs")
	for _, profile := range []string{"single", "dup"} {
		t.Run(profile, func(t *testing.T) {
			f, err := os.Open(filled(t, "-n", "4k", "-s", "4k", "-m", profile))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			const size, node = 256 << 20, 4 << 10
			asked, sum := map[int64]bool{}, 0
			r := &recorder{ReaderAt: f}
			err = AskTrees(r, size, func(offset, length uint64) {
				for at := offset; at < offset+length; at += node {
					asked[int64(at)] = true //nolint:gosec // of an image
					sum++
				}
			})
			if err != nil || sum != len(asked) {
				t.Fatalf("%d blocks, of which %d are different: %v", sum, len(asked), err)
			}
			inner := len(r.at)
			m, err := ReadImage(f, size)
			if err != nil {
				t.Fatal(err)
			}
			r.at = nil
			m.trees.open = func(UUID) io.ReaderAt { return r }
			for _, tree := range []root{m.extents, m.sum} {
				r.at = nil
				if err := m.walkAll(tree, func(key, []byte) error { return nil }); err != nil {
					t.Fatal(err)
				}
				for _, at := range r.at[1:] { // the root is known
					if !asked[at] {
						t.Errorf("the block at %d was not asked for", at)
					}
					delete(asked, at)
				}
			}
			if len(asked) > 0 {
				t.Errorf("%d blocks were asked for and are in no tree", len(asked))
			}
			if inner >= sum {
				t.Errorf("to ask for %d blocks, %d were read", sum, inner)
			}
		})
	}
	if err := AskTrees(bytes.NewReader(make([]byte, 1<<20)), 1<<20, nil); !errors.Is(err, ErrNotBtrfs) {
		t.Errorf("of no Btrfs: %v", err)
	}
}

func TestWhatAdjoinsIsAskedForAsOne(t *testing.T) {
	var asked [][2]uint64
	tree := trees{
		super:  Super{NodeSize: 4096},
		chunks: []chunk{{logical: 1 << 30, length: 1 << 20, stripes: []stripe{{offset: 5 << 20}}}},
		ask:    func(offset, length uint64) { asked = append(asked, [2]uint64{offset, length}) },
	}
	tree.askFor([]uint64{1<<30 + 8192, 1 << 30, 1<<30 + 4096, 1<<30 + 65536, 7})
	if want := [][2]uint64{{5 << 20, 12288}, {5<<20 + 65536, 4096}}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, not %v", asked, want)
	}
}

func TestWhatAnImageUsesIsAllOfIt(t *testing.T) {
	testenv.NeedTool(t, "mkfs.btrfs", "btrfs")
	for _, args := range [][]string{
		{"-m", "single"}, {"-m", "dup"}, {"-m", "dup", "-d", "dup"}, {"--mixed", "-m", "single", "-d", "single"}, {"-O", "^skinny-metadata"},
		{"--csum", "xxhash"}, {"--csum", "sha256"}, {"--csum", "blake2", "-n", "64k"}, {"-n", "4k", "-s", "4k"}, {"-R", "free-space-tree"},
	} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			path := filled(t, args...)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			m, err := ReadImage(bytes.NewReader(data), int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			if err := checked(m, bytes.NewReader(data)); err != nil {
				t.Error(err)
			}
			// What is copied of it, and no more, is whole.
			copied := make([]byte, len(data)+1<<20)
			for _, at := range block.BtrfsSuperblocks() {
				if at < uint64(len(data)) {
					copy(copied[at:at+superSize], data[at:])
					if super := copied[at : at+superSize]; !m.IsSuper(at, super) || m.IsSuper(at+1, super) || m.IsSuper(at, make([]byte, superSize)) {
						t.Errorf("the superblock at %d is none", at)
					}
				}
			}
			var used uint64
			counted := map[uint64]bool{}
			for _, s := range m.Used {
				copy(copied[s.Offset:], data[s.Offset:][:s.Length])
				if !counted[s.Logical] {
					used += s.Length
				}
				counted[s.Logical] = true
			}
			if used != m.Super.Used {
				t.Errorf("%d bytes are in use, and the superblock says %d", used, m.Super.Used)
			}
			half := filepath.Join(t.TempDir(), "copy.img")
			if err := os.WriteFile(half, copied, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("btrfs", "check", "--check-data-csum", half).CombinedOutput(); err != nil {
				t.Errorf("the copy is not whole: %v: %s", err, out)
			}

			// Wherever a byte is wrong, it is noticed.
			for range 50 {
				s := m.Used[rand.IntN(len(m.Used))]
				at := s.Offset + rand.Uint64N(s.Length)
				if s.Tree && (at-s.Offset)%uint64(m.Super.NodeSize) >= uint64(m.Super.CsumType.Size()) && (at-s.Offset)%uint64(m.Super.NodeSize) < 32 {
					continue // between a checksum and what it is of
				}
				data[at] ^= 4
				bad, err := ReadImage(bytes.NewReader(data), int64(len(data)))
				if err == nil {
					err = checked(bad, bytes.NewReader(data))
				}
				var wrong *ChecksumError
				if !errors.As(err, &wrong) && !errors.Is(err, ErrTreeCorrupt) {
					t.Errorf("a flipped bit at %d of %+v: %v", at, s, err)
				}
				data[at] ^= 4
			}
		})
	}
}

func TestAnImageThatIsNotKnownIsRefused(t *testing.T) {
	data, err := os.ReadFile(image(t, "-m", "single"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(super []byte){
		"two devices":        func(super []byte) { super[136] = 2 },
		"a log":              func(super []byte) { super[97] = 1 },
		"zoned":              func(super []byte) { super[189] |= 1 << 4 },
		"a raid stripe tree": func(super []byte) { super[189] |= 1 << 6 },
		"an unknown feature": func(super []byte) { super[195] |= 1 },
	} {
		changed := bytes.Clone(data)
		super := changed[superOffset : superOffset+superSize]
		change(super)
		copy(super, CsumCRC32C.Sum(super[32:]))
		if _, err := ReadImage(bytes.NewReader(changed), int64(len(changed))); !errors.Is(err, ErrUnknownLayout) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ReadImage(bytes.NewReader(data), int64(len(data)/2)); !errors.Is(err, ErrTruncated) {
		t.Errorf("half of it: %v", err)
	}
}

// FuzzReadImage is [FuzzReadDevItems] for all trees.
func FuzzReadImage(f *testing.F) {
	super, node := make([]byte, superSize), make([]byte, 16<<10)
	if _, err := exec.LookPath("mkfs.btrfs"); err == nil {
		data, err := os.ReadFile(filled(f, "-m", "single"))
		if err != nil {
			f.Fatal(err)
		}
		copy(super, data[superOffset:])
		m, err := ReadImage(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			f.Fatal(err)
		}
		for _, s := range m.Used[:min(len(m.Used), 20)] {
			f.Add(super, bytes.Clone(data[s.Offset:][:16<<10]))
		}
	}
	f.Add(super, node)
	f.Fuzz(func(t *testing.T, super, node []byte) {
		d := hostile(super, node, func(d withNode) {
			// The addresses are believed of a device on which all blocks are one.
			for _, at := range []int{80, 88} {
				copy(d.super[at:], d.node[48:56])
			}
			copy(d.super[72:], d.node[80:88])
			copy(d.super[164:], d.node[80:88])
			d.super[198], d.super[199] = d.node[100], d.node[100]
		})
		_ = AskTrees(d, 1<<40, func(offset, length uint64) {
			if length == 0 || offset+length > 1<<40 || offset+length < offset {
				t.Errorf("%d bytes at %d were asked for", length, offset)
			}
		})
		m, err := ReadImage(d, 1<<40)
		if err != nil {
			return
		}
		for _, s := range m.Used {
			if s.Length == 0 || s.Offset+s.Length > 1<<40 || s.Offset+s.Length < s.Offset {
				t.Errorf("%+v is in use", s)
			}
		}
	})
}
