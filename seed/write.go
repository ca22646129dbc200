package seed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"

	dbtrfs "github.com/dennwc/btrfs"
	"golang.org/x/sys/unix"
)

// writer fills the mounted filesystem.
type writer struct {
	*source
	ctx    context.Context
	root   string
	meter  *meter
	buf    []byte
	frames *frames
}

func (w *writer) to(e *entry) string { return w.root + "/" + e.path }

// create makes every name in the order of the paths, so that what is close in
// the tree is close in the metadata, and the content that goes there. All of
// this comes before any other content: the metadata then lies below most of that,
// and is moved once only by a flatten, which begins at the end of the device.
func (w *writer) create() error {
	for _, e := range w.entries {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.createOne(e); err != nil {
			return fmt.Errorf("cannot write %q: %w", e.path, err)
		}
	}
	return nil
}

func (w *writer) createOne(e *entry) error {
	to := w.to(e)
	switch {
	case e.link != nil:
		return os.Link(w.to(e.link), to)
	case e.path == "":
		return nil
	case e.subvolume:
		return dbtrfs.CreateSubVolume(to)
	case e.isDir():
		return os.Mkdir(to, 0o700)
	case e.kind() == unix.S_IFLNK:
		if err := os.Symlink(e.target, to); err != nil {
			return err
		}
	case !e.regular():
		if err := unix.Mknod(to, e.mode&unix.S_IFMT|0o600, int(e.rdev)); err != nil {
			return &fs.PathError{Op: "mknod", Path: to, Err: err}
		}
	case e.inline():
		if err := w.fill(e); err != nil {
			return err
		}
	default:
		f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return f.Close() // the content comes later, and the attributes with it
	}
	return w.finish(e)
}

// fill writes the content of a file and leaves its holes out.
func (w *writer) fill(e *entry) (err error) {
	out, err := os.OpenFile(w.to(e), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	// Only an empty file can be told not to copy on write.
	if e.flags&flagNoCow != 0 {
		if err := unix.IoctlSetPointerInt(int(out.Fd()), unix.FS_IOC_SETFLAGS, flagNoCow); err != nil {
			return &fs.PathError{Op: "set the flags of", Path: out.Name(), Err: err}
		}
	}
	in, err := w.open(e)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	err = e.pieces(in, func(start, end int64) error {
		for at := start; at < end; {
			if err := w.ctx.Err(); err != nil {
				return err
			}
			p := w.buf[:min(end-at, int64(len(w.buf)))]
			if err := in.read(p, at); err != nil {
				return err
			}
			if _, err := out.WriteAt(p, at); err != nil {
				return err
			}
			at += int64(len(p))
			w.meter.add(int64(len(p)))
		}
		return nil
	})
	if err != nil || e.dense() {
		return err
	}
	return out.Truncate(e.size)
}

// rest writes those of the files that were not packed.
func (w *writer) rest(files []*entry) error {
	for _, e := range files {
		if err := errors.Join(w.fill(e), w.finish(e)); err != nil {
			return fmt.Errorf("cannot write %q: %w", e.path, err)
		}
	}
	return nil
}

// share gives files the content of their equals.
func (w *writer) share() error {
	for _, e := range w.entries {
		if e.same == nil {
			continue
		}
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := errors.Join(w.clone(e), w.finish(e)); err != nil {
			return fmt.Errorf("cannot write %q: %w", e.path, err)
		}
		w.meter.add(e.data)
	}
	return nil
}

func (w *writer) clone(e *entry) (err error) {
	from, err := os.Open(w.to(e.same))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	to, err := os.OpenFile(w.to(e), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd())); err != nil {
		return errors.Join(&fs.PathError{Op: "share content with", Path: e.same.path, Err: err}, to.Close())
	}
	return to.Close()
}

// directories get their attributes last and from the bottom up: each entry made
// in one changes its time, and a new file inherits from it.
func (w *writer) directories() error {
	for _, e := range slices.Backward(w.entries) {
		if !e.isDir() {
			continue
		}
		err := w.finish(e)
		if err == nil && e.readOnly {
			err = setReadOnly(w.to(e))
		}
		if err != nil {
			return fmt.Errorf("cannot write %q: %w", e.path, err)
		}
	}
	return nil
}

func setReadOnly(path string) error {
	sub, err := dbtrfs.Open(path, false)
	if err != nil {
		return err
	}
	return errors.Join(sub.SetFlags(dbtrfs.SubvolReadOnly), sub.Close())
}

// finish sets all attributes, in the order in which none undoes another: a new
// owner takes setuid and capabilities away, and some flags forbid the rest.
func (w *writer) finish(e *entry) error {
	to := w.to(e)
	fail := func(op string, err error) error { return &fs.PathError{Op: op, Path: to, Err: err} }
	if err := unix.Lchown(to, int(e.uid), int(e.gid)); err != nil {
		return fail("change the owner of", err)
	}
	if e.kind() != unix.S_IFLNK {
		if err := unix.Chmod(to, e.mode&0o7777); err != nil {
			return fail("change the mode of", err)
		}
	}
	for _, x := range e.xattrs {
		if err := unix.Lsetxattr(to, x.name, x.value, 0); err != nil {
			return fail("set the attribute "+x.name+" of", err)
		}
	}
	times := []unix.Timespec{e.mtime, e.mtime}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail("set the time of", err)
	}
	if e.flags == 0 || e.flags == flagNoCow && !e.isDir() { // fill has set that
		return nil
	}
	f, err := openQuietly(to)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read from
	now, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(now&^flagsKept|e.flags))
	}
	if err != nil {
		return fail("set the flags of", err)
	}
	return nil
}

// pieces calls visit for each part with data, all of it being one in a dense
// file wherever that lies.
func (e *entry) pieces(in content, visit func(start, end int64) error) error {
	if !e.dense() {
		return in.pieces(visit)
	}
	if e.size == 0 {
		return nil
	}
	return visit(0, e.size)
}

func dirOf(name string) string { return path.Dir("/" + name) }

// blocks rounds up to whole blocks.
func blocks(n int64) int64 { return (n + blockSize - 1) / blockSize * blockSize }
