package seed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
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
	// write is [btrfs.WriteZstd], nil once the kernel was found not to have that.
	write   func(file *os.File, at int64, frame []byte, length int) error
	seed    maphash.Seed
	written []written // since the last check
}

// written is what was written as a frame.
type written struct {
	at  int64
	len int
	sum uint64
}

// blockLeast is the least that is worth a block, whose tables take some bytes.
const blockLeast = 8 * kib

func newFrames(level int, write func(*os.File, int64, []byte, int) error) (*frames, error) {
	f := &frames{write: write, seed: maphash.MakeSeed()}
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

// put writes the content of some files as one extent of shared at offset at. It
// does not where that would save no block, and where the kernel takes nothing that
// is compressed already, which it does since Linux 5.18; done says which.
func (f *frames) put(shared *os.File, at int64, files []*entry, content []byte) (done bool, err error) {
	if f.write == nil {
		return false, nil
	}
	frame, err := f.of(files, content)
	if err != nil || len(frame) > len(content)-blockSize {
		return false, err
	}
	err = f.write(shared, at, frame, len(content))
	if errors.Is(err, unix.ENOTTY) {
		f.write = nil
		return false, nil
	}
	if err == nil {
		f.written = append(f.written, written{at, len(content), maphash.Bytes(f.seed, content)})
	}
	return err == nil, err
}

// check reads what was put into shared: the kernel took the frames unseen.
func (f *frames) check(ctx context.Context, shared *os.File) error {
	buf := make([]byte, maxPacked)
	for _, w := range f.written {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := shared.ReadAt(buf[:w.len], w.at); err != nil {
			return fmt.Errorf("cannot read what was compressed: %w", err)
		}
		if maphash.Bytes(f.seed, buf[:w.len]) != w.sum {
			return fmt.Errorf("the kernel reads something else than what was compressed: %w", unix.EIO)
		}
	}
	f.written = f.written[:0]
	return nil
}

// of gives the frame of the content of some files, good until the next.
func (f *frames) of(files []*entry, content []byte) ([]byte, error) {
	f.out.Reset()
	f.zip.Reset(&f.out)
	begin, at := 0, 0
	for _, e := range files {
		at += int(blocks(e.size))
		if at-begin < blockLeast && at < len(content) {
			continue
		}
		if _, err := f.zip.Write(content[begin:at]); err != nil {
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
