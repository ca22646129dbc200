package seed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	dbtrfs "github.com/dennwc/btrfs"
	"golang.org/x/sys/unix"
)

const (
	blockSize = 4 * kib
	// maxInline is the largest file that goes into the metadata: what
	// max_inline=4095 takes without help of compression.
	maxInline = blockSize - 1
)

// Inode flags of FS_IOC_SETFLAGS that are kept; linux/fs.h. That of compression
// comes with its attribute.
const (
	flagNoCow = 0x00800000
	flagsKept = 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x10000 | flagNoCow // sync, immutable, append, nodump, noatime, dirsync
)

// entry is one name of the source.
type entry struct {
	path     string // below the top, "" for the top itself
	mode     uint32 // with its type, as in st_mode
	uid, gid uint32
	mtime    unix.Timespec
	size     int64 // of a regular file
	rdev     uint64
	target   string // of a symbolic link
	xattrs   []xattr
	flags    uint32 // inode flags
	link     *entry // a hard link to an entry that comes before
	// A top of a subvolume, and one that is read-only.
	subvolume, readOnly bool
	// data is the size without the holes.
	data int64
	// Where an archive has the content.
	file   *os.File
	offset int64

	stored bool   // it does not compress
	same   *entry // the entry with equal content that comes before
	packed bool
}

type xattr struct {
	name  string
	value []byte
}

func (e *entry) kind() uint32  { return e.mode & unix.S_IFMT }
func (e *entry) isDir() bool   { return e.kind() == unix.S_IFDIR }
func (e *entry) regular() bool { return e.kind() == unix.S_IFREG && e.link == nil }
func (e *entry) dense() bool   { return e.data == e.size }
func (e *entry) inline() bool  { return e.size <= maxInline && e.dense() }

// source is what a seed is made of. Entries are sorted: directories come before
// what is in them.
type source struct {
	top     string // "" for an archive
	entries []*entry
	mounts  int
	files   []*os.File // open as long as the source is
}

// openSource lists the source. What an archive needs to have unpacked goes into
// files without a name in work.
func openSource(ctx context.Context, path, work string) (*source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadSource, err)
	}
	switch {
	case info.IsDir():
		s := &scanner{ctx: ctx, source: &source{top: path}, links: map[[2]uint64]*entry{}}
		return s.source, s.walk("", 0)
	case info.Mode().IsRegular():
		s := &source{}
		if err := s.readTar(ctx, path, work); err != nil {
			s.close()
			return nil, err
		}
		return s, nil
	}
	return nil, fmt.Errorf("%w: %s is neither a directory nor a file", ErrBadSource, path)
}

func (s *source) close() {
	for _, f := range s.files {
		_ = f.Close() // only read from
	}
}

// count notes what is known when all is written.
func (s *source) count(r *Report) {
	r.Entries, r.Mounts = len(s.entries), s.mounts
	for _, e := range s.entries {
		if e.subvolume {
			r.Subvolumes++
		}
		if !e.regular() {
			continue
		}
		r.Files++
		switch {
		case e.same != nil:
			r.SameFiles++
			r.SameBytes += uint64(e.data)
		case e.packed:
			r.Packed++
		}
		if e.stored && e.same == nil {
			r.Stored++
		}
	}
}

// content is an opened file of the source.
type content struct {
	*os.File
	offset, size int64
	shared       bool
}

func (s *source) open(e *entry) (content, error) {
	if e.file != nil {
		return content{e.file, e.offset, e.size, true}, nil
	}
	f, err := openQuietly(s.top + "/" + e.path)
	return content{File: f, size: e.size}, err
}

func (c content) Close() error {
	if c.shared {
		return nil
	}
	return c.File.Close()
}

// read fills p from offset at of the content.
func (c content) read(p []byte, at int64) error {
	if _, err := c.ReadAt(p, c.offset+at); errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %s", ErrChanged, c.Name())
	} else if err != nil {
		return err
	}
	return nil
}

// pieces calls visit for each part between the holes.
func (c content) pieces(visit func(start, end int64) error) error {
	for at := c.offset; at < c.offset+c.size; {
		start, err := unix.Seek(int(c.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // a hole up to the end
		}
		end := start
		if err == nil {
			end, err = unix.Seek(int(c.Fd()), start, unix.SEEK_HOLE)
		}
		if err != nil {
			return &fs.PathError{Op: "look for holes", Path: c.Name(), Err: err}
		}
		if start, end = start-c.offset, min(end-c.offset, c.size); start >= end {
			return nil
		}
		if err := visit(start, end); err != nil {
			return err
		}
		at = c.offset + end
	}
	return nil
}

// openQuietly opens for reading and leaves the access time alone.
func openQuietly(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_RDONLY|unix.O_NOATIME|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

type scanner struct {
	*source
	ctx   context.Context
	mount uint64
	links map[[2]uint64]*entry
}

func (s *scanner) walk(rel string, parentDev uint64) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	path := s.top + "/" + rel
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	e := &entry{
		path: rel, mode: uint32(st.Mode), uid: st.Uid, gid: st.Gid,
		mtime: unix.Timespec{Sec: st.Mtime.Sec, Nsec: int64(st.Mtime.Nsec)},
		rdev:  unix.Mkdev(st.Rdev_major, st.Rdev_minor),
	}
	s.entries = append(s.entries, e)
	if rel == "" {
		s.mount = st.Mnt_id
	} else if st.Mnt_id != s.mount {
		if s.mounts++; !e.isDir() {
			s.entries = s.entries[:len(s.entries)-1] // a file mounted over a file
		}
		return nil
	}
	dev := unix.Mkdev(st.Dev_major, st.Dev_minor)
	if !e.isDir() && st.Nlink > 1 {
		id := [2]uint64{dev, st.Ino}
		if e.link = s.links[id]; e.link != nil {
			return nil
		}
		s.links[id] = e
	}
	var err error
	if e.xattrs, err = readXattrs(path); err != nil {
		return err
	}
	switch e.kind() {
	case unix.S_IFLNK:
		e.target, err = os.Readlink(path)
		return err
	case unix.S_IFREG:
		return s.openFile(e, path, int64(st.Size))
	case unix.S_IFDIR:
	default:
		return nil
	}
	// The top of a subvolume has this inode number and a device of its own;
	// linux/btrfs_tree.h, BTRFS_FIRST_FREE_OBJECTID.
	if rel != "" && st.Ino == 256 && dev != parentDev {
		if flags, err := dbtrfs.GetFlags(path); err == nil {
			e.subvolume, e.readOnly = true, flags.ReadOnly()
		}
	}
	if err := s.openFile(e, path, 0); err != nil {
		return err
	}
	names, err := os.ReadDir(path) // sorted
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := s.walk(strings.TrimPrefix(rel+"/"+name.Name(), "/"), dev); err != nil {
			return err
		}
	}
	return nil
}

// openFile notes what only an open file or directory tells.
func (s *scanner) openFile(e *entry, path string, size int64) (err error) {
	f, err := openQuietly(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// Not every file system has flags.
	if flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
		e.flags = flags & flagsKept
	}
	e.size = size
	return content{File: f, size: size}.pieces(func(start, end int64) error {
		e.data += end - start
		return nil
	})
}

func readXattrs(path string) ([]xattr, error) {
	names, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "list the attributes of", Path: path, Err: err}
	}
	var list []xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err != nil {
			return nil, &fs.PathError{Op: "read the attribute " + name + " of", Path: path, Err: err}
		}
		list = append(list, xattr{name, value})
	}
	return list, nil
}

// grow calls get with a larger buffer, up to the kernel's limit, until it fits.
func grow(get func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 16 {
		b := make([]byte, size)
		n, err := get(b)
		if !errors.Is(err, unix.ERANGE) || size > 64*kib {
			return b[:max(n, 0):max(n, 0)], err
		}
	}
}
