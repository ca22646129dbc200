// Package btrfs is the adapter to Btrfs: to mounted filesystems through the
// kernel's ioctls and sysfs, and to unmounted ones through their superblock.
// It starts no program and needs no C library.
//
//	btrfs.go    an open filesystem: Open, Info, label, sync, state
//	member.go   the devices of a filesystem
//	device.go   add, remove, replace, resize; scan and forget
//	space.go    space by kind and profile; conversion of metadata
//	group.go    tree search and the block groups on a device
//	check.go    what was read against its checksums
//	damage.go   which files cannot be read after a removal failed
//	scrub.go    reading everything and comparing it with its checksum
//	super.go    the superblock of a file or device
//	offline.go  the trees of an unmounted filesystem, and its devices
//	image.go    what is in use of a seed by its own trees
//	scratched.go  superblocks that a replace has wiped, and its state
//	encoded.go  writing extents that are compressed already
//	csum.go     the four checksums, with xxhash64.go and blake2b.go
//	ioctl.go    the one ioctl helper and the kernel's structures
//
// It follows include/uapi/linux/btrfs.h and btrfs_tree.h. The constants of the
// kernel's positive return codes come from github.com/dennwc/btrfs; its calls
// are not used here since they drop those codes, know no device by id, and
// keep their descriptor to themselves.
package btrfs

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	dbtrfs "github.com/dennwc/btrfs"
	"golang.org/x/sys/unix"
)

// FS is an open mounted filesystem. Its methods may be called concurrently. An
// open FS keeps the filesystem from being unmounted.
type FS struct {
	dir   *os.File
	path  string
	sys   string // where sysfs is mounted
	dev   string // where the device nodes are
	ioctl ioctlFunc
}

// Open opens the filesystem mounted at mountpoint; any directory in it will
// do. The error wraps [ErrNotBtrfs] when something else is mounted there.
func Open(mountpoint string) (*FS, error) {
	dir, err := os.OpenFile(mountpoint, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the filesystem: %w", err)
	}
	var st unix.Statfs_t
	statErr := error(nil)
	err = withFD(dir, func(fd uintptr) { statErr = unix.Fstatfs(int(fd), &st) })
	if err == nil {
		err = statErr
	}
	if err == nil && uint32(st.Type) != dbtrfs.SuperMagic {
		err = ErrNotBtrfs
	}
	if err != nil {
		_ = dir.Close() // Nothing was written.
		return nil, opError("open the filesystem", mountpoint, 0, err)
	}
	return &FS{dir: dir, path: mountpoint, sys: "/sys", dev: "/dev", ioctl: sysIoctl}, nil
}

// Close gives the filesystem free. Calls that are under way go on to their end;
// later ones fail with os.ErrClosed.
func (f *FS) Close() error { return f.dir.Close() }

// Info describes a mounted filesystem. Source: BTRFS_IOC_FS_INFO.
type Info struct {
	FSID         UUID
	MetadataUUID UUID // equal to FSID unless it was changed offline; zero before Linux 5.10
	// NumDevices counts the writable devices only: neither it nor MaxDevID
	// knows of the seeds below a sprout.
	NumDevices uint64
	MaxDevID   uint64
	NodeSize   uint32 // bytes
	SectorSize uint32 // bytes
	CsumType   CsumType
	CsumSize   uint16 // bytes
	Generation uint64 // of the last committed transaction
}

// Info asks the kernel about the filesystem as a whole.
func (f *FS) Info() (Info, error) {
	args := fsInfoArgs{flags: 1<<0 | 1<<1 | 1<<2} // checksum, generation, metadata UUID
	if err := f.call(iocFSInfo, unsafe.Pointer(&args)); err != nil {
		return Info{}, f.fail("read the filesystem's description", err)
	}
	return Info{
		FSID: args.fsid, MetadataUUID: args.metadataUUID,
		NumDevices: args.numDevices, MaxDevID: args.maxID,
		NodeSize: args.nodeSize, SectorSize: args.sectorSize,
		CsumType: CsumType(args.csumType), CsumSize: args.csumSize,
		Generation: args.generation,
	}, nil
}

// Sync writes everything to the devices and commits. It is about this
// filesystem only.
func (f *FS) Sync() error {
	return f.fail("write out the filesystem", f.call(iocSync, nil))
}

// Label gives the filesystem's label, "" when it has none.
func (f *FS) Label() (string, error) {
	var label [256]byte
	if err := f.call(iocGetLabel, unsafe.Pointer(&label)); err != nil {
		return "", f.fail("read the label", err)
	}
	return getString(label[:]), nil
}

// SetLabel sets the label: at most 255 bytes, "" for none.
func (f *FS) SetLabel(label string) error {
	var arg [256]byte
	err := putString(arg[:], label)
	if err == nil {
		err = f.call(iocSetLabel, unsafe.Pointer(&arg))
	}
	return f.fail("set the label", err)
}

// ExclusiveOperation names the operation that keeps others out: "none",
// "device add", "device remove", "device replace", "resize", "balance",
// "balance paused" or "swap activate". Source: sysfs exclusive_operation,
// Linux 5.10.
func (f *FS) ExclusiveOperation() (string, error) {
	return f.attr("exclusive_operation")
}

// GlobalReserve gives the size in bytes of what the kernel keeps back for
// metadata. It can be read on a seed that is mounted read-only, where it says
// how large a sprout's first device must be.
func (f *FS) GlobalReserve() (uint64, error) {
	text, err := f.attr("allocation/global_rsv_size")
	if err != nil {
		return 0, err
	}
	size, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, f.fail("read the global reserve", err)
	}
	return size, nil
}

// attr reads an attribute of the filesystem in sysfs.
func (f *FS) attr(name string) (string, error) {
	const op = "read the filesystem's state"
	_, dir, err := f.state()
	if err != nil {
		return "", f.fail(op, err)
	}
	text, err := readAttr(filepath.Join(dir, name))
	return text, f.fail(op, err)
}

// errRenamed is met in the middle of [FS.Add] on a seed: the filesystem has its
// new fsid already, but sysfs only at the end.
var errRenamed = fmt.Errorf("%w: the filesystem is just becoming a sprout", unix.EAGAIN)

// state gives the filesystem's description and its directory in sysfs.
func (f *FS) state() (Info, string, error) {
	info, err := f.Info()
	if err != nil {
		return Info{}, "", err
	}
	dir := filepath.Join(f.sys, "fs/btrfs", info.FSID.String())
	if _, err := os.Stat(dir); os.IsNotExist(err) {
		return Info{}, "", errRenamed
	} else if err != nil {
		return Info{}, "", err
	}
	return info, dir, nil
}

func readAttr(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(data)), nil
}

// entries lists a directory of sysfs; one that is absent is empty.
func entries(dir string) ([]fs.DirEntry, error) {
	list, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil, nil
	}
	return list, err
}
