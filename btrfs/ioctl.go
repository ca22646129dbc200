package btrfs

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers follow the generic encoding of asm-generic/ioctl.h and the sizes
// of 64-bit machines: amd64, arm64, riscv64, s390x, loong64.
const (
	magic = 0x94 << 8
	dirW  = 1 << 30
	dirR  = 2 << 30
	dirWR = dirW | dirR

	iocResize        = dirW | 4096<<16 | magic | 3
	iocScanDev       = dirW | 4096<<16 | magic | 4
	iocForgetDev     = dirW | 4096<<16 | magic | 5
	iocSync          = magic | 8
	iocAddDev        = dirW | 4096<<16 | magic | 10
	iocTreeSearchV2  = dirWR | 112<<16 | magic | 17
	iocInoLookup     = dirWR | 4096<<16 | magic | 18
	iocSpaceInfo     = dirWR | 16<<16 | magic | 20
	iocScrub         = dirWR | 1024<<16 | magic | 27
	iocScrubCancel   = magic | 28
	iocScrubProgress = dirWR | 1024<<16 | magic | 29
	iocDevInfo       = dirWR | 4096<<16 | magic | 30
	iocFSInfo        = dirR | 1024<<16 | magic | 31
	iocBalanceV2     = dirWR | 1024<<16 | magic | 32
	iocBalanceCtl    = dirW | 4<<16 | magic | 33
	iocGetLabel      = dirR | 256<<16 | magic | 49
	iocSetLabel      = dirW | 256<<16 | magic | 50
	iocDevReplace    = dirWR | 2600<<16 | magic | 53
	iocRmDevV2       = dirW | 4096<<16 | magic | 58
	iocLogicalInoV2  = dirWR | 56<<16 | magic | 59
	iocEncodedWrite  = dirW | 128<<16 | magic | 64
)

// The structures of linux/btrfs.h that this package hands to the kernel. Their
// sizes and offsets are tested against the header's.
type (
	volArgs struct {
		fd   int64
		name [4088]byte
	}

	volArgsV2 struct {
		fd, transid, flags uint64
		unused             [4]uint64
		name               [4040]byte // or the devid in its first eight bytes
	}

	fsInfoArgs struct {
		maxID, numDevices              uint64
		fsid                           UUID
		nodeSize, sectorSize, cloneAln uint32
		csumType, csumSize             uint16
		flags, generation              uint64
		metadataUUID                   UUID
		reserved                       [944]byte
	}

	devInfoArgs struct {
		devid                 uint64
		uuid                  UUID
		bytesUsed, totalBytes uint64
		fsid                  UUID // zero before Linux 6.3
		unused                [377]uint64
		path                  [1024]byte
	}

	spaceArgs struct {
		slots, total uint64
	}
	spaceInfo struct {
		flags, total, used uint64
	}

	replaceStart struct {
		srcDevID, mode uint64
		src, target    [1025]byte
	}
	replaceStatus struct {
		state, progress1000, started, stopped, writeErrors, readErrors uint64
	}
	replaceStartArgs struct {
		cmd, result uint64
		start       replaceStart
		spare       [64]uint64
	}
	replaceStatusArgs struct {
		cmd, result uint64
		status      replaceStatus
		pad         [2072 - 48]byte // the union is as long as replaceStart
		spare       [64]uint64
	}

	balanceFilter struct {
		profiles, usage, devid, pstart, pend, vstart, vend uint64
		target, flags, limit                               uint64
		stripesMin, stripesMax                             uint32
		unused                                             [6]uint64
	}
	balanceArgs struct {
		flags, state                    uint64
		data, meta, sys                 balanceFilter
		expected, considered, completed uint64
		unused                          [72]uint64
	}

	scrubProgress struct {
		dataExtents, treeExtents, dataBytes, treeBytes     uint64
		readErrors, csumErrors, verifyErrors               uint64
		noCsum, csumDiscards, superErrors, mallocErrors    uint64
		uncorrectable, corrected, lastPhysical, unverified uint64
	}
	scrubArgs struct {
		devid, start, end, flags uint64
		progress                 scrubProgress
		unused                   [109]uint64
	}

	searchKey struct {
		treeID                   uint64
		minObjectID, maxObjectID uint64
		minOffset, maxOffset     uint64
		minTransID, maxTransID   uint64
		minType, maxType         uint32
		nrItems, unused          uint32
		unused2                  [4]uint64
	}
	searchArgsV2 struct {
		key     searchKey
		bufSize uint64
		// The found items follow.
	}
	searchHeader struct {
		transID, objectID, offset uint64
		typ, length               uint32
	}

	inoLookupArgs struct {
		treeID, objectID uint64
		name             [4080]byte
	}

	logicalInoArgs struct {
		logical, size uint64
		reserved      [3]uint64
		flags, inodes uint64 // inodes is the address of a dataContainer
	}
	dataContainer struct {
		bytesLeft, bytesMissing, count, missed uint32
		refs                                   [2730]inodeRef
	}
	inodeRef struct {
		inode, offset, root uint64
	}

	encodedArgs struct {
		parts                            *unix.Iovec
		count                            uint64
		offset                           int64
		flags                            uint64
		length                           uint64
		unencodedLength, unencodedOffset uint64
		compression, encryption          uint32
		unused                           [64]byte
	}
)

// scrubReadOnly is BTRFS_SCRUB_READONLY.
const scrubReadOnly = 1

// ioctlFunc calls ioctl(2) and keeps both results: Btrfs reports some refusals
// as positive results with errno 0.
type ioctlFunc func(fd uintptr, req uint32, arg unsafe.Pointer) (r1 uintptr, errno unix.Errno)

func sysIoctl(fd uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
	r1, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(req), uintptr(arg))
	runtime.KeepAlive(arg)
	return r1, errno
}

// withFD lends out file's descriptor and keeps it open meanwhile.
func withFD(file *os.File, do func(fd uintptr)) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if raw.Control(do) != nil {
		return os.ErrClosed // It fails for no other reason.
	}
	return nil
}

// raw calls ioctl on the open filesystem. err is only set when it is closed.
func (f *FS) raw(req uint32, arg unsafe.Pointer) (r1 uintptr, errno unix.Errno, err error) {
	err = withFD(f.dir, func(fd uintptr) { r1, errno = f.ioctl(fd, req, arg) })
	return r1, errno, err
}

// call is raw with the results turned into one error.
func (f *FS) call(req uint32, arg unsafe.Pointer) error {
	r1, errno, err := f.raw(req, arg)
	if err != nil {
		return err
	}
	return cause(r1, errno)
}

// fail wraps a cause about the whole filesystem; nil stays nil.
func (f *FS) fail(op string, err error) error {
	return opError(op, f.path, 0, err)
}

// opError wraps a cause; nil and what is wrapped already stay as they are.
func opError(op, path string, devid uint64, err error) error {
	if inner := (*OpError)(nil); err == nil || errors.As(err, &inner) {
		return err
	}
	return &OpError{Op: op, Path: path, DevID: devid, Err: err}
}

// onOwnThread runs do, which blocks for as long as the kernel moves data, on a
// thread that takes no signals: the kernel may stop such work when a signal is
// pending (replace and scrub since 6.19 on any signal), and a signal sent to a
// Go process can land on any of its threads. SIGKILL still gets through.
func onOwnThread(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var all, old unix.Sigset_t
		for i := range all.Val {
			all.Val[i] = ^all.Val[i]
		}
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
			done <- fmt.Errorf("cannot block signals: %w", err)
			return
		}
		err := do()
		if restore := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil); restore != nil && err == nil {
			err = fmt.Errorf("cannot unblock signals: %w", restore)
		}
		done <- err
	}()
	return <-done
}

// putString writes s and a final zero byte into dst.
func putString(dst []byte, s string) error {
	if len(s) >= len(dst) {
		return fmt.Errorf("%w: longer than %d bytes", unix.ENAMETOOLONG, len(dst)-1)
	}
	if strings.IndexByte(s, 0) >= 0 {
		return fmt.Errorf("%w: contains a zero byte", unix.EINVAL)
	}
	copy(dst, s)
	return nil
}

// getString reads up to the first zero byte.
func getString(src []byte) string { return unix.ByteSliceToString(src) }
