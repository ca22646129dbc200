package seedtest

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// readerPause leaves the processor to the move now and then.
const readerPause = 2 * time.Millisecond

// Reader reads files of a tree over and over, from the device rather than from
// the page cache, and compares them with a manifest.
type Reader struct {
	cancel context.CancelFunc
	done   chan struct{}
	files  atomic.Uint64
	bytes  atomic.Int64
	err    error // set before done is closed
}

// StartReader starts to read the regular files of m below dir. Leave out of m
// what changes meanwhile, with [Manifest.Without].
func StartReader(dir string, m Manifest) (*Reader, error) {
	paths := slices.DeleteFunc(slices.Sorted(maps.Keys(m)), func(path string) bool { return m[path].Type != "file" })
	if len(paths) == 0 {
		return nil, fmt.Errorf("cannot read in %s: the manifest has no files", dir)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Reader{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		rnd := rand.New(rand.NewPCG(4, 5))
		pause := time.NewTicker(readerPause)
		defer pause.Stop()
		for r.err == nil {
			select {
			case <-ctx.Done():
				return
			case <-pause.C:
			}
			path := paths[rnd.IntN(len(paths))]
			r.err = r.compare(filepath.Join(dir, path), m[path])
		}
	}()
	return r, nil
}

func (r *Reader) compare(path string, want Record) error {
	sum, _, err := hashFile(path, want.Size)
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	if sum != want.Sum {
		return fmt.Errorf("%s: read something else than what was written", path)
	}
	r.files.Add(1)
	r.bytes.Add(want.Size)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// Stats gives the number of files and bytes read and found right.
func (r *Reader) Stats() (files uint64, bytes int64) { return r.files.Load(), r.bytes.Load() }

// Stop ends the reading and gives the first error or difference it met.
func (r *Reader) Stop() error {
	r.cancel()
	<-r.done
	return r.err
}
