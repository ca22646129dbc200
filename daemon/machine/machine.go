// Package machine is the kernel of the machine sproutd runs on, put together
// from the adapters. It decides nothing; it looks, does, and says in faults what
// went wrong.
//
//   - look.go    what is there
//   - change.go  one change of a mounted sprout each
//   - replace.go a member that is copied as a whole
//   - release.go a copy of the seed, and how the seed comes to be read from it
//   - copy.go    how that copy is made and compared
//   - freeze.go  a file system held still, and the guard that lets it go
//   - room.go    a new partition on the stick
//   - seed.go    seeds, and their way to a mount and back
//   - errors.go  from the kernel's errors to faults
package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/zram"
)

// Machine is the running kernel. It is safe for concurrent use.
type Machine struct {
	blocks *block.System
	mounts *mount.Table
	zrams  *zram.Manager
	bootID string
	kernel string // its release
	memory uint64 // bytes

	note    handover.Note
	noteErr error

	// probing is held while devices are open for a look: such a look must not
	// be taken for a user of the media.
	probing sync.Mutex

	mu sync.Mutex
	// held are loops attached for a seed that is not mounted yet. They go with
	// this process.
	held map[block.DevNum]*block.Loop

	extents extentCache
	seen    seen
}

var _ daemon.Kernel = (*Machine)(nil)

// New gives the kernel of this machine.
func New() (*Machine, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cannot read the boot id: %w", err)
	}
	memory, err := meminfo("MemTotal")
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, fmt.Errorf("cannot read the release of the kernel: %w", err)
	}
	m := &Machine{
		kernel: strings.TrimSpace(string(kernel)),
		blocks: block.New(), mounts: mount.New(), zrams: zram.New(),
		bootID: strings.TrimSpace(string(boot)), memory: memory, held: map[block.DevNum]*block.Loop{},
	}
	m.note, m.noteErr = readNote(handover.File, m.bootID)
	return m, nil
}

// readNote reads the note of the early boot, if it is of the given boot.
func readNote(path, bootID string) (handover.Note, error) {
	n, err := handover.Read(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && n.BootID != bootID {
		return handover.Note{}, nil
	}
	return n, err
}

// BootID implements [daemon.Kernel].
func (m *Machine) BootID() string { return m.bootID }

// BootNote implements [daemon.Kernel].
func (m *Machine) BootNote() (handover.Note, error) { return m.note, m.noteErr }

// MemoryTotal implements [daemon.Kernel].
func (m *Machine) MemoryTotal() uint64 { return m.memory }

// Watch calls changed after each change of mounts or block devices, and once at
// the start, until ctx ends.
func (m *Machine) Watch(ctx context.Context, changed func()) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.mounts.Watch(ctx, changed) })
	group.Go(func() error {
		return m.blocks.Watch(ctx, func(e block.Event) {
			m.seen.forget(e.Num)
			changed()
		})
	})
	return group.Wait()
}

// meminfo reads one value of /proc/meminfo, in bytes.
func meminfo(key string) (uint64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("cannot read the size of the memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		name, rest, _ := strings.Cut(line, ":")
		if name != key {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("cannot read %s of /proc/meminfo: %w", key, err)
		}
		return kib << 10, nil
	}
	return 0, fmt.Errorf("cannot find %s in /proc/meminfo", key)
}
