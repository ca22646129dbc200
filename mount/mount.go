// Package mount reads the mount table and mounts, remounts and unmounts file
// systems.
//
// Topics by file: the mount table and its changes (table.go), mounting and
// remounting (mount.go), unmounting and who stands in its way (unmount.go), making
// writers wait (freeze.go). It
// uses the mount API of Linux 5.2 (fsopen, fsconfig, fspick), which changes
// what is asked for and nothing else, and gives the file system's own words
// when it refuses; mount(2) where the kernel is older.
package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Options of a mount. The zero value mounts read-write with the defaults of
// kernel and file system.
type Options struct {
	// ReadOnly makes the superblock and the mount read-only.
	ReadOnly bool
	// Flags of this mount: nosuid, nodev, noexec, noatime, nodiratime,
	// strictatime, relatime, nosymfollow.
	Flags []string
	// Data are the file system's own options, "compress=zstd:1" or "degraded".
	Data []string
}

// flag is a per-mount option in the three languages it is spoken of.
type flag struct {
	attr, clear uint64 // mount_setattr(2), fsmount(2)
	ms          uintptr
}

func flagOf(name string) (flag, bool) {
	switch name {
	case "nosuid":
		return flag{unix.MOUNT_ATTR_NOSUID, 0, unix.MS_NOSUID}, true
	case "nodev":
		return flag{unix.MOUNT_ATTR_NODEV, 0, unix.MS_NODEV}, true
	case "noexec":
		return flag{unix.MOUNT_ATTR_NOEXEC, 0, unix.MS_NOEXEC}, true
	case "noatime":
		return flag{unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME, unix.MS_NOATIME}, true
	case "strictatime":
		return flag{unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME, unix.MS_STRICTATIME}, true
	case "relatime":
		return flag{unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME, unix.MS_RELATIME}, true
	case "nodiratime":
		return flag{unix.MOUNT_ATTR_NODIRATIME, 0, unix.MS_NODIRATIME}, true
	case "nosymfollow":
		return flag{unix.MOUNT_ATTR_NOSYMFOLLOW, 0, unix.MS_NOSYMFOLLOW}, true
	}
	return flag{}, false
}

// ParseOptions sorts a comma-separated list as mount(8) takes it: "ro" and
// "rw", the flags of the mount, and all else as data of the file system.
func ParseOptions(list string) Options {
	var o Options
	for word := range strings.SplitSeq(list, ",") {
		_, isFlag := flagOf(word)
		switch {
		case word == "" || word == "defaults":
		case word == "ro", word == "rw":
			o.ReadOnly = word == "ro"
		case isFlag:
			o.Flags = append(o.Flags, word)
		default:
			o.Data = append(o.Data, word)
		}
	}
	return o
}

// Mount mounts source on target, which must exist. The error wraps the
// kernel's errno and carries the messages of the file system.
func Mount(source, target, fstype string, o Options) error {
	var attrs uint64
	var ms uintptr
	for _, name := range o.Flags {
		f, ok := flagOf(name)
		if !ok {
			return fmt.Errorf("cannot mount %s: %q is no flag of a mount", source, name)
		}
		attrs, ms = attrs&^f.clear|f.attr, ms|f.ms
	}
	if o.ReadOnly {
		attrs, ms = attrs|unix.MOUNT_ATTR_RDONLY, ms|unix.MS_RDONLY
	}
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		err = unix.Mount(source, target, fstype, ms, strings.Join(o.Data, ","))
		return wrap(err, "cannot mount %s on %s", source, target)
	}
	if err != nil {
		return wrap(err, "cannot mount a file system of type %s", fstype)
	}
	defer func() { _ = unix.Close(fs) }()
	err = unix.FsconfigSetString(fs, "source", source)
	if err == nil {
		err = configure(fs, o.ReadOnly, o.Data)
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return wrap(withLog(fs, err), "cannot mount %s on %s", source, target)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(attrs))
	if err != nil {
		return wrap(withLog(fs, err), "cannot mount %s on %s", source, target)
	}
	defer func() { _ = unix.Close(mnt) }()
	err = unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
	return wrap(err, "cannot mount %s on %s", source, target)
}

// configure hands the options to a file system context.
func configure(fs int, readOnly bool, data []string) error {
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	if err := unix.FsconfigSetFlag(fs, mode); err != nil {
		return err
	}
	for _, option := range data {
		key, value, hasValue := strings.Cut(option, "=")
		var err error
		if hasValue {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return fmt.Errorf("option %s: %w", option, withLog(fs, err))
		}
	}
	return nil
}

// logged is an error with what the file system said about it.
type logged struct {
	err error
	log []string
}

func (e *logged) Error() string { return e.err.Error() + ": " + strings.Join(e.log, "; ") }
func (e *logged) Unwrap() error { return e.err }

// withLog adds the messages waiting in a file system context
// (Documentation/filesystems/mount_api.rst): "e ", "w " or "i " and a text each.
func withLog(fs int, err error) error {
	var lines []string
	buf := make([]byte, 4096)
	for range 16 {
		n, e := unix.Read(fs, buf)
		if e != nil || n == 0 { // ENODATA: no more
			break
		}
		text := strings.TrimSpace(string(buf[:n]))
		if len(text) > 2 && text[1] == ' ' && strings.ContainsRune("ewi", rune(text[0])) {
			text = text[2:]
		}
		lines = append(lines, text)
	}
	if len(lines) == 0 {
		return err
	}
	return &logged{err, lines}
}

// wrap is fmt.Errorf for what may be no error.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

// SetWritable makes the file system on target writable: the superblock, with
// data as further options of the file system, and then this mount of it. Its
// other flags (nosuid, noatime ...) and other mounts stay as they are. This is
// also what gives a freshly made sprout its first write.
func SetWritable(target string, data ...string) error {
	if err := reconfigure(target, false, data); err != nil {
		return wrap(err, "cannot make %s writable", target)
	}
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	err := unix.MountSetattr(unix.AT_FDCWD, target, 0, &attr)
	if errors.Is(err, unix.ENOSYS) { // before 5.12
		var e Entry
		if e, err = New().At(target); err == nil {
			err = unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|e.flags(), "")
		}
	}
	return wrap(err, "cannot make %s writable", target)
}

// Reconfigure changes options of the mounted file system on target, such as
// compress= or commit=. Whether it is writable does not change.
func Reconfigure(target string, data ...string) error {
	e, err := New().At(target)
	if err == nil {
		// The file system takes an unsaid "ro" for "rw" (fc->sb_flags starts at 0).
		err = reconfigure(target, slices.Contains(e.SuperOptions, "ro"), data)
	}
	return wrap(err, "cannot change the options of %s", target)
}

func reconfigure(target string, readOnly bool, data []string) error {
	fs, err := unix.Fspick(unix.AT_FDCWD, target, unix.FSPICK_CLOEXEC|unix.FSPICK_NO_AUTOMOUNT)
	if errors.Is(err, unix.ENOSYS) { // before 5.2
		e, err := New().At(target)
		if err != nil {
			return err
		}
		flags := unix.MS_REMOUNT | e.flags()
		if readOnly {
			flags |= unix.MS_RDONLY
		}
		return os.NewSyscallError("mount", unix.Mount("", target, "", flags, strings.Join(data, ",")))
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fs) }()
	if err := configure(fs, readOnly, data); err != nil {
		return err
	}
	if err := unix.FsconfigReconfigure(fs); err != nil {
		return withLog(fs, err)
	}
	return nil
}
