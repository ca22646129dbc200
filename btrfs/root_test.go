package btrfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

// These tests run on real loop devices. A sprout's first device has 2 GiB
// here: the kernel does not survive one that is too small.

// seedSize is the size of the seeds' images.
const seedSize = 256 << 20

// bench is a directory with image files, loop devices and one mount, all of
// which are gone when the test ends.
type bench struct {
	t   *testing.T
	dir string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "mkfs.btrfs", "btrfstune", "losetup", "lsblk", "mount")
	return &bench{t: t, dir: t.TempDir()}
}

// loop attaches a new sparse file of the given size.
func (b *bench) loop(name string, size int64) string {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	truncate(b.t, path, size)
	return b.attach(path)
}

func (b *bench) attach(args ...string) string {
	b.t.Helper()
	dev := run(b.t, "losetup", append([]string{"--find", "--show"}, args...)...)
	b.t.Cleanup(func() { run(b.t, "losetup", "--detach", dev) })
	return dev
}

// mount mounts and returns the directory.
func (b *bench) mount(dev, options string) string {
	b.t.Helper()
	dir := filepath.Join(b.dir, "mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.t.Fatal(err)
	}
	run(b.t, "mount", "-t", "btrfs", "-o", options, dev, dir)
	b.t.Cleanup(func() {
		// Others look at new mounts in passing, and have them open meanwhile.
		var err error
		for range 100 {
			if err = unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			b.t.Errorf("cannot unmount %s: %v", dir, err)
		}
	})
	return dir
}

func (b *bench) open(dir string) *FS {
	b.t.Helper()
	f, err := Open(dir)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = f.Close() })
	return f
}

// noise gives n bytes that do not compress, the same for the same seed.
func noise(seed byte, n int) []byte {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// seed makes a seed image with the given files and returns its path.
func (b *bench) seed(files map[string][]byte, mkfs ...string) string {
	b.t.Helper()
	path := filepath.Join(b.dir, "root.img")
	truncate(b.t, path, seedSize)
	run(b.t, "mkfs.btrfs", append([]string{"-q", "-m", "single", path}, mkfs...)...)
	dev := run(b.t, "losetup", "--find", "--show", path)
	defer run(b.t, "losetup", "--detach", dev)
	dir := filepath.Join(b.dir, "build")
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.t.Fatal(err)
	}
	func() {
		run(b.t, "mount", "-t", "btrfs", dev, dir)
		defer run(b.t, "umount", dir)
		for name, data := range files {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				b.t.Fatal(err)
			}
		}
	}()
	run(b.t, "btrfstune", "-S", "1", path)
	return path
}

// sprout mounts the seed and gives it a first device of 2 GiB.
func (b *bench) sprout(seed string) (*FS, string) {
	b.t.Helper()
	dir := b.mount(b.attach("--read-only", seed), "ro")
	f := b.open(dir)
	if err := f.Add(b.loop("first.img", 2<<30)); err != nil {
		b.t.Fatal(err)
	}
	run(b.t, "mount", "-o", "remount,rw", dir)
	return f, dir
}

func (b *bench) members(f *FS) []Member {
	b.t.Helper()
	members, err := f.Members()
	if err != nil {
		b.t.Fatal(err)
	}
	return members
}

func devids(members []Member) []uint64 {
	var ids []uint64
	for _, m := range members {
		ids = append(ids, m.DevID)
	}
	return ids
}

func devNumOf(t *testing.T, path string) string {
	t.Helper()
	return run(t, "lsblk", "--noheadings", "--nodeps", "--output", "MAJ:MIN", path)
}

func TestSeedBecomesSproutAndMovesToAnotherDevice(t *testing.T) {
	b := newBench(t)
	content := noise(1, 128<<20)
	seedImage := b.seed(map[string][]byte{"big": content, "small": []byte("hello")}, "-L", "live")
	seedBefore := imageSum(t, seedImage)
	seed, err := superOf(t, seedImage)
	if err != nil || !seed.Seeding || seed.MetadataProfile != "single" || seed.Label != "live" {
		t.Fatalf("the seed is %+v (%v)", seed, err)
	}
	if reasons := seed.Unsupported("/"); reasons != nil {
		t.Fatalf("the running kernel is said not to mount the seed: %q", reasons)
	}

	// The seed by itself: read-only, but it can be asked.
	seedLoop := b.attach("--read-only", seedImage)
	dir := b.mount(seedLoop, "ro")
	f := b.open(dir)
	info, err := f.Info()
	if err != nil || info.FSID != seed.FSID || info.CsumType != CsumCRC32C || info.CsumSize != 4 ||
		info.NodeSize != 16384 || info.SectorSize != 4096 || info.Generation != seed.Generation {
		t.Fatalf("the mounted seed is %+v (%v)", info, err)
	}
	reserve, err := f.GlobalReserve()
	if err != nil || reserve == 0 || reserve > 64<<20 {
		t.Errorf("the global reserve is %d (%v)", reserve, err)
	}
	alone := b.members(f)
	if len(alone) != 1 || alone[0].DevID != 1 || alone[0].Writable || alone[0].Seed || alone[0].Num.String() != devNumOf(t, seedLoop) {
		t.Errorf("the members of the seed are %+v", alone)
	}

	// It becomes a sprout.
	first := b.loop("first.img", 2<<30)
	if err := f.Add(first); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-o", "remount,rw", dir)
	sprout, err := f.Info()
	if err != nil || sprout.FSID == seed.FSID || sprout.NumDevices != 1 || sprout.MaxDevID != 2 {
		t.Fatalf("the sprout is %+v (%v)", sprout, err)
	}
	members := b.members(f)
	if len(members) != 2 {
		t.Fatalf("the members are %+v", members)
	}
	if m := members[0]; m.DevID != 1 || !m.Seed || m.Writable || m.Missing || m.Leaving || m.FSID != seed.FSID ||
		m.UUID != seed.DevUUID || m.Path != seedLoop || m.Num.String() != devNumOf(t, seedLoop) || m.Size != seedSize || m.Used < 128<<20 {
		t.Errorf("the seed's member is %+v", m)
	}
	if m := members[1]; m.DevID != 2 || m.Seed || !m.Writable || m.Missing || m.Leaving || m.FSID != sprout.FSID ||
		m.Path != first || m.Num.String() != devNumOf(t, first) || m.Size != 2<<30 || m.Used == 0 {
		t.Errorf("the first device is %+v", m)
	}

	spaces, err := f.Spaces()
	if err != nil {
		t.Fatal(err)
	}
	if spaces.DataUsed() < 128<<20 || spaces.DataUsed() > 136<<20 || spaces.MetadataUsed() == 0 || spaces.SystemUsed() == 0 ||
		spaces.GlobalReserve() == 0 || spaces.MetadataCopies() != 1 {
		t.Errorf("the spaces are %+v", spaces)
	}

	// The groups of each member add up to what is allocated on it.
	var data uint64
	for _, m := range members {
		groups, err := f.Groups(m.DevID)
		if err != nil || len(groups) == 0 {
			t.Fatalf("the groups of device %d: %+v (%v)", m.DevID, groups, err)
		}
		var sum uint64
		for i, g := range groups {
			sum += g.DevLength
			if g.Length != g.DevLength || g.Used > g.Length || g.Profile() != "single" || g.Type() == 0 {
				t.Errorf("group %d is %+v", i, g)
			}
			if i > 0 && g.DevOffset >= groups[i-1].DevOffset {
				t.Errorf("group %d is not below the one before", i)
			}
			if g.Type() == Data {
				data += g.Used
			}
		}
		if sum != m.Used {
			t.Errorf("device %d has groups of %d bytes, the kernel says %d", m.DevID, sum, m.Used)
		}
	}
	if data < 128<<20 || data > 136<<20 {
		t.Errorf("the data groups hold %d bytes", data)
	}

	// Nothing can leave without a place to go.
	if err := f.Remove(2); !errors.Is(err, ErrOnlyWritable) {
		t.Errorf("removing the only writable device: %v", err)
	}
	if err := f.Remove(77); !errors.Is(err, unix.ENOENT) {
		t.Errorf("removing a device that is not there: %v", err)
	}
	if err := f.CancelRemove(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("cancelling nothing: %v", err)
	}
	if op, err := f.ExclusiveOperation(); op != "none" || err != nil {
		t.Errorf("the exclusive operation is %q (%v)", op, err)
	}
	if err := f.Add(first); !errors.Is(err, unix.EEXIST) {
		t.Errorf("adding a member: %v", err)
	}

	// Label and sync.
	if err := f.SetLabel("grown"); err != nil {
		t.Error(err)
	}
	if label, err := f.Label(); label != "grown" || err != nil {
		t.Errorf("the label is %q (%v)", label, err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}

	// A second device comes, the seed leaves, with a cancel in the middle.
	second := b.loop("second.img", 2<<30)
	if err := f.Add(second); err != nil {
		t.Fatal(err)
	}
	before := b.members(f)[0].Used
	removed := make(chan error, 1)
	go func() { removed <- f.Remove(1) }()
	cancelled := cancelOnceRunning(t, f, removed)
	switch err := <-removed; {
	case errors.Is(err, ErrCancelled):
		t.Log("the removal was cancelled in the middle")
		m := b.members(f)[0]
		if m.DevID != 1 || m.Leaving || m.Size != seedSize || m.Used > before {
			t.Errorf("after the cancel the seed is %+v", m)
		}
		if !cancelled {
			t.Error("the removal says that it was cancelled, but nobody did")
		}
		if err := f.Remove(1); err != nil { // Resume is to call it again.
			t.Fatal(err)
		}
	case err != nil:
		t.Fatal(err)
	}
	if op, err := f.ExclusiveOperation(); op != "none" || err != nil {
		t.Errorf("after the removal the exclusive operation is %q (%v)", op, err)
	}
	if ids := devids(b.members(f)); !slices.Equal(ids, []uint64{2, 3}) {
		t.Errorf("after the removal the members are %v", ids)
	}
	if groups, err := f.Groups(1); err != nil || len(groups) != 0 {
		t.Errorf("the seed still has %d groups (%v)", len(groups), err)
	}
	if imageSum(t, seedImage) != seedBefore {
		t.Error("the seed was written to")
	}

	// The first device is replaced by a larger one and keeps its devid.
	third := b.loop("third.img", 3<<30)
	if err := f.Replace(2, third); err != nil {
		t.Fatal(err)
	}
	if status, err := f.ReplaceStatus(); err != nil || status.State != ReplaceFinished || status.PerMille != 1000 || status.Stopped.IsZero() || !status.Over() {
		t.Errorf("the replace ended as %+v (%v)", status, err)
	}
	if target, ok, err := f.ReplaceTarget(); ok || err != nil {
		t.Errorf("after the replace it has the target %+v (%v)", target, err)
	}
	if err := f.CancelReplace(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("cancelling no replace: %v", err)
	}
	if m := b.members(f)[0]; m.DevID != 2 || m.Path != third || m.Num.String() != devNumOf(t, third) || m.Size != 2<<30 {
		t.Errorf("after the replace the member is %+v", m)
	}
	third = cancelledReplace(t, f, third, b.loop("fourth.img", 3<<30))
	if m := b.members(f)[0]; m.DevID != 2 || m.Path != third {
		t.Errorf("after another replace the member is %+v, wanted %s", m, third)
	}
	if err := f.Resize(2, 0); err != nil {
		t.Error(err)
	}
	if m := b.members(f)[0]; m.Size != 3<<30 {
		t.Errorf("after growing the member is %+v", m)
	}
	if err := f.Resize(2, 2<<30); err != nil {
		t.Error(err)
	}
	if m := b.members(f)[0]; m.Size != 2<<30 {
		t.Errorf("after shrinking the member is %+v", m)
	}

	// What was there in the beginning is there now.
	got, err := os.ReadFile(filepath.Join(dir, "big"))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file has changed (%v)", err)
	}
	if err := f.Remove(2); err != nil {
		t.Fatal(err)
	}
	if members := b.members(f); len(members) != 1 || members[0].Num.String() != devNumOf(t, second) {
		t.Errorf("at the end the members are %+v", members)
	}
}

// cancelledReplace replaces device 2 once more and cancels that as soon as it
// runs. It returns the device that is the member in the end: the new one when
// the cancel came too late.
func cancelledReplace(t *testing.T, f *FS, from, to string) string {
	t.Helper()
	replaced := make(chan error, 1)
	go func() { replaced <- f.Replace(2, to) }()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for {
		select {
		case err := <-replaced:
			if errors.Is(err, ErrCancelled) {
				t.Log("the replace was cancelled in the middle")
				return from
			}
			if err != nil {
				t.Error(err)
			}
			return to
		case <-poll.C:
			target, ok, err := f.ReplaceTarget()
			if err != nil {
				t.Errorf("the target of the replace: %v", err)
			}
			if ok && (target.DevID != 0 || target.Path != to || target.Num.String() != devNumOf(t, to)) {
				t.Errorf("the target of the replace is %+v, not %s", target, to)
			}
			if status, err := f.ReplaceStatus(); err != nil || !status.Over() && status.DevID != 2 && status.DevID != 0 {
				t.Errorf("the replace is %+v (%v)", status, err)
			}
			if err := f.CancelReplace(); err != nil && !errors.Is(err, ErrNotRunning) {
				t.Errorf("cancelling the replace: %v", err)
			}
		}
	}
}

// cancelOnceRunning waits until the removal holds the filesystem and has begun
// to move data, and tells it to stop. It reports whether the kernel took the
// request; a removal that ends first is put back for the caller.
func cancelOnceRunning(t *testing.T, f *FS, removed chan error) bool {
	t.Helper()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for range poll.C {
		select {
		case err := <-removed:
			removed <- err
			return false
		default:
		}
		op, err := f.ExclusiveOperation()
		if err != nil {
			t.Error(err)
			return false
		}
		if op != "device remove" {
			continue
		}
		members, err := f.Members()
		if err != nil {
			t.Error(err)
			return false
		}
		if m := members[0]; m.DevID != 1 || !m.Leaving {
			continue // not begun, or at its very end
		} else if m.Size != seedSize {
			t.Errorf("while it leaves the seed's size is %d", m.Size)
		}
		if err := f.Add("/dev/null"); !errors.Is(err, ErrExclusiveRunning) {
			t.Logf("a second operation meanwhile: %v", err) // It may have ended.
		}
		err = f.CancelRemove()
		if err != nil && !errors.Is(err, ErrNotRunning) {
			t.Errorf("cancelling: %v", err)
		}
		return err == nil
	}
	return false
}

func imageSum(t *testing.T, path string) [32]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

func TestScanAndForget(t *testing.T) {
	b := newBench(t)
	dev := b.attach("--read-only", b.seed(nil))
	if err := Scan(dev); err != nil {
		t.Fatal(err)
	}
	if err := Forget(dev); err != nil {
		t.Fatal(err)
	}
	empty := b.loop("empty.img", 1<<30)
	if err := Scan(empty); !errors.Is(err, unix.EINVAL) {
		t.Errorf("scanning a device without Btrfs: %v", err)
	}
	if err := Scan(filepath.Join(b.dir, "missing")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("scanning nothing: %v", err)
	}
	b.mount(dev, "ro")
	if err := Forget(dev); !errors.Is(err, unix.EBUSY) {
		t.Errorf("forgetting a mounted seed: %v", err)
	}
}

func TestRelocate(t *testing.T) {
	b := newBench(t)
	f, dir := b.sprout(b.seed(map[string][]byte{"file": noise(3, 20<<20)}))
	if err := f.Remove(1); err != nil {
		t.Fatal(err)
	}
	groups, err := f.Groups(2)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		err := f.Relocate(t.Context(), g)
		if g.Type() != Data {
			if !errors.Is(err, unix.EINVAL) {
				t.Errorf("moving a group of %s: %v", g.Type(), err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		after, err := f.Groups(2)
		if err != nil || slices.ContainsFunc(after, func(a Group) bool { return a.Logical == g.Logical }) {
			t.Errorf("the group at %d is still there: %+v (%v)", g.Logical, after, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, noise(3, 20<<20)) {
		t.Errorf("the file has changed (%v)", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Relocate(ctx, groups[0]); !errors.Is(err, ErrCancelled) {
		t.Errorf("when cancelled: %v", err)
	}
}

func TestConvertMetadata(t *testing.T) {
	b := newBench(t)
	f, dir := b.sprout(b.seed(map[string][]byte{"file": noise(2, 1<<20)}))
	// Metadata on the seed's devices would have to move as well: a flattened
	// filesystem is what is converted.
	if err := f.Remove(1); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		profile string
		copies  int
	}{{"dup", 2}, {"dup", 2}, {"single", 1}} {
		if err := f.ConvertMetadata(t.Context(), c.profile); err != nil {
			t.Fatalf("to %s: %v", c.profile, err)
		}
		spaces, err := f.Spaces()
		if err != nil || spaces.MetadataCopies() != c.copies {
			t.Errorf("after %s there are %d copies: %+v (%v)", c.profile, spaces.MetadataCopies(), spaces, err)
		}
	}
	// Both copies of a group lie on the one device.
	if err := f.ConvertMetadata(t.Context(), "dup"); err != nil {
		t.Fatal(err)
	}
	groups, err := f.Groups(2)
	if err != nil {
		t.Fatal(err)
	}
	listed := map[uint64]int{}
	for _, g := range groups {
		if g.Profile() == "dup" {
			listed[g.Logical]++
		}
	}
	if len(listed) < 2 {
		t.Errorf("system and metadata should be dup: %+v", groups)
	}
	for logical, n := range listed {
		if n != 2 {
			t.Errorf("the dup group at %d is listed %d times", logical, n)
		}
	}
	// Cancelled as soon as it runs, it is done or has both profiles; the next
	// call finishes it.
	ctx, cancel := context.WithCancel(t.Context())
	converted := make(chan error, 1)
	go func() { converted <- f.ConvertMetadata(ctx, "single") }()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for done := false; !done; {
		select {
		case err := <-converted:
			t.Logf("the conversion ended with %v", err)
			if err != nil && !errors.Is(err, ErrCancelled) {
				t.Error(err)
			}
			done = true
		case <-poll.C:
			if op, err := f.ExclusiveOperation(); err != nil || op == "balance" {
				cancel()
			}
		}
	}
	cancel()
	if op, err := f.ExclusiveOperation(); op != "none" || err != nil {
		t.Errorf("after the conversion the exclusive operation is %q (%v)", op, err)
	}
	if err := f.ConvertMetadata(t.Context(), "single"); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, noise(2, 1<<20)) {
		t.Errorf("the file has changed (%v)", err)
	}
}

// A byte of a file's data is changed behind the filesystem's back, as a bad
// stick would. The removal stops there; the file is named, and once it is gone
// the removal goes through.
func TestUnreadableFiles(t *testing.T) {
	for _, csum := range []string{"crc32c", "xxhash", "sha256", "blake2"} {
		t.Run(csum, func(t *testing.T) {
			b := newBench(t)
			bad, good := noise(4, 3<<20), noise(5, 3<<20)
			image := b.seed(map[string][]byte{"bad file \xff": bad, "good": good}, "--csum", csum)
			flip(t, image, bad[1<<20:][:4096])

			f, dir := b.sprout(image)
			if err := f.Add(b.loop("second.img", 2<<30)); err != nil {
				t.Fatal(err)
			}
			if err := f.Remove(1); !errors.Is(err, unix.EIO) {
				t.Fatalf("the removal of a damaged seed: %v", err)
			}
			files, err := f.UnreadableFiles(t.Context(), 1, 0)
			if err != nil || !slices.Equal(files, []string{"bad file \xff"}) {
				t.Fatalf("unreadable are %q (%v)", files, err)
			}
			if files, err := f.UnreadableFiles(t.Context(), 2, 10); err != nil || files != nil {
				t.Errorf("on the whole device: %q (%v)", files, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := f.UnreadableFiles(ctx, 1, 0); !errors.Is(err, context.Canceled) {
				t.Errorf("with an ended context: %v", err)
			}
			if err := os.Remove(filepath.Join(dir, "bad file \xff")); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := f.Remove(1); err != nil {
				t.Errorf("after the file is gone: %v", err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "good")); err != nil || !bytes.Equal(got, good) {
				t.Errorf("the other file has changed (%v)", err)
			}
		})
	}
}

// Every name of a damaged file counts: hard links, and snapshots of the
// subvolume it is in.
func TestUnreadableFilesInSubvolumes(t *testing.T) {
	b := newBench(t)
	testenv.NeedTool(t, "btrfs")
	path := filepath.Join(b.dir, "root.img")
	truncate(t, path, seedSize)
	run(t, "mkfs.btrfs", "-q", "-m", "single", path)
	bad := noise(6, 1<<20)
	dev := b.attach(path)
	build := filepath.Join(b.dir, "build")
	if err := os.Mkdir(build, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "btrfs", dev, build)
	func() {
		defer run(t, "umount", build)
		sub := filepath.Join(build, "dir", "sub")
		deep := filepath.Join(sub, "a", "b")
		if err := os.Mkdir(filepath.Join(build, "dir"), 0o700); err != nil {
			t.Fatal(err)
		}
		run(t, "btrfs", "subvolume", "create", sub)
		if err := errors.Join(os.MkdirAll(deep, 0o700), os.WriteFile(filepath.Join(deep, "one"), bad, 0o600),
			os.Link(filepath.Join(deep, "one"), filepath.Join(sub, "two"))); err != nil {
			t.Fatal(err)
		}
		run(t, "btrfs", "subvolume", "snapshot", sub, filepath.Join(build, "snap"))
	}()
	run(t, "btrfstune", "-S", "1", path)
	flip(t, path, bad[:4096])
	f, _ := b.sprout(path)
	files, err := f.UnreadableFiles(t.Context(), 1, 0)
	slices.Sort(files)
	want := []string{"dir/sub/a/b/one", "dir/sub/two", "snap/a/b/one", "snap/two"}
	if err != nil || !slices.Equal(files, want) {
		t.Errorf("unreadable are %q (%v)", files, err)
	}
	if files, err := f.UnreadableFiles(t.Context(), 1, 3); err != nil || len(files) != 3 {
		t.Errorf("with a limit of 3: %q (%v)", files, err)
	}
}

// flip changes one byte of the only place where the image has this content.
func flip(t *testing.T, image string, content []byte) {
	t.Helper()
	data, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, content)
	if at < 0 || bytes.Contains(data[at+1:], content) {
		t.Fatal("the content is not in the image exactly once")
	}
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt([]byte{content[100] ^ 1}, int64(at)+100)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		t.Fatal(err)
	}
}

// A device that somebody called by another name is still recognised.
func TestMembersWithAStalePath(t *testing.T) {
	b := newBench(t)
	dev := b.attach("--read-only", b.seed(nil))
	alias := filepath.Join(b.dir, "alias")
	if err := os.Symlink(dev, alias); err != nil {
		t.Fatal(err)
	}
	if err := Scan(alias); err != nil {
		t.Fatal(err)
	}
	f := b.open(b.mount(alias, "ro"))
	if err := os.Remove(alias); err != nil {
		t.Fatal(err)
	}
	members := b.members(f)
	if len(members) != 1 || members[0].Num.String() != devNumOf(t, dev) {
		t.Errorf("the members are %+v", members)
	}
	t.Log("the kernel calls it", strings.TrimPrefix(members[0].Path, b.dir))
}
