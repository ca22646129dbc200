package seedtest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Manifest describes a tree: one record a path, below the directory that was
// scanned; that directory itself is ".".
type Manifest map[string]Record

// Extent is a piece of data in a file, in bytes; End is exclusive.
type Extent struct{ Start, End int64 }

// Record is all there is to know of one path. Access and change times are
// left out: reading and moving may change them.
type Record struct {
	// Type is file, directory, symlink, char, block, fifo or socket.
	Type string
	// Mode holds the permission bits with setuid, setgid and sticky.
	Mode uint32
	// UID and GID of the owner.
	UID, GID uint32
	// Size in bytes.
	Size int64
	// ModTime to the nanosecond.
	ModTime time.Time
	// Device is the number of a char or block device, "major:minor".
	Device string
	// Links is the number of links of what is not a directory, and LinkOf the
	// first path, by name, of the same inode; "" where there is one link.
	Links  uint32
	LinkOf string
	// Target of a symbolic link.
	Target string
	// Xattrs by name, ACLs and capabilities included.
	Xattrs map[string]string
	// Sum is the SHA-256 of a file's data extents and their places.
	Sum [sha256.Size]byte
	// Data lists the extents with data; the rest of a file is holes.
	Data []Extent
	// Flags are the inode flags as lsattr(1) knows them, as a number.
	Flags uint32
	// Subvolume says "" for none, "subvolume", "read-only subvolume" or, in a
	// snapshot in the place of a subvolume that it does not hold, "placeholder".
	Subvolume string

	dev, ino uint64
}

// TakeManifest scans dir and everything below it on the same mount,
// subvolumes included. It reads every byte but changes nothing. It does not look
// at the given paths, relative to dir, nor below them: files may come and go there.
func TakeManifest(ctx context.Context, dir string, without ...string) (Manifest, error) {
	s := &scan{ctx: ctx, without: without, records: map[string]*Record{}, files: map[inode]string{}}
	err := s.walk(dir, ".", 0)
	if err == nil {
		err = s.hash(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot scan %s: %w", dir, err)
	}
	first := map[inode]string{}
	for _, path := range slices.Sorted(maps.Keys(s.records)) {
		if r := s.records[path]; r.Links > 1 {
			id := inode{r.dev, r.ino}
			if _, ok := first[id]; !ok {
				first[id] = path
			}
			r.LinkOf = first[id]
		}
	}
	m := Manifest{}
	for path, r := range s.records {
		if hashed := s.files[inode{r.dev, r.ino}]; r.Type == "file" && hashed != path {
			r.Sum, r.Data = s.records[hashed].Sum, s.records[hashed].Data
		}
		m[path] = *r
	}
	return m, nil
}

type inode struct{ dev, ino uint64 }

type scan struct {
	ctx     context.Context
	without []string
	mount   uint64
	records map[string]*Record
	// files holds the path under which each regular inode gets hashed.
	files map[inode]string
}

// walk notes the record of rel and everything below.
func (s *scan) walk(root, rel string, parentDev uint64) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	path := root + "/" + rel
	var st unix.Statx_t
	const mask = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, mask, &st); err != nil {
		return &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	if rel == "." {
		s.mount = st.Mnt_id
	} else if st.Mnt_id != s.mount {
		return nil // something else is mounted here
	}
	r := &Record{
		Mode: uint32(st.Mode) & 0o7777, UID: st.Uid, GID: st.Gid, Size: int64(st.Size),
		ModTime: time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec)).UTC(),
		dev:     unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino,
	}
	s.records[rel] = r
	var err error
	if r.Xattrs, err = xattrs(path); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		r.Type = "file"
		if _, ok := s.files[inode{r.dev, r.ino}]; !ok {
			s.files[inode{r.dev, r.ino}] = rel
		}
	case unix.S_IFDIR:
		r.Type = "directory"
		// The kernel makes up such a directory, with the time of that moment;
		// linux/btrfs_tree.h, BTRFS_EMPTY_SUBVOL_DIR_OBJECTID.
		if r.ino == 2 && rel != "." {
			r.Subvolume, r.ModTime = "placeholder", time.Time{}
		}
	case unix.S_IFLNK:
		r.Type = "symlink"
		if r.Target, err = os.Readlink(path); err != nil {
			return err
		}
	case unix.S_IFCHR:
		r.Type = "char"
	case unix.S_IFBLK:
		r.Type = "block"
	case unix.S_IFIFO:
		r.Type = "fifo"
	case unix.S_IFSOCK:
		r.Type = "socket"
	}
	if r.Type == "char" || r.Type == "block" {
		r.Device = fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor)
	}
	if r.Type != "directory" {
		r.Links = st.Nlink
	}
	if r.Type != "directory" && r.Type != "file" {
		return nil
	}
	if err := s.flags(path, r, r.Type == "directory" && r.dev != parentDev); err != nil {
		return err
	}
	if r.Type == "file" {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		below := entry.Name()
		if rel != "." {
			below = rel + "/" + below
		}
		if ignored(below, s.without) {
			continue
		}
		if err := s.walk(root, below, r.dev); err != nil {
			return err
		}
	}
	return nil
}

// BTRFS_IOC_SUBVOL_GETFLAGS and its read-only bit; linux/btrfs.h.
const (
	ioctlSubvolGetFlags = 0x80089419
	subvolReadOnly      = 2
)

func (s *scan) flags(path string, r *Record, top bool) error {
	f, err := openQuietly(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if r.Flags, err = unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS); err != nil && !notSupported(err) {
		return &fs.PathError{Op: "get inode flags", Path: path, Err: err}
	}
	// A subvolume's top directory has inode number 256 and a device number of
	// its own; linux/btrfs_tree.h, BTRFS_FIRST_FREE_OBJECTID.
	if !top || r.ino != 256 {
		return nil
	}
	flags, err := unix.IoctlGetInt(int(f.Fd()), ioctlSubvolGetFlags)
	switch {
	case err != nil && notSupported(err):
	case err != nil:
		return &fs.PathError{Op: "get subvolume flags", Path: path, Err: err}
	case flags&subvolReadOnly != 0:
		r.Subvolume = "read-only subvolume"
	default:
		r.Subvolume = "subvolume"
	}
	return nil
}

func notSupported(err error) bool {
	return errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)
}

// openQuietly opens a file for reading without changing its access time.
func openQuietly(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		return os.Open(path)
	}
	return f, err
}

// hash reads the files, two at a time.
func (s *scan) hash(root string) error {
	group, ctx := errgroup.WithContext(s.ctx)
	group.SetLimit(2)
	for _, rel := range slices.Sorted(maps.Values(s.files)) {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			r := s.records[rel]
			var err error
			r.Sum, r.Data, err = hashFile(filepath.Join(root, rel), r.Size)
			return err
		})
	}
	return group.Wait()
}

// hashFile sums up the data of a file with its places. It skips the holes, so
// a huge sparse file is no trouble.
func hashFile(path string, size int64) (sum [sha256.Size]byte, extents []Extent, err error) {
	f, err := openQuietly(path)
	if err != nil {
		return sum, nil, err
	}
	defer f.Close()
	if extents, err = dataExtents(f, size); err != nil {
		return sum, nil, err
	}
	h := sha256.New()
	for _, e := range extents {
		_ = binary.Write(h, binary.LittleEndian, e)
		if _, err := io.Copy(h, io.NewSectionReader(f, e.Start, e.End-e.Start)); err != nil {
			return sum, nil, err
		}
	}
	return [sha256.Size]byte(h.Sum(nil)), extents, nil
}

// dataExtents asks the kernel which parts of a file hold data.
func dataExtents(f *os.File, size int64) ([]Extent, error) {
	var extents []Extent
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		if err != nil {
			return nil, &fs.PathError{Op: "seek data", Path: f.Name(), Err: err}
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, &fs.PathError{Op: "seek hole", Path: f.Name(), Err: err}
		}
		extents = append(extents, Extent{start, end})
		at = end
	}
	return extents, nil
}

func xattrs(path string) (map[string]string, error) {
	names, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.EOPNOTSUPP) || len(names) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		all[name] = string(value)
	}
	return all, nil
}

// grow calls get with a larger buffer, up to the kernel's limit, until it fits.
func grow(get func([]byte) (int, error)) ([]byte, error) {
	for size := 512; ; size *= 16 {
		b := make([]byte, size)
		n, err := get(b)
		if !errors.Is(err, unix.ERANGE) || size > 64*KiB {
			return b[:max(n, 0)], err
		}
	}
}

// Without gives a copy of m that leaves out the given paths and what is below.
func (m Manifest) Without(paths ...string) Manifest {
	out := maps.Clone(m)
	maps.DeleteFunc(out, func(path string, _ Record) bool { return ignored(path, paths) })
	return out
}

func ignored(path string, ignore []string) bool {
	return slices.ContainsFunc(ignore, func(i string) bool {
		return path == i || strings.HasPrefix(path, i+"/")
	})
}

// Diff gives the differences between two manifests, one line each, sorted by
// path; none if they are equal. The paths to ignore are left out with all that
// is below them; the directories they are in may have another size and time.
func Diff(before, after Manifest, ignore ...string) []string {
	changing := map[string]bool{}
	for _, path := range ignore {
		changing[filepath.Dir(path)] = true
	}
	paths := maps.Clone(before)
	maps.Copy(paths, after)
	var lines []string
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		if ignored(path, ignore) {
			continue
		}
		a, hadIt := before[path]
		b, hasIt := after[path]
		switch {
		case !hadIt:
			lines = append(lines, fmt.Sprintf("%q: new (%s)", path, b.Type))
		case !hasIt:
			lines = append(lines, fmt.Sprintf("%q: gone (%s)", path, a.Type))
		default:
			if changing[path] {
				a.Size, a.ModTime = b.Size, b.ModTime
			}
			for _, what := range a.diff(b) {
				lines = append(lines, fmt.Sprintf("%q: %s", path, what))
			}
		}
	}
	return lines
}

func (r Record) diff(o Record) []string {
	var lines []string
	note := func(same bool, what string, was, is any) {
		if !same {
			lines = append(lines, fmt.Sprintf("%s was %v, is %v", what, was, is))
		}
	}
	note(r.Type == o.Type, "type", r.Type, o.Type)
	note(r.Mode == o.Mode, "mode", fmt.Sprintf("%04o", r.Mode), fmt.Sprintf("%04o", o.Mode))
	note(r.UID == o.UID, "owner", r.UID, o.UID)
	note(r.GID == o.GID, "group", r.GID, o.GID)
	note(r.Size == o.Size, "size", r.Size, o.Size)
	note(r.ModTime.Equal(o.ModTime), "mtime", r.ModTime.Format(time.RFC3339Nano), o.ModTime.Format(time.RFC3339Nano))
	note(r.Device == o.Device, "device number", r.Device, o.Device)
	note(r.Links == o.Links, "number of links", r.Links, o.Links)
	note(r.LinkOf == o.LinkOf, "hard link of", fmt.Sprintf("%q", r.LinkOf), fmt.Sprintf("%q", o.LinkOf))
	note(r.Target == o.Target, "link target", fmt.Sprintf("%q", r.Target), fmt.Sprintf("%q", o.Target))
	note(slices.Equal(r.Data, o.Data), "data extents", r.Data, o.Data)
	// Another extent map makes another sum: say so once only.
	note(r.Sum == o.Sum || !slices.Equal(r.Data, o.Data), "content",
		fmt.Sprintf("%x", r.Sum[:8]), fmt.Sprintf("%x", o.Sum[:8]))
	note(r.Flags == o.Flags, "inode flags", fmt.Sprintf("%#x", r.Flags), fmt.Sprintf("%#x", o.Flags))
	note(r.Subvolume == o.Subvolume, "subvolume", cmp.Or(r.Subvolume, "none"), cmp.Or(o.Subvolume, "none"))
	names := maps.Clone(r.Xattrs)
	if names == nil {
		names = map[string]string{}
	}
	maps.Copy(names, o.Xattrs)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		was, had := r.Xattrs[name]
		is, has := o.Xattrs[name]
		note(had == has && was == is, "xattr "+name, quoted(was, had), quoted(is, has))
	}
	return lines
}

func quoted(value string, there bool) string {
	switch {
	case !there:
		return "absent"
	case len(value) > 64:
		return fmt.Sprintf("%q... (%d bytes)", value[:64], len(value))
	}
	return fmt.Sprintf("%q", value)
}
