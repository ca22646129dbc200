package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/machine"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// cost is what one flatten cost.
type cost struct {
	// Seconds from the call to its end.
	Seconds float64 `json:"seconds"`
	// Machine is the processor time in seconds of all that ran on the machine,
	// and Process that of the process that called the kernel.
	Machine float64 `json:"machine_processor_seconds"`
	Process float64 `json:"process_processor_seconds"`
}

// pair is one flatten each way, of the same seed onto equal targets.
type pair struct {
	Daemon cost `json:"daemon"`
	Bare   cost `json:"bare"`
}

// overlay is how much is written to a sprout before it is flattened, in bytes.
const overlay = 64 * seedtest.MiB

// flatten compares the daemon with the bare ioctls.
func (b *bench) flatten(ctx context.Context, r *report) (err error) {
	seed, err := b.makeSeed(ctx, b.mib)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(seed.Path)) }()
	for n := range b.pairs + 1 {
		var p pair
		ways := []func() error{
			func() (err error) { p.Daemon, err = b.throughDaemon(ctx, seed); return err },
			func() (err error) { p.Bare, err = b.bare(ctx, seed); return err },
		}
		if n%2 == 1 {
			slices.Reverse(ways)
		}
		for _, way := range ways {
			if err := cmp.Or(context.Cause(ctx), way()); err != nil {
				return err
			}
		}
		say("flatten %d: daemon %.3f s (processors %.2f s, own %.2f s), bare %.3f s (%.2f s, %.2f s)",
			n, p.Daemon.Seconds, p.Daemon.Machine, p.Daemon.Process, p.Bare.Seconds, p.Bare.Machine, p.Bare.Process)
		if n > 0 { // the first pair warms up
			r.Pairs = append(r.Pairs, p)
		}
	}
	column := func(value func(pair) float64) []float64 {
		var list []float64
		for _, p := range r.Pairs {
			list = append(list, value(p))
		}
		return list
	}
	daemon := column(func(p pair) float64 { return p.Daemon.Seconds })
	bare := column(func(p pair) float64 { return p.Bare.Seconds })
	span := func(list []float64) string {
		return fmt.Sprintf("median of %d, %.2f to %.2f", len(list), slices.Min(list), slices.Max(list))
	}
	moved := fmt.Sprintf("; %d MiB of the seed, %d MiB of zram", b.mib, overlay/seedtest.MiB)
	r.Figures = append(r.Figures,
		figure{Name: "flatten through the daemon", Value: median(daemon), Unit: "s", Note: span(daemon) + moved},
		figure{Name: "flatten by bare ioctls", Value: median(bare), Unit: "s", Note: span(bare)},
		atMost(figure{
			Name: "ratio of the two", Value: median(daemon) / median(bare), Unit: "times",
			Note: "of the medians; of each pair " + span(column(func(p pair) float64 { return p.Daemon.Seconds / p.Bare.Seconds })),
		}, 1.05),
		figure{
			Name: "processor time of the machine", Unit: "times as much", Note: "ratio of the medians, kernel threads and all others included",
			Value: median(column(func(p pair) float64 { return p.Daemon.Machine })) / median(column(func(p pair) float64 { return p.Bare.Machine })),
		},
		figure{
			Name: "processor time of the process", Unit: "times as much", Note: "ratio of the medians, the moving itself included, wipefs too",
			Value: median(column(func(p pair) float64 { return p.Daemon.Process })) / median(column(func(p pair) float64 { return p.Bare.Process })),
		})
	return nil
}

// measured runs what is measured, which the process pid does.
func measured(pid int, work func() error) (cost, error) {
	machine, err := machineTime()
	if err != nil {
		return cost{}, err
	}
	process, err := processTime(pid)
	if err != nil {
		return cost{}, err
	}
	begin := time.Now()
	if err := work(); err != nil {
		return cost{}, err
	}
	took := time.Since(begin)
	machineNow, err := machineTime()
	if err != nil {
		return cost{}, err
	}
	processNow, err := processTime(pid)
	return cost{took.Seconds(), (machineNow - machine).Seconds(), (processNow - process).Seconds()}, err
}

// throughDaemon measures from the call of Flatten to the reply of Wait.
func (b *bench) throughDaemon(ctx context.Context, seed seedtest.Seed) (c cost, err error) {
	target, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: seed.Size})
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	err = b.live(ctx, seed.Path, client.CreateOptions{}, func(l live) error {
		if err := overwrite(l.mnt); err != nil {
			return err
		}
		// Not cut short, as the bare ioctls cannot be.
		whole := context.WithoutCancel(ctx)
		c, err = measured(l.daemon.PID, func() error {
			job, err := l.bus.Flatten(whole, l.sprout, target.Path, client.MoveOptions{Bootloader: "none"})
			if err == nil {
				_, err = l.bus.Wait(whole, job)
			}
			return err
		})
		return err
	})
	return c, err
}

// live is a sprout of the daemon.
type live struct {
	daemon      *harness.Daemon
	bus         *client.Client
	sprout, mnt string
}

// live runs do with a sprout of a daemon of its own.
func (b *bench) live(ctx context.Context, seed string, o client.CreateOptions, do func(live) error) (err error) {
	daemon, _, err := b.launch(ctx)
	if err != nil {
		return err
	}
	defer daemon.Stop()
	bus, err := client.Connect(ctx, client.Options{NoAutoStart: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bus.Close()) }()
	mnt := filepath.Join(b.mounts, "live")
	sprout, err := b.sprout(ctx, bus, seed, mnt, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unsprout(bus, sprout, mnt)) }()
	return do(live{daemon, bus, sprout, mnt})
}

// bare measures the ioctls that do the same: add the target, remove the zram
// device, remove the seed.
func (b *bench) bare(ctx context.Context, seed seedtest.Seed) (c cost, err error) {
	target, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: seed.Size})
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	err = b.bareSprout(ctx, seed.Path, "", func(s bareSprout) error {
		if err := overwrite(s.mnt); err != nil {
			return err
		}
		c, err = measured(os.Getpid(), func() error { return s.flatten(target.Path) })
		return err
	})
	return c, err
}

// bareSprout is a sprout that was made by ioctls, in the way the daemon makes it.
type bareSprout struct {
	fs      *btrfs.FS
	mnt     string
	members []btrfs.Member // the seed and what it writes to
}

// flatten leaves the target as the only member.
func (s bareSprout) flatten(target string) error {
	return cmp.Or(s.fs.Add(target), s.fs.Remove(s.members[1].DevID), s.fs.Remove(s.members[0].DevID))
}

// bareSprout runs do with a sprout that writes to zram, or to a device.
func (b *bench) bareSprout(ctx context.Context, seed, device string, do func(bareSprout) error) (err error) {
	whole := context.WithoutCancel(ctx)
	kernel, err := machine.New()
	if err != nil {
		return err
	}
	mnt := filepath.Join(b.mounts, "bare")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(mnt)) }()
	loop, _, err := kernel.AttachSeed(whole, seed)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernel.DetachLoop(whole, loop)) }()
	options := []string{"discard=async", "compress=zstd:1"}
	if err := kernel.MountSeed(whole, loop, mnt, options); err != nil {
		return err
	}
	var writable block.ID
	if device == "" {
		writable, err = kernel.CreateZram(whole, max(seedtest.GiB, kernel.MemoryTotal()/2), "", func(block.ID) error { return nil })
		if err == nil {
			defer func() { err = errors.Join(err, kernel.FreeZram(whole, writable)) }()
		}
	} else {
		var d block.Device
		d, err = kernel.Device(whole, device)
		writable = d.ID
	}
	if err != nil {
		return errors.Join(err, leave(kernel, mnt))
	}
	defer func() { err = errors.Join(err, leave(kernel, mnt)) }() // before the devices go
	if err := cmp.Or(kernel.Add(whole, mnt, writable), kernel.MakeWritable(whole, mnt, options...)); err != nil {
		return err
	}
	f, err := btrfs.Open(mnt)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(f.Close(), err) }()
	members, err := f.Members()
	if err != nil {
		return err
	}
	if len(members) != 2 || !members[0].Seed {
		return fmt.Errorf("the sprout has the members %+v", members)
	}
	return do(bareSprout{f, mnt, members})
}

// leave unmounts mnt, waiting for who else looks around in it.
func leave(kernel *machine.Machine, mnt string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := kernel.Unmount(ctx, mnt)
	for fault.CodeOf(err) == fault.DeviceBusy && ctx.Err() == nil {
		time.Sleep(100 * time.Millisecond)
		err = kernel.Unmount(ctx, mnt)
	}
	return err
}

// overwrite puts data into a sprout and out to its device.
func overwrite(mnt string) error { return write(filepath.Join(mnt, "overlay"), overlay) }

// write makes a file of which half compresses.
func write(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(1, 2))
	chunk := make([]byte, seedtest.MiB)
	for ; size > 0; size -= int64(len(chunk)) {
		for i := 0; i < len(chunk); i += 2 {
			chunk[i] = byte(random.Uint32())
		}
		if _, err := f.Write(chunk); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}
