package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// recorder is a test that notes its failures instead of failing.
type recorder struct {
	testing.TB
	dir      string
	cleanups []func()
	failures []string
}

func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recorder) TempDir() string  { return r.dir }
func (r *recorder) Errorf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

// finish ends the recorded test and gives its failures as one text.
func (r *recorder) finish() string {
	for _, cleanup := range slices.Backward(r.cleanups) {
		cleanup()
	}
	return strings.Join(r.failures, "\n")
}

// newRecorder has a directory of its own below a common one, as t.TempDir has.
func newRecorder(t *testing.T) *recorder {
	dir := filepath.Join(t.TempDir(), "test", "001")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return &recorder{TB: t, dir: dir}
}

func losetup(t *testing.T, dir string) string {
	t.Helper()
	image := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestNoLeftovers(t *testing.T) {
	NeedRoot(t)
	NeedTool(t, "losetup")

	t.Run("a clean test passes", func(t *testing.T) {
		r := newRecorder(t)
		NoLeftovers(r)
		loop := losetup(t, r.dir)
		r.Cleanup(func() { _ = detach(loop) })
		if got := r.finish(); got != "" {
			t.Errorf("a test that cleaned up was blamed: %s", got)
		}
	})
	t.Run("a forgotten loop device fails it", func(t *testing.T) {
		r := newRecorder(t)
		NoLeftovers(r)
		loop := losetup(t, r.dir)
		// The name of its backing file may be gone by then.
		if err := os.Remove(filepath.Join(r.dir, "disk.img")); err != nil {
			t.Fatal(err)
		}
		if got := r.finish(); !strings.Contains(got, loop) || !strings.Contains(got, "(deleted)") {
			t.Errorf("the failure does not name %s: %q", loop, got)
		}
		now, err := Leftovers()
		if err != nil {
			t.Fatal(err)
		}
		if left := now.Under(r.dir).List(); len(left) > 0 {
			t.Errorf("the leftovers were not taken away: %v", left)
		}
	})
	t.Run("a forgotten mount fails it", func(t *testing.T) {
		r := newRecorder(t)
		NoLeftovers(r)
		for _, name := range []string{"a", "a/b"} {
			point := filepath.Join(r.dir, name)
			if err := os.Mkdir(point, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", point, "tmpfs", 0, "size=64k"); err != nil {
				t.Fatal(err)
			}
		}
		got := r.finish()
		if !strings.Contains(got, "mount of tmpfs on "+r.dir+"/a/b") {
			t.Errorf("the failure does not name the mount: %q", got)
		}
		if err := os.Remove(filepath.Join(r.dir, "a")); err != nil {
			t.Errorf("the mount was not taken away: %v", err)
		}
	})
	t.Run("what others do is not in the way", func(t *testing.T) {
		other := t.TempDir()
		r := newRecorder(t)
		NoLeftovers(r)
		loop := losetup(t, other)
		t.Cleanup(func() { _ = detach(loop) })
		if got := r.finish(); got != "" {
			t.Errorf("blamed for what another test has: %s", got)
		}
	})
	t.Run("a forgotten zram device fails it", func(t *testing.T) {
		name := newZram(t)
		r := newRecorder(t)
		NoLeftovers(r).Zram("/dev/" + name)
		if got := r.finish(); !strings.Contains(got, name) {
			t.Errorf("the failure does not name %s: %q", name, got)
		}
	})
}

// newZram adds a zram device, without a size, and takes it away at the end.
func newZram(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile("/sys/class/zram-control/hot_add")
	if err != nil {
		t.Fatal(err)
	}
	number := strings.TrimSpace(string(raw))
	t.Cleanup(func() {
		if err := os.WriteFile("/sys/class/zram-control/hot_remove", []byte(number), 0); err != nil {
			t.Error(err)
		}
	})
	return "zram" + number
}

type fakeTests func() int

func (f fakeTests) Run() int { return f() }

func TestRunWatched(t *testing.T) {
	NeedRoot(t)
	NeedTool(t, "losetup")
	t.Setenv("TMPDIR", t.TempDir())
	lock := filepath.Join(t.TempDir(), "lock")

	// Others that run at this time may make zram devices.
	code, err := runWatched(fakeTests(func() int { return 3 }), lock)
	if code != 3 || err != nil && !strings.Contains(err.Error(), "zram") {
		t.Errorf("a clean run gave %d, %v, want the tests' own code, 3", code, err)
	}

	var loop string
	_, err = runWatched(fakeTests(func() int { loop = losetup(t, os.TempDir()); return 0 }), lock)
	if err == nil || !strings.Contains(err.Error(), loop) {
		t.Errorf("a loop device was left, the run said: %v", err)
	}
	if err := detach(loop); err != nil {
		t.Error(err)
	}

	t.Run("zram", func(t *testing.T) {
		var name string
		_, err := runWatched(fakeTests(func() int { name = newZram(t); return 0 }), lock)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s was left, the run said: %v", name, err)
		}
	})
	t.Run("zram of an overlapping run", func(t *testing.T) {
		// The first to leave cannot know; the last one sees it, although it
		// started after the device was made.
		first, err := watchZrams(lock)
		if err != nil {
			t.Fatal(err)
		}
		name := newZram(t)
		_, err = runWatched(fakeTests(func() int {
			if last, err := first.last(); last || err != nil {
				t.Errorf("the first run takes itself for the last one: %v, %v", last, err)
			}
			return 0
		}), lock)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s was left, the run said: %v", name, err)
		}
		if err := first.lock.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestUnder(t *testing.T) {
	s := State{
		Loops:   map[string]string{"loop1": "/t/one/a.img", "loop11": "/t/other/b.img", "loop3": "/t/one/c (deleted)"},
		Mounts:  map[string]string{"/t/one": "x", "/t/onemore": "x", "/mnt": "/dev/loop1", "/mnt2": "/dev/loop1p2", "/mnt11": "/dev/loop11"},
		Zrams:   []string{"zram0"},
		Mappers: map[string]string{"dm-0": "root"},
	}
	want := `loop device /dev/loop1 on /t/one/a.img
loop device /dev/loop3 on /t/one/c (deleted)
mount of /dev/loop1 on /mnt
mount of /dev/loop1p2 on /mnt2
mount of x on /t/one`
	if got := strings.Join(s.Under("/t/one").List(), "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
