package block

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// LoopChange puts another file behind a loop device that is in use. What can be
// foreseen is found by [System.PrepareChange], so that [LoopChange.Do] is one
// system call; [LoopChange.Check] then asks the kernel what is behind the loop.
// It is not safe for concurrent use.
//
// On a mounted device Do is dangerous: the kernel takes it for a change of the
// medium, and from Linux 6.17 on it throws away what a Btrfs on the device has
// in memory for files that nobody has open, written out or not. Source:
// drivers/block/loop.c, loop_change_fd, and fs/super.c, fs_bdev_mark_dead. The
// caller has to see to it that nothing waits to be written meanwhile.
type LoopChange struct {
	s      *System
	before Loop
	loop   *os.File
	file   *os.File
	want   backing
}

// PrepareChange prepares to put an opened file or block device behind the loop
// that id means. The loop keeps its offset, its limit and its flags. The errors
// are those of the kernel, before anything is done: [ErrLoopWritable] for a loop
// that is not read-only, [ErrSizeDiffers] where the device would have another
// size, [ErrChanged] if it is not the loop that id means any more. file is to
// stay open until Do has returned.
func (s *System) PrepareChange(id ID, file *os.File) (_ *LoopChange, err error) {
	f, err := s.openNode(id.Path, id.Num)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	fail := func(err error) error { return fmt.Errorf("cannot put another file behind %s: %w", id.Path, err) }
	// While f is open the loop cannot be given to somebody else.
	loop, err := s.LoopStatus(id.Num)
	if err != nil {
		return nil, err
	}
	if !loop.Same(id) {
		return nil, fail(ErrChanged)
	}
	// The device may be set read-only where the loop is not: see blockdev(8).
	if err := onlyRead(f); err != nil {
		return nil, fail(err)
	}
	want, size, err := fileBehind(file)
	if err != nil {
		return nil, fail(err)
	}
	if size -= min(size, loop.Offset); loop.SizeLimit > 0 {
		size = min(size, loop.SizeLimit)
	}
	if size/sectorSize != id.Size/sectorSize {
		return nil, fail(ErrSizeDiffers)
	}
	return &LoopChange{s: s, before: loop, loop: f, file: file, want: want}, nil
}

// fileBehind gives what the loop driver will say of an opened file, and its size.
func fileBehind(file *os.File) (backing, uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return backing{}, 0, err
	}
	b := backing{dev: DevNumOf(st.Dev), inode: st.Ino}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		b.rdev = DevNumOf(st.Rdev)
	}
	size, err := file.Seek(0, io.SeekEnd) // of a block device as well
	return b, uint64(max(size, 0)), err
}

// loopChangeFD is LOOP_CHANGE_FD. Source: linux/loop.h.
const loopChangeFD = 0x4C06

// Do makes the kernel read from the other file from now on.
func (c *LoopChange) Do() error {
	err := unix.IoctlSetInt(int(c.loop.Fd()), loopChangeFD, int(c.file.Fd()))
	if err != nil {
		return fmt.Errorf("cannot put another file behind %s: %w", c.before.Path, err)
	}
	return nil
}

// Check gives the loop as it is now. It is an error if the file is not what is
// behind it. After Do the loop has another DiskSeq.
func (c *LoopChange) Check() (Loop, error) {
	now, err := c.s.LoopStatus(c.before.Num)
	if err != nil {
		return Loop{}, err
	}
	got, err := c.s.loopBacking(c.s.path(now.Path))
	if err != nil {
		return Loop{}, err
	}
	if got != c.want {
		return Loop{}, fmt.Errorf("cannot put another file behind %s: the kernel says that it is %s", now.Path, now.BackingFile)
	}
	return now, nil
}

// Close gives the loop device up; the loop goes on.
func (c *LoopChange) Close() error { return c.loop.Close() }

// IsBehind reports whether an opened file is behind the loop.
func (s *System) IsBehind(num DevNum, file *os.File) (bool, error) {
	loop, err := s.LoopStatus(num)
	if err != nil {
		return false, err
	}
	got, err := s.loopBacking(s.path(loop.Path))
	if err != nil {
		return false, err
	}
	want, _, err := fileBehind(file)
	return got == want, err
}

// LoopFixed says why no other file can be put behind a loop, nil where one can.
func (s *System) LoopFixed(num DevNum) error {
	id, err := s.Identify(num)
	if err != nil {
		return err
	}
	f, err := s.openNode(id.Path, num)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := onlyRead(f); err != nil {
		return fmt.Errorf("cannot put another file behind %s: %w", id.Path, err)
	}
	return nil
}

// onlyRead gives ErrLoopWritable for a loop that can be written.
func onlyRead(loop *os.File) error {
	info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
	if err == nil && info.Flags&unix.LO_FLAGS_READ_ONLY == 0 {
		err = ErrLoopWritable
	}
	return err
}

// InMemory reports whether the file behind a loop is in memory and nowhere else:
// in a tmpfs, or made by memfd_create(2), which has no mount.
func (s *System) InMemory(num DevNum) (bool, error) {
	loop, err := s.LoopStatus(num)
	if err != nil {
		return false, err
	}
	file, err := s.loopBacking(s.path(loop.Path))
	if err != nil {
		return false, err
	}
	if !file.rdev.IsZero() {
		return false, nil // what would be asked is the file system of /dev
	}
	if unnamed, err := unnamedMemory(); err != nil || file.dev == unnamed {
		return err == nil, err
	}
	f, err := s.OpenBacking(num)
	if errors.Is(err, ErrOutOfSight) {
		return false, nil // as after an initramfs; nobody can tell
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, fmt.Errorf("cannot look at the file behind %s: %w", loop.Path, err)
	}
	return st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC, nil
}

// unnamedMemory gives the device number of what memfd_create makes: the kernel
// has one mount of its own for all of it.
func unnamedMemory() (DevNum, error) {
	fd, err := unix.MemfdCreate("sproutd-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return DevNum{}, fmt.Errorf("cannot make a file in memory: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return DevNum{}, fmt.Errorf("cannot look at a file in memory: %w", err)
	}
	return DevNumOf(st.Dev), nil
}
