package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
)

// Entry is one line of the mount table (proc_pid_mountinfo(5)).
type Entry struct {
	// ID of the mount, and of the one it is mounted in.
	ID, Parent int
	// Num is the device number of the file system; its major is 0 for those
	// that are not on one block device, Btrfs among them.
	Num block.DevNum
	// Root is the directory of the file system that is seen at MountPoint.
	Root, MountPoint string
	// Options of this mount: "ro", "nosuid" ...
	Options        []string
	FSType, Source string
	// SuperOptions are the options of the file system, "ro" or "rw" the first.
	SuperOptions []string
}

// flags are the per-mount flags in the form of mount(2), without read-only.
func (e Entry) flags() uintptr {
	var ms uintptr
	for _, name := range e.Options {
		f, _ := flagOf(name)
		ms |= f.ms
	}
	return ms
}

// Table is the mount table of this process' mount namespace.
type Table struct{ root string }

// New returns the mount table of the running kernel.
func New() *Table { return NewAt("/") }

// NewAt returns the mount table in the proc directory below root.
func NewAt(root string) *Table { return &Table{root: root} }

// List reads the mount table, in the order of the kernel: of two entries with
// one mount point the later one is on top.
func (t *Table) List() ([]Entry, error) {
	f, err := os.Open(t.path())
	if err != nil {
		return nil, fmt.Errorf("cannot read the mount table: %w", err)
	}
	defer func() { _ = f.Close() }()
	infos, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot read the mount table: %w", err)
	}
	list := make([]Entry, 0, len(infos))
	for _, m := range infos {
		list = append(list, Entry{
			ID: m.ID, Parent: m.Parent,
			Num:  block.DevNum{Major: uint32(m.Major), Minor: uint32(m.Minor)},
			Root: m.Root, MountPoint: m.Mountpoint,
			Options: strings.Split(m.Options, ","),
			FSType:  m.FSType, Source: m.Source,
			SuperOptions: strings.Split(m.VFSOptions, ","),
		})
	}
	return list, nil
}

func (t *Table) path() string { return filepath.Join(t.root, "proc/self/mountinfo") }

// At gives the mount that path lies on, which need not be its mount point.
func (t *Table) At(path string) (Entry, error) {
	id, err := mountID(path)
	if err != nil {
		return Entry{}, fmt.Errorf("cannot find the mount of %s: %w", path, err)
	}
	list, err := t.List()
	if err != nil {
		return Entry{}, err
	}
	for _, e := range list {
		if e.ID == id {
			return e, nil
		}
	}
	return Entry{}, fmt.Errorf("cannot find the mount of %s: %w", path, os.ErrNotExist)
}

// mountID asks without waiting for network or FUSE servers.
func mountID(path string) (int, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0, err
	}
	if st.Mask&unix.STATX_MNT_ID == 0 { // before 5.8
		return 0, unix.ENOSYS
	}
	return int(st.Mnt_id), nil
}

// Watch calls changed once when it has begun to watch, and then after every
// change of the mount table, until ctx ends; it returns nil then. Changes that
// come fast may be told as one. No timer runs.
func (t *Table) Watch(ctx context.Context, changed func()) error {
	// Not by os.Open: Go would put the descriptor into an epoll set of its own,
	// and which of two polls sees a change is chance.
	table, err := unix.Open(t.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot watch the mount table: %w", &fs.PathError{Op: "open", Path: t.path(), Err: err})
	}
	defer func() { _ = unix.Close(table) }()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot watch the mount table: %w", err)
	}
	defer func() { _ = unix.Close(wake) }()
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, binary.NativeEndian.AppendUint64(nil, 1))
	})
	defer func() {
		if !stop() {
			<-woken // it still needs the descriptor
		}
	}()
	changed()
	for {
		// The kernel raises POLLPRI once for each change since the last poll
		// of this descriptor (mounts_poll in fs/proc_namespace.c).
		fds := []unix.PollFd{
			{Fd: int32(table), Events: unix.POLLPRI},
			{Fd: int32(wake), Events: unix.POLLIN},
		}
		_, err := unix.Poll(fds, -1)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("cannot watch the mount table: %w", err)
		case fds[0].Revents&(unix.POLLPRI|unix.POLLERR) != 0:
			changed()
		}
	}
}
