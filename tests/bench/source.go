package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/throttle"
)

// source is where the images lie: in memory, or on a stick of that rate.
type source struct {
	Name    string        `json:"name"`
	Rate    int64         `json:"rate"` // bytes a second, 0 for memory
	Latency time.Duration `json:"latency"`
}

// parseSource reads "memory", "150" (MB/s) or "150+1ms".
func parseSource(text string) (source, error) {
	s := source{Name: text}
	if text == "memory" {
		return s, nil
	}
	rate, latency, late := strings.Cut(text, "+")
	n, err := strconv.ParseInt(rate, 10, 64)
	if err == nil && late {
		s.Latency, err = time.ParseDuration(latency)
	}
	if err != nil || n <= 0 {
		return s, fmt.Errorf("%q is no source: say memory, 150 or 150+1ms", text)
	}
	s.Rate = n * 1e6
	return s, nil
}

// stick is a source that is plugged in: a directory with the images.
type stick struct {
	dir string
	fs  *throttle.FS // nil for memory
}

// plug shows the images in dir as they are on the source; each time with an
// empty page cache, but for memory, which is one.
func (b *bench) plug(s source, dir string) (stick, error) {
	if s.Rate == 0 {
		return stick{dir: dir}, nil
	}
	at, err := os.MkdirTemp(b.mounts, "stick-")
	if err != nil {
		return stick{}, err
	}
	fs, err := throttle.Mount(throttle.Spec{Dir: dir, Rate: s.Rate, Latency: s.Latency}, at)
	if err != nil {
		return stick{}, errors.Join(err, os.Remove(at))
	}
	return stick{dir: at, fs: fs}, nil
}

// unplug fails if somebody still uses it.
func (s stick) unplug() error {
	if s.fs == nil {
		return nil
	}
	return errors.Join(s.fs.Close(), os.Remove(s.dir))
}

// path of an image as it is seen there.
func (s stick) path(i image) string { return filepath.Join(s.dir, filepath.Base(i.path)) }

// attached is a mounted loop device.
type attached struct {
	loop string // path of the device
	dir  string
	id   block.ID
}

// attach mounts an image that is a file system.
func (b *bench) attach(ctx context.Context, path, fstype string, writable bool) (a attached, err error) {
	flags := os.O_RDONLY
	if writable {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	loop, err := block.New().AttachLoop(ctx, f, block.LoopOptions{ReadOnly: !writable})
	if err != nil {
		return a, err
	}
	a = attached{loop: loop.Path, id: loop.ID}
	if a.dir, err = b.mount(loop.Path, fstype, mount.Options{ReadOnly: !writable}); err != nil {
		return a, errors.Join(err, block.New().DetachLoop(ctx, loop.ID))
	}
	return a, nil
}

func (a attached) detach() error {
	return errors.Join(unmount(a.dir), block.New().DetachLoop(context.Background(), a.id))
}

// mount mounts a device on a new directory.
func (b *bench) mount(device, fstype string, o mount.Options) (string, error) {
	dir, err := os.MkdirTemp(b.mounts, "mnt-")
	if err != nil {
		return "", err
	}
	if err := mount.Mount(device, dir, fstype, o); err != nil {
		return "", errors.Join(err, os.Remove(dir))
	}
	return dir, nil
}

// unmount unmounts dir, once those are gone who look around in it, and removes
// it.
func unmount(dir string) error {
	err := unix.Unmount(dir, 0)
	for deadline := time.Now().Add(time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		err = unix.Unmount(dir, 0)
	}
	if err != nil {
		return fmt.Errorf("cannot unmount %s: %w", dir, err)
	}
	return os.Remove(dir)
}

// readRate is the most that the source gives, in bytes a second: some readers
// at once that read what is allocated of an image. A single one would wait for
// the latency of each request.
func readRate(path string, most int64) (float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	const readers, chunk = 4, 1 << 20
	var (
		all   sync.WaitGroup
		mu    sync.Mutex
		at    int64
		total int64
		first error
	)
	next := func() (int64, bool) {
		mu.Lock()
		defer mu.Unlock()
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err != nil || total >= most || first != nil {
			return 0, false
		}
		at = max(data, at) + chunk
		return at - chunk, true
	}
	begin := time.Now()
	for range readers {
		all.Go(func() {
			buf := make([]byte, chunk)
			for {
				from, ok := next()
				if !ok {
					return
				}
				n, err := f.ReadAt(buf, from)
				mu.Lock()
				total += int64(n)
				if err != nil && !errors.Is(err, io.EOF) && first == nil {
					first = err
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return float64(total) / time.Since(begin).Seconds(), first
}

// writeRate is what a target takes, in bytes a second: one writer, past all caches.
// Through the page cache it was 270 MB/s in one round and 1961 in another.
func (b *bench) writeRate(ctx context.Context, size int64) (rate float64, err error) {
	disk, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: size + seedtest.GiB})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	f, err := os.OpenFile(disk.Path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	chunk, err := unix.Mmap(-1, 0, 4*seedtest.MiB, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(chunk)) }()
	_, _ = rand.NewChaCha8([32]byte{4}).Read(chunk)
	begin := time.Now()
	for at := int64(0); at < size; at += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, at); err != nil {
			return 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	return float64(size) / time.Since(begin).Seconds(), nil
}
