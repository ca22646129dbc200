package boot

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/probe"
	"sproutd.org/sproutd/btrfs"
)

// found is a block device and what is on it.
type found struct {
	block.ID
	// Disk is the whole disk, itself for one.
	Disk block.DevNum
	// PartLabel is the partition's name in the partition table.
	PartLabel string
	FS        probe.FS
	// Super is the superblock where there is a Btrfs, or Err what is wrong with it.
	Super btrfs.Super
	Err   error
	// Scratched: it is Super but for its magic, which the kernel wipes from a
	// device that it lets go of. Nothing else is known to be on it.
	Scratched bool
}

func (f found) isBtrfs() bool { return f.FS.Type == "btrfs" && f.Err == nil }

// isSeed reports whether the device is a seed by itself.
func (f found) isSeed() bool { return f.isBtrfs() && f.Super.Seeding }

// patience is how long a device may take to be read before the others go on
// without it: a dying disk answers after minutes, if at all.
const patience = 5 * time.Second

// scanner reads each block device once.
type scanner struct {
	blocks *block.System
	only   func(block.ID) bool
	warn   func(string)
	// ids lists the devices, read reads one.
	ids  func() ([]block.ID, error)
	read func(context.Context, block.ID) found

	known map[block.ID]found
	// reading are those that have not answered yet, late those nobody waits for
	// any more.
	reading map[block.ID]chan found
	late    map[block.ID]bool
}

func newScanner(blocks *block.System, only func(block.ID) bool, warn func(string)) *scanner {
	s := &scanner{
		blocks: blocks, only: only, warn: warn, ids: blocks.IDs,
		known: map[block.ID]found{}, reading: map[block.ID]chan found{}, late: map[block.ID]bool{},
	}
	s.read = s.readDevice
	return s
}

// list gives what is there now, in the order of the kernel's list. What cannot
// be read is left out, and is read again next time.
func (s *scanner) list(ctx context.Context) ([]found, error) {
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	var list []found
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for _, id := range ids {
		if _, ok := s.known[id]; ok || s.reading[id] != nil || s.only != nil && !s.only(id) {
			continue
		}
		// The reader ends when the kernel answers, or with the program: nothing
		// stops a read of a disk that hangs.
		answer := make(chan found, 1)
		s.reading[id] = answer
		go func() { answer <- s.read(ctx, id) }()
	}
	expired := false
	for _, id := range ids {
		if answer := s.reading[id]; answer != nil {
			var f found
			var ok bool
			select {
			case f, ok = <-answer:
			default:
				if s.late[id] || expired {
					break
				}
				select {
				case f, ok = <-answer:
				case <-deadline.C:
					expired = true
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
			if !ok {
				if !s.late[id] {
					s.late[id] = true
					s.warn(fmt.Sprintf("%s does not answer: nobody waits for it any longer.", id.Path))
				}
				continue
			}
			delete(s.reading, id)
			if f.FS.Type == "" && f.Err != nil {
				continue // unreadable
			}
			s.known[id] = f
		}
		if f, ok := s.known[id]; ok {
			list = append(list, f)
		}
	}
	return list, nil
}

// readDevice reads what is on one device.
func (s *scanner) readDevice(ctx context.Context, id block.ID) found {
	f := found{ID: id, Disk: id.Num, PartLabel: s.blocks.PartLabel(id.Num)}
	if disk, err := s.blocks.WholeDisk(id.Num); err == nil {
		f.Disk = disk.Num
	}
	h, err := s.open(ctx, id)
	if err != nil {
		f.Err = err
		return f
	}
	defer func() { _ = h.Close() }()
	size := int64(id.Size) //nolint:gosec // sysfs counts in sectors
	switch f.FS, f.Err = probe.Probe(h.File()); {
	case f.Err != nil:
	case f.FS.Type == "btrfs":
		f.Super, f.Err = btrfs.ReadSuper(h.File(), size)
	case f.FS.Type == "":
		super, err := btrfs.ReadScratched(h.File(), size)
		if f.Scratched = err == nil; f.Scratched {
			f.Super = super
		}
	}
	return f
}

// open opens the device for reading, and no other.
func (s *scanner) open(ctx context.Context, id block.ID) (*block.Handle, error) {
	h, err := s.blocks.Open(ctx, id.Path)
	if err != nil {
		return nil, err
	}
	if !h.ID().Same(id) {
		_ = h.Close()
		return nil, fmt.Errorf("cannot use %s: %w", id.Path, block.ErrChanged)
	}
	return h, nil
}

// devices are open devices of one file system, by their UUIDs.
type devices map[btrfs.UUID]*block.Handle

// openAll opens devices, of those with the same UUID the first.
func (s *scanner) openAll(ctx context.Context, list ...found) (devices, error) {
	d := devices{}
	for _, f := range list {
		if d[f.Super.DevUUID] != nil {
			continue
		}
		h, err := s.open(ctx, f.ID)
		if err != nil {
			d.close()
			return nil, err
		}
		d[f.Super.DevUUID] = h
	}
	return d, nil
}

// file gives what the readers of package btrfs ask for.
func (d devices) file(device btrfs.UUID) io.ReaderAt {
	if h := d[device]; h != nil {
		return h.File()
	}
	return nil
}

func (d devices) close() {
	for _, h := range d {
		_ = h.Close()
	}
}

// deviceAt gives the block device that a path names, zero if none.
func deviceAt(path string) block.DevNum {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return block.DevNum{}
	}
	return block.DevNumOf(uint64(st.Rdev)) //nolint:unconvert // not 64 bits everywhere
}
