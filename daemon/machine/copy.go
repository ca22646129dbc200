package machine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

const (
	// pieceSize is how much is read at once. Tree blocks are whole in it.
	pieceSize = 1 << 20
	// readers is how many reads are under way, so that the stick never waits.
	readers = 4
	// aheadSize is how much the stick is asked for before it is read, in bytes: all
	// that is read through a loop device is read by one thread of the kernel, one
	// request after the other.
	aheadSize = 8 << 20
	// windowSize is how many pieces are compared together, behind the copying.
	windowSize = 16
	// leastMemory is what a copy leaves for others of the memory that is available.
	leastMemory = 128 << 20
)

// copier copies what is in use of a seed. Each block is compared with its Btrfs
// checksum when it has been read; and what was written is read back from where
// it was written to, and compared with that.
type copier struct {
	fs       *btrfs.FS
	from     *os.File // the seed, read past all caches
	behind   *leaving // the file behind the seed, nil where it cannot be read ahead
	to       *seedCopy
	offset   uint64 // where the device begins in the copy
	progress func(uint64)

	pieces []piece
	// image is what is copied to a block device, and supers its superblocks, which
	// come last; else nil.
	image  *btrfs.Image
	supers []piece
	total  uint64 // bytes of all pieces
	done   atomic.Uint64

	taking sync.Mutex // guards what follows
	taken  int        // pieces that are being copied, or were
	asked  int        // pieces that the stick was asked for
	ahead  uint64     // bytes of those that are not taken
}

// piece is a stretch of the seed that is in use.
type piece struct {
	at, length uint64 // on the device
	logical    uint64
	check      *btrfs.Checker // nil for what has no checksum here
	sum        uint32         // of what was read
}

// superSize is the size of a superblock. Source: fs/btrfs/disk-io.h.
const superSize = 4096

// plan lists what is to be copied, in the order in which it lies on the seed. All
// that waits is written out before: so nothing that an older state of the file
// system needs is left out, and a seed only ever loses what is in use of it.
func (c *copier) plan(r daemon.Release) error {
	const what = "cannot list what is in use of the seed"
	if err := c.fs.Sync(); err != nil {
		return explain(err, what)
	}
	groups, err := c.fs.Groups(r.DevID)
	if err != nil {
		return explain(err, what)
	}
	for _, at := range block.BtrfsSuperblocks() {
		if at+superSize <= r.Seed.Size {
			c.add(piece{at: at, length: superSize})
		}
	}
	for _, g := range groups {
		if profile := g.Profile(); profile != "single" && profile != "dup" {
			return fault.New(fault.NotSupported, "the seed has the profile %s, of which one device is a part only", profile)
		}
		check, err := c.fs.Checker(g)
		if err != nil {
			return explain(err, what)
		}
		extents, err := c.fs.InUse(g)
		if err == nil && c.behind != nil {
			err = check.Load(g.Logical, g.Length)
		}
		if err != nil {
			return explain(err, what)
		}
		for _, e := range extents {
			for done := uint64(0); done < e.Length; done += pieceSize {
				c.add(piece{
					at: g.DevOffset + e.Start - g.Logical + done, length: min(pieceSize, e.Length-done),
					logical: e.Start + done, check: check,
				})
			}
		}
	}
	c.sort()
	return nil
}

// planAll lists all that is in use of the seed for itself, whatever the sprout has
// deleted: the copy is to be a seed in its own right. Nothing is written to a seed,
// so its trees can be read from below the mounted file system.
func (c *copier) planAll(r daemon.Release, seed io.ReaderAt) (err error) {
	if c.image, err = btrfs.ReadImage(seed, int64(r.Seed.Size)); err != nil { //nolint:gosec // of a device
		return explain(err, "cannot list what is in use of the seed")
	}
	if s := c.image.Super; !s.Seeding || s.FSID.String() != r.SeedFSID {
		return fault.New(fault.Internal, "what is on %s is not the seed of this sprout", r.Seed.Path)
	}
	for _, at := range block.BtrfsSuperblocks() {
		if at+superSize <= r.Seed.Size {
			p := piece{at: at, length: superSize}
			c.supers, c.total = append(c.supers, p), c.total+p.length
		}
	}
	slices.Reverse(c.supers)
	checks := map[bool]*btrfs.Checker{true: c.image.Checker(true, c.fs), false: c.image.Checker(false, c.fs)}
	if c.behind != nil {
		if err := checks[false].Load(0, math.MaxInt64); err != nil {
			return explain(err, "cannot read the checksums of the seed")
		}
	}
	for _, u := range c.image.Used {
		for done := uint64(0); done < u.Length; done += pieceSize {
			c.add(piece{
				at: u.Offset + done, length: min(pieceSize, u.Length-done), logical: u.Logical + done, check: checks[u.Tree],
			})
		}
	}
	c.sort()
	return nil
}

func (c *copier) add(p piece) {
	c.pieces = append(c.pieces, p)
	c.total += p.length
}

func (c *copier) sort() {
	slices.SortFunc(c.pieces, func(a, b piece) int { return cmp.Compare(a.at, b.at) })
}

// run copies and compares all pieces, and gives the bytes of them.
func (c *copier) run(ctx context.Context) (uint64, error) {
	windows := (len(c.pieces) + windowSize - 1) / windowSize
	left := make([]atomic.Int64, windows)
	for w := range left {
		left[w].Store(int64(min(windowSize, len(c.pieces)-w*windowSize)))
	}
	written := make(chan int, windows) // windows of which every piece was written
	group, ctx := errgroup.WithContext(ctx)
	for range readers {
		group.Go(func() error {
			buf, free, err := directBuffer(pieceSize)
			if err != nil {
				return err
			}
			defer free()
			for i := c.take(); i < len(c.pieces); i = c.take() {
				if ctx.Err() != nil {
					return fault.New(fault.Cancelled, "the copy was cancelled")
				}
				if err := c.copy(&c.pieces[i], buf); err != nil {
					return err
				}
				c.drop(i)
				if w := i / windowSize; left[w].Add(-1) == 0 {
					written <- w
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		buf, free, err := directBuffer(pieceSize)
		if err != nil {
			return err
		}
		defer free()
		for range windows {
			select {
			case w := <-written:
				if err := c.compare(c.pieces[w*windowSize:min((w+1)*windowSize, len(c.pieces))], buf); err != nil {
					return err
				}
			case <-ctx.Done():
				return fault.New(fault.Cancelled, "the copy was cancelled")
			}
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return 0, err
	}
	// The size and the holes as well, and the name.
	if err := c.to.sync(); err != nil {
		return 0, c.to.failed("write", err)
	}
	return c.total, c.seal()
}

// take gives the number of the next piece to copy, beyond all where there is none,
// and asks for more.
func (c *copier) take() int {
	c.taking.Lock()
	defer c.taking.Unlock()
	c.ask()
	i := c.taken
	c.taken++
	if i < c.asked {
		c.ahead -= c.pieces[i].length
	}
	return i
}

// ask has the stick read ahead. Where that cannot be done, a piece is read when its
// turn comes, and what is wrong is told then.
func (c *copier) ask() {
	for ; c.behind != nil && c.asked < len(c.pieces) && c.ahead < aheadSize; c.asked++ {
		p := &c.pieces[c.asked]
		_ = c.behind.ask(c.behind.of(p))
		c.ahead += p.length
	}
}

// drop takes what was read ahead of the piece with the number i from memory.
func (c *copier) drop(i int) {
	if c.behind != nil {
		_ = c.behind.Drop(c.behind.of(&c.pieces[i]))
	}
}

// seal writes the superblocks, which make a seed of a copy on a block device: all
// else is on the medium by then. The first one comes last, because it is the only
// one that anybody looks for.
func (c *copier) seal() error {
	if c.image == nil {
		return nil
	}
	buf, free, err := directBuffer(superSize)
	if err != nil {
		return err
	}
	defer free()
	c.to.sealed = true
	for i := range c.supers {
		p := &c.supers[i]
		switch err := c.read(p, buf); {
		case err != nil:
			return err
		case c.image.IsSuper(p.at, buf):
		case i < len(c.supers)-1:
			continue // a spare one that would help nobody
		default:
			return fault.New(fault.IOError, "the superblock of the seed is damaged, and the copy would be")
		}
		if err := c.write(p, buf); err != nil {
			return err
		}
		if err := c.to.sync(); err != nil {
			return c.to.failed("write", err)
		}
		if err := c.compare(c.supers[i:i+1], buf); err != nil {
			return err
		}
	}
	return nil
}

// directBuffer gives memory that can be read into past all caches: a huge page where
// there is one, which the kernel pins as one and not as 4 KiB at a time.
func directBuffer(size int) (buf []byte, free func(), err error) {
	const hugePage = 2 << 20
	all, err := unix.Mmap(-1, 0, max(size, hugePage), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, nil, explain(err, "cannot get memory")
	}
	_ = unix.Madvise(all, unix.MADV_HUGEPAGE) // small ones are as good, but for the time
	return all[:size], func() { _ = unix.Munmap(all) }, nil
}

func sumOf(data []byte) uint32 { return crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)) }

// copy copies one piece.
func (c *copier) copy(p *piece, buf []byte) error {
	if err := c.read(p, buf[:p.length]); err != nil {
		return err
	}
	return c.write(p, buf[:p.length])
}

// read reads one piece of the seed.
func (c *copier) read(p *piece, data []byte) error {
	if n, err := c.from.ReadAt(data, int64(p.at)); n < len(data) { //nolint:gosec // within a device
		return &fault.Error{Code: fault.IOError, Message: "cannot read the seed", Err: err}
	}
	if p.check != nil {
		if err := p.check.Check(p.logical, data); err != nil {
			return damaged(err)
		}
	}
	p.sum = sumOf(data)
	return nil
}

// write writes one piece of the copy.
func (c *copier) write(p *piece, data []byte) error {
	if err := c.to.do((*os.File).WriteAt, data, c.offset+p.at); err != nil {
		return c.to.failed("write", err)
	}
	c.progress(min(c.done.Add(p.length), c.total))
	return nil
}

// damaged says which files are, where a block of the seed is not as it should be.
func damaged(err error) error {
	var bad *btrfs.ChecksumError
	if !errors.As(err, &bad) {
		return explain(err, "cannot compare the seed with its checksums")
	}
	text := "the seed is damaged, and the copy would be"
	if len(bad.Files) > 0 {
		text += ": cannot read " + strings.Join(bad.Files, ", ")
	}
	return &fault.Error{Code: fault.IOError, Message: text, Files: bad.Files, Err: err}
}

// compare reads what was written back, from the device where there is one, and
// compares it.
func (c *copier) compare(pieces []piece, buf []byte) error {
	if c.to.memory {
		available, err := meminfo("MemAvailable")
		if err != nil {
			return explain(err, "cannot look at the memory")
		}
		if available < leastMemory {
			return fault.New(fault.NoMemory, "only %s of memory is available any more", plan.BytesText(available))
		}
	}
	first, last := pieces[0], pieces[len(pieces)-1]
	from, length := int64(c.offset+first.at), int64(last.at+last.length-first.at) //nolint:gosec // within a file
	fd := int(c.to.file.Fd())
	if !c.to.memory {
		const out = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(fd, from, length, out); err != nil {
			return c.to.failed("write", err)
		}
		// From the page cache it would always be right.
		if err := unix.Fadvise(fd, from, length, unix.FADV_DONTNEED); err != nil {
			return c.to.failed("read", err)
		}
	}
	for _, p := range pieces {
		data := buf[:p.length]
		if err := c.to.do((*os.File).ReadAt, data, c.offset+p.at); err != nil {
			return c.to.failed("read", err)
		}
		if sumOf(data) != p.sum {
			return fault.New(fault.IOError, "what is read from %s is not what was written to it", c.to.place())
		}
	}
	if !c.to.memory {
		_ = unix.Fadvise(fd, from, length, unix.FADV_DONTNEED) // it is only kind
	}
	return nil
}

// do reads or writes past all caches, or through them where the file system of the
// copy does not allow that.
func (c *seedCopy) do(operation func(f *os.File, data []byte, at int64) (int, error), data []byte, at uint64) error {
	if c.direct != nil {
		_, err := operation(c.direct, data, int64(at)) //nolint:gosec // within a file
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	_, err := operation(c.file, data, int64(at)) //nolint:gosec // within a file
	return err
}

// sync writes the copy out, with its name.
func (c *seedCopy) sync() error {
	switch {
	case c.memory:
		return nil
	case c.device != nil:
		return c.file.Sync()
	}
	return errors.Join(c.file.Sync(), c.dir.Sync())
}

func (c *seedCopy) place() string {
	if c.memory {
		return "memory"
	}
	if c.device != nil {
		return c.device.ID().Path
	}
	return c.dir.Name()
}

// failed says that the copy cannot be written or read.
func (c *seedCopy) failed(verb string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		return fault.Wrap(err, fault.NoSpace, "the copy of the seed does not fit into %s", c.place())
	case errors.Is(err, unix.ENOMEM):
		return fault.Wrap(err, fault.NoMemory, "the copy of the seed does not fit into %s", c.place())
	}
	return &fault.Error{Code: fault.IOError, Message: fmt.Sprintf("cannot %s the copy of the seed in %s", verb, c.place()), Err: err}
}
