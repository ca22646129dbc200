package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
)

// persistenceType is the type of a partition for what a live system writes, in a
// GUID partition table, and persistenceLabel its label.
const (
	persistenceType  = "5b3f9a1e-7c0d-4d7e-9d39-5a2c1f8e6b47"
	persistenceLabel = "sprout-persist"
)

// partitionFor bounds the making of a partition: a table is some KiB.
const partitionFor = 2 * time.Minute

const mib = 1 << 20

// Room implements [daemon.Looker].
func (m *Machine) Room(ctx context.Context, disk block.ID) (daemon.Room, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	h, table, err := m.table(ctx, disk)
	if err != nil {
		return daemon.Room{}, err
	}
	defer h.Close()
	room := daemon.Room{Free: roundDown(table.Free)}
	for _, e := range table.Entries {
		if e.Type != persistenceType {
			continue
		}
		id, err := m.blocks.PartitionOf(disk.Num, e)
		switch {
		case errors.Is(err, fs.ErrNotExist): // cut off before the kernel was told
			room.Free = e.Size
		case err != nil:
			return daemon.Room{}, explain(err, "cannot look at the partitions of %s", disk.Path)
		default:
			room.Partitions = append(room.Partitions, id)
		}
	}
	if len(room.Partitions) == 0 {
		_, err = repart()
	}
	return room, err
}

// table opens a disk and reads its partition table.
func (m *Machine) table(ctx context.Context, disk block.ID) (*block.Handle, block.Table, error) {
	h, err := m.blocks.Open(ctx, disk.Path)
	if err != nil {
		return nil, block.Table{}, explain(err, "cannot open %s", disk.Path)
	}
	t, err := h.GPT()
	switch {
	case !h.ID().Same(disk):
		err = fault.New(fault.NoSuchDevice, "%s is another device now", disk.Path)
	case errors.Is(err, block.ErrNoGPT):
		err = fault.New(fault.NotSupported, "%s has no GUID partition table (GPT), in which a partition could be made", disk.Path)
	case err != nil:
		err = explain(err, "cannot read the partition table of %s", disk.Path)
	}
	if err != nil {
		_ = h.Close() // opened for reading only
		return nil, block.Table{}, err
	}
	return h, t, nil
}

// repart finds the program that makes partitions.
func repart() (string, error) {
	for _, name := range []string{"systemd-repart", "/usr/bin/systemd-repart", "/usr/sbin/systemd-repart"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fault.New(fault.NotSupported, "the program systemd-repart, which makes partitions, is not installed")
}

// MakePartition implements [daemon.Changer].
func (m *Machine) MakePartition(ctx context.Context, disk block.ID) (block.ID, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	// While h is open the name cannot be given to another disk.
	h, table, err := m.table(ctx, disk)
	if err != nil {
		return block.ID{}, err
	}
	defer h.Close()
	known := map[string]bool{} // to the kernel
	for _, e := range table.Entries {
		_, err := m.blocks.PartitionOf(disk.Num, e)
		known[e.UUID] = !errors.Is(err, fs.ErrNotExist)
	}
	fresh := func() int {
		return slices.IndexFunc(table.Entries, func(e block.Entry) bool { return e.Type == persistenceType && !known[e.UUID] })
	}
	at := fresh()
	if at < 0 {
		if err := runRepart(ctx, disk.Path, roundDown(table.Free)); err != nil {
			return block.ID{}, err
		}
		if table, err = h.GPT(); err != nil {
			return block.ID{}, explain(err, "cannot read the partition table of %s", disk.Path)
		}
		if at = fresh(); at < 0 {
			return block.ID{}, fault.New(fault.Internal, "systemd-repart made no partition on %s", disk.Path)
		}
	}
	id, err := m.blocks.PartitionOf(disk.Num, table.Entries[at])
	if errors.Is(err, fs.ErrNotExist) { // nor has systemd-repart told the kernel
		if err = h.AddPartition(table.Entries[at]); err == nil {
			id, err = m.blocks.PartitionOf(disk.Num, table.Entries[at])
		}
	}
	return id, explain(err, "cannot find the new partition of %s", disk.Path)
}

// roundDown gives what a partition surely gets of a stretch of free space, the
// ends of which are rounded.
func roundDown(free uint64) uint64 { return max(free/mib, 1)*mib - mib }

// runRepart makes a partition of at least size bytes, in the smallest stretch of
// free space that has as many: the whole of it is used. Other partitions are
// left as they are. It locks the disk itself.
func runRepart(ctx context.Context, path string, size uint64) (err error) {
	program, err := repart()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/run", "sproutd-repart-")
	if err != nil {
		return fault.Wrap(err, fault.Internal, "cannot write down what partition is wanted")
	}
	defer func() { _ = os.RemoveAll(dir) }() // in memory, and gone with it
	definition := fmt.Sprintf("[Partition]\nType=%s\nLabel=%s\nSizeMinBytes=%d\n", persistenceType, persistenceLabel, size)
	if err := os.WriteFile(filepath.Join(dir, "50-persist.conf"), []byte(definition), 0o600); err != nil {
		return fault.Wrap(err, fault.Internal, "cannot write down what partition is wanted")
	}
	ctx, cancel := context.WithTimeout(ctx, partitionFor)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "--dry-run=no", "--empty=refuse", "--discard=no", "--seed=random", "--no-pager",
		"--definitions="+dir, path)
	cmd.Env = []string{"LC_ALL=C.UTF-8", "SYSTEMD_COLORS=0", "SYSTEMD_LOG_TARGET=console"}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		last := strings.TrimSpace(said.String())
		last = last[strings.LastIndexByte(last, '\n')+1:]
		return fault.Wrap(err, fault.IOError, "cannot make a partition on %s: %s", path, last)
	}
	return nil
}
