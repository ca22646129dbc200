package btrfs

import (
	"context"
	"errors"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel scrubs until it is told to stop. A request that comes too early is
// answered with ENOTCONN.
func TestScrubTellsAndStops(t *testing.T) {
	f := fakeFS(t, 0, 0)
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	early := true
	f.ioctl = func(_ uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		switch req {
		case iocScrub:
			args := (*scrubArgs)(arg)
			if args.devid != 3 || args.start != 0 || args.end != ^uint64(0) || args.flags != scrubReadOnly {
				t.Errorf("the kernel is asked for %+v", args)
			}
			select {
			case <-stopped:
			case <-time.After(time.Minute):
			}
			args.progress = scrubProgress{dataBytes: 40, treeBytes: 2, csumErrors: 1}
			return ^uintptr(0), unix.ECANCELED
		case iocScrubProgress:
			(*scrubArgs)(arg).progress.dataBytes = 7
			return 0, 0
		case iocScrubCancel:
			if early {
				early = false
				return ^uintptr(0), unix.ENOTCONN
			}
			close(stopped)
			return 0, 0
		}
		return ^uintptr(0), unix.ENOTTY
	}
	result, err := f.Scrub(ctx, 3, func(r ScrubResult) {
		if r.Bytes != 7 {
			t.Errorf("the progress is %+v", r)
		}
		cancel()
	})
	if !errors.Is(err, ErrCancelled) || result.Bytes != 42 || !result.Damaged() {
		t.Errorf("the result is %+v (%v)", result, err)
	}
}
