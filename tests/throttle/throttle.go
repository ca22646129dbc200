// Package throttle shows the files of a directory through a file system that is
// as slow as a stick: so many bytes a second, and each answer late by so much.
//
// What matters to those who read is kept as it is on a stick: the page cache,
// the kernel's read-ahead, and several requests under way at once, of which the
// stick works on one after the other. While it does, other requests wait in its
// queue; the latency comes on top of each of them and keeps no other one
// waiting, as with a stick that has a queue (UAS) or looks ahead itself. It is
// for a benchmark, and for tests that need a slow source without a slow device.
//
// The files are there to be read and changed, not to be made or deleted. It
// needs root, and no program of the fuse package.
package throttle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Spec says what to show, and how slowly.
type Spec struct {
	// Dir has the files; required. Only regular files in it are shown.
	Dir string
	// Rate in bytes a second, for reads and writes together; 0 means no limit.
	Rate int64
	// Latency of each read and write.
	Latency time.Duration
}

// FS is a mounted file system. Make it with [Mount], give it back with
// [FS.Close].
type FS struct {
	dir     string
	server  *fuse.Server
	latency time.Duration
	queue   queue

	read, written, reads atomic.Int64
	last                 atomic.Int64 // end of the last read, in ns since the epoch
}

// Mount shows spec.Dir at dir.
func Mount(spec Spec, dir string) (*FS, error) {
	f := &FS{dir: dir, latency: spec.Latency, queue: queue{rate: float64(spec.Rate)}}
	found, err := os.ReadDir(spec.Dir)
	if err != nil {
		return nil, fmt.Errorf("cannot show %s at %s: %w", spec.Dir, dir, err)
	}
	var names []string
	for _, entry := range found {
		if entry.Type().IsRegular() {
			names = append(names, entry.Name())
		}
	}
	forever := time.Hour // nothing changes behind our back
	f.server, err = fs.Mount(dir, &root{fs: f, dir: spec.Dir, names: names}, &fs.Options{
		AttrTimeout: &forever, EntryTimeout: &forever,
		MountOptions: fuse.MountOptions{
			FsName: "throttle", Name: "throttle",
			MaxWrite:          1 << 19,
			DirectMountStrict: true, // fusermount need not be there
			// It complains of each read whose reader has gone meanwhile.
			Logger: log.New(io.Discard, "", 0),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot show %s at %s: %w", spec.Dir, dir, err)
	}
	return f, nil
}

// Path is that of the file with this name.
func (f *FS) Path(name string) string { return filepath.Join(f.dir, name) }

// BytesRead and BytesWritten count since the mount what was asked of the stick:
// what came from the page cache is not in it.
func (f *FS) BytesRead() int64 { return f.read.Load() }

// BytesWritten is [FS.BytesRead] for writes.
func (f *FS) BytesWritten() int64 { return f.written.Load() }

// Reads counts the requests.
func (f *FS) Reads() int64 { return f.reads.Load() }

// LastRead is when the last read ended, the zero time if there was none.
func (f *FS) LastRead() time.Time {
	if ns := f.last.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// How long others may have open what they look at in passing.
const (
	busyFor   = 15 * time.Second
	busyPause = 20 * time.Millisecond
)

// Close unmounts it, once nobody uses it any more. If it stays busy it is taken
// out of the tree all the same, and the error says so.
func (f *FS) Close() error {
	for deadline := time.Now().Add(busyFor); ; time.Sleep(busyPause) {
		err := unix.Unmount(f.dir, 0)
		if errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
			continue
		}
		if err != nil {
			return errors.Join(fmt.Errorf("cannot unmount %s: %w", f.dir, err), unix.Unmount(f.dir, unix.MNT_DETACH))
		}
		f.server.Wait()
		return nil
	}
}

// queue is the one thing a stick can do at a time.
type queue struct {
	rate float64
	mu   sync.Mutex
	free time.Time // when all is done that was asked for
}

// catchUp is how much idle time a stick makes up for, with what it has looked
// ahead. Without it each late wake-up of this process would slow the stick down.
const catchUp = 2 * time.Millisecond

// add queues n bytes and says when they are there.
func (q *queue) add(n int, now time.Time) time.Time {
	if q.rate == 0 {
		return now
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if earliest := now.Add(-catchUp); q.free.Before(earliest) {
		q.free = earliest
	}
	q.free = q.free.Add(time.Duration(float64(n) / q.rate * float64(time.Second)))
	return q.free
}

// wait takes as long as the stick takes for n bytes. As with a stick, a signal
// does not cut it short.
func (f *FS) wait(n int) {
	now := time.Now()
	time.Sleep(max(f.queue.add(n, now).Sub(now), 0) + f.latency)
}

// root is the directory.
type root struct {
	fs.Inode
	fs    *FS
	dir   string
	names []string
}

// OnAdd makes the files known.
func (r *root) OnAdd(ctx context.Context) {
	for _, name := range r.names {
		child := r.NewPersistentInode(ctx, &file{fs: r.fs, path: filepath.Join(r.dir, name)}, fs.StableAttr{Mode: fuse.S_IFREG})
		r.AddChild(name, child, true)
	}
}

// Statfs says what the directory's own file system says.
func (r *root) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st syscall.Statfs_t
	if err := syscall.Statfs(r.dir, &st); err != nil {
		return fs.ToErrno(err)
	}
	out.FromStatfsT(&st)
	return 0
}

// file is one file.
type file struct {
	fs.Inode
	fs   *FS
	path string
}

// handle is an open file.
type handle struct {
	fd int
}

// Release closes it.
func (h *handle) Release(context.Context) syscall.Errno { return fs.ToErrno(unix.Close(h.fd)) }

// Open keeps what the page cache has of the file.
func (f *file) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	const kept = unix.O_ACCMODE
	fd, err := unix.Open(f.path, int(flags)&kept|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fs.ToErrno(err)
	}
	return &handle{fd}, fuse.FOPEN_KEEP_CACHE, 0
}

// Getattr is stat.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	var st syscall.Stat_t
	if err := syscall.Stat(f.path, &st); err != nil {
		return fs.ToErrno(err)
	}
	out.FromStat(&st)
	return 0
}

// Setattr takes new times for granted; they are of no use here.
func (f *file) Setattr(ctx context.Context, h fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return f.Getattr(ctx, h, out)
}

// Read is as slow as the stick.
func (f *file) Read(_ context.Context, h fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	open, ok := h.(*handle)
	if !ok {
		return nil, syscall.EBADF
	}
	n := len(dest)
	var st unix.Stat_t
	if err := unix.Fstat(open.fd, &st); err != nil {
		return nil, fs.ToErrno(err)
	}
	n = int(max(min(int64(n), st.Size-off), 0))
	f.fs.wait(n)
	f.fs.read.Add(int64(n))
	f.fs.reads.Add(1)
	f.fs.last.Store(time.Now().UnixNano())
	return fuse.ReadResultFd(uintptr(open.fd), off, n), 0
}

// Write is as slow as the stick.
func (f *file) Write(_ context.Context, h fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	open, ok := h.(*handle)
	if !ok {
		return 0, syscall.EBADF
	}
	f.fs.wait(len(data))
	n, err := unix.Pwrite(open.fd, data, off)
	f.fs.written.Add(int64(max(n, 0)))
	return uint32(max(n, 0)), fs.ToErrno(err)
}

// Fsync is that of the file.
func (f *file) Fsync(_ context.Context, h fs.FileHandle, _ uint32) syscall.Errno {
	open, ok := h.(*handle)
	if !ok {
		return syscall.EBADF
	}
	return fs.ToErrno(unix.Fsync(open.fd))
}

// Lseek finds data and holes.
func (f *file) Lseek(_ context.Context, h fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	open, ok := h.(*handle)
	if !ok {
		return 0, syscall.EBADF
	}
	at, err := unix.Seek(open.fd, int64(off), int(whence))
	return uint64(at), fs.ToErrno(err)
}

var (
	_ fs.NodeOnAdder   = (*root)(nil)
	_ fs.NodeStatfser  = (*root)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeSetattrer = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
	_ fs.NodeLseeker   = (*file)(nil)
	_ fs.FileReleaser  = (*handle)(nil)
)
