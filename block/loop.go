package block

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Loop is a loop device with a file behind it.
type Loop struct {
	ID
	// BackingFile as the kernel names it, with " (deleted)" after it when the
	// file has no name any more.
	BackingFile string
	// Offset of the device in the file and SizeLimit (0 = to its end), in bytes.
	Offset, SizeLimit uint64
	// Autoclear: the loop goes away when its last user does.
	Autoclear          bool
	ReadOnly, DirectIO bool
	hold               *os.File
}

// Close lets go of the descriptor that AttachLoop keeps for a loop with
// Autoclear. Such a loop is gone then, unless it was mounted or opened
// meanwhile. For every other loop Close does nothing.
func (l *Loop) Close() error {
	if l.hold == nil {
		return nil
	}
	err := l.hold.Close()
	l.hold = nil
	return err
}

// LoopOptions for AttachLoop. The zero value attaches the whole file, with the
// same access as the file was opened with, buffered, for good.
type LoopOptions struct {
	ReadOnly bool
	// Offset and SizeLimit in bytes; a limit of 0 means up to the end of the
	// file. A limit equal to the file's size is what lets the loop be switched
	// over to a larger file or partition later.
	Offset, SizeLimit uint64
	// BlockSize in bytes, 0 for the kernel's choice.
	BlockSize uint32
	// Autoclear makes the loop go away with its last user; see [Loop.Close].
	Autoclear bool
}

const (
	// attachTries bounds the race for a free loop with other programs.
	attachTries = 64
	// detachGrace is how long a passing opener, such as udev, may keep a
	// detached loop alive before it counts as in use.
	detachGrace = 5 * time.Second
	detachTick  = 20 * time.Millisecond
)

// AttachLoop puts a loop device over an opened file or block device. The loop
// keeps its own reference: file may be closed afterwards. Partitions on it are
// not looked for.
func (s *System) AttachLoop(ctx context.Context, file *os.File, o LoopOptions) (Loop, error) {
	control, err := os.OpenFile(s.path("dev/loop-control"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return Loop{}, fmt.Errorf("cannot get a loop device: %w", err)
	}
	defer func() { _ = control.Close() }()
	for range attachTries {
		if err := ctx.Err(); err != nil {
			return Loop{}, fmt.Errorf("cannot get a loop device: %w", err)
		}
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Loop{}, fmt.Errorf("cannot get a loop device: %w", err)
		}
		loop, err := s.configureLoop(fmt.Sprintf("loop%d", n), file, o)
		if errors.Is(err, unix.EBUSY) || gone(err) { // somebody else took or removed it
			continue
		}
		return loop, err
	}
	return Loop{}, errors.New("cannot get a loop device: other programs take every free one")
}

func (s *System) configureLoop(name string, file *os.File, o LoopOptions) (Loop, error) {
	mode := unix.O_RDWR
	if o.ReadOnly {
		mode = unix.O_RDONLY
	}
	f, err := os.OpenFile(s.path("dev", name), mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return Loop{}, fmt.Errorf("cannot open the device: %w", err)
	}
	keep := false
	defer func() {
		if !keep {
			_ = f.Close()
		}
	}()
	cfg := unix.LoopConfig{Fd: uint32(file.Fd()), Size: o.BlockSize}
	cfg.Info.Offset, cfg.Info.Sizelimit = o.Offset, o.SizeLimit
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], file.Name())
	for flag, on := range map[uint32]bool{
		unix.LO_FLAGS_READ_ONLY: o.ReadOnly, unix.LO_FLAGS_AUTOCLEAR: o.Autoclear,
	} {
		if on {
			cfg.Info.Flags |= flag
		}
	}
	err = unix.IoctlLoopConfigure(int(f.Fd()), &cfg)
	runtime.KeepAlive(file)
	if err != nil {
		return Loop{}, fmt.Errorf("cannot attach %s to /dev/%s: %w", file.Name(), name, err)
	}
	num, err := rdevOf(f)
	if err != nil {
		return Loop{}, err
	}
	loop, err := s.LoopStatus(num)
	if err != nil {
		_ = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
		// Not wrapped: this is no lost race for the loop.
		return Loop{}, fmt.Errorf("cannot attach %s to /dev/%s: %s", file.Name(), name, err.Error())
	}
	if o.Autoclear {
		loop.hold, keep = f, true
	}
	return loop, nil
}

// LoopStatus describes one loop device. The error wraps [os.ErrNotExist] when
// there is no file behind it.
func (s *System) LoopStatus(num DevNum) (Loop, error) {
	id, err := s.Identify(num)
	if err != nil {
		return Loop{}, err
	}
	dir := s.path("sys/dev/block", num.String())
	file, err := os.ReadFile(filepath.Join(dir, "loop/backing_file"))
	if err != nil {
		return Loop{}, fmt.Errorf("cannot find a file behind %s: %w", id.Path, err)
	}
	loop := Loop{
		ID:          id,
		BackingFile: strings.TrimSuffix(string(file), "\n"),
		ReadOnly:    attr(dir, "ro") == "1",
		Autoclear:   attr(dir, "loop/autoclear") == "1",
		DirectIO:    attr(dir, "loop/dio") == "1",
	}
	if loop.Offset, err = attrUint(dir, "loop/offset"); err == nil {
		loop.SizeLimit, err = attrUint(dir, "loop/sizelimit")
	}
	if err != nil {
		return Loop{}, fmt.Errorf("cannot read the state of %s: %w", id.Path, err)
	}
	return loop, nil
}

// BackingDevice gives the device that carries the file behind a loop: the one
// its file system is on, or the backing device itself. It works also when the
// file's name means nothing here, as after an initramfs. The error wraps
// [ErrNoDevice] for a file on no device (tmpfs).
func (s *System) BackingDevice(num DevNum) (ID, error) {
	loop, err := s.LoopStatus(num)
	if err != nil {
		return ID{}, err
	}
	file, err := s.loopBacking(s.path(loop.Path))
	switch {
	case err != nil:
		return ID{}, err
	case !file.rdev.IsZero():
		return s.Identify(file.rdev)
	case file.dev.Major != 0:
		return s.Identify(file.dev)
	}
	if unnamed, err := unnamedMemory(); err != nil || file.dev == unnamed {
		return ID{}, errors.Join(err, fmt.Errorf("cannot find the device below %s: it is %w", loop.Path, ErrNoDevice))
	}
	return s.Of(loop.BackingFile) // a Btrfs has a device number of its own
}

// LoopOver gives the block device that a loop is over itself, zero for one over a
// file. The error wraps [os.ErrNotExist] when the device is gone.
func (s *System) LoopOver(num DevNum) (ID, error) {
	loop, err := s.LoopStatus(num)
	if err != nil {
		return ID{}, err
	}
	file, err := s.loopBacking(s.path(loop.Path))
	if err != nil || file.rdev.IsZero() {
		return ID{}, err
	}
	return s.Identify(file.rdev)
}

// Loops lists the loop devices that have a file behind them.
func (s *System) Loops(ctx context.Context) ([]Loop, error) {
	files, err := filepath.Glob(s.path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the loop devices: %w", err)
	}
	var loops []Loop
	for _, file := range files {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("cannot list the loop devices: %w", err)
		}
		num, err := s.numOf(filepath.Base(filepath.Dir(filepath.Dir(file))))
		var loop Loop
		if err == nil {
			loop, err = s.LoopStatus(num)
		}
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		loops = append(loops, loop)
	}
	slices.SortFunc(loops, func(a, b Loop) int { return int(a.Num.Minor) - int(b.Num.Minor) })
	return loops, nil
}

// DetachLoop takes the file away from a loop device, provided that it is still
// the one that id means ([ErrChanged] otherwise, [os.ErrNotExist] when it has no
// file any more). A loop that somebody mounts or has open goes when they are
// done; [ErrStillInUse] says so.
func (s *System) DetachLoop(ctx context.Context, id ID) error {
	f, err := s.openNode(id.Path, id.Num)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// While f is open the loop cannot be given another file.
	loop, err := s.LoopStatus(id.Num)
	if err != nil {
		return err
	}
	if !loop.Same(id) {
		return fmt.Errorf("cannot detach %s: %w", id.Path, ErrChanged)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		if errors.Is(err, unix.ENXIO) {
			err = fs.ErrNotExist
		}
		return fmt.Errorf("cannot detach %s: %w", id.Path, err)
	}
	// The loop goes with the last descriptor: this one, or somebody's.
	if err := f.Close(); err != nil {
		return fmt.Errorf("cannot detach %s: %w", id.Path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, detachGrace)
	defer cancel()
	for {
		now, err := s.LoopStatus(id.Num)
		if gone(err) || err == nil && !now.Same(id) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot detach %s yet: %w", id.Path, ErrStillInUse)
		case <-time.After(detachTick):
		}
	}
}

// backing is the file behind a loop as the loop driver knows it: the device the
// file is on, its inode there and, for a block device, its own number (loop(4):
// lo_device, lo_inode and lo_rdevice).
type backing struct {
	dev, rdev DevNum
	inode     uint64
}

// loopBacking asks the loop driver which file it has.
func loopBacking(node string) (backing, error) {
	f, err := os.OpenFile(node, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return backing{}, fmt.Errorf("cannot open the device: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return backing{}, fmt.Errorf("cannot read the state of %s: %w", node, err)
	}
	return backing{dev: DevNumOf(info.Device), rdev: DevNumOf(info.Rdevice), inode: info.Inode}, nil
}
