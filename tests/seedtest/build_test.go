package seedtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// needTools asks for all that this package runs.
func needTools(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "btrfs", "mkfs.btrfs", "btrfstune", "mke2fs", "losetup", "addpart", "delpart")
}

// mountImage mounts a filesystem image until the end of the test.
func mountImage(t *testing.T, image string, flags uintptr) string {
	t.Helper()
	loop, err := attach(t.Context(), image, flags&unix.MS_RDONLY != 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := detach(loop); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	if err := mount(loop, dir, "btrfs", flags, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// newBtrfs gives an empty, writable Btrfs.
func newBtrfs(t *testing.T) string {
	t.Helper()
	seed := New(t, Spec{Plain: true, Content: func(string) error { return nil }})
	return mountImage(t, seed.Path, 0)
}

func scanTree(t *testing.T, dir string) Manifest {
	t.Helper()
	m, err := TakeManifest(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// isSeed reads the flags of the superblock at 64 KiB: super_flags at byte 56,
// BTRFS_SUPER_FLAG_SEEDING is 1<<32.
func isSeed(t *testing.T, image string) bool {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	super := make([]byte, 72)
	if _, err := f.ReadAt(super, 64*KiB); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(super[64:], []byte("_BHRfS_M")) {
		t.Fatalf("%s holds no Btrfs", image)
	}
	return super[56+4]&1 != 0
}

func TestBuildStandard(t *testing.T) {
	needTools(t)
	for _, spec := range []Spec{
		{Method: RootDir},
		{Method: RootDir, Metadata: "dup", Csum: "xxhash"},
		{Compress: "none", Csum: "sha256"},
		{Compress: "zstd:3", Metadata: "dup", Csum: "blake2"},
	} {
		t.Run(fmt.Sprintf("%s %s %s %s", spec.Method, spec.Compress, spec.Metadata, spec.Csum), func(t *testing.T) {
			testenv.NoLeftovers(t)
			seed := New(t, spec)
			if !isSeed(t, seed.Path) {
				t.Error("the seed flag is not set")
			}
			if err := Check(t.Context(), seed.Path); err != nil {
				t.Error(err)
			}
			m := scanTree(t, mountImage(t, seed.Path, unix.MS_RDONLY))
			types := map[string]int{}
			xattrs, holes, flags, subvolumes, total := 0, 0, 0, 0, int64(0)
			for _, r := range m {
				types[r.Type]++
				xattrs += len(r.Xattrs)
				if r.Type == "file" && len(r.Data) > 1 {
					holes++
				}
				for _, e := range r.Data {
					total += e.End - e.Start
				}
				if r.Flags != 0 {
					flags++
				}
				if r.Subvolume != "" && r.Subvolume != "placeholder" {
					subvolumes++
				}
			}
			t.Logf("%d MiB of data; %v; %d xattrs, %d files with holes, %d flagged, %d subvolumes", total/MiB, types, xattrs, holes, flags, subvolumes)
			for _, kind := range []string{"file", "directory", "symlink", "char", "block", "fifo", "socket"} {
				if types[kind] == 0 {
					t.Errorf("there is no %s in the seed", kind)
				}
			}
			if name := strings.Repeat("n", 255); m["names/"+name].Type != "file" {
				t.Error("the name of 255 bytes is missing")
			}
			if spec.Method != RootDir {
				if subvolumes != 5 { // the top, two, and two snapshots
					t.Errorf("%d subvolumes, want 5", subvolumes)
				}
				if got := m["snapshots/read-only"].Subvolume; got != "read-only subvolume" {
					t.Errorf("the read-only snapshot is a %q", got)
				}
				if got := m["links/there/third"].LinkOf; got != "links/first" {
					t.Errorf("a hard link across directories is a link of %q", got)
				}
			}
		})
	}
}

func TestStandardIsTheSameForTheSameNumber(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	var trees []Manifest
	for _, random := range []uint64{7, 7} {
		seed := New(t, Spec{Random: random})
		trees = append(trees, scanTree(t, mountImage(t, seed.Path, unix.MS_RDONLY)))
	}
	for _, line := range Diff(trees[0], trees[1]) {
		t.Error(line)
	}
}

func TestBuildFromATree(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	src := t.TempDir()
	if err := Standard(src, StandardOptions{}); err != nil {
		t.Fatal(err)
	}
	want := scanTree(t, src)
	seed := New(t, Spec{Source: src, SourceMax: 5 * MiB, Compress: "zstd"})
	got := scanTree(t, mountImage(t, seed.Path, unix.MS_RDONLY))
	var size int64
	for path, r := range got {
		if r.Type == "file" {
			size += r.Size
			if r.Sum != want[path].Sum || !r.ModTime.Equal(want[path].ModTime) || r.UID != want[path].UID || r.Mode != want[path].Mode {
				t.Errorf("%q was not copied as it was", path)
			}
		}
	}
	if size < 5*MiB || size > 30*MiB {
		t.Errorf("%d bytes copied, want about 5 MiB", size)
	}
}

func TestBuildRefuses(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	for name, spec := range map[string]Spec{
		"no directory":        {},
		"unknown method":      {Dir: dir, Method: "magic"},
		"compressed rootdir":  {Dir: dir, Method: RootDir, Compress: "zstd"},
		"unknown csum":        {Dir: dir, Csum: "rot13"},
		"content that failed": {Dir: dir, Content: func(string) error { return os.ErrInvalid }},
	} {
		if _, err := Build(t.Context(), spec); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("failed builds left %v (%v)", left, err)
	}
}

func TestBuildWithoutTheSeedFlag(t *testing.T) {
	needTools(t)
	if seed := New(t, Spec{Plain: true, Content: func(string) error { return nil }}); isSeed(t, seed.Path) {
		t.Error("the seed flag is set")
	}
}

func TestCheckFindsDamage(t *testing.T) {
	needTools(t)
	data := bytes.Repeat([]byte("find me on the disk "), 10*KiB)
	seed := New(t, Spec{ImageSize: 256 * MiB, Content: func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "file"), data, 0o644)
	}})
	raw, err := os.ReadFile(seed.Path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(raw, data[:4096])
	if at < 0 {
		t.Fatal("the data is not in the image")
	}
	if err := writeAt(seed.Path, []byte("damage"), int64(at)); err != nil {
		t.Fatal(err)
	}
	if err := Check(context.Background(), seed.Path); err == nil {
		t.Error("a damaged block of data was not found")
	}
}
