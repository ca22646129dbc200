package block

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

// filled is an image of 16 MiB that begins with text.
func filled(t *testing.T, text string) *os.File {
	t.Helper()
	f := image(t, 16*mib)
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// change puts a file behind a loop, as its caller would.
func change(s *System, id ID, file *os.File) (Loop, error) {
	c, err := s.PrepareChange(id, file)
	if err != nil {
		return Loop{}, err
	}
	defer c.Close()
	if err := c.Do(); err != nil {
		return Loop{}, err
	}
	return c.Check()
}

func TestAnotherFileIsPutBehindALoopInUse(t *testing.T) {
	testenv.NeedRoot(t)
	s, old, other := New(), filled(t, "the stick"), filled(t, "the copy")
	l := attach(t, old, LoopOptions{ReadOnly: true, SizeLimit: 16 * mib})
	if err := s.SetDirectIO(l.ID, true); err != nil && !errors.Is(err, ErrNotSupported) {
		t.Fatal(err)
	}
	user, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()

	now, err := change(s, l.ID, other)
	if err != nil {
		t.Fatal(err)
	}
	// It goes by another sequence number, so the test has to detach that one.
	t.Cleanup(func() {
		if err := s.DetachLoop(context.Background(), now.ID); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Log(err)
		}
	})
	if now.BackingFile != other.Name() || !now.ReadOnly || now.SizeLimit != 16*mib || now.Size != l.Size {
		t.Errorf("the loop is %+v now", now)
	}
	if now.Same(l.ID) {
		t.Error("it counts as the same medium: the kernel changed what it calls a change of the medium")
	}
	head := make([]byte, 8)
	if _, err := user.ReadAt(head, 0); err != nil || string(head) != "the copy" {
		t.Errorf("who had it open reads %q (%v)", head, err)
	}
	for file, want := range map[*os.File]bool{old: false, other: true} {
		if is, err := s.IsBehind(l.Num, file); is != want || err != nil {
			t.Errorf("%s is behind the loop: %v (%v)", file.Name(), is, err)
		}
	}
	if _, err := change(s, l.ID, old); !errors.Is(err, ErrChanged) {
		t.Errorf("by its old identity it was changed back: %v", err)
	}
}

func TestAFileInMemoryIsPutBehindALoop(t *testing.T) {
	testenv.NeedRoot(t)
	s, old := New(), filled(t, "the stick")
	l := attach(t, old, LoopOptions{ReadOnly: true})
	fd, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	memory := os.NewFile(uintptr(fd), "copy")
	defer memory.Close()
	if err := memory.Truncate(16 * mib); err != nil {
		t.Fatal(err)
	}
	if in, err := s.InMemory(l.Num); err != nil {
		t.Fatal(err)
	} else if in {
		testenv.Skip(t, "the temporary directory is in memory itself")
	}
	now, err := change(s, l.ID, memory)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.DetachLoop(context.Background(), now.ID) })
	if in, err := s.InMemory(l.Num); !in || err != nil {
		t.Errorf("it is in memory: %v (%v)", in, err)
	}
	if _, err := s.BackingDevice(l.Num); !errors.Is(err, ErrNoDevice) {
		t.Errorf("the device below it gave %v", err)
	}
	used, err := s.usage()
	if err != nil {
		t.Fatal(err)
	}
	for num, holders := range used {
		if slices.ContainsFunc(holders, func(h Holder) bool { return h.Kind == "loop" && "/dev/"+h.Name == l.Path }) {
			t.Errorf("it holds %v, which nothing of it is on", num)
		}
	}
	got, err := os.ReadFile(l.Path)
	if err != nil || !bytes.Equal(got, make([]byte, 16*mib)) {
		t.Errorf("it reads otherwise (%v)", err)
	}
}

func TestALargerDeviceIsPutBehindALoop(t *testing.T) {
	testenv.NeedRoot(t)
	s, old := New(), filled(t, "the stick")
	under := attach(t, image(t, 32*mib), LoopOptions{})
	l := attach(t, old, LoopOptions{ReadOnly: true, SizeLimit: 16 * mib})
	if over, err := s.LoopOver(l.Num); err != nil || !over.Num.IsZero() {
		t.Errorf("it is over %+v (%v)", over, err)
	}
	device, err := os.Open(under.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	now, err := change(s, l.ID, device)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.DetachLoop(context.Background(), now.ID) })
	if now.Size != 16*mib || now.BackingFile != under.Path {
		t.Errorf("the loop is %+v now", now)
	}
	if over, err := s.LoopOver(l.Num); err != nil || !over.Same(under.ID) {
		t.Errorf("it is over %+v (%v)", over, err)
	}
	// The device's node is in memory; what is on it is not.
	if in, err := s.InMemory(l.Num); in || err != nil {
		t.Errorf("it is in memory: %v (%v)", in, err)
	}
	d, err := s.ByPath(t.Context(), under.Path)
	if err != nil || len(d.Holders) != 1 || d.Holders[0].Kind != "loop" {
		t.Errorf("the device is held by %v (%v)", d.Holders, err)
	}
}

func TestWhatTheKernelWouldNotPutBehindALoop(t *testing.T) {
	testenv.NeedRoot(t)
	s, other := New(), filled(t, "the copy")
	short := image(t, 8*mib)
	whole := attach(t, filled(t, "the stick"), LoopOptions{ReadOnly: true})
	limited := attach(t, filled(t, "the stick"), LoopOptions{ReadOnly: true, SizeLimit: 4 * mib})
	writable := attach(t, filled(t, "the stick"), LoopOptions{})
	for _, c := range []struct {
		what string
		loop Loop
		file *os.File
		want error
	}{
		{"a shorter file", whole, short, ErrSizeDiffers},
		{"a shorter file that is long enough", limited, short, nil},
		{"a loop that can be written", writable, other, ErrLoopWritable},
	} {
		t.Run(c.what, func(t *testing.T) {
			before, err := s.LoopStatus(c.loop.Num)
			if err != nil {
				t.Fatal(err)
			}
			p, err := s.PrepareChange(c.loop.ID, c.file)
			if !errors.Is(err, c.want) {
				t.Errorf("it gave %v", err)
			}
			if err == nil {
				_ = p.Close()
			}
			if now, err := s.LoopStatus(c.loop.Num); err != nil || now.BackingFile != before.BackingFile || !now.Same(before.ID) {
				t.Errorf("the loop is %+v now (%v)", now, err)
			}
		})
	}
	if err := s.LoopFixed(writable.Num); !errors.Is(err, ErrLoopWritable) {
		t.Errorf("a writable loop can be changed: %v", err)
	}
	if err := s.LoopFixed(whole.Num); err != nil {
		t.Errorf("a read-only loop cannot be changed: %v", err)
	}
}
