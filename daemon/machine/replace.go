package machine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
)

// deviceReplace is the exclusive operation of a replace that runs.
const deviceReplace = "device replace"

// replaceEvery is how often a replace is looked at. The kernel tells nobody how
// far one is that it goes on with by itself, nor of errors in the middle.
const replaceEvery = 100 * time.Millisecond

// Replace implements [daemon.Changer].
func (m *Machine) Replace(ctx context.Context, mountpoint string, devid uint64, id block.ID) error {
	f, err := btrfs.Open(mountpoint)
	if err != nil {
		return explain(err, "cannot open the file system at %s", mountpoint)
	}
	defer f.Close()
	failed, stop, unseen := m.failures(ctx)
	defer stop()
	var ended <-chan error // nil where nobody is to be waited for
	running, err := replaceRuns(f)
	if err == nil && !running && unseen != nil {
		// Who cannot see a disk fail had better not copy: see awaitReplace.
		return fault.Wrap(unseen, fault.NotSupported, "cannot copy member %d to %s", devid, id.Path)
	}
	if err == nil && !running {
		// Where one waits to go on, there was no room for it at the mount: it starts over.
		if err = f.CancelReplace(); errors.Is(err, btrfs.ErrNotRunning) {
			err = nil
		}
		if err == nil {
			ended, err = m.startReplace(ctx, f, devid, id)
		}
	}
	if err != nil {
		return explain(err, "cannot copy member %d to %s", devid, id.Path)
	}
	return explain(awaitReplace(ctx, f, ended, failed), "cannot copy member %d to %s", devid, id.Path)
}

// replaceRuns reports whether the kernel copies right now. One that is not over
// does not while the file system is read-only.
func replaceRuns(f *btrfs.FS) (bool, error) {
	s, err := f.ReplaceStatus()
	if err != nil || s.Over() {
		return false, err
	}
	op, err := f.ExclusiveOperation()
	return op == deviceReplace, err
}

// startReplace starts to copy and returns once the kernel has taken the device,
// or has refused it. The channel gets the result.
func (m *Machine) startReplace(ctx context.Context, f *btrfs.FS, devid uint64, id block.ID) (<-chan error, error) {
	ended := make(chan error, 1)
	return ended, m.onDevice(ctx, id, func(_ *block.Handle, d block.Device) error {
		if len(d.Signatures) > 0 {
			return fault.New(fault.TargetNotEmpty, "%s is not empty any more: there is %s on it", id.Path, d.Signatures[0].Type)
		}
		go func() { ended <- f.Replace(devid, id.Path) }()
		// Until then somebody else could take it. After that nobody is kept from
		// looking at devices for as long as the copy takes.
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if s, err := f.ReplaceStatus(); err != nil || !s.Over() || len(ended) > 0 {
				break
			}
		}
		return nil
	})
}

// failures gives a channel that is closed when a disk could not read or write
// something, until stop is called. Which disk does not matter: moving takes longer,
// but loses nothing.
func (m *Machine) failures(ctx context.Context) (failed <-chan struct{}, stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	seen, began := make(chan struct{}), make(chan error, 2)
	var watch sync.WaitGroup
	watch.Go(func() {
		err := m.blocks.AwaitFailure(ctx, func() { began <- nil })
		if err == nil {
			close(seen)
		}
		began <- err // counts only if it comes first
	})
	stop = func() { cancel(); watch.Wait() }
	return seen, stop, <-began
}

// errNotCopied says that the kernel counted errors, or stopped by itself.
var errNotCopied = errors.New("the kernel could not copy all of it")

// awaitReplace waits for the end of a replace, which it tells to stop when ctx
// ends or something could not be copied. Such a replace would end well, without
// it: since Linux 6.4 (seen on 6.18) writes to the target that fail are counted
// nowhere. Moving tells which files are damaged, and loses none.
func awaitReplace(ctx context.Context, f *btrfs.FS, ended <-chan error, failed <-chan struct{}) error {
	var cause error // of telling it to stop
	stop := ctx.Done()
	// Nobody is told of an end that is not one.
	giveUp := func(over bool, err error) error {
		if ended != nil && !over {
			err = errors.Join(err, <-ended)
		}
		return err
	}
	tick := time.NewTicker(replaceEvery)
	defer tick.Stop()
	for {
		var over bool
		var result error
		select {
		case result = <-ended:
			over = true
		case <-stop:
			cause, stop = btrfs.ErrCancelled, nil
		case <-failed:
			cause, failed = cmp.Or(cause, fmt.Errorf("%w: a disk has failed", errNotCopied)), nil
		case <-tick.C:
		}
		if ended == nil {
			op, err := f.ExclusiveOperation()
			if err != nil {
				return err
			}
			over = op != deviceReplace
		}
		s, err := f.ReplaceStatus()
		switch {
		case err != nil:
			return giveUp(over, err)
		case over && s.State == btrfs.ReplaceFinished:
			return result // also where it was told too late
		case over:
			return cmp.Or(cause, result, errNotCopied)
		case cause == nil && s.ReadErrors+s.WriteErrors > 0:
			cause = fmt.Errorf("%w: %d read errors, %d write errors", errNotCopied, s.ReadErrors, s.WriteErrors)
		}
		if cause == nil {
			continue
		}
		// ErrNotRunning: it is over, which shows above.
		if err := f.CancelReplace(); err != nil && !errors.Is(err, btrfs.ErrNotRunning) {
			return giveUp(over, errors.Join(cause, err))
		}
	}
}

// Check implements [daemon.Changer].
func (m *Machine) Check(ctx context.Context, mountpoint string, devid uint64) error {
	f, err := btrfs.Open(mountpoint)
	if err != nil {
		return explain(err, "cannot open the file system at %s", mountpoint)
	}
	defer f.Close()
	// A scrub sees what was last committed: also files that were deleted since.
	if err := f.Sync(); err != nil {
		return explain(err, "cannot write out %s", mountpoint)
	}
	found, err := f.Scrub(ctx, devid, nil)
	if err == nil && found.Damaged() {
		return m.unreadable(ctx, f, devid, "cannot read all that was copied to member %d", fmt.Errorf("a scrub found %+v", found))
	}
	return explain(err, "cannot compare member %d with its checksums", devid)
}

// Resize implements [daemon.Changer].
func (m *Machine) Resize(_ context.Context, mountpoint string, devid uint64) error {
	return m.with(mountpoint, "use the whole device for", func(f *btrfs.FS) error { return f.Resize(devid, 0) })
}

// replaced is what is left on a member that is being copied, in device order.
func replaced(s btrfs.ReplaceStatus, groups []btrfs.Group, size uint64) (c daemon.Counters) {
	at := s.PerMille * (size / 1000)
	for _, g := range groups { // the highest offset first
		if g.DevOffset+g.DevLength > at {
			c.Left += g.Used
			c.Group = g.Used
		}
	}
	return c
}
