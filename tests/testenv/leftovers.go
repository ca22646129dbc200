package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// What is detached goes away at the last close, and on most machines udev has
// a look at every device: so leftovers get this long to go.
const (
	settleTime  = 2 * time.Second
	settleCheck = 50 * time.Millisecond
)

// State is what the kernel holds that a test could leave behind. The zero
// value holds nothing.
type State struct {
	// Loops maps the kernel name of each attached loop device to its backing
	// file, which ends in " (deleted)" if that file has no name any more.
	Loops map[string]string
	// Zrams are the kernel names of all zram devices.
	Zrams []string
	// Mappers maps the kernel names of device-mapper devices to their names.
	Mappers map[string]string
	// Mounts maps each mount point in this mount namespace to its source. Of
	// mounts on top of each other it has the last.
	Mounts map[string]string
}

// Leftovers looks at the kernel's loop, zram and device-mapper devices and at
// the mounts, as they are now.
func Leftovers() (State, error) {
	s := State{Loops: map[string]string{}, Mappers: map[string]string{}, Mounts: map[string]string{}}
	disks, err := os.ReadDir("/sys/block")
	if err != nil {
		return s, err
	}
	for _, disk := range disks {
		name := disk.Name()
		var attribute string
		switch {
		case strings.HasPrefix(name, "zram"):
			s.Zrams = append(s.Zrams, name)
			continue
		case strings.HasPrefix(name, "loop"):
			attribute = "loop/backing_file"
		case strings.HasPrefix(name, "dm-"):
			attribute = "dm/name"
		default:
			continue
		}
		raw, err := os.ReadFile(filepath.Join("/sys/block", name, attribute))
		if gone(err) {
			continue // not attached, or gone since
		}
		if err != nil {
			return s, err
		}
		value := strings.TrimSuffix(string(raw), "\n")
		if attribute == "dm/name" {
			s.Mappers[name] = value
		} else {
			s.Loops[name] = value
		}
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return s, err
	}
	for _, m := range mounts {
		s.Mounts[m.Mountpoint] = m.Source
	}
	return s, nil
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
}

// Under gives the part of s that belongs to a directory: the loop devices
// whose backing file lies below it, and the mounts that lie below it or whose
// source is such a loop device or a partition of one. Nothing in the kernel
// says whose a zram or device-mapper device is, so there are none in the part.
func (s State) Under(dir string) State {
	part := State{Loops: map[string]string{}, Mounts: map[string]string{}}
	for name, file := range s.Loops {
		if below(file, dir) {
			part.Loops[name] = file
		}
	}
	for point, source := range s.Mounts {
		disk, _, _ := strings.Cut(strings.TrimPrefix(source, "/dev/loop"), "p")
		_, ours := part.Loops["loop"+disk]
		if below(point, dir) || ours && strings.HasPrefix(source, "/dev/loop") {
			part.Mounts[point] = source
		}
	}
	return part
}

func below(path, dir string) bool {
	return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") || path == dir
}

// List gives one line for each thing in s, sorted; none if s is empty.
func (s State) List() []string {
	var lines []string
	for name, file := range s.Loops {
		lines = append(lines, fmt.Sprintf("loop device /dev/%s on %s", name, file))
	}
	for _, name := range s.Zrams {
		lines = append(lines, "zram device /dev/"+name)
	}
	for name, mapped := range s.Mappers {
		lines = append(lines, fmt.Sprintf("device-mapper device /dev/%s (%s)", name, mapped))
	}
	for point, source := range s.Mounts {
		lines = append(lines, fmt.Sprintf("mount of %s on %s", source, point))
	}
	slices.Sort(lines)
	return lines
}

// NoLeftovers fails t, at its end, if a loop device or a mount is left that
// lies in one of t's temporary directories, or one of the zram devices that t
// said it made. What is left is then taken away, so that the removal of the
// temporary directory does not reach into a mounted filesystem. Call it first:
// then it looks after all other clean-up was done. Other tests, and other
// programs, are not in its way.
func NoLeftovers(t testing.TB) *Watch {
	t.Helper()
	w := &Watch{}
	// All directories of t.TempDir lie in one that is t's own.
	dir := filepath.Dir(t.TempDir())
	t.Cleanup(func() {
		left, err := settle(func() (State, error) {
			now, err := Leftovers()
			left := now.Under(dir)
			left.Zrams = intersect(now.Zrams, w.zrams)
			return left, err
		})
		if err != nil {
			t.Errorf("cannot look for leftovers: %v", err)
		}
		for _, line := range left.List() {
			t.Errorf("left behind: %s", line)
		}
		if err := left.remove(); err != nil {
			t.Errorf("cannot take away what was left behind: %v", err)
		}
	})
	return w
}

// Watch is told of what a test makes.
type Watch struct{ zrams []string }

// Zram says that t made this zram device, by kernel name such as "zram1" or
// by path. Not for use by several goroutines at once.
func (w *Watch) Zram(name string) { w.zrams = append(w.zrams, filepath.Base(name)) }

func intersect(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return !slices.Contains(b, s) })
}

// settle calls look until it finds nothing, for two seconds at most.
func settle(look func() (State, error)) (State, error) {
	deadline := time.Now().Add(settleTime)
	for {
		left, err := look()
		if err != nil || len(left.List()) == 0 || time.Now().After(deadline) {
			return left, err
		}
		time.Sleep(settleCheck)
	}
}

// remove unmounts and detaches what s holds, deepest mount first. Zram devices
// are left alone.
func (s State) remove() error {
	var errs []error
	for _, point := range slices.Backward(slices.Sorted(maps.Keys(s.Mounts))) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("cannot unmount %s: %w", point, err))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Loops)) {
		if err := detach("/dev/" + name); err != nil {
			errs = append(errs, fmt.Errorf("cannot detach %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func detach(loop string) error {
	f, err := os.Open(loop)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); !gone(err) {
		return err
	}
	return nil
}

// Main runs the tests of a package and fails the run if they leave a loop
// device, a mount or a zram device behind. Use it as
//
//	func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }
//
// All temporary directories of the run, those of the programs it starts
// included, are put below one of its own, which says what belongs to this run.
// Zram devices say nothing of their maker: those new since the first of the
// test programs that run at this time are counted, by the last of them, unless
// somebody uses them. Without root, or where SPROUTD_TEST_ROOT is not 1, it
// only runs the tests.
func Main(m interface{ Run() int }) int {
	if os.Geteuid() != 0 || !Required() {
		return m.Run()
	}
	code, err := runWatched(m, lockFile)
	if err != nil {
		fmt.Fprintf(os.Stderr, "FAIL: %v\n", err)
		return max(code, 1)
	}
	return code
}

func runWatched(m interface{ Run() int }, lock string) (code int, err error) {
	zrams, err := watchZrams(lock)
	if err != nil {
		return 1, fmt.Errorf("cannot watch for leftovers: %w", err)
	}
	defer zrams.lock.Close()
	dir, err := os.MkdirTemp("", "sproutd-test-")
	if err != nil {
		return 1, err
	}
	old, had := os.LookupEnv("TMPDIR")
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 1, err
	}
	code = m.Run()
	if had {
		err = os.Setenv("TMPDIR", old)
	} else {
		err = os.Unsetenv("TMPDIR")
	}
	if err != nil {
		return code, err
	}
	last, err := zrams.last()
	if err != nil {
		return code, err
	}
	left, err := settle(func() (State, error) {
		now, err := Leftovers()
		left := now.Under(dir)
		if last {
			left.Zrams = slices.DeleteFunc(now.Zrams, func(name string) bool {
				return slices.Contains(zrams.before, name) || inUse(name, now.Mounts)
			})
		}
		return left, err
	})
	if err != nil {
		return code, err
	}
	if lines := left.List(); len(lines) > 0 {
		// The directory stays: to remove it could reach into a mount.
		return code, fmt.Errorf("the tests left behind, in %s:\n\t%s", dir, strings.Join(lines, "\n\t"))
	}
	return code, os.RemoveAll(dir)
}

// zramWatch knows the zram devices from before the tests. Every test program
// holds a shared lock on one file; the first to come writes down which there
// are, and the last to go compares.
type zramWatch struct {
	lock   *os.File
	before []string
}

func watchZrams(path string) (*zramWatch, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	w := &zramWatch{lock: f}
	if err := w.start(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return w, nil
}

func (w *zramWatch) start() error {
	fd := int(w.lock.Fd())
	err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	first := err == nil
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	if first {
		now, err := Leftovers()
		if err != nil {
			return err
		}
		if err := w.lock.Truncate(0); err != nil {
			return err
		}
		if _, err := w.lock.WriteAt([]byte(strings.Join(now.Zrams, " ")), 0); err != nil {
			return err
		}
	}
	// Waits only while the first one is still writing.
	if err := unix.Flock(fd, unix.LOCK_SH); err != nil {
		return err
	}
	raw, err := os.ReadFile(w.lock.Name())
	w.before = strings.Fields(string(raw))
	return err
}

// last reports whether no other test program runs. It keeps new ones waiting
// until the lock is closed.
func (w *zramWatch) last() (bool, error) {
	err := unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// lockFile is where only root can write, so nobody else can be in the way.
const lockFile = "/run/sproutd-test.lock"

// inUse reports whether a device is a member of a mounted Btrfs, mounted in
// another way, or swapped on. To open it would be simpler, but for that moment
// its owner could neither mount nor reset it.
func inUse(name string, mounts map[string]string) bool {
	if members, _ := filepath.Glob("/sys/fs/btrfs/*/devices/" + name); len(members) > 0 {
		return true
	}
	for _, source := range mounts {
		if source == "/dev/"+name {
			return true
		}
	}
	swaps, _ := os.ReadFile("/proc/swaps")
	return strings.Contains(string(swaps), "/dev/"+name+" ")
}
