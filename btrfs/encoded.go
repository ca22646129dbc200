package btrfs

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxEncoded is the most bytes that one extent of compressed data can stand for:
// BTRFS_MAX_UNCOMPRESSED, fs/btrfs/compression.h.
const MaxEncoded = 128 << 10

// encodedZstd is BTRFS_ENCODED_IO_COMPRESSION_ZSTD.
const encodedZstd = 2

// WriteZstd writes an extent that stands for length bytes of file, beginning at
// offset at, both whole blocks, as the zstd frame that is given. The kernel does
// not look into the frame: its window must be no larger than [MaxEncoded], and
// the frame no longer than length. It needs CAP_SYS_ADMIN. Errors:
// EINVAL for wrong lengths, ENOTTY where the file is not on Btrfs and before Linux
// 5.18. Source: linux/btrfs.h, BTRFS_IOC_ENCODED_WRITE.
func WriteZstd(file *os.File, at int64, frame []byte, length int) error {
	const op = "write a compressed extent"
	if len(frame) == 0 || len(frame) > length || length > MaxEncoded {
		return opError(op, file.Name(), 0, fmt.Errorf("%w: %d bytes for %d", unix.EINVAL, len(frame), length))
	}
	part := unix.Iovec{Base: &frame[0]}
	part.SetLen(len(frame))
	args := encodedArgs{
		parts: &part, count: 1, offset: at, length: uint64(length), unencodedLength: uint64(length), compression: encodedZstd,
	}
	var errno unix.Errno
	err := withFD(file, func(fd uintptr) { _, errno = sysIoctl(fd, iocEncodedWrite, unsafe.Pointer(&args)) })
	runtime.KeepAlive(frame)
	if err == nil && errno != 0 {
		err = errno
	}
	return opError(op, file.Name(), 0, err)
}
