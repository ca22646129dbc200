package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	siderolabs "github.com/siderolabs/go-blockdevice/v2/block"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

const mib = 1 << 20

// image makes a sparse file.
func image(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// attach puts a loop over f until the test ends.
func attach(t *testing.T, f *os.File, o LoopOptions) Loop {
	t.Helper()
	s := New()
	l, err := s.AttachLoop(t.Context(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := s.DetachLoop(context.Background(), l.ID)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrChanged) {
			t.Errorf("left behind: %v", err)
		}
	})
	return l
}

func loop(t *testing.T, size int64) Loop { return attach(t, image(t, size), LoopOptions{}) }

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	testenv.NeedTool(t, name)
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func open(t *testing.T, path string) *Handle {
	t.Helper()
	h, err := New().Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func probe(t *testing.T, h *Handle) Device {
	t.Helper()
	d, err := h.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mountUntilEnd(t *testing.T, source, fstype string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(source, dir, fstype, 0, ""); err != nil {
		t.Fatalf("mount %s: %v", source, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	return dir
}

func types(list []Signature) []string {
	var names []string
	for _, s := range list {
		if !slices.Contains(names, s.Type) {
			names = append(names, s.Type)
		}
	}
	return names
}

func TestWipeLeavesNothing(t *testing.T) {
	testenv.NeedRoot(t)
	sfdisk := func(label string) func(*testing.T, string) {
		return func(t *testing.T, node string) {
			testenv.NeedTool(t, "sfdisk")
			cmd := exec.Command("sfdisk", "--no-tell-kernel", "--no-reread", "--wipe", "never", "-q", node)
			cmd.Stdin = strings.NewReader("label: " + label + "\nsize=16MiB\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sfdisk: %v\n%s", err, out)
			}
		}
	}
	tool := func(args ...string) func(*testing.T, string) {
		return func(t *testing.T, node string) { run(t, args[0], append(args[1:], node)...) }
	}
	for _, c := range []struct {
		want string
		make []func(*testing.T, string)
	}{
		{"ext4", []func(*testing.T, string){tool("mkfs.ext4", "-q", "-F")}},
		{"xfs", []func(*testing.T, string){tool("mkfs.xfs", "-q", "-f")}},
		{"btrfs", []func(*testing.T, string){tool("mkfs.btrfs", "-q", "-f")}},
		{"vfat", []func(*testing.T, string){tool("mkfs.vfat")}},
		{"swap", []func(*testing.T, string){tool("mkswap")}},
		{"crypto_LUKS", []func(*testing.T, string){func(t *testing.T, node string) {
			testenv.NeedTool(t, "cryptsetup")
			cmd := exec.Command("cryptsetup", "luksFormat", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode", "--key-file", "-", node)
			cmd.Stdin = strings.NewReader("secret")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("cryptsetup: %v\n%s", err, out)
			}
		}}},
		{"gpt", []func(*testing.T, string){sfdisk("gpt")}},
		{"dos", []func(*testing.T, string){sfdisk("dos")}},
		// The layers of a disk's long life, of which none hides another.
		{"btrfs gpt", []func(*testing.T, string){tool("mkfs.btrfs", "-q", "-f"), sfdisk("gpt")}},
		{"ext4 dos", []func(*testing.T, string){tool("mkfs.ext4", "-q", "-F"), sfdisk("dos")}},
	} {
		t.Run(c.want, func(t *testing.T) {
			l := loop(t, 400*mib)
			for _, f := range c.make {
				f(t, l.Path)
			}
			h := open(t, l.Path)
			d := probe(t, h)
			for want := range strings.FieldsSeq(c.want) {
				if !slices.Contains(types(d.Signatures), want) {
					t.Fatalf("found %v before the wipe, want %s", types(d.Signatures), c.want)
				}
			}
			if err := h.Lock(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := h.Wipe(t.Context()); err != nil {
				t.Fatal(err)
			}
			if d := probe(t, h); len(d.Signatures) != 0 {
				t.Errorf("left after the wipe: %+v", d.Signatures)
			}
			// Another program agrees.
			out, err := exec.Command("blkid", "-p", l.Path).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 2 {
				t.Errorf("blkid still sees %q (%v)", out, err)
			}
		})
	}
}

// The partition table stays, and what is no Btrfs; every superblock goes.
func TestWipeBtrfsWipesNothingElse(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "mkfs.btrfs")
	l := loop(t, 400*mib)
	run(t, "mkfs.btrfs", "-q", "-f", l.Path)
	h := open(t, l.Path)
	f, err := os.OpenFile(l.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	const first, second = 64 << 10, 64 << 20
	around := map[int64][]byte{0: {1, 2, 3}, first - 1: {4}, first + 4096: {5}, second - 1: {6}, second + 4096: {7}}
	for at, data := range around {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}

	dir := mountUntilEnd(t, l.Path, "btrfs")
	if err := h.WipeBtrfs(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("wiping a mounted device gave %v, want EBUSY", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 { // there is nothing left to do the second time
		if err := h.WipeBtrfs(); err != nil {
			t.Fatal(err)
		}
		if d := probe(t, h); len(d.Signatures) > 0 {
			t.Errorf("left after the wipe: %+v", d.Signatures)
		}
	}
	for at, want := range around {
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, at); err != nil || !bytes.Equal(got, want) {
			t.Errorf("at %d there is %v (%v), want %v", at, got, err, want)
		}
	}
}

func TestRestoreBtrfsWritesNothingElse(t *testing.T) {
	testenv.NeedRoot(t)
	l := loop(t, 80*mib)
	h := open(t, l.Path)
	const first, second = 64 << 10, 64 << 20
	var asked []uint64
	mend := func(places ...uint64) func(uint64, []byte) []byte {
		asked = nil
		return func(at uint64, block []byte) []byte {
			asked = append(asked, at)
			if !slices.Contains(places, at) {
				return nil
			}
			return append([]byte{1}, block[1:]...)
		}
	}
	read := func() []byte {
		t.Helper()
		data, err := os.ReadFile(l.Path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	before := read()
	// Without the primary one there is nothing to be a part of.
	if err := h.RestoreBtrfs(mend(second)); !errors.Is(err, ErrChanged) || !bytes.Equal(read(), before) {
		t.Errorf("with the second alone: %v", err)
	}
	if want := []uint64{first, second}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
	for _, places := range [][]uint64{{first}, {first, second}} {
		want := bytes.Clone(before)
		for _, at := range places {
			want[at] = 1
		}
		if err := h.RestoreBtrfs(mend(places...)); err != nil || !bytes.Equal(read(), want) {
			t.Errorf("restoring %v: %v", places, err)
		}
	}
	held, err := os.OpenFile(l.Path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	if err := h.RestoreBtrfs(mend(first)); !errors.Is(err, unix.EBUSY) || asked != nil {
		t.Errorf("in use: %v", err)
	}
}

func TestWipeIsRefusedWhileInUse(t *testing.T) {
	testenv.NeedRoot(t)
	l := loop(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", l.Path)
	h := open(t, l.Path)
	dir := mountUntilEnd(t, l.Path, "ext4")
	if d := probe(t, h); !slices.Contains(d.Holders, Holder{"mount", dir}) {
		t.Errorf("held by %v, want the mount on %s", d.Holders, dir)
	}
	if err := h.Wipe(t.Context()); !errors.Is(err, unix.EBUSY) {
		t.Errorf("wiping a mounted device gave %v, want EBUSY", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if d := probe(t, h); !slices.Contains(types(d.Signatures), "ext4") || len(d.Holders) != 0 {
		t.Errorf("after the refusal there are %v, held by %v", d.Signatures, d.Holders)
	}
}

func TestReadOnlyDeviceIsNotWiped(t *testing.T) {
	testenv.NeedRoot(t)
	f := image(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", f.Name())
	l := attach(t, f, LoopOptions{ReadOnly: true})
	h := open(t, l.Path)
	if d := probe(t, h); !d.ReadOnly || !l.ReadOnly {
		t.Errorf("a read-only loop reads %+v", d)
	}
	if err := h.Wipe(t.Context()); !errors.Is(err, ErrReadOnly) {
		t.Errorf("wiping gave %v, want ErrReadOnly", err)
	}
	if err := h.WipeBtrfs(); !errors.Is(err, ErrReadOnly) {
		t.Errorf("wiping the superblocks gave %v, want ErrReadOnly", err)
	}
	if err := h.RestoreBtrfs(func(_ uint64, block []byte) []byte { return block }); !errors.Is(err, ErrReadOnly) {
		t.Errorf("restoring the superblocks gave %v, want ErrReadOnly", err)
	}
	if err := h.Discard(t.Context()); !errors.Is(err, ErrReadOnly) {
		t.Errorf("discarding gave %v, want ErrReadOnly", err)
	}
	if d := probe(t, h); !slices.Contains(types(d.Signatures), "ext4") {
		t.Errorf("after the refusal there are %v", d.Signatures)
	}
}

func TestSymlinkThatChangesAfterOpen(t *testing.T) {
	testenv.NeedRoot(t)
	named, other := loop(t, 64*mib), loop(t, 64*mib)
	for _, l := range []Loop{named, other} {
		run(t, "mkfs.ext4", "-q", "-F", l.Path)
	}
	link := filepath.Join(t.TempDir(), "disk")
	if err := os.Symlink(named.Path, link); err != nil {
		t.Fatal(err)
	}
	h := open(t, link)
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other.Path, link); err != nil {
		t.Fatal(err)
	}
	if err := h.Wipe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h.ID() != named.ID {
		t.Errorf("opened %+v, want %+v", h.ID(), named.ID)
	}
	if d, err := New().ByPath(t.Context(), link); err != nil || !slices.Contains(types(d.Signatures), "ext4") {
		t.Errorf("the other device now has %v, %v", d.Signatures, err)
	}
	if d, err := New().Lookup(t.Context(), named.Num); err != nil || len(d.Signatures) != 0 {
		t.Errorf("the opened device still has %v, %v", d.Signatures, err)
	}
}

func TestOpenNamesWhatIsNoBlockDevice(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, kind := range map[string]string{dir: "a directory", image(t, 1).Name(): "a regular file", "/dev/null": "a character device", pipe: "a named pipe"} {
		_, err := s.ByPath(t.Context(), path)
		var typed *NotBlockDeviceError
		if !errors.As(err, &typed) || typed.Kind != kind || !errors.Is(err, ErrNotBlockDevice) {
			t.Errorf("%s gave %v, want %s", path, err, kind)
		}
	}
	if _, err := s.Open(t.Context(), filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing path gave %v", err)
	}
	if _, err := s.Lookup(t.Context(), DevNum{4095, 4095}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing number gave %v", err)
	}
}

func TestMediumChangedAfterOpen(t *testing.T) {
	testenv.NeedRoot(t)
	f := image(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", f.Name())
	h := open(t, loop(t, 64*mib).Path)
	// As a stick that was pulled and another one put in.
	h.id.DiskSeq--
	if _, err := h.Probe(t.Context()); !errors.Is(err, ErrChanged) {
		t.Errorf("probing gave %v, want ErrChanged", err)
	}
	if err := h.Wipe(t.Context()); !errors.Is(err, ErrChanged) {
		t.Errorf("wiping gave %v, want ErrChanged", err)
	}
}

func TestLockWaitsForTheOther(t *testing.T) {
	testenv.NeedRoot(t)
	l := loop(t, 64*mib)
	first, second := open(t, l.Path), open(t, l.Path)
	if err := first.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	locked := make(chan error, 1)
	go func() { locked <- second.Lock(ctx) }()
	cancel()
	if err := <-locked; !errors.Is(err, context.Canceled) {
		t.Fatalf("the second lock gave %v, want it to end with its context", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(t.Context()); err != nil {
		t.Errorf("the lock was not given up by Close: %v", err)
	}
}

// partition adds a partition to the kernel's view of a loop, as a scan would.
func partition(t *testing.T, l Loop, number int, start, length uint64) string {
	t.Helper()
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := siderolabs.NewFromFile(f).KernelPartitionAdd(number, start, length); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f, err := os.Open(l.Path)
		if err != nil {
			return
		}
		defer func() { _ = f.Close() }()
		_ = siderolabs.NewFromFile(f).KernelPartitionDelete(number) // a wipe may have dropped it
	})
	return fmt.Sprintf("%sp%d", l.Path, number)
}

func TestPartitions(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	l := loop(t, 256*mib)
	one := partition(t, l, 1, mib, 100*mib)
	two := partition(t, l, 2, 128*mib, 100*mib)
	run(t, "mkfs.ext4", "-q", "-F", one)
	dir := mountUntilEnd(t, one, "ext4")

	d, err := s.ByPath(t.Context(), two)
	if err != nil {
		t.Fatal(err)
	}
	if d.Partition != 2 || d.Path != two || "/dev/"+d.Disk != l.Path || d.Size != 100*mib || d.DiskSeq != l.DiskSeq || len(d.Holders) != 0 {
		t.Errorf("the free partition reads %+v", d)
	}
	if disk, err := s.WholeDisk(d.Num); err != nil || !disk.Same(l.ID) {
		t.Errorf("its disk is %+v, %v", disk, err)
	}
	disk, err := s.Lookup(t.Context(), l.Num)
	if err != nil {
		t.Fatal(err)
	}
	wanted := Holder{"partition", filepath.Base(one) + ": mount " + dir}
	if !slices.Equal(disk.Holders, []Holder{wanted}) || len(disk.Partitions) != 2 {
		t.Errorf("the disk is held by %v", disk.Holders)
	}
	if ok, holders, err := s.Unused(t.Context(), d.Num); ok || err != nil || !slices.Equal(holders, []Holder{wanted}) {
		t.Errorf("unused: %v, %v, %v", ok, holders, err)
	}
	if id, err := s.Of(dir); err != nil || id.Path != one {
		t.Errorf("below %s is %+v, %v", dir, id, err)
	}

	// The sibling can be had while the disk as a whole cannot.
	h := open(t, two)
	if err := h.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.Wipe(t.Context()); err != nil {
		t.Errorf("wiping the free partition: %v", err)
	}
	whole := open(t, l.Path)
	if err := whole.Wipe(t.Context()); !errors.Is(err, unix.EBUSY) {
		t.Errorf("wiping the disk of a mounted partition gave %v, want EBUSY", err)
	}
	if err := errors.Join(h.Close(), unix.Unmount(dir, 0)); err != nil {
		t.Fatal(err)
	}
	if err := whole.Wipe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := probe(t, whole); len(d.Partitions) != 0 {
		t.Errorf("the wiped disk still has %v", d.Partitions)
	}
}

func TestUnusedNamesEveryHolder(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	stick := loop(t, 512*mib)
	self := Holder{"process", fmt.Sprintf("%s (pid %d)", attr("/proc/self", "comm"), os.Getpid())}
	unused := func() (bool, []Holder) {
		t.Helper()
		for {
			ok, holders, err := s.Unused(t.Context(), stick.Num)
			if err != nil {
				t.Fatal(err)
			}
			// A program that looks at every disk, such as udev or another
			// package's test, passes.
			if !slices.ContainsFunc(holders, func(h Holder) bool { return h.Kind == "process" && h != self }) {
				return ok, holders
			}
		}
	}
	if ok, holders := unused(); !ok {
		t.Fatalf("a fresh loop is held by %v", holders)
	}

	h := open(t, stick.Path)
	if ok, holders := unused(); ok || !slices.Equal(holders, []Holder{self}) {
		t.Errorf("an open descriptor: %v, %v", ok, holders)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}

	// An image on a mount of the stick, as on a live medium. The loop over it
	// stays when the mount has gone out of sight.
	run(t, "mkfs.ext4", "-q", "-F", stick.Path)
	dir := mountUntilEnd(t, stick.Path, "ext4")
	inner, err := os.Create(filepath.Join(dir, "root.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := inner.Truncate(16 * mib); err != nil {
		t.Fatal(err)
	}
	over := attach(t, inner, LoopOptions{ReadOnly: true})
	if err := inner.Close(); err != nil {
		t.Fatal(err)
	}
	loopHolder := Holder{"loop", filepath.Base(over.Path)}
	if ok, holders := unused(); ok || !slices.Equal(holders, []Holder{{"mount", dir}, loopHolder}) {
		t.Errorf("a mount and a loop on it: %v, %v", ok, holders)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if ok, holders := unused(); ok || !slices.Equal(holders, []Holder{loopHolder}) {
		t.Errorf("after a lazy unmount: %v, %v", ok, holders)
	}
	if err := s.DetachLoop(t.Context(), over.ID); err != nil {
		t.Fatal(err)
	}
	if ok, holders := unused(); !ok {
		t.Errorf("after all is gone it is held by %v", holders)
	}

	run(t, "mkswap", stick.Path)
	if err := swapon(stick.Path); err != nil {
		t.Fatal(err)
	}
	ok, holders := unused()
	if err := swapoff(stick.Path); err != nil {
		t.Fatal(err)
	}
	if ok || !slices.Equal(holders, []Holder{{"swap", stick.Path}}) {
		t.Errorf("swap: %v, %v", ok, holders)
	}
}

func TestUnusedSeesAClaimFromElsewhere(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	l := loop(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", l.Path)
	// A mount that no table shows: detached, kept alive by its descriptor.
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.FsconfigSetString(fs, "source", l.Path), unix.FsconfigCreate(fs)); err != nil {
		t.Fatal(err)
	}
	ok, holders, err := s.Unused(t.Context(), l.Num)
	if ok || err != nil || len(holders) != 1 || holders[0].Kind != "claim" {
		t.Errorf("unused: %v, %v, %v, want a claim", ok, holders, err)
	}
	if err := unix.Close(fs); err != nil {
		t.Fatal(err)
	}
}

func swapon(path string) error  { return swapCall(unix.SYS_SWAPON, path) }
func swapoff(path string) error { return swapCall(unix.SYS_SWAPOFF, path) }

func swapCall(number uintptr, path string) error {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(number, uintptr(unsafe.Pointer(name)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func TestBtrfsMountCountsForEveryMember(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	a, b := loop(t, 512*mib), loop(t, 512*mib)
	run(t, "mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "single", a.Path, b.Path)
	run(t, "btrfs", "device", "scan", a.Path, b.Path)
	dir := mountUntilEnd(t, a.Path, "btrfs")
	for _, l := range []Loop{a, b} {
		d, err := s.Lookup(t.Context(), l.Num)
		if err != nil || !slices.Contains(d.Holders, Holder{"mount", dir}) {
			t.Errorf("%s is held by %v, %v, want the mount", l.Path, d.Holders, err)
		}
	}
	if id, err := s.Of(dir); err != nil || id.Num != a.Num && id.Num != b.Num {
		t.Errorf("below %s is %+v, %v", dir, id, err)
	}
	// A file on it makes its loop a user of both as well.
	f, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(16*mib), f.Sync()); err != nil {
		t.Fatal(err)
	}
	over := attach(t, f, LoopOptions{})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, l := range []Loop{a, b} {
		d, err := s.Lookup(t.Context(), l.Num)
		if err != nil || !slices.Contains(d.Holders, Holder{"loop", filepath.Base(over.Path)}) {
			t.Errorf("%s is held by %v, %v, want the loop", l.Path, d.Holders, err)
		}
	}
	if err := s.DetachLoop(t.Context(), over.ID); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	run(t, "btrfs", "device", "scan", "--forget", a.Path)
	run(t, "btrfs", "device", "scan", "--forget", b.Path)
}

func TestSeedOfASproutIsHeld(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	// A sprout's first device must never be a small one: the kernel oopses.
	seed, overlay := loop(t, 1024*mib), loop(t, 1024*mib)
	run(t, "mkfs.btrfs", "-q", "-f", "-m", "single", seed.Path)
	run(t, "btrfstune", "-f", "-S", "1", seed.Path)
	dir := t.TempDir()
	if err := unix.Mount(seed.Path, dir, "btrfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	run(t, "btrfs", "device", "add", "-f", overlay.Path, dir)
	for _, l := range []Loop{seed, overlay} {
		d, err := s.Lookup(t.Context(), l.Num)
		if err != nil || !slices.Equal(d.Holders, []Holder{{"mount", dir}}) {
			t.Errorf("%s is held by %v, %v, want the mount", l.Path, d.Holders, err)
		}
		if ok, _, err := s.Unused(t.Context(), l.Num); ok || err != nil {
			t.Errorf("%s passes for unused (%v)", l.Path, err)
		}
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	for _, l := range []Loop{seed, overlay} {
		_ = exec.Command("btrfs", "device", "scan", "--forget", l.Path).Run()
	}
}

func TestOfAFileSystemWithoutADevice(t *testing.T) {
	testenv.NeedRoot(t)
	if _, err := New().Of("/proc"); !errors.Is(err, ErrNoDevice) {
		t.Errorf("below /proc: %v, want ErrNoDevice", err)
	}
}

func TestLoopKeepsWhatWasAskedFor(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	l := attach(t, image(t, 64*mib), LoopOptions{ReadOnly: true, Offset: mib, SizeLimit: 32 * mib})
	if l.Size != 32*mib || l.Offset != mib || l.SizeLimit != 32*mib || !l.ReadOnly || l.Autoclear || l.DiskSeq == 0 {
		t.Errorf("the loop reads %+v", l)
	}
	loops, err := s.Loops(t.Context())
	if err != nil || !slices.ContainsFunc(loops, func(x Loop) bool { return x.ID == l.ID }) {
		t.Errorf("the list %+v, %v lacks it", loops, err)
	}
	list, err := s.List(t.Context(), nil)
	if err != nil || !slices.ContainsFunc(list, func(d Device) bool { return d.ID == l.ID && d.BackingFile == l.BackingFile }) {
		t.Errorf("the list of devices %v lacks it", err)
	}
}

func TestDetachIsForTheOneMeant(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	l := loop(t, 16*mib)
	stale := l.ID
	stale.DiskSeq--
	if err := s.DetachLoop(t.Context(), stale); !errors.Is(err, ErrChanged) {
		t.Errorf("detaching by an old identity gave %v, want ErrChanged", err)
	}
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DetachLoop(t.Context(), l.ID); !errors.Is(err, ErrStillInUse) {
		t.Errorf("detaching while open gave %v, want ErrStillInUse", err)
	}
	if now, err := s.LoopStatus(l.Num); err != nil || !now.Autoclear {
		t.Errorf("it is now %+v, %v, want it to go with its last user", now, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.DetachLoop(t.Context(), l.ID); !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrChanged) {
		t.Errorf("detaching what is gone gave %v", err)
	}
}

func TestAutoclearLoopGoesWithItsLastUser(t *testing.T) {
	testenv.NeedRoot(t)
	s := New()
	f := image(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", f.Name())
	l := attach(t, f, LoopOptions{Autoclear: true})
	dir := mountUntilEnd(t, l.Path, "ext4")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.LoopStatus(l.Num); err != nil {
		t.Errorf("mounted, it is %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if now, err := s.LoopStatus(l.Num); err == nil && now.Same(l.ID) {
		t.Errorf("unmounted, it is still there: %+v", now)
	}
}

func TestDiscard(t *testing.T) {
	testenv.NeedRoot(t)
	l := loop(t, 64*mib)
	run(t, "mkfs.ext4", "-q", "-F", l.Path)
	err := open(t, l.Path).Discard(t.Context())
	if err != nil && !errors.Is(err, ErrNotSupported) {
		t.Error(err)
	}
}

func TestWatchTellsOfALoop(t *testing.T) {
	testenv.NeedRoot(t)
	leaks := goleak.IgnoreCurrent()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events := make(chan Event, 1024)
	done := make(chan error, 1)
	go func() { done <- New().Watch(ctx, func(e Event) { events <- e }) }()
	if first := <-events; first != (Event{}) {
		t.Fatalf("the first call told %+v, want the sign that it listens", first)
	}
	l := loop(t, 16*mib)
	for {
		select {
		case e := <-events:
			if e.Num != l.Num || e.Action != "change" {
				continue
			}
			if "/dev/"+e.Name != l.Path || e.DevType != "disk" {
				t.Errorf("told %+v", e)
			}
		case err := <-done:
			t.Fatalf("the watch ended with %v before the loop was told", err)
		}
		break
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the watch ended with %v", err)
	}
	goleak.VerifyNone(t, leaks)
}
