package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// User is a process that uses a mount.
type User struct {
	PID int
	// Command is the name of its program.
	Command string
}

func (u User) String() string { return fmt.Sprintf("%s (pid %d)", u.Command, u.PID) }

// BusyError says why a mount cannot go. It wraps EBUSY.
type BusyError struct {
	Target string
	// Users have a file, a directory or their program on it.
	Users []User
	// Mounts are the mount points inside it.
	Mounts []string
}

func (e *BusyError) Error() string {
	var by []string
	for _, u := range e.Users {
		by = append(by, u.String())
	}
	for _, m := range e.Mounts {
		by = append(by, "the mount "+m)
	}
	if len(by) == 0 { // a loop, a swap file, an NFS export, or over since
		by = []string{"the kernel, or a process that just ended"}
	}
	return "cannot unmount " + e.Target + ": in use by " + strings.Join(by, ", ")
}

func (e *BusyError) Unwrap() error { return unix.EBUSY }

// Unmount takes a mount away. A lazy one is out of sight at once and gone when
// its last user is; otherwise a mount in use stays, and the error is a
// [*BusyError].
func Unmount(target string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(target, flags)
	if errors.Is(err, unix.EBUSY) {
		return busy(target)
	}
	return wrap(err, "cannot unmount %s", target)
}

func busy(target string) *BusyError {
	e := &BusyError{Target: target}
	at, err := New().At(target)
	if err != nil {
		return e
	}
	e.Users = users(at.ID)
	list, err := New().List()
	if err != nil {
		return e
	}
	for _, m := range list {
		if m.Parent == at.ID {
			e.Mounts = append(e.Mounts, m.MountPoint)
		}
	}
	return e
}

// users finds the processes with anything on the mount. Following the links in
// /proc gives the very mount they came through, which names do not.
func users(mount int) []User {
	var list []User
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", entry.Name())
		links := []string{filepath.Join(dir, "cwd"), filepath.Join(dir, "root"), filepath.Join(dir, "exe")}
		for _, sub := range []string{"fd", "map_files"} {
			names, _ := os.ReadDir(filepath.Join(dir, sub)) // it may have ended
			for _, name := range names {
				links = append(links, filepath.Join(dir, sub, name.Name()))
			}
		}
		for _, link := range links {
			if id, err := mountID(link); err == nil && id == mount {
				command, _ := os.ReadFile(filepath.Join(dir, "comm"))
				list = append(list, User{PID: pid, Command: strings.TrimSpace(string(command))})
				break
			}
		}
	}
	return list
}
