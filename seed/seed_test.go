package seed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func needAll(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "mkfs.btrfs", "btrfstune", "btrfs")
	testenv.NoLeftovers(t)
}

// TestSeedHoldsWhatTheSourceHeld builds a seed from a Btrfs tree of everything
// and finds all of it in the image: subvolumes, flags, links, holes, times.
func TestSeedHoldsWhatTheSourceHeld(t *testing.T) {
	needAll(t)
	source := look(t, seedtest.New(t, seedtest.Spec{Random: 4}).Path)
	before := manifest(t, source)

	image := filepath.Join(t.TempDir(), "root.img")
	var phases []string
	fsid, err := btrfs.ParseUUID("4f5cf6b6-1f0a-4b6e-8a56-0f0f3b3b0001")
	must(t, err)
	report := newSeed(t, Options{
		Source: source, Image: image, Label: "a seed", FSID: fsid, Csum: "xxhash",
		Progress: func(p Progress) {
			if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
				phases = append(phases, p.Phase)
			}
			if p.Done > p.Total {
				t.Errorf("progress of %d of %d bytes", p.Done, p.Total)
			}
		},
	})
	if want := []string{PhaseScan, PhaseSample, PhaseWrite, PhaseFinish}; !slices.Equal(phases, want) {
		t.Errorf("the phases were %q, want %q", phases, want)
	}
	must(t, seedtest.Check(t.Context(), image))

	super := readSuper(t, image)
	if !super.Seeding || super.FSID != fsid || super.Label != "a seed" || super.CsumType != btrfs.CsumXXHash ||
		super.NodeSize != nodeSize || super.MetadataProfile != "single" {
		t.Errorf("the superblock is not as asked for: %+v", super)
	}
	info, err := os.Stat(image)
	must(t, err)
	if uint64(info.Size()) != super.DevSize || report.ImageSize != super.DevSize {
		t.Errorf("the image has %d bytes, its filesystem %d, and the report says %d", info.Size(), super.DevSize, report.ImageSize)
	}
	same(t, before, manifest(t, look(t, image)))
	if report.Packed == 0 || report.SameFiles == 0 || report.Stored == 0 || report.Subvolumes == 0 {
		t.Errorf("nothing packed, shared, stored or no subvolumes: %+v", report)
	}
	t.Logf("%+v", report)
}

// TestSmallFilesShareExtents counts extents: a thousand files are to be in a
// few, and a flatten to be cheap. What compresses and what does not is known
// apart.
func TestSmallFilesShareExtents(t *testing.T) {
	needAll(t)
	source := t.TempDir()
	rnd := rand.NewChaCha8([32]byte{1})
	for i := range 1000 {
		data := make([]byte, 5000+7*i)
		if i%4 == 0 {
			_, _ = rnd.Read(data)
		} else {
			copy(data, strings.Repeat(fmt.Sprintf("line %d\n", i), len(data)))
		}
		put(t, source, fmt.Sprintf("%02d/file-%d.%s", i%20, i, []string{"txt", "py", "bin"}[i%3]), data)
	}
	noise := make([]byte, 12*mib)
	_, _ = rnd.Read(noise)
	put(t, source, "large", noise)
	image := filepath.Join(t.TempDir(), "root.img")
	report := newSeed(t, Options{Source: source, Image: image})
	if report.Packed != 1000 || report.Stored != 251 || report.Files != 1001 {
		t.Errorf("%d of 1000 packed, %d of 251 stored, %d files of 1001", report.Packed, report.Stored, report.Files)
	}
	// 6 MB that compress in 128 KiB each, 2 MB that do not, and a large one.
	if n := report.Geometry.DataExtents; n > 100 {
		t.Errorf("%d extents for 1000 small files", n)
	}
	must(t, seedtest.Check(t.Context(), image))
	found, err := Inspect(t.Context(), image)
	must(t, err)
	if g, w := fmt.Sprint(found.Geometry), fmt.Sprint(report.Geometry); g != w || found.Super.FSID != report.FSID {
		t.Errorf("Inspect gives\n%s\nfor the image of\n%s", g, w)
	}
	if found.Allocated > found.Super.Used+4*mib {
		t.Errorf("the image takes %d bytes for %d in use", found.Allocated, found.Super.Used)
	}
	var extents int
	for _, b := range found.Geometry.Histogram {
		extents += b.Extents
	}
	if extents != found.Geometry.DataExtents || extents == 0 {
		t.Errorf("%d extents in the histogram, %d in all", extents, found.Geometry.DataExtents)
	}
	if slow, fast := found.Geometry.FlattenTime(1e6), found.Geometry.FlattenTime(0); slow <= fast || fast <= 0 {
		t.Errorf("a flatten takes %s from a slow device and %s from a fast one", slow, fast)
	}
	same(t, manifest(t, source), manifest(t, look(t, image)))
	if _, err := Inspect(t.Context(), image); !errors.Is(err, ErrMounted) {
		t.Errorf("to inspect what is mounted gives %v", err)
	}
}

// makeImage makes an image of a hundred files that compress, with another way to
// write what is compressed already.
func makeImage(t *testing.T, write func(*os.File, int64, []byte, int) error) (source, path string, r Report, err error) {
	t.Helper()
	source, work := t.TempDir(), t.TempDir()
	for i := range 100 {
		put(t, source, fmt.Sprintf("file-%d.txt", i), []byte(strings.Repeat(fmt.Sprintf("line %d\n", i), 1000)))
	}
	src, err := openSource(t.Context(), source, work)
	must(t, err)
	size, err := examine(t.Context(), src)
	must(t, err)
	frames, err := newFrames(9, write)
	must(t, err)
	img := &image{
		path: filepath.Join(work, "image"), dir: filepath.Join(work, "mnt"), options: Options{CompressLevel: 9, Csum: "crc32c"}, frames: frames,
	}
	err = img.make(t.Context(), src, size, &meter{}, &r)
	return source, img.path, r, err
}

// TestOldKernelsCompressByThemselves builds a seed where the kernel takes no data
// that is compressed already.
func TestOldKernelsCompressByThemselves(t *testing.T) {
	needAll(t)
	asked := 0
	source, path, r, err := makeImage(t, func(file *os.File, _ int64, _ []byte, _ int) error {
		asked++
		return &os.PathError{Op: "write", Path: file.Name(), Err: unix.ENOTTY}
	})
	must(t, err)
	if asked != 1 || r.Geometry.DataExtents > 10 || r.UsedBytes > mib {
		t.Errorf("asked %d times; %d extents, %d bytes in use", asked, r.Geometry.DataExtents, r.UsedBytes)
	}
	same(t, manifest(t, source), manifest(t, look(t, path)))
}

// TestWhatTheKernelCannotReadIsNoSeed has the kernel take frames that are damaged,
// of which some decompress to something else.
func TestWhatTheKernelCannotReadIsNoSeed(t *testing.T) {
	needAll(t)
	for name, damage := range map[string]func(frame []byte) []byte{
		"cut short": func(frame []byte) []byte { return frame[:len(frame)/2] },
		"other":     func(frame []byte) []byte { i := bytes.Index(frame, []byte("ine ")); frame[i]++; return frame },
	} {
		_, _, _, err := makeImage(t, func(file *os.File, at int64, frame []byte, length int) error {
			return btrfs.WriteZstd(file, at, damage(frame), length)
		})
		if !errors.Is(err, unix.EIO) {
			t.Errorf("%s: what the kernel reads back is not compared: %v", name, err)
		}
	}
}

// TestContentLiesBelowAndAboveTheMetadata builds seeds whose content is more than
// one group: some that compresses, and some that does not.
func TestContentLiesBelowAndAboveTheMetadata(t *testing.T) {
	needAll(t)
	for kind, change := range map[string]func(byte) byte{
		"text":  func(b byte) byte { return 'a' + b&15 }, // half its length
		"noise": func(b byte) byte { return b },
	} {
		t.Run(kind, func(t *testing.T) {
			source := t.TempDir()
			rnd := rand.NewChaCha8([32]byte{4})
			data := make([]byte, 16*mib)
			for i := range 20 {
				_, _ = rnd.Read(data)
				for j := range data {
					data[j] = change(data[j])
				}
				put(t, source, fmt.Sprintf("large-%d", i), data)
			}
			// The first group for metadata, of 8 MiB, is from mkfs.
			for i := range 6000 {
				put(t, source, fmt.Sprintf("%02d/tiny-%d", i%20, i), data[i:i+2000])
			}
			image := filepath.Join(t.TempDir(), "root.img")
			report := newSeed(t, Options{Source: source, Image: image, CompressLevel: 1})
			if limit := report.UsedBytes + 128*mib; report.ImageSize > limit {
				t.Errorf("the image has %d bytes with %d in use", report.ImageSize, report.UsedBytes)
			}
			dir := look(t, image)
			fsys, err := btrfs.Open(dir)
			must(t, err)
			defer fsys.Close()
			groups, err := fsys.Groups(only)
			must(t, err)
			var trees btrfs.Group
			for _, g := range groups {
				if g.Type() == btrfs.Metadata && g.DevOffset > trees.DevOffset {
					trees = g
				}
			}
			var below, above uint64
			for _, g := range groups {
				switch {
				case g.Type() != btrfs.Data:
				case g.DevOffset < trees.DevOffset:
					below += g.Used
				default:
					above += g.Used
				}
			}
			if below < firstGroup/2 || above == 0 {
				t.Errorf("%d bytes lie below the metadata and %d above: %+v", below, above, groups)
			}
			same(t, manifest(t, source), manifest(t, dir))
		})
	}
}

// TestEqualFilesAreStoredOnce has four equal files, two of them small, and one
// that differs in its last byte.
func TestEqualFilesAreStoredOnce(t *testing.T) {
	needAll(t)
	source := t.TempDir()
	data := make([]byte, 3*mib)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	put(t, source, "a/one", data)
	put(t, source, "b/two", data)
	put(t, source, "a/small", data[:50000])
	put(t, source, "small", data[:50000])
	data[len(data)-1]++
	put(t, source, "other", data)
	must(t, os.Chmod(filepath.Join(source, "b/two"), 0o4711))
	image := filepath.Join(t.TempDir(), "root.img")
	report := newSeed(t, Options{Source: source, Image: image})
	if report.SameFiles != 2 || report.SameBytes != 3*mib+50000 {
		t.Errorf("%d files shared, %d bytes", report.SameFiles, report.SameBytes)
	}
	if report.UsedBytes > 7*mib+mib/2 {
		t.Errorf("%d bytes for 6 MiB of content", report.UsedBytes)
	}
	same(t, manifest(t, source), manifest(t, look(t, image)))
}

// TestPackTimesGivesShorterExtents packs a thousand files of 5 KiB, which are in
// a quarter of an extent of 128 KiB then, and nothing of them is lost.
func TestPackTimesGivesShorterExtents(t *testing.T) {
	needAll(t)
	source := t.TempDir()
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 1000 {
		data := make([]byte, 5000)
		for j := range data {
			data[j] = byte('a' + rnd.IntN(16))
		}
		put(t, source, fmt.Sprintf("%02d/%d.txt", i%20, i), data)
	}
	var extents []int
	for _, times := range []int{0, 2} {
		image := filepath.Join(t.TempDir(), "root.img")
		report := newSeed(t, Options{Source: source, Image: image, PackTimes: times})
		if report.Packed != 1000 {
			t.Errorf("%d of 1000 packed with %d", report.Packed, times)
		}
		extents = append(extents, report.Geometry.DataExtents)
		must(t, seedtest.Check(t.Context(), image))
		same(t, manifest(t, source), manifest(t, look(t, image)))
	}
	if extents[0] < 60 || extents[1] < 2*extents[0] {
		t.Errorf("%d extents of 128 KiB, %d of 32 KiB", extents[0], extents[1])
	}
	for size, want := range map[int64]int64{4096: 32 * kib, 16 * kib: 32 * kib, 17 * kib: 64 * kib, 100 * kib: 128 * kib, 128 * kib: 128 * kib} {
		if got := slotOf(size, 2); got != want {
			t.Errorf("a file of %d bytes shares an extent of %d, want %d", size, got, want)
		}
	}
}

// TestSameSourceSameImage builds twice and finds every extent of every file at
// the same place.
func TestSameSourceSameImage(t *testing.T) {
	needAll(t)
	testenv.NeedTool(t, "filefrag")
	source := t.TempDir()
	must(t, seedtest.Standard(source, seedtest.StandardOptions{Random: 5}))
	var places [2]map[string]string
	for i := range places {
		image := filepath.Join(t.TempDir(), "root.img")
		newSeed(t, Options{Source: source, Image: image})
		dir := look(t, image)
		places[i] = map[string]string{}
		for path, r := range manifest(t, dir) {
			if r.Type != "file" || r.Size == 0 {
				continue
			}
			out, err := exec.Command("filefrag", "-v", filepath.Join(dir, path)).Output()
			must(t, err)
			_, extents, _ := strings.Cut(string(out), "\n") // the name comes first
			places[i][path] = strings.ReplaceAll(extents, dir, "")
		}
	}
	for path, at := range places[0] {
		if at != places[1][path] {
			t.Errorf("%q lies at\n%s\nand then at\n%s", path, at, places[1][path])
		}
	}
}

// TestArchiveGivesTheSameSeed packs a tree with tar and compares the seeds.
func TestArchiveGivesTheSameSeed(t *testing.T) {
	needAll(t)
	testenv.NeedTool(t, "tar")
	source, dir := t.TempDir(), t.TempDir()
	must(t, seedtest.Standard(source, seedtest.StandardOptions{Random: 6}))
	must(t, os.Remove(filepath.Join(source, "special/socket"))) // tar knows none
	// To tar, space that was never written is as good as zeros.
	must(t, os.Chmod(source, 0o751))
	before := manifest(t, source)
	for _, c := range []struct{ name, option string }{{"plain.tar", "--sparse"}, {"zip.tar.gz", "-z"}} {
		t.Run(c.name, func(t *testing.T) {
			archive, image := filepath.Join(dir, c.name), filepath.Join(t.TempDir(), "root.img")
			out, err := exec.Command("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner",
				c.option, "-C", source, "-cf", archive, ".").CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			report := newSeed(t, Options{Source: archive, Image: image})
			if report.Packed == 0 || report.Stored == 0 {
				t.Errorf("nothing packed or stored: %+v", report)
			}
			after := manifest(t, look(t, image))
			if c.option != "--sparse" { // holes have become zeros
				before, after = before.Without("holes"), after.Without("holes")
			}
			same(t, before, after)
		})
	}
}

// TestArchiveThatLeadsOutIsRefused tries what archives are known for.
func TestArchiveThatLeadsOutIsRefused(t *testing.T) {
	needAll(t)
	testenv.NeedTool(t, "tar")
	dir := t.TempDir()
	must(t, os.Symlink("/etc", filepath.Join(dir, "link")))
	must(t, os.MkdirAll(filepath.Join(dir, "real"), 0o755))
	put(t, dir, "real/passwd", []byte("mine"))
	pack := func(t *testing.T, args ...string) string {
		archive := filepath.Join(t.TempDir(), "a.tar")
		out, err := exec.Command("tar", append([]string{"-C", dir, "-P", "-cf", archive}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return archive
	}
	for name, args := range map[string][]string{
		"up":           {"--transform=s,real/,../../,", "real/passwd"},
		"through link": {"link", "--transform=s,real/,link/,", "real/passwd"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, Options{Source: pack(t, args...)}, ErrBadSource)
		})
	}
}

func TestBadSourcesAndImagesAreRefused(t *testing.T) {
	needAll(t)
	dir := t.TempDir()
	put(t, dir, "text", []byte(strings.Repeat("no archive\n", 100)))
	put(t, dir, "empty", nil)
	put(t, dir, "tree/file", []byte("x"))
	tree := filepath.Join(dir, "tree")
	refused(t, Options{Source: filepath.Join(dir, "nothing")}, ErrBadSource)
	refused(t, Options{Source: filepath.Join(dir, "text")}, ErrBadSource)
	refused(t, Options{Source: filepath.Join(dir, "empty")}, ErrBadSource)
	refused(t, Options{Source: "/dev/null"}, ErrBadSource)
	refused(t, Options{Source: ""}, ErrBadSource)
	refused(t, Options{Source: tree, Csum: "md5"}, nil)
	refused(t, Options{Source: tree, CompressLevel: 16}, unix.EINVAL)
	if _, err := Build(t.Context(), Options{Source: tree, Image: filepath.Join(tree, "root.img")}); !errors.Is(err, ErrBadSource) {
		t.Errorf("an image in its source gives %v", err)
	}

	image := filepath.Join(dir, "root.img")
	must(t, os.WriteFile(image, []byte("precious"), 0o600))
	if _, err := Build(t.Context(), Options{Source: tree, Image: image}); !errors.Is(err, ErrExists) {
		t.Errorf("an image that exists gives %v", err)
	}
	if got, err := os.ReadFile(image); err != nil || string(got) != "precious" {
		t.Errorf("the image that existed is now %q (%v)", got, err)
	}
	newSeed(t, Options{Source: tree, Image: image, Overwrite: true})
	if !readSuper(t, image).Seeding {
		t.Error("the image was not replaced")
	}
	t.Setenv("PATH", dir)
	refused(t, Options{Source: tree}, ErrNoTool)
}

// TestTooLittleSpaceIsRefusedEarly has 24 MiB that do not compress for a file
// system of 16 MiB, and nothing may have been written when that is noticed.
func TestTooLittleSpaceIsRefusedEarly(t *testing.T) {
	needAll(t)
	source, small := t.TempDir(), t.TempDir()
	must(t, mount.Mount("tmpfs", small, "tmpfs", mount.Options{Data: []string{"size=16m"}}))
	t.Cleanup(func() { must(t, mount.Unmount(small, false)) })
	noise := make([]byte, 24*mib)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(noise)
	put(t, source, "noise", noise)
	wrote := false
	_, err := Build(t.Context(), Options{
		Source: source, Image: filepath.Join(small, "root.img"),
		Progress: func(p Progress) { wrote = wrote || p.Phase == PhaseWrite },
	})
	var full *NoSpaceError
	if !errors.As(err, &full) || full.Need < 24*mib || full.Free > 16*mib || wrote {
		t.Errorf("the error is %v, and it came too late: %v", err, wrote)
	}
	empty(t, small)
}

// TestDiskThatFillsUp has somebody else take the space while the image is being
// written.
func TestDiskThatFillsUp(t *testing.T) {
	needAll(t)
	source, small := t.TempDir(), t.TempDir()
	must(t, mount.Mount("tmpfs", small, "tmpfs", mount.Options{Data: []string{"size=64m"}}))
	t.Cleanup(func() { must(t, mount.Unmount(small, false)) })
	noise := make([]byte, 24*mib)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(noise)
	put(t, source, "noise", noise)
	_, err := Build(t.Context(), Options{Source: source, Image: filepath.Join(small, "root.img"), Progress: func(p Progress) {
		if _, err := os.Stat(filepath.Join(small, "other")); p.Phase == PhaseWrite && err != nil {
			put(t, small, "other", noise)
			put(t, small, "another", noise)
		}
	}})
	var full *NoSpaceError
	if !errors.As(err, &full) {
		t.Errorf("the error is %v", err)
	}
	must(t, os.Remove(filepath.Join(small, "other")))
	must(t, os.Remove(filepath.Join(small, "another")))
	empty(t, small)
}

// TestCancelLeavesNothing ends a build in each phase and in the middle of the
// writing.
func TestCancelLeavesNothing(t *testing.T) {
	needAll(t)
	source := t.TempDir()
	must(t, seedtest.Standard(source, seedtest.StandardOptions{Random: 7}))
	for name, now := range map[string]func(Progress) bool{
		PhaseScan:   func(p Progress) bool { return p.Phase == PhaseScan },
		PhaseSample: func(p Progress) bool { return p.Phase == PhaseSample },
		PhaseWrite:  func(p Progress) bool { return p.Phase == PhaseWrite },
		"half":      func(p Progress) bool { return p.Phase == PhaseWrite && p.Done > p.Total/4 },
		PhaseFinish: func(p Progress) bool { return p.Phase == PhaseFinish },
	} {
		t.Run(name, func(t *testing.T) {
			testenv.NoLeftovers(t)
			dir := t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			_, err := Build(ctx, Options{Source: source, Image: filepath.Join(dir, "root.img"), Progress: func(p Progress) {
				if now(p) {
					cancel()
				}
			}})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the error is %v", err)
			}
			empty(t, dir)
		})
	}
}

// TestSourceThatShrinksIsNoticed cuts a file after it was listed.
func TestSourceThatShrinksIsNoticed(t *testing.T) {
	needAll(t)
	source, dir := t.TempDir(), t.TempDir()
	put(t, source, "file", []byte(strings.Repeat("text", 50000)))
	_, err := Build(t.Context(), Options{Source: source, Image: filepath.Join(dir, "root.img"), Progress: func(p Progress) {
		if p.Phase == PhaseWrite {
			must(t, os.Truncate(filepath.Join(source, "file"), 100))
		}
	}})
	if !errors.Is(err, ErrChanged) {
		t.Errorf("the error is %v", err)
	}
	empty(t, dir)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, name), data, 0o644))
}

func newSeed(t *testing.T, o Options) Report {
	t.Helper()
	r, err := Build(t.Context(), o)
	must(t, err)
	return r
}

// refused builds in an empty directory, which has to stay so.
func refused(t *testing.T, o Options, want error) {
	t.Helper()
	dir := t.TempDir()
	o.Image = filepath.Join(dir, "root.img")
	if _, err := Build(t.Context(), o); err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("%+v gives %v, want %v", o, err, want)
	}
	empty(t, dir)
}

func empty(t *testing.T, dir string) {
	t.Helper()
	names, err := os.ReadDir(dir)
	must(t, err)
	if len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
}

func readSuper(t *testing.T, image string) btrfs.Super {
	t.Helper()
	f, err := os.Open(image)
	must(t, err)
	defer func() { must(t, f.Close()) }()
	info, err := f.Stat()
	must(t, err)
	super, err := btrfs.ReadSuper(f, info.Size())
	must(t, err)
	return super
}

// look mounts an image read-only until the end of the test.
func look(t *testing.T, image string) string {
	t.Helper()
	f, err := os.Open(image)
	must(t, err)
	defer func() { must(t, f.Close()) }()
	system, dir := block.New(), t.TempDir()
	loop, err := system.AttachLoop(t.Context(), f, block.LoopOptions{ReadOnly: true})
	must(t, err)
	t.Cleanup(func() { must(t, system.DetachLoop(context.Background(), loop.ID)) })
	must(t, mount.Mount(loop.Path, dir, "btrfs", mount.Options{ReadOnly: true}))
	t.Cleanup(func() { must(t, mount.Unmount(dir, false)) })
	return dir
}

// manifest leaves out what another file system has otherwise, and the
// placeholders of snapshots, which can only be copied as empty directories.
func manifest(t *testing.T, dir string) seedtest.Manifest {
	t.Helper()
	m, err := seedtest.TakeManifest(t.Context(), dir)
	must(t, err)
	maps.DeleteFunc(m, func(_ string, r seedtest.Record) bool { return r.Subvolume == "placeholder" })
	for path, r := range m {
		r.Flags &^= 0x00080000 | 0x1000 // ext4 says that it uses extents and an index
		if path == "." {
			r.Subvolume = "" // the top of a Btrfs is one
		}
		if r.Type == "directory" {
			r.Size = 0
		}
		m[path] = r
	}
	return m
}

func same(t *testing.T, before, after seedtest.Manifest) {
	t.Helper()
	for path, r := range after {
		if _, ok := before[path]; !ok && r.Type == "directory" && r.Subvolume == "" && strings.HasSuffix(path, "nested") {
			delete(after, path) // was a placeholder
		}
	}
	for i, line := range seedtest.Diff(before, after) {
		if t.Error(line); i == 20 {
			break
		}
	}
}
