package seedtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Freezing and thawing a filesystem; linux/fs.h: _IOWR('X', 119, int) and 120.
const (
	ioctlFreeze = 0xC0045877
	ioctlThaw   = 0xC0045878
)

// DiskSpec says what disk to make.
type DiskSpec struct {
	// Dir is the directory its image is made in; required.
	Dir string
	// Size in bytes; 0 means 2 GiB. The image is sparse. Never sprout onto
	// less than 512 MiB: the kernel may not survive it.
	Size int64
	// Gate puts the image on a filesystem of its own that can be frozen, so
	// that [Disk.Hold] can stop the disk's writes and [Disk.Slow] slow them.
	Gate bool
}

// Disk is a loop device that stands for an internal disk. Make it with
// [NewDisk], give it back with [Disk.Close].
type Disk struct {
	// Path of the device, such as /dev/loop4.
	Path string
	// Image is its backing file.
	Image string

	// backing is what the kernel calls Image.
	backing string

	// gate is the mount point of the filesystem that holds Image, and outer
	// the disk that is on; both empty without a gate.
	gate  string
	outer *Disk

	mu     sync.Mutex
	frozen *os.File // open on gate while it is frozen
	stop   func()   // ends Slow, nil without one
}

// NewDisk attaches an empty disk.
func NewDisk(ctx context.Context, spec DiskSpec) (*Disk, error) {
	if spec.Size == 0 {
		spec.Size = 2 * GiB
	}
	d := &Disk{}
	if err := d.open(ctx, spec); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make a disk: %w", err), d.Close())
	}
	return d, nil
}

// OpenDisk is [NewDisk] for a test, which closes it.
func OpenDisk(t testing.TB, spec DiskSpec) *Disk {
	t.Helper()
	if spec.Dir == "" {
		spec.Dir = t.TempDir()
	}
	d, err := NewDisk(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *Disk) open(ctx context.Context, spec DiskSpec) error {
	dir := spec.Dir
	if dir == "" {
		return errors.New("no directory given")
	}
	if spec.Gate {
		// Room for the whole image and for the filesystem's own tables.
		outer, err := NewDisk(ctx, DiskSpec{Dir: dir, Size: spec.Size + spec.Size/16 + 64*MiB})
		if err != nil {
			return err
		}
		d.outer = outer
		if _, err := run(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-N", "16", "-m", "0",
			"-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=1", outer.Path); err != nil {
			return err
		}
		gate, err := os.MkdirTemp(dir, "gate-")
		if err != nil {
			return err
		}
		if err := mount(outer.Path, gate, "ext4", 0, ""); err != nil {
			return errors.Join(err, os.Remove(gate))
		}
		d.gate, dir = gate, gate
	}
	image, err := os.CreateTemp(dir, "disk-*.img")
	if err != nil {
		return err
	}
	d.Image = image.Name()
	if err := errors.Join(image.Truncate(spec.Size), image.Close()); err != nil {
		return err
	}
	if d.Path, err = attach(ctx, d.Image, false); err != nil {
		return err
	}
	d.backing = backing(d.Path)
	return dropPartitions(ctx, d.Path)
}

// backing is what the kernel calls the file behind a loop, "" if it has none.
func backing(loop string) string {
	name, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(name), "\n"), " (deleted)")
}

// dropPartitions takes away the partitions of a loop device: they outlive the
// backing file.
func dropPartitions(ctx context.Context, loop string) error {
	name := filepath.Base(loop)
	parts, err := filepath.Glob("/sys/block/" + name + "/" + name + "p*")
	if err != nil {
		return err
	}
	for _, part := range parts {
		number, err := strconv.Atoi(filepath.Base(part)[len(name)+1:])
		if err != nil {
			return err
		}
		if err := dropPartition(ctx, loop, number); err != nil {
			return err
		}
	}
	return nil
}

// dropPartition makes the kernel forget a partition. Somebody who looks at all
// block devices may have it open for a moment.
func dropPartition(ctx context.Context, disk string, number int) error {
	deadline := time.Now().Add(busyFor)
	for {
		_, err := run(ctx, "delpart", disk, strconv.Itoa(number))
		if err == nil || !strings.Contains(err.Error(), "busy") || time.Now().After(deadline) {
			return err
		}
		time.Sleep(busyPause)
	}
}

// How long others may have open what they look at in passing.
const (
	busyFor   = 15 * time.Second
	busyPause = 20 * time.Millisecond
)

// AddPartition makes partition number known to the kernel, start and size in
// bytes, and gives its device. Nothing is written to the disk; the partition
// goes with the disk.
func (d *Disk) AddPartition(ctx context.Context, number int, start, size int64) (string, error) {
	if _, err := run(ctx, "addpart", d.Path, strconv.Itoa(number),
		strconv.FormatInt(start/512, 10), strconv.FormatInt(size/512, 10)); err != nil {
		return "", err
	}
	return fmt.Sprintf("%sp%d", d.Path, number), nil
}

// Written gives the number of bytes written to the disk since boot, as the
// kernel counts them (Documentation/block/stat.rst).
func (d *Disk) Written() (int64, error) {
	raw, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path) + "/stat")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(raw))
	if len(fields) < 7 {
		return 0, fmt.Errorf("cannot read the counters of %s: %q", d.Path, raw)
	}
	sectors, err := strconv.ParseInt(fields[6], 10, 64)
	return 512 * sectors, err
}

// Hold stops all writes to a disk made with a gate, until [Disk.Let]: what is
// under way waits in the kernel, as on a stick that has hung. Reads go on.
// Whatever has to write waits in the kernel and cannot be killed meanwhile.
func (d *Disk) Hold() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gate == "" {
		return fmt.Errorf("cannot hold %s: it was made without a gate", d.Path)
	}
	if d.frozen != nil {
		return nil
	}
	f, err := os.Open(d.gate)
	if err != nil {
		return err
	}
	if err := ioctl(f, ioctlFreeze, 0); err != nil {
		return errors.Join(fmt.Errorf("cannot hold %s: %w", d.Path, err), f.Close())
	}
	d.frozen = f
	return nil
}

// HoldAfter waits until n more bytes were written to the disk and then holds
// it: that is how a test catches a move in the middle.
func (d *Disk) HoldAfter(ctx context.Context, n int64) error {
	start, err := d.Written()
	if err != nil {
		return err
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := d.Written()
		if err != nil {
			return err
		}
		if now-start >= n {
			return d.Hold()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("cannot hold %s after %d bytes: %d were written: %w", d.Path, n, now-start, context.Cause(ctx))
		}
	}
}

// Let lets writes go on after [Disk.Hold]. Without one it does nothing.
func (d *Disk) Let() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.frozen == nil {
		return nil
	}
	err := ioctl(d.frozen, ioctlThaw, 0)
	err = errors.Join(err, d.frozen.Close())
	d.frozen = nil
	return err
}

// Slow keeps the writes to a disk made with a gate to about rate bytes a
// second, by holding it whenever it is ahead, until [Disk.Fast] or
// [Disk.Close]. [Disk.Hold] must not be used meanwhile.
func (d *Disk) Slow(rate int64) error {
	if d.gate == "" {
		return fmt.Errorf("cannot slow %s: it was made without a gate", d.Path)
	}
	if err := d.Fast(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	d.mu.Lock()
	d.stop = func() { cancel(); <-done }
	d.mu.Unlock()
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		before, _ := d.Written()
		last, credit := time.Now(), int64(0)
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			written, err := d.Written()
			if err != nil {
				return
			}
			now := time.Now()
			// At most a fifth of a second can be saved up while idle.
			credit += int64(now.Sub(last).Seconds()*float64(rate)) - (written - before)
			credit = min(credit, rate/5)
			last, before = now, written
			if credit < 0 {
				_ = d.Hold()
			} else {
				_ = d.Let()
			}
		}
	}()
	return nil
}

// Fast ends [Disk.Slow].
func (d *Disk) Fast() error {
	d.mu.Lock()
	stop := d.stop
	d.stop = nil
	d.mu.Unlock()
	if stop != nil {
		stop()
	}
	return d.Let()
}

// Close takes the disk away again, with its partitions and its image. It goes
// on after an error, so that as little as possible is left. It may be called
// twice.
func (d *Disk) Close() error {
	errs := []error{d.Fast()}
	if d.Path != "" {
		// A test may have detached it, and somebody else got the loop since.
		if now := backing(d.Path); now == "" || now == d.backing {
			errs = append(errs, dropPartitions(context.Background(), d.Path))
		}
		if now := backing(d.Path); now != "" && now == d.backing {
			errs = append(errs, detach(d.Path))
		}
		d.Path = ""
	}
	if d.Image != "" {
		errs = append(errs, os.Remove(d.Image))
		d.Image = ""
	}
	if d.gate != "" {
		errs = append(errs, unmount(d.gate), os.Remove(d.gate))
		d.gate = ""
	}
	if d.outer != nil {
		errs = append(errs, d.outer.Close())
		d.outer = nil
	}
	return errors.Join(errs...)
}

// MediaStart is where the first partition of a [Stick] starts, in bytes.
const mediaStart = 1 * MiB

// StickSpec says what stick to make.
type StickSpec struct {
	// Dir is the directory its image is made in; required.
	Dir string
	// Seed is the path of the image to put on it as /LiveOS/root.img; required.
	Seed string
	// PersistSize is the size in bytes of the empty second partition, at
	// least 512 MiB; 0 means that there is none.
	PersistSize int64
	// Free is the size in bytes of free space for a partition, at least 512 MiB.
	// The stick then has a GPT that was made for an image without it, as a stick
	// has to which an image was copied; 0 means an MBR without free space.
	Free int64
	// Gate as in [DiskSpec].
	Gate bool
}

// Stick is a disk as a live medium has it: a partition table, an ext4
// partition with the seed, mounted read-only, and an empty partition for
// persistence. Make it with [NewStick], give it back with [Stick.Close].
type Stick struct {
	*Disk
	// Media is the device of the first partition.
	Media string
	// MountPoint is where it is mounted.
	MountPoint string
	// Seed is the path of the seed image on it.
	Seed string
	// Persist is the device of the second partition, "" if there is none.
	Persist string

	mounted bool
}

// NewStick makes a stick and plugs it in.
func NewStick(ctx context.Context, spec StickSpec) (*Stick, error) {
	s := &Stick{}
	if err := s.open(ctx, spec); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make a stick: %w", err), s.Close())
	}
	return s, nil
}

// OpenStick is [NewStick] for a test, which closes it.
func OpenStick(t testing.TB, spec StickSpec) *Stick {
	t.Helper()
	if spec.Dir == "" {
		spec.Dir = t.TempDir()
	}
	s, err := NewStick(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *Stick) open(ctx context.Context, spec StickSpec) error {
	if spec.PersistSize != 0 && spec.PersistSize < 512*MiB {
		return errors.New("a persistence partition under 512 MiB is not safe to sprout onto")
	}
	info, err := os.Stat(spec.Seed)
	if err != nil {
		return err
	}
	mediaSize := (info.Size()+128*MiB)/MiB*MiB + info.Size()/16/MiB*MiB
	persistStart := mediaStart + mediaSize
	s.Disk, err = NewDisk(ctx, DiskSpec{
		Dir: spec.Dir, Size: persistStart + spec.PersistSize + spec.Free + MiB, Gate: spec.Gate,
	})
	if err != nil {
		return err
	}
	parts := [][2]int64{{mediaStart, mediaSize}, {persistStart, spec.PersistSize}}
	if spec.Free == 0 {
		err = writeAt(s.Path, partitionTable(parts...), 0)
	} else {
		err = smallGPT(ctx, s.Path, spec.Dir, persistStart+spec.PersistSize+MiB, parts)
	}
	if err != nil {
		return err
	}
	if s.Media, err = s.AddPartition(ctx, 1, mediaStart, mediaSize); err != nil {
		return err
	}
	if spec.PersistSize > 0 {
		if s.Persist, err = s.AddPartition(ctx, 2, persistStart, spec.PersistSize); err != nil {
			return err
		}
	}
	if _, err := run(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-N", "64", "-m", "0", "-L", "LIVE",
		"-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=1", s.Media); err != nil {
		return err
	}
	if s.MountPoint, err = os.MkdirTemp(spec.Dir, "stick-"); err != nil {
		return err
	}
	if err := s.mount(0); err != nil {
		return err
	}
	s.Seed = filepath.Join(s.MountPoint, "LiveOS", "root.img")
	if err := os.Mkdir(filepath.Dir(s.Seed), 0o755); err != nil {
		return err
	}
	if _, err := copyFile(s.Seed, spec.Seed); err != nil {
		return err
	}
	// Written and read-only from here on, as a live system mounts its medium.
	if err := s.unmount(); err != nil {
		return err
	}
	return s.mount(unix.MS_RDONLY)
}

func (s *Stick) mount(flags uintptr) error {
	err := mount(s.Media, s.MountPoint, "ext4", flags, "")
	s.mounted = s.mounted || err == nil
	return err
}

func (s *Stick) unmount() error {
	if !s.mounted {
		return nil
	}
	s.mounted = false
	return unmount(s.MountPoint)
}

// Unmount unmounts the first partition: what an unplugged stick needs first.
// It fails while the seed is in use.
func (s *Stick) Unmount() error {
	if !s.mounted {
		return nil
	}
	if err := UnmountIdle(s.MountPoint); err != nil {
		return err
	}
	s.mounted = false
	return nil
}

// Close unplugs the stick: it unmounts it and takes the disk away. It goes on
// after an error and may be called twice.
func (s *Stick) Close() error {
	errs := []error{s.unmount()}
	if s.MountPoint != "" {
		errs = append(errs, os.Remove(s.MountPoint))
		s.MountPoint = ""
	}
	if s.Disk != nil {
		errs = append(errs, s.Disk.Close())
	}
	return errors.Join(errs...)
}

// partitionTable is an MBR with the given partitions (start, size in bytes);
// those of size 0 are left out.
func partitionTable(parts ...[2]int64) []byte {
	var b bytes.Buffer
	b.Write(make([]byte, 440))
	b.WriteString("SEED") // disk signature: PARTUUIDs start with 44454553
	b.Write(make([]byte, 2))
	for _, p := range parts {
		if p[1] > 0 {
			b.Write([]byte{0, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff})
			_ = binary.Write(&b, binary.LittleEndian, []uint32{uint32(p[0] / 512), uint32(p[1] / 512)})
		}
	}
	b.Write(make([]byte, 510-b.Len()))
	b.Write([]byte{0x55, 0xaa})
	return b.Bytes()
}

// smallGPT writes a GUID partition table to device that was made for a disk of
// the given size.
func smallGPT(ctx context.Context, device, dir string, size int64, parts [][2]int64) (err error) {
	image, err := os.CreateTemp(dir, "gpt-*.img")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, image.Close(), os.Remove(image.Name())) }()
	var script strings.Builder
	script.WriteString("label: gpt\n")
	for _, p := range parts {
		if p[1] > 0 {
			fmt.Fprintf(&script, "start=%d, size=%d\n", p[0]/512, p[1]/512)
		}
	}
	table := filepath.Join(dir, "gpt.script")
	if err := errors.Join(os.WriteFile(table, []byte(script.String()), 0o600), image.Truncate(size)); err != nil {
		return err
	}
	if _, err := run(ctx, "sh", "-c", `sfdisk --quiet --no-tell-kernel "$0" <"$1"`, image.Name(), table); err != nil {
		return err
	}
	for _, at := range []int64{0, size - MiB} { // both copies
		copied := make([]byte, MiB)
		if _, err := image.ReadAt(copied, at); err != nil {
			return err
		}
		if err := writeAt(device, copied, at); err != nil {
			return err
		}
	}
	return os.Remove(table)
}

func writeAt(path string, data []byte, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, at)
	return errors.Join(err, f.Sync(), f.Close())
}

// attach gives a new loop device on image.
func attach(ctx context.Context, image string, readOnly bool) (string, error) {
	args := []string{"--find", "--show"}
	if readOnly {
		args = append(args, "--read-only")
	}
	return run(ctx, "losetup", append(args, image)...)
}

// detach takes the backing file off a loop device. While something still has
// the device open the kernel puts it off until the last close.
func detach(loop string) error {
	f, err := os.OpenFile(loop, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	err = ioctl(f, unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		err = nil // not attached any more
	}
	if err != nil {
		err = fmt.Errorf("cannot detach %s: %w", loop, err)
	}
	return errors.Join(err, f.Close())
}

// detachIdle is detach for a loop device that nobody uses; it returns once those
// are gone who look at it in passing.
func detachIdle(loop string) error {
	before := backing(loop)
	if err := detach(loop); err != nil {
		return err
	}
	for deadline := time.Now().Add(busyFor); before != "" && backing(loop) == before; time.Sleep(busyPause) {
		if time.Now().After(deadline) {
			return fmt.Errorf("cannot detach %s: it is still in use", loop)
		}
	}
	return nil
}

// mount mounts a device once those are gone who look at it in passing: some take
// it for themselves for that moment.
func mount(device, dir, fstype string, flags uintptr, options string) error {
	deadline := time.Now().Add(busyFor)
	for {
		err := unix.Mount(device, dir, fstype, flags, options)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("cannot mount %s on %s: %w", device, dir, err)
		}
		time.Sleep(busyPause)
	}
}

// unmount unmounts dir. If it stays busy it is taken out of the tree all the
// same, and the error says so.
func unmount(dir string) error {
	err := UnmountIdle(dir)
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	return err
}

// UnmountIdle unmounts dir once those are gone who have a look at it in
// passing, as the daemon does when mounts and devices come and go.
func UnmountIdle(dir string) error {
	deadline := time.Now().Add(busyFor)
	for {
		err := unix.Unmount(dir, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("cannot unmount %s: %w", dir, err)
		}
		time.Sleep(busyPause)
	}
}

func ioctl(f *os.File, request, arg uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, arg); errno != 0 {
		return errno
	}
	return nil
}

// copyN is io.CopyN, except that an input that ends early is an error.
func copyN(out *os.File, in *os.File, n int64) (int64, error) {
	m, err := io.CopyN(out, in, n)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return m, err
}
