package btrfs

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unsafe"
)

// ScrubResult is what a scrub has read and found so far.
type ScrubResult struct {
	// Bytes that were read: data and tree blocks.
	Bytes uint64
	// ReadErrors counts the sectors that could not be read, CsumErrors those that
	// do not match their checksum, TreeErrors the tree blocks that are not what
	// they should be, SuperErrors the bad superblocks. Uncorrectable counts what
	// was good in no copy.
	ReadErrors, CsumErrors, TreeErrors, SuperErrors, Uncorrectable uint64
}

// Damaged reports whether anything bad was found.
func (r ScrubResult) Damaged() bool {
	return r.ReadErrors+r.CsumErrors+r.TreeErrors+r.SuperErrors+r.Uncorrectable > 0
}

// scrubEvery is how often the progress of a scrub is asked for.
const scrubEvery = time.Second

// Scrub reads all that is in use on the member and compares it with its
// checksums. Nothing is repaired or written. progress, if not nil, is called
// about once a second on another goroutine. It blocks until done; when ctx ends
// the error wraps [ErrCancelled] and the result is what was found until then.
//
// A seed can be scrubbed while it is mounted by itself only: as the member of a
// sprout each of its tree blocks counts as an error, since the kernel expects
// the sprout's fsid in it.
func (f *FS) Scrub(ctx context.Context, devid uint64, progress func(ScrubResult)) (ScrubResult, error) {
	const op = "check the device"
	if err := ctx.Err(); err != nil {
		return ScrubResult{}, opError(op, f.path, devid, fmt.Errorf("%w: %w", ErrCancelled, err))
	}
	args := scrubArgs{devid: devid, end: ^uint64(0), flags: scrubReadOnly}
	done, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		f.watchScrub(ctx, done, devid, progress)
	}()
	err := onOwnThread(func() error { return f.call(iocScrub, unsafe.Pointer(&args)) })
	close(done)
	<-watched
	return args.progress.result(), opError(op, f.path, devid, err)
}

// watchScrub tells of the progress, and stops the scrub when ctx ends before
// done does. A request that comes before the kernel has begun is made again.
func (f *FS) watchScrub(ctx context.Context, done <-chan struct{}, devid uint64, progress func(ScrubResult)) {
	tick := time.NewTicker(scrubEvery)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			err := f.call(iocScrubCancel, nil)
			if err != nil && !errors.Is(err, ErrNotRunning) {
				return
			}
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
			}
		case <-tick.C:
			args := scrubArgs{devid: devid}
			if progress != nil && f.call(iocScrubProgress, unsafe.Pointer(&args)) == nil {
				progress(args.progress.result())
			}
		}
	}
}

func (p scrubProgress) result() ScrubResult {
	return ScrubResult{
		Bytes: p.dataBytes + p.treeBytes, ReadErrors: p.readErrors, CsumErrors: p.csumErrors,
		TreeErrors: p.verifyErrors, SuperErrors: p.superErrors, Uncorrectable: p.uncorrectable,
	}
}
