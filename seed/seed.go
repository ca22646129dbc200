// Package seed builds Btrfs seed images with the geometry that makes a flatten
// cheap and the image small, and tells the geometry of those that exist.
//
// What a flatten costs is decided by the number of data extents, hardly by the
// bytes. So small files share extents of 128 KiB, equal files share theirs,
// tiny files live in the metadata, and what does not compress is stored as it
// is, in extents that may then be long. The mount sees ordinary files.
//
// A seed leaves from the end of its device to the beginning. There lie some of the
// largest files, which are moved in an instant, with the metadata above them and
// the rest of the content above that: so nearly all the work is done by the time
// in which a slow stick has given its last byte.
//
//	seed.go     Build from beginning to end, its options and errors
//	scan.go     what is in a source: the entries, and a directory as a source
//	tar.go      a tar archive as a source
//	sample.go   what compresses, and how large the image will be
//	same.go     which files are equal
//	write.go    the entries and their attributes, and the content of one file
//	pack.go     small files into shared extents
//	frame.go    such an extent, compressed so that each file can be read alone
//	image.go    the file system while it is being built; its final size
//	inspect.go  the geometry of an image
//
// It runs mkfs.btrfs and btrfstune of btrfs-progs, which only builders of seeds
// need. Nothing here calls sync(2).
package seed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/btrfs"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// Options says what to build. Source and Image are required.
type Options struct {
	// Source is a directory, or a tar archive that may be compressed with
	// gzip. Of a directory everything on the same mount is taken, subvolumes
	// included; another mount in it becomes an empty directory.
	Source string
	// Image is the file to make. Nothing has this name before it is complete.
	Image string
	// Label of the filesystem, at most 255 bytes, "" for none.
	Label string
	// FSID of the filesystem, zero for a random one.
	FSID btrfs.UUID
	// CompressLevel of zstd, 1 to 15; 0 means 9.
	CompressLevel int
	// Csum is crc32c, xxhash, sha256 or blake2; "" means crc32c.
	Csum string
	// PackTimes trades reading for moving. Small files share extents of 128 KiB:
	// the fewest there are to move, but to read a file its whole extent is read,
	// and decompressed up to the end of the file. With PackTimes the extent has, up to 128
	// KiB, at least so many times the size of its files and 32 KiB, and no more
	// than that takes; 0 means that all have 128 KiB.
	PackTimes int
	// Overwrite replaces an image that exists, at the very end.
	Overwrite bool
	// Progress is called a few times a second, on the caller's goroutine; nil
	// for none.
	Progress func(Progress)
}

// Phases of Build, in their order.
const (
	PhaseScan   = "scan"   // list the source
	PhaseSample = "sample" // see what compresses and what is equal
	PhaseWrite  = "write"  // all content
	PhaseFinish = "finish" // shrink, trim, mark as a seed
)

// Progress is how far Build has got. Done and Total are bytes of content that
// was written; both are 0 in the phases before.
type Progress struct {
	Phase       string
	Done, Total uint64
}

// Report is what Build made.
type Report struct {
	FSID btrfs.UUID
	// BytesIn is the content of the source: each file once, without its holes.
	BytesIn uint64
	// ImageSize is the length of the image and UsedBytes what is in use of
	// it, the rest being holes.
	ImageSize, UsedBytes uint64
	// Entries counts all names; Files the regular files, where hard links
	// count once; Packed the files that share extents; Subvolumes those kept.
	Entries, Files, Packed, Subvolumes int
	// Stored counts the files that are not compressed since it does not help.
	Stored int
	// Mounts counts the directories that are empty in the image because
	// something else is mounted there in the source.
	Mounts int
	// SameFiles is how many files share the content of an equal one, and
	// SameBytes how many bytes of BytesIn that saved.
	SameFiles int
	SameBytes uint64
	Geometry  Geometry
	Time      time.Duration
}

// Ratio is used bytes to content bytes, 0 for a seed without content.
func (r Report) Ratio() float64 {
	if r.BytesIn == 0 {
		return 0
	}
	return float64(r.UsedBytes) / float64(r.BytesIn)
}

var (
	// ErrBadSource says that the source is nothing a seed can be made of.
	ErrBadSource = errors.New("not a usable source")
	// ErrExists says that the image exists and is not to be overwritten.
	ErrExists = errors.New("the image exists already")
	// ErrNoTool says that a program of btrfs-progs is missing.
	ErrNoTool = errors.New("the program is not installed (btrfs-progs)")
	// ErrChanged says that the source changed while it was being read.
	ErrChanged = errors.New("changed while it was read")
)

// NoSpaceError says that the image does not fit where it is to be.
type NoSpaceError struct {
	Dir string
	// Need is an estimate, with a tenth to spare; both in bytes.
	Need, Free uint64
}

// Error names both numbers.
func (e *NoSpaceError) Error() string {
	return fmt.Sprintf("not enough space in %s: about %d MB needed, %d MB free", e.Dir, e.Need/1e6+1, e.Free/1e6)
}

// Unwrap makes it an ENOSPC.
func (e *NoSpaceError) Unwrap() error { return unix.ENOSPC }

// Build makes a seed image. It needs root, one loop device and one mount, which
// nobody else can look into, and free space for the image; an archive that is
// compressed needs as much again as its content has. When it fails or ctx ends,
// nothing is left but an image that was there before; only a killed process
// leaves its mount, its loop device and a directory beside the image. The same
// source gives the same order of writes. Errors: ErrBadSource, ErrExists, ErrNoTool, ErrChanged,
// *NoSpaceError.
func Build(ctx context.Context, o Options) (Report, error) {
	r, err := build(ctx, o)
	if err != nil {
		return Report{}, fmt.Errorf("cannot build a seed: %w", err)
	}
	return r, nil
}

func build(ctx context.Context, o Options) (r Report, err error) {
	start := time.Now()
	o.CompressLevel = cmp.Or(o.CompressLevel, 9)
	o.Csum = cmp.Or(o.Csum, "crc32c")
	if err := checkOptions(&o); err != nil {
		return r, err
	}
	p := &meter{call: o.Progress}
	p.phase(PhaseScan)
	// On the image's file system, so that the rename at the end is one.
	work, err := os.MkdirTemp(filepath.Dir(o.Image), "."+shorten(filepath.Base(o.Image))+".")
	if err != nil {
		return r, err
	}
	// Not RemoveAll: should the mount be left, it must not be emptied.
	defer func() { err = errors.Join(err, os.Remove(work)) }()

	src, err := openSource(ctx, o.Source, work)
	if err != nil {
		return r, err
	}
	defer src.close()
	p.phase(PhaseSample)
	size, err := examine(ctx, src)
	if err != nil {
		return r, err
	}
	if free := freeSpace(work); free < size.need {
		return r, &NoSpaceError{Dir: filepath.Dir(o.Image), Need: size.need, Free: free}
	}

	partial := filepath.Join(work, "image")
	defer func() {
		if e := os.Remove(partial); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	frames, err := newFrames(o.CompressLevel, btrfs.WriteZstd)
	if err != nil {
		return r, err
	}
	img := &image{path: partial, dir: filepath.Join(work, "mnt"), options: o, frames: frames}
	p.total = size.content
	if err := img.make(ctx, src, size, p, &r); err != nil {
		// The kernel says EIO or EROFS when the loop's file cannot grow.
		if free := freeSpace(work); ctx.Err() == nil && free < 32*mib &&
			(errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSPC)) {
			err = errors.Join(&NoSpaceError{Dir: filepath.Dir(o.Image), Need: size.need, Free: free}, err)
		}
		return r, err
	}
	if err := publish(partial, o); err != nil {
		return r, err
	}
	r.BytesIn, r.Time = size.content, time.Since(start)
	src.count(&r)
	return r, nil
}

func checkOptions(o *Options) error {
	if o.Source == "" || o.Image == "" {
		return fmt.Errorf("%w: a source and an image are needed", ErrBadSource)
	}
	if o.CompressLevel < 1 || o.CompressLevel > 15 {
		return fmt.Errorf("the level of zstd is 1 to 15, not %d: %w", o.CompressLevel, unix.EINVAL)
	}
	source, err := filepath.Abs(o.Source)
	if err == nil {
		source, err = filepath.EvalSymlinks(source)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBadSource, err)
	}
	dir, err := filepath.Abs(filepath.Dir(o.Image))
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return err
	}
	o.Source, o.Image = source, filepath.Join(dir, filepath.Base(o.Image))
	info, err := os.Lstat(o.Image)
	switch {
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%w: %s, and it is not a regular file", ErrExists, o.Image)
	case err == nil && !o.Overwrite:
		return fmt.Errorf("%w: %s", ErrExists, o.Image)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	}
	if rel, err := filepath.Rel(source, o.Image); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		return fmt.Errorf("%w: the image would lie in it: %s", ErrBadSource, source)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can: it takes a mount and a loop device: %w", unix.EPERM)
	}
	for _, tool := range []string{"mkfs.btrfs", "btrfstune"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: %s", ErrNoTool, tool)
		}
	}
	return nil
}

// publish gives the finished image its name.
func publish(partial string, o Options) error {
	var err error
	if o.Overwrite {
		err = os.Rename(partial, o.Image)
	} else if err = unix.Renameat2(unix.AT_FDCWD, partial, unix.AT_FDCWD, o.Image, unix.RENAME_NOREPLACE); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %s", ErrExists, o.Image)
	} else if errors.Is(err, unix.EINVAL) { // not on every file system
		if err = os.Link(partial, o.Image); errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%w: %s", ErrExists, o.Image)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot name the image: %w", err)
	}
	dir, err := os.Open(filepath.Dir(o.Image))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// shorten leaves room for what is added to a name.
func shorten(name string) string { return name[:min(len(name), 200)] }

// freeSpace is what the file system of dir has left.
func freeSpace(dir string) uint64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return st.Bavail * uint64(st.Bsize)
}

// meter passes progress on, not too often.
type meter struct {
	call  func(Progress)
	name  string
	done  uint64
	total uint64
	last  time.Time
}

func (m *meter) phase(name string) {
	m.name, m.last = name, time.Time{}
	m.add(0)
}

func (m *meter) add(n int64) {
	m.done += uint64(n)
	if m.call == nil || time.Since(m.last) < 250*time.Millisecond {
		return
	}
	m.last = time.Now()
	m.call(Progress{Phase: m.name, Done: min(m.done, m.total), Total: m.total})
}
