package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/zram"
)

// lockFor bounds the wait for udev or a partitioning tool to let go of a disk.
const lockFor = 10 * time.Second

// onDevice holds the device and calls act with what is on it now.
func (m *Machine) onDevice(ctx context.Context, id block.ID, act func(h *block.Handle, d block.Device) error) error {
	m.probing.Lock()
	defer m.probing.Unlock()
	h, d, err := m.hold(ctx, id)
	if err != nil {
		return err
	}
	defer h.Close()
	defer m.seen.forget(id.Num) // it is not the same after this
	return act(h, d)
}

// hold opens the device, locks its disk, and makes sure that it is still the one
// meant, and that nobody uses it. m.probing must be held.
func (m *Machine) hold(ctx context.Context, id block.ID) (_ *block.Handle, d block.Device, err error) {
	h, err := m.blocks.Open(ctx, id.Path)
	if err != nil {
		return nil, d, explain(err, "cannot open %s", id.Path)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if !h.ID().Same(id) {
		return nil, d, fault.New(fault.NoSuchDevice, "%s is another device now", id.Path)
	}
	locking, cancel := context.WithTimeout(ctx, lockFor)
	defer cancel()
	if err := h.Lock(locking); err != nil {
		return nil, d, explain(err, "cannot lock %s", id.Path)
	}
	if d, err = h.Probe(ctx); err != nil {
		return nil, d, explain(err, "cannot look at %s", id.Path)
	}
	switch {
	case d.ReadOnly:
		return nil, d, fault.New(fault.DeviceReadOnly, "%s is read-only", id.Path)
	case len(d.Holders) > 0:
		return nil, d, fault.New(fault.DeviceBusy, "%s is in use: %s", id.Path, plan.HoldersText(d.Holders))
	}
	return h, d, nil
}

// Wipe implements [daemon.Changer].
func (m *Machine) Wipe(ctx context.Context, id block.ID) error {
	return m.onDevice(ctx, id, func(h *block.Handle, _ block.Device) error {
		return explain(h.Wipe(ctx), "cannot destroy what is on %s", id.Path)
	})
}

// Add implements [daemon.Changer].
func (m *Machine) Add(ctx context.Context, mountpoint string, id block.ID) error {
	return m.onDevice(ctx, id, func(_ *block.Handle, d block.Device) error {
		if len(d.Signatures) > 0 {
			return fault.New(fault.TargetNotEmpty, "%s is not empty any more: there is %s on it", id.Path, d.Signatures[0].Type)
		}
		f, err := btrfs.Open(mountpoint)
		if err != nil {
			return explain(err, "cannot open the file system at %s", mountpoint)
		}
		defer f.Close()
		return explain(f.Add(id.Path), "cannot add %s", id.Path)
	})
}

// cancelEvery is how long the kernel gets between two requests to stop a
// removal. The first can come before the removal has begun.
const cancelEvery = 50 * time.Millisecond

// Remove implements [daemon.Changer].
func (m *Machine) Remove(ctx context.Context, mountpoint string, devid uint64) error {
	f, err := btrfs.Open(mountpoint)
	if err != nil {
		return explain(err, "cannot open the file system at %s", mountpoint)
	}
	defer f.Close()
	for {
		err := remove(ctx, f, devid)
		if errors.Is(err, btrfs.ErrCancelled) && ctx.Err() == nil {
			continue // a request meant for an earlier removal: see btrfs.CancelRemove
		}
		if errors.Is(err, unix.EIO) {
			return m.unreadable(ctx, f, devid, "cannot move everything off member %d", err)
		}
		return explain(err, "cannot remove member %d", devid)
	}
}

// remove removes the member and tells the kernel to stop when ctx ends. It
// returns only when the kernel has stopped.
func remove(ctx context.Context, f *btrfs.FS, devid uint64) error {
	if ctx.Err() != nil {
		return btrfs.ErrCancelled
	}
	ended := make(chan error, 1)
	go func() { ended <- f.Remove(devid) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	ticker := time.NewTicker(cancelEvery)
	defer ticker.Stop()
	for {
		// ErrNotRunning: the removal has not begun, or is over; the channel tells.
		if err := f.CancelRemove(); err != nil && !errors.Is(err, btrfs.ErrNotRunning) {
			return errors.Join(<-ended, err)
		}
		select {
		case err := <-ended:
			return err
		case <-ticker.C:
		}
	}
}

// lookFor bounds the search for the files that cannot be read, and maxFiles how
// many are named.
const (
	lookFor  = time.Minute
	maxFiles = 20
)

// unreadable says which files on a member are damaged; failed says what that
// kept from being done, with the member's number in it.
func (m *Machine) unreadable(ctx context.Context, f *btrfs.FS, devid uint64, failed string, cause error) error {
	looking, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	// What was found is worth telling also when the search failed half-way.
	files, searchErr := f.UnreadableFiles(looking, devid, maxFiles)
	what := "a device does not work"
	if len(files) > 0 {
		what = "cannot read " + strings.Join(files, ", ")
	}
	return &fault.Error{
		Code: fault.IOError, Message: fmt.Sprintf(failed, devid) + ": " + what,
		Files: files, Err: errors.Join(cause, searchErr),
	}
}

// MakeWritable implements [daemon.Changer].
func (m *Machine) MakeWritable(_ context.Context, mountpoint string, options ...string) error {
	data := mount.ParseOptions(strings.Join(options, ",")).Data
	return explain(mount.SetWritable(mountpoint, data...), "cannot make %s writable", mountpoint)
}

// SetCompress implements [daemon.Changer].
func (m *Machine) SetCompress(_ context.Context, mountpoint, value string) error {
	return explain(mount.Reconfigure(mountpoint, "compress="+value), "cannot change the compression of %s", mountpoint)
}

// SetLabel implements [daemon.Changer].
func (m *Machine) SetLabel(_ context.Context, mountpoint, label string) error {
	return m.with(mountpoint, "set the label of", func(f *btrfs.FS) error { return f.SetLabel(label) })
}

// ConvertMetadata implements [daemon.Changer].
func (m *Machine) ConvertMetadata(ctx context.Context, mountpoint, profile string) error {
	return m.with(mountpoint, "convert the metadata of", func(f *btrfs.FS) error { return f.ConvertMetadata(ctx, profile) })
}

// Sync implements [daemon.Changer].
func (m *Machine) Sync(_ context.Context, mountpoint string) error {
	return m.with(mountpoint, "write out", func(f *btrfs.FS) error { return f.Sync() })
}

// with calls act with the opened file system.
func (m *Machine) with(mountpoint, what string, act func(*btrfs.FS) error) error {
	f, err := btrfs.Open(mountpoint)
	if err != nil {
		return explain(err, "cannot open the file system at %s", mountpoint)
	}
	defer f.Close()
	return explain(act(f), "cannot %s %s", what, mountpoint)
}

// CreateZram implements [daemon.Changer].
func (m *Machine) CreateZram(ctx context.Context, size uint64, algorithm string, record func(block.ID) error) (block.ID, error) {
	d, err := m.zrams.Create(ctx, zram.Config{Size: size, Algorithm: algorithm, Record: record})
	return d.ID, explain(err, "cannot make a zram device")
}

// FreeZram implements [daemon.Changer].
func (m *Machine) FreeZram(ctx context.Context, id block.ID) error {
	return explain(m.zrams.Remove(ctx, id), "cannot free %s", id.Path)
}

// DetachLoop implements [daemon.Changer].
func (m *Machine) DetachLoop(ctx context.Context, id block.ID) error {
	m.letGo(id)
	err := m.blocks.DetachLoop(ctx, id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, block.ErrChanged) {
		return nil // it is gone, and its number may serve somebody else
	}
	return explain(err, "cannot detach %s", id.Path)
}
