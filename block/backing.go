package block

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// OpenBacking opens the file behind a loop, or the block device, for reading.
// What is opened is the very file the loop has, whatever its name means here:
// the error wraps [ErrOutOfSight] when that cannot be reached by a name, as
// after an initramfs that unmounted it lazily, or for one that was deleted.
func (s *System) OpenBacking(num DevNum) (*os.File, error) {
	loop, err := s.LoopStatus(num)
	if err != nil {
		return nil, err
	}
	want, err := s.loopBacking(s.path(loop.Path))
	if err != nil {
		return nil, err
	}
	// O_PATH has no side effects on whatever is there now.
	fd, err := unix.Open(s.path(loop.BackingFile), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the file behind %s: %w: %w", loop.Path, ErrOutOfSight, err)
	}
	name := os.NewFile(uintptr(fd), loop.BackingFile)
	defer func() { _ = name.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("cannot stat the file behind %s: %w", loop.Path, err)
	}
	got := backing{dev: DevNumOf(st.Dev), inode: st.Ino}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		got.rdev = DevNumOf(st.Rdev)
	}
	if got != want {
		return nil, fmt.Errorf("cannot open the file behind %s: %w", loop.Path, ErrOutOfSight)
	}
	f, err := reopen(name, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("cannot open the file behind %s: %w", loop.Path, err)
	}
	return f, nil
}

// SetDirectIO makes a loop read its file past the page cache, or through it,
// while it is in use. [ErrChanged] if it is not the loop that id means any more,
// [ErrNotSupported] where the file's file system cannot.
func (s *System) SetDirectIO(id ID, on bool) error {
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
		return fmt.Errorf("cannot change how %s reads: %w", id.Path, ErrChanged)
	}
	value := 0
	if on {
		value = 1
	}
	err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_DIRECT_IO, value)
	if errors.Is(err, unix.EINVAL) {
		err = ErrNotSupported
	}
	if err != nil {
		return fmt.Errorf("cannot change how %s reads: %w", id.Path, err)
	}
	return nil
}

// opticalMajor is the major number of CD and DVD drives.
// Source: Documentation/admin-guide/devices.txt.
const opticalMajor = 11

// Spins reports whether the disk of a device is known to turn, so that jumping
// to and fro costs. A loop is looked through. The kernel's word alone is not
// enough: USB sticks and virtual disks say that they turn as well.
func (s *System) Spins(num DevNum) (bool, error) {
	for {
		disk, err := s.WholeDisk(num)
		if err != nil {
			return false, err
		}
		if num = disk.Num; !num.IsLoop() {
			break
		}
		under, err := s.BackingDevice(num)
		if errors.Is(err, ErrNoDevice) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		num = under.Num
	}
	_, disk, err := s.dirs(num)
	if err != nil {
		return false, err
	}
	believed := attr(disk, "removable") != "1" && !strings.Contains(disk, "/virtio")
	return num.Major == opticalMajor || believed && attr(disk, "queue/rotational") == "1", nil
}
