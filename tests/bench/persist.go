package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
)

// persistence compares how a persistence partition full of data moves to a disk:
// through the daemon, which may replace one writable member by another, and by
// adding and removing. The seed is small, so that its way does not count.
func (b *bench) persistence(ctx context.Context, r *report) (err error) {
	bytes := int64(b.options.sizes[0] * 1e9)
	if err := needMemory(4 * bytes); err != nil {
		return err
	}
	base, err := b.makeSeed(ctx, 64)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(base.Path)) }()
	var daemon, bare []float64
	for round := range b.options.rounds {
		ways := []func() error{
			func() error {
				o, err := b.persisted(ctx, func(partition, target *seedtest.Disk) (o outcome, err error) {
					err = b.live(ctx, base.Path, client.CreateOptions{Device: partition.Path}, func(l live) error {
						if err := b.home(ctx, l.mnt, bytes); err != nil {
							return err
						}
						g := gauge{target: target, pid: l.daemon.PID}
						whole := context.WithoutCancel(ctx)
						o, err = g.run(func() (time.Time, error) {
							job, err := l.bus.Flatten(whole, l.sprout, target.Path, client.MoveOptions{Bootloader: "none"})
							if err == nil {
								_, err = l.bus.Wait(whole, job)
							}
							return time.Now(), err
						}, func() error { return nil })
						return err
					})
					return o, err
				})
				daemon = append(daemon, o.Wall)
				return err
			},
			func() error {
				o, err := b.persisted(ctx, func(partition, target *seedtest.Disk) (o outcome, err error) {
					err = b.bareSprout(ctx, base.Path, partition.Path, func(s bareSprout) error {
						if err := b.home(ctx, s.mnt, bytes); err != nil {
							return err
						}
						g := gauge{target: target}
						o, err = g.run(func() (time.Time, error) {
							err := s.flatten(target.Path)
							return time.Now(), err
						}, func() error { return nil })
						return err
					})
					return o, err
				})
				bare = append(bare, o.Wall)
				return err
			},
		}
		if round%2 == 1 {
			slices.Reverse(ways)
		}
		for _, way := range ways {
			if err := errors.Join(context.Cause(ctx), way()); err != nil {
				return err
			}
		}
		say("persistence %d: daemon %.2f s, add and remove %.2f s", round+1, daemon[round], bare[round])
	}
	r.Figures = append(r.Figures, atMost(figure{
		Name: "persistence partition to a disk, against add and remove", Value: median(daemon) / median(bare), Unit: "times",
		Note: fmt.Sprintf("%.1f GB of files; %.1f s and %.1f s", float64(bytes)/1e9, median(daemon), median(bare)),
	}, 0.35))
	return nil
}

// persisted runs do with a persistence partition and a target that is a little
// larger, as the disk of a computer is larger than a stick.
func (b *bench) persisted(ctx context.Context, do func(partition, target *seedtest.Disk) (outcome, error)) (o outcome, err error) {
	partition, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: targetSize - 4*seedtest.GiB})
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, partition.Close()) }()
	target, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: targetSize})
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	return do(partition, target)
}

// home puts files into a sprout and out to its device.
func (b *bench) home(ctx context.Context, mnt string, bytes int64) error {
	if _, err := makeTree(ctx, filepath.Join(mnt, "home"), b.options.kinds[0], bytes); err != nil {
		return err
	}
	return syncfs(mnt)
}
