package seed

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// frames compresses what shares an extent, as the kernel does but for one thing:
// a block of zstd is decompressed as a whole, and the kernel makes a single one of
// all 128 KiB. Here blocks end where files do, so who reads the first file of an
// extent does not wait for all the others.
type frames struct {
	zip *zstd.Encoder
	out bytes.Buffer
	// write is [btrfs.WriteZstd].
	write func(file *os.File, at int64, frame []byte, length int) error
}

// blockLeast is the least that is worth a block, whose tables take some bytes.
const blockLeast = 8 * kib

func newFrames(level int, write func(*os.File, int64, []byte, int) error) (*frames, error) {
	f := &frames{write: write}
	speed := zstd.EncoderLevelFromZstd(level)
	if level >= 7 {
		speed = zstd.SpeedBestCompression // which is about zstd's own 9 for as little as this
	}
	var err error
	f.zip, err = zstd.NewWriter(&f.out, zstd.WithEncoderLevel(speed), zstd.WithWindowSize(maxPacked),
		zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("cannot compress: %w", err)
	}
	return f, nil
}

// put writes a slot, whose files are in buf, as one extent of file at offset at. It
// does not where that would save no block, and where the kernel takes nothing that
// is compressed already, which it does since Linux 5.18; written says which.
func (f *frames) put(file *os.File, at int64, s slot, buf []byte) (written bool, err error) {
	frame, err := f.of(s, buf)
	if err != nil || int64(len(frame)) > s.used-blockSize {
		return false, err
	}
	err = f.write(file, at, frame, int(s.used))
	if errors.Is(err, unix.ENOTTY) {
		return false, nil
	}
	return err == nil, err
}

// of gives the frame of a slot. It is good until the next.
func (f *frames) of(s slot, buf []byte) ([]byte, error) {
	f.out.Reset()
	f.zip.Reset(&f.out)
	begin, at := int64(0), int64(0)
	for _, e := range s.files {
		at += blocks(e.size)
		if at-begin < blockLeast && at < s.used {
			continue
		}
		if _, err := f.zip.Write(buf[begin:at]); err != nil {
			return nil, err
		}
		if err := f.zip.Flush(); err != nil {
			return nil, err
		}
		begin = at
	}
	err := f.zip.Close()
	return f.out.Bytes(), err
}
