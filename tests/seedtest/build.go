package seedtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Method is a way of making a seed. The two lay out block groups differently,
// so a move has to cope with both.
type Method string

const (
	// Copy makes an empty filesystem, mounts it and copies the content in.
	Copy Method = "copy"
	// RootDir lets mkfs.btrfs --rootdir fill the image without a mount. It
	// knows no compression, subvolumes, reflinks or inode flags, and before
	// btrfs-progs 6.12 it makes two files of a hard link.
	RootDir Method = "rootdir"
)

// Spec says what seed to build. The zero value is a 1.5 GiB image, copied in
// without compression, single metadata, crc32c, holding [Standard].
type Spec struct {
	// Dir is the directory the image is made in; required.
	Dir string
	// ImageSize in bytes; 0 means 1.5 GiB. The file is sparse.
	ImageSize int64
	// Method; "" means [Copy].
	Method Method
	// Compress is a value for the mount option of that name, such as "zstd"
	// or "zstd:3"; "" and "none" mean no compression. [Copy] only.
	Compress string
	// Metadata profile, "single" or "dup"; "" means single, as a live image
	// should have.
	Metadata string
	// Csum is crc32c, xxhash, sha256 or blake2; "" means crc32c.
	Csum string
	// Label of the filesystem; "" means "sproutd-test".
	Label string
	// Random picks the data of [Standard]: the same number, the same content.
	Random uint64
	// Content fills the empty tree at dir.
	Content func(dir string) error
	// Source is a directory to copy into the seed, up to SourceMax bytes of
	// it (0 = all). See [CopyTree].
	Source    string
	SourceMax int64
	// Plain leaves the seed flag out: an ordinary filesystem, which the
	// daemon has to refuse.
	Plain bool
}

// Seed is a seed image.
type Seed struct {
	// Path of the image file.
	Path string
	// Size of the image in bytes.
	Size int64
	// Label of the filesystem.
	Label string
}

// Build makes a seed image as spec says. With neither Content nor Source the
// seed holds [Standard].
func Build(ctx context.Context, spec Spec) (Seed, error) {
	spec.ImageSize = cmp.Or(spec.ImageSize, 3*GiB/2)
	spec.Method = cmp.Or(spec.Method, Copy)
	spec.Metadata = cmp.Or(spec.Metadata, "single")
	spec.Csum = cmp.Or(spec.Csum, "crc32c")
	spec.Label = cmp.Or(spec.Label, "sproutd-test")
	if spec.Compress == "none" {
		spec.Compress = ""
	}
	seed, err := build(ctx, spec)
	if err != nil {
		return Seed{}, fmt.Errorf("cannot build a seed: %w", err)
	}
	return seed, nil
}

func build(ctx context.Context, spec Spec) (seed Seed, err error) {
	if spec.Dir == "" {
		return seed, errors.New("no directory given")
	}
	image, err := os.CreateTemp(spec.Dir, "root-*.img")
	if err != nil {
		return seed, err
	}
	seed = Seed{Path: image.Name(), Size: spec.ImageSize, Label: spec.Label}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(seed.Path))
		}
	}()
	if err := errors.Join(image.Truncate(spec.ImageSize), image.Close()); err != nil {
		return seed, err
	}
	mkfs := []string{"-q", "-f", "-d", "single", "-m", spec.Metadata, "--csum", spec.Csum, "-L", spec.Label}

	switch spec.Method {
	case Copy:
		if _, err := run(ctx, "mkfs.btrfs", append(mkfs, seed.Path)...); err != nil {
			return seed, err
		}
		if err := copyIn(ctx, spec, seed.Path); err != nil {
			return seed, err
		}
	case RootDir:
		if spec.Compress != "" {
			return seed, errors.New("--rootdir does not compress everywhere: copy the content in")
		}
		stage, err := os.MkdirTemp(spec.Dir, "rootdir-")
		if err != nil {
			return seed, err
		}
		defer os.RemoveAll(stage)
		if err := spec.fill(stage); err != nil {
			return seed, err
		}
		if _, err := run(ctx, "mkfs.btrfs", append(mkfs, "--rootdir", stage, seed.Path)...); err != nil {
			return seed, err
		}
	default:
		return seed, fmt.Errorf("no such method: %q", spec.Method)
	}
	if spec.Plain {
		return seed, nil
	}
	_, err = run(ctx, "btrfstune", "-S", "1", "-f", seed.Path)
	return seed, err
}

// copyIn mounts the image and fills it. The unmount writes everything out.
func copyIn(ctx context.Context, spec Spec, image string) (err error) {
	loop, err := attach(ctx, image, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detachIdle(loop)) }()
	dir, err := os.MkdirTemp(spec.Dir, "mnt-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	options := ""
	if spec.Compress != "" {
		options = "compress=" + spec.Compress
	}
	if err := mount(loop, dir, "btrfs", unix.MS_NOATIME, options); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(dir)) }()
	return spec.fill(dir)
}

func (s Spec) fill(dir string) error {
	if s.Content == nil && s.Source == "" {
		return Standard(dir, StandardOptions{Random: s.Random, Btrfs: s.Method == Copy})
	}
	if s.Source != "" {
		if _, err := CopyTree(dir, s.Source, s.SourceMax); err != nil {
			return err
		}
	}
	if s.Content != nil {
		return s.Content(dir)
	}
	return nil
}

// CopyTree copies the directories, regular files and symbolic links of src
// into dst, in the order of their names, until limit bytes of files are there
// (0 = no limit), and gives the number of bytes copied. Modes, owners and
// modification times come along; hard links and extended attributes do not.
func CopyTree(dst, src string, limit int64) (int64, error) {
	var copied int64
	var dirs []string
	err := filepath.WalkDir(src, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if limit > 0 && copied >= limit {
			return filepath.SkipAll
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		switch entry.Type() {
		case fs.ModeDir:
			dirs = append(dirs, rel)
			if rel == "." {
				return nil
			}
			return os.Mkdir(to, 0o700)
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if err := os.Symlink(target, to); err != nil {
				return err
			}
		case 0:
			n, err := copyFile(to, path)
			if err != nil {
				return err
			}
			copied += n
		default:
			return nil
		}
		return copyAttributes(to, path)
	})
	// A directory's own times are set last: each entry made in it changes them.
	for i := len(dirs) - 1; i >= 0 && err == nil; i-- {
		err = copyAttributes(filepath.Join(dst, dirs[i]), filepath.Join(src, dirs[i]))
	}
	if err != nil {
		return copied, fmt.Errorf("cannot copy %s: %w", src, err)
	}
	return copied, nil
}

func copyAttributes(to, from string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: from, Err: err}
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
			return &fs.PathError{Op: "chmod", Path: to, Err: err}
		}
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimensat", Path: to, Err: err}
	}
	return nil
}

// copyFile copies a regular file, leaving its holes out.
func copyFile(to, from string) (n int64, err error) {
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	extents, err := dataExtents(in, info.Size())
	if err != nil {
		return 0, err
	}
	for _, e := range extents {
		if _, err := in.Seek(e.Start, 0); err != nil {
			return n, err
		}
		if _, err := out.Seek(e.Start, 0); err != nil {
			return n, err
		}
		// The standard library hands this to copy_file_range(2).
		m, err := copyN(out, in, e.End-e.Start)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, out.Truncate(info.Size())
}
