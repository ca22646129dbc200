package mount

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/tests/testenv"
)

func TestParseOptions(t *testing.T) {
	got := ParseOptions("defaults,ro,nosuid,compress=zstd:1,,noatime,degraded")
	if !got.ReadOnly || !slices.Equal(got.Flags, []string{"nosuid", "noatime"}) || !slices.Equal(got.Data, []string{"compress=zstd:1", "degraded"}) {
		t.Errorf("got %+v", got)
	}
	if got := ParseOptions(""); got.ReadOnly || got.Flags != nil || got.Data != nil {
		t.Errorf("an empty list gave %+v", got)
	}
}

func TestListReadsTheTable(t *testing.T) {
	root := t.TempDir()
	line := `31 20 0:40 /@ /mnt/a\040b rw,nosuid,relatime shared:1 - btrfs /dev/loop1 ro,subvol=/@` + "\n"
	if err := os.MkdirAll(filepath.Join(root, "proc/self"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	list, err := NewAt(root).List()
	if err != nil || len(list) != 1 {
		t.Fatalf("got %+v, %v", list, err)
	}
	e := list[0]
	if e.ID != 31 || e.Parent != 20 || e.Num != (block.DevNum{Minor: 40}) || e.Root != "/@" || e.MountPoint != "/mnt/a b" ||
		e.FSType != "btrfs" || e.Source != "/dev/loop1" || e.SuperOptions[0] != "ro" || e.flags() != unix.MS_NOSUID|unix.MS_RELATIME {
		t.Errorf("got %+v", e)
	}
}

// device makes a loop with a file system on it until the test ends.
func device(t *testing.T, mkfs ...string) string {
	t.Helper()
	testenv.NeedTool(t, mkfs[0])
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(512 << 20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], f.Name())...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", mkfs, err, out)
	}
	s := block.New()
	l, err := s.AttachLoop(t.Context(), f, block.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.DetachLoop(context.Background(), l.ID); err != nil {
			t.Errorf("left behind: %v", err)
		}
	})
	return l.Path
}

// mounted mounts a device until the test ends.
func mounted(t *testing.T, device, fstype string, o Options) string {
	t.Helper()
	dir := t.TempDir()
	if err := Mount(device, dir, fstype, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Unmount(dir, false) })
	return dir
}

func at(t *testing.T, path string) Entry {
	t.Helper()
	e, err := New().At(path)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestSetWritableKeepsTheOtherFlags(t *testing.T) {
	testenv.NeedRoot(t)
	for fstype, mkfs := range map[string][]string{
		"ext4":  {"mkfs.ext4", "-q", "-F"},
		"btrfs": {"mkfs.btrfs", "-q", "-f"},
	} {
		t.Run(fstype, func(t *testing.T) {
			dir := mounted(t, device(t, mkfs...), fstype, Options{ReadOnly: true, Flags: []string{"nosuid", "nodev", "noatime"}})
			before := at(t, dir)
			if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Fatalf("writing to a read-only mount gave %v", err)
			}
			if before.SuperOptions[0] != "ro" || before.Options[0] != "ro" {
				t.Fatalf("mounted as %+v, want both read-only", before)
			}
			if err := SetWritable(dir); err != nil {
				t.Fatal(err)
			}
			after := at(t, dir)
			if after.ID != before.ID || after.SuperOptions[0] != "rw" || after.flags() != before.flags() || !slices.Contains(after.Options, "nosuid") {
				t.Errorf("went from %+v to %+v", before, after)
			}
			if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); err != nil {
				t.Error(err)
			}
			// What is writable already stays so.
			if err := SetWritable(dir); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSetWritableLeavesOtherMountsAlone(t *testing.T) {
	testenv.NeedRoot(t)
	source := device(t, "mkfs.ext4", "-q", "-F")
	first := mounted(t, source, "ext4", Options{ReadOnly: true})
	second := mounted(t, source, "ext4", Options{ReadOnly: true})
	if err := SetWritable(first); err != nil {
		t.Fatal(err)
	}
	if e := at(t, second); e.Options[0] != "ro" {
		t.Errorf("the other mount became %+v", e)
	}
}

func TestReconfigureChangesNothingElse(t *testing.T) {
	testenv.NeedRoot(t)
	for _, readOnly := range []bool{true, false} {
		dir := mounted(t, device(t, "mkfs.btrfs", "-q", "-f"), "btrfs", Options{ReadOnly: readOnly, Flags: []string{"nosuid"}, Data: []string{"compress=zstd:1"}})
		before := at(t, dir)
		if !slices.Contains(before.SuperOptions, "compress=zstd:1") {
			t.Errorf("mounted with %v", before.SuperOptions)
		}
		if err := Reconfigure(dir, "commit=77"); err != nil {
			t.Fatal(err)
		}
		after := at(t, dir)
		if !slices.Contains(after.SuperOptions, "commit=77") || !slices.Contains(after.SuperOptions, "compress=zstd:1") ||
			after.SuperOptions[0] != before.SuperOptions[0] || !slices.Equal(after.Options, before.Options) {
			t.Errorf("went from %+v to %+v", before, after)
		}
		if err := SetWritable(dir, "compress=lzo"); err != nil {
			t.Fatal(err)
		}
		if e := at(t, dir); !slices.Contains(e.SuperOptions, "compress=lzo") || e.SuperOptions[0] != "rw" {
			t.Errorf("became %+v", e)
		}
	}
}

func TestRefusalsCarryTheKernelsReason(t *testing.T) {
	testenv.NeedRoot(t)
	source := device(t, "mkfs.ext4", "-q", "-F")
	dir := t.TempDir()
	err := Mount(source, dir, "ext4", Options{Data: []string{"no_such_option=1"}})
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "no_such_option") || !strings.Contains(err.Error(), ": ext4: ") {
		t.Errorf("an unknown option gave %v, want EINVAL and the words of ext4", err)
	}
	if err := Mount(source, dir, "ext4", Options{Flags: []string{"nonsense"}}); err == nil {
		t.Error("an unknown flag was taken")
	}
	if err := Mount(source, filepath.Join(dir, "missing"), "ext4", Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing mount point gave %v", err)
	}
	if err := SetWritable(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing mount gave %v", err)
	}
	if err := SetWritable(dir); !errors.Is(err, unix.EINVAL) { // no mount point
		t.Errorf("a plain directory gave %v", err)
	}
}

func TestBusyUnmountNamesTheProcess(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "sleep")
	source := device(t, "mkfs.ext4", "-q", "-F")
	dir := mounted(t, source, "ext4", Options{})

	for name, use := range map[string]func(*exec.Cmd, *os.File){
		"by its directory":  func(c *exec.Cmd, _ *os.File) { c.Dir = dir },
		"by an opened file": func(c *exec.Cmd, f *os.File) { c.ExtraFiles = []*os.File{f} },
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sleep", "600")
			use(cmd, f)
			if err := errors.Join(cmd.Start(), f.Close()); err != nil {
				t.Fatal(err)
			}
			defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
			err = Unmount(dir, false)
			var busy *BusyError
			if !errors.As(err, &busy) || !errors.Is(err, unix.EBUSY) || !slices.Equal(busy.Users, []User{{cmd.Process.Pid, "sleep"}}) {
				t.Errorf("got %v, want sleep to be named", err)
			}
		})
	}

	inner := filepath.Join(dir, "inner")
	if err := errors.Join(os.Mkdir(inner, 0o755), Mount("none", inner, "tmpfs", Options{})); err != nil {
		t.Fatal(err)
	}
	var busy *BusyError
	if err := Unmount(dir, false); !errors.As(err, &busy) || !slices.Equal(busy.Mounts, []string{inner}) {
		t.Errorf("got %v, want the mount inside to be named", err)
	}
	if err := Unmount(dir, true); err != nil {
		t.Fatal(err)
	}
	if err := Unmount(dir, false); !errors.Is(err, unix.EINVAL) {
		t.Errorf("unmounting what is no mount gave %v", err)
	}
}

func TestWatchTellsOfEachMount(t *testing.T) {
	testenv.NeedRoot(t)
	leaks := goleak.IgnoreCurrent()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	changes := make(chan struct{}, 1024)
	done := make(chan error, 1)
	go func() { done <- New().Watch(ctx, func() { changes <- struct{}{} }) }()
	<-changes // it watches
	told := func(what string) {
		t.Helper()
		select {
		case <-changes:
		case err := <-done:
			t.Fatalf("the watch ended with %v before the %s was told", err, what)
		}
	}
	// Many times, since a change that another poll of the descriptor took away
	// would be missing only now and then.
	t.Cleanup(func() { _ = Unmount(dir, true) })
	for range 500 {
		if err := Mount("none", dir, "tmpfs", Options{}); err != nil {
			t.Fatal(err)
		}
		told("mount")
		if fs := at(t, dir).FSType; fs != "tmpfs" {
			t.Fatalf("%s is on %s", dir, fs)
		}
		if err := Unmount(dir, false); err != nil {
			t.Fatal(err)
		}
		told("unmount")
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the watch ended with %v", err)
	}
	goleak.VerifyNone(t, leaks)
}
