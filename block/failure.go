package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// failed is in what the kernel logs of a read or write that a disk could not do.
// Source: block/blk-mq.c, blk_print_req_error.
const failed = " error, dev "

// AwaitFailure waits until the kernel logs that some disk could not read or write
// something, and returns nil then. It is for those whose own failures the kernel
// does not report to them. ready is called once it waits.
func (s *System) AwaitFailure(ctx context.Context, ready func()) error {
	// Not blocking, so that closing it ends a read.
	log, err := os.OpenFile(s.path("dev/kmsg"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("cannot watch for failures of disks: %w", err)
	}
	defer func() { _ = log.Close() }() // it was only read
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("cannot watch for failures of disks: %w", err)
	}
	closing := context.AfterFunc(ctx, func() { _ = log.Close() })
	defer closing()
	ready()
	message := make([]byte, 8<<10) // one at a time; none is longer
	for {
		n, err := log.Read(message)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.EPIPE): // some were overwritten before they were read
		case err != nil:
			return fmt.Errorf("cannot watch for failures of disks: %w", err)
		case bytes.Contains(message[:n], []byte(failed)):
			return nil
		}
	}
}
