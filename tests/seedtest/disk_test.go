package seedtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

func sumFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return string(h.Sum(nil))
}

func TestStickHoldsTheSeed(t *testing.T) {
	needTools(t)
	for name, gate := range map[string]bool{"plain": false, "with a gate": true} {
		t.Run(name, func(t *testing.T) {
			testenv.NoLeftovers(t)
			seed := New(t, Spec{ImageSize: 256 * MiB, Content: func(dir string) error {
				return os.WriteFile(filepath.Join(dir, "file"), content("file", 1, 3*MiB), 0o644)
			}})
			dir := t.TempDir()
			stick, err := NewStick(t.Context(), StickSpec{Dir: dir, Seed: seed.Path, PersistSize: GiB, Gate: gate})
			must(t, err)
			closed := false
			t.Cleanup(func() {
				if !closed {
					must(t, stick.Close())
				}
			})
			if sumFile(t, stick.Seed) != sumFile(t, seed.Path) {
				t.Error("the seed on the stick is not the seed")
			}
			if err := os.WriteFile(stick.Seed, nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing to the stick gave %v, want that it is read-only", err)
			}
			p, err := os.Open(stick.Persist)
			must(t, err)
			size, err := p.Seek(0, io.SeekEnd)
			must(t, errors.Join(err, p.Close()))
			if size != GiB {
				t.Errorf("the persistence partition has %d bytes", size)
			}
			must(t, stick.Unmount())
			must(t, stick.Close())
			closed = true
			must(t, stick.Close())
			left, err := os.ReadDir(dir)
			must(t, err)
			if len(left) > 0 {
				t.Errorf("the stick left %v", left)
			}
		})
	}
}

func TestStickCloseWhileBusy(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	seed := New(t, Spec{ImageSize: 256 * MiB, Content: func(string) error { return nil }})
	stick, err := NewStick(t.Context(), StickSpec{Dir: t.TempDir(), Seed: seed.Path})
	must(t, err)
	open, err := os.Open(stick.Seed)
	must(t, err)
	if err := stick.Unmount(); err == nil {
		t.Error("a stick with an open file was unmounted")
	}
	if err := stick.Close(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("closing a busy stick gave %v, want that it is busy", err)
	}
	// With the last user gone nothing may be left: that is NoLeftovers' part.
	must(t, open.Close())
}

func TestFailedStickLeavesNothing(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	dir := t.TempDir()
	seed := filepath.Join(t.TempDir(), "root.img")
	must(t, os.WriteFile(seed, make([]byte, MiB), 0o644))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		spec StickSpec
	}{
		"no seed":            {t.Context(), StickSpec{Dir: dir, Seed: "/no/such/seed"}},
		"too little persist": {t.Context(), StickSpec{Dir: dir, Seed: seed, PersistSize: 100 * MiB}},
		"cancelled":          {ctx, StickSpec{Dir: dir, Seed: seed, Gate: true}},
		"seed not readable":  {t.Context(), StickSpec{Dir: dir, Seed: dir}},
	} {
		if _, err := NewStick(c.ctx, c.spec); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("failed sticks left %v (%v)", left, err)
	}
}

// TestHoldCatchesAMove is how a test stops a move in the middle: the removal
// of the seed waits in the kernel until the target is let go on.
func TestHoldCatchesAMove(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	seed := New(t, Spec{})
	overlay := OpenDisk(t, DiskSpec{})
	target := OpenDisk(t, DiskSpec{Gate: true})

	seedLoop, err := attach(t.Context(), seed.Path, true)
	must(t, err)
	t.Cleanup(func() { must(t, detach(seedLoop)) })
	dir := t.TempDir()
	must(t, mount(seedLoop, dir, "btrfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() { must(t, errors.Join(target.Let(), unmount(dir))) })
	btrfs := func(args ...string) error {
		_, err := run(t.Context(), "btrfs", args...)
		return err
	}
	must(t, btrfs("device", "add", "-f", "-K", overlay.Path, dir))
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT, ""))
	work := filepath.Join(dir, "work")
	must(t, os.Mkdir(work, 0o755))
	before := scanTree(t, dir)
	w, err := StartWriter(work)
	must(t, err)
	t.Cleanup(func() { must(t, w.Stop()) })
	r, err := StartReader(dir, before.Without("work"))
	must(t, err)
	t.Cleanup(func() { must(t, r.Stop()) })
	must(t, w.AwaitFsyncs(soon(t), 50))

	must(t, btrfs("device", "add", "-f", "-K", target.Path, dir))
	moved := make(chan error, 1)
	go func() {
		moved <- errors.Join(btrfs("device", "remove", overlay.Path, dir), btrfs("device", "remove", seedLoop, dir))
	}()
	must(t, target.HoldAfter(soon(t), 30*MiB))
	held, err := target.Written()
	must(t, err)
	select {
	case err := <-moved:
		t.Fatalf("the move is over, held at %d bytes: %v", held, err)
	case <-time.After(200 * time.Millisecond):
	}
	// What was handed to the disk before may still be counted, no more.
	now, err := target.Written()
	must(t, err)
	if now-held > 4*MiB {
		t.Errorf("%d bytes were written while held", now-held)
	}
	must(t, target.Let())
	must(t, <-moved)

	must(t, w.AwaitFsyncs(soon(t), 50))
	must(t, errors.Join(w.Stop(), r.Stop()))
	must(t, w.Verify(work))
	for _, line := range Diff(before, scanTree(t, dir), "work") {
		t.Error(line)
	}
	t.Logf("%+v", w.Stats())
	must(t, unmount(dir))
	must(t, Check(t.Context(), target.Path))
	must(t, mount(target.Path, dir, "btrfs", 0, ""))
	must(t, w.Verify(work))
	for _, line := range Diff(before, scanTree(t, dir), "work") {
		t.Error(line)
	}
}

func TestSlowDisk(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	d := OpenDisk(t, DiskSpec{Size: GiB, Gate: true})
	must(t, d.Slow(50*MiB))
	start := time.Now()
	// fsync after each piece, or all of it would be one burst.
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	must(t, err)
	for range 40 {
		_, err := f.Write(bytes.Repeat([]byte{1}, MiB))
		must(t, errors.Join(err, f.Sync()))
	}
	must(t, f.Close())
	t.Logf("40 MiB at 50 MiB/s took %v", time.Since(start))
	must(t, d.Fast())
	must(t, OpenDisk(t, DiskSpec{Size: MiB}).Close())
	if err := OpenDisk(t, DiskSpec{Size: MiB}).Hold(); err == nil {
		t.Error("a disk without a gate was held")
	}
}

// TestALoopThatSomebodyElseGotIsLeftAlone has a disk detached by a test, as when a
// stick is pulled, and its loop given to another file before the disk is closed.
func TestALoopThatSomebodyElseGotIsLeftAlone(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	pulled := OpenDisk(t, DiskSpec{})
	must(t, detach(pulled.Path))
	image := filepath.Join(t.TempDir(), "of-another")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	_, err := run(t.Context(), "losetup", pulled.Path, image)
	must(t, err)
	path := pulled.Path
	t.Cleanup(func() { must(t, detach(path)) })
	must(t, pulled.Close())
	if now := backing(path); now != image {
		t.Errorf("behind %s is %q now, not %q", path, now, image)
	}
}
