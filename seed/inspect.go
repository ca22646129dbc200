package seed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
)

// Geometry is what decides the cost of moving a filesystem.
type Geometry struct {
	// DataGroups and DataLength are the groups for data and their length.
	DataGroups int
	DataLength uint64
	// DataExtents is the number of data extents and DataUsed their bytes on
	// disk.
	DataExtents int
	DataUsed    uint64
	// Histogram counts the extents by their bytes on disk.
	Histogram []Bucket
	// TreeNodes of NodeSize bytes hold the metadata, MetadataUsed bytes in all.
	TreeNodes    int
	NodeSize     uint32
	MetadataUsed uint64
}

// Bucket counts the extents with at most Limit bytes on disk that are in no
// bucket before; a Limit of 0 is none.
type Bucket struct {
	Limit, Bytes uint64
	Extents      int
}

// perExtent is what the kernel takes to move one data extent, measured with a
// tree of 57,000 files on Linux 6.18 and memory-backed devices: what the number
// of extents adds to the time that bytes take.
const perExtent = 80 * time.Microsecond

// memoryRate is how many bytes a second the kernel moved in that measurement,
// besides what each extent took.
const memoryRate = 500e6

// FlattenTime estimates roughly how long a flatten takes, where rate is what
// the slower one of source and target moves, in bytes a second; 0 means that
// neither is slow. A slow source is read while the kernel works, all but for the
// last eighth or so of the work. The number of tree nodes, another processor and
// what else the machine does are left out.
func (g Geometry) FlattenTime(rate uint64) time.Duration {
	at := func(rate float64) time.Duration {
		return time.Duration(float64(g.DataUsed+g.MetadataUsed) / rate * float64(time.Second))
	}
	work := at(memoryRate) + time.Duration(g.DataExtents)*perExtent
	if rate == 0 {
		return work
	}
	return max(work, at(float64(rate))+work/8)
}

// ErrMounted says that a filesystem cannot be inspected since it is mounted, and
// the kernel takes another device for the same one.
var ErrMounted = errors.New("the filesystem is mounted already")

// Inspection is what Inspect found.
type Inspection struct {
	Super btrfs.Super
	// Length of the image and Allocated, what it takes on its file system, in
	// bytes; the latter is 0 for a block device.
	Length, Allocated uint64
	Geometry          Geometry
}

// Inspect tells the geometry of an image, or of a filesystem of one device on a
// block device, by mounting it read-only where nobody else sees it. It needs
// root. Errors: ErrMounted, and those of [btrfs.ReadSuper].
func Inspect(ctx context.Context, path string) (Inspection, error) {
	r, err := inspect(ctx, path)
	if err != nil {
		return Inspection{}, fmt.Errorf("cannot inspect %s: %w", path, err)
	}
	return r, nil
}

func inspect(ctx context.Context, path string) (r Inspection, err error) {
	f, err := os.Open(path)
	if err != nil {
		return r, err
	}
	defer func() { _ = f.Close() }() // only read from
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return r, err
	}
	r.Length, r.Allocated = uint64(end), allocated(f)
	if r.Super, err = btrfs.ReadSuper(f, end); err != nil {
		return r, err
	}
	work, err := os.MkdirTemp("", "sprout-inspect-")
	if err != nil {
		return r, err
	}
	// Not RemoveAll: should the mount be left, it must not be emptied.
	defer func() { err = errors.Join(err, os.Remove(work)) }()
	o := mount.Options{ReadOnly: true, Flags: []string{"nosuid", "nodev", "noexec"}}
	err = mounted(ctx, f, filepath.Join(work, "mnt"), o, func(fsys *btrfs.FS) error {
		r.Geometry, err = measure(ctx, fsys)
		return err
	})
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: %w", ErrMounted, err)
	}
	return r, err
}

// allocated is what a regular file takes on its file system.
func allocated(f *os.File) uint64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	return uint64(st.Blocks) * 512
}

// measure reads the geometry of a mounted filesystem of one device.
func measure(ctx context.Context, fsys *btrfs.FS) (Geometry, error) {
	g := Geometry{Histogram: []Bucket{{Limit: 4 * kib}, {Limit: 16 * kib}, {Limit: 64 * kib}, {Limit: 128 * kib}, {Limit: mib}, {}}}
	info, err := fsys.Info()
	if err != nil {
		return g, err
	}
	spaces, err := fsys.Spaces()
	if err != nil {
		return g, err
	}
	g.NodeSize = info.NodeSize
	g.MetadataUsed = spaces.MetadataUsed() + spaces.SystemUsed()
	g.TreeNodes = int(g.MetadataUsed / uint64(g.NodeSize))
	groups, err := fsys.Groups(only)
	if err != nil {
		return g, err
	}
	seen := map[uint64]bool{}
	for _, group := range groups {
		if err := ctx.Err(); err != nil {
			return g, err
		}
		if t := group.Type(); t != btrfs.Data && t != btrfs.Mixed || seen[group.Logical] {
			continue
		}
		seen[group.Logical] = true // a second copy is none of its own
		g.DataGroups++
		g.DataLength += group.Length
		extents, err := fsys.Extents(group)
		if err != nil {
			return g, err
		}
		g.DataExtents += len(extents)
		for _, e := range extents {
			g.DataUsed += e.Length
			for i := range g.Histogram {
				if b := &g.Histogram[i]; e.Length <= b.Limit || b.Limit == 0 {
					b.Extents++
					b.Bytes += e.Length
					break
				}
			}
		}
	}
	return g, nil
}
