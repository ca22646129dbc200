package daemon

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// seedFile tells what the seed of a sprout is read from.
func (s *Service) seedFile(ctx context.Context, sprout plan.Sprout, record sproutRecord) (plan.SeedFile, error) {
	seed, ok := plan.SeedOf(sprout.Members)
	if !ok {
		return plan.SeedFile{}, nil
	}
	return s.kernel.SeedFile(ctx, seed.ID, record.Media.Disk)
}

// aim takes in where a user wants a seed to be copied to.
func (s *Service) aim(ctx context.Context, sprout plan.Sprout, r *plan.Request, to string) (*plan.Target, error) {
	r.Target = plan.TargetRef{ReleaseTo: to, SeedFSID: sprout.SeedFSID, BootID: s.kernel.BootID()}
	if to != plan.RAM && !filepath.IsAbs(to) {
		return nil, fault.New(fault.InvalidArgs, "%q is neither ram nor the absolute path of a directory or a device", to)
	}
	target, err := s.destination(ctx, sprout, to)
	if target != nil {
		r.Target.ReleaseTo = target.Path
		if !target.Num.IsZero() {
			r.Target.ID = target.ID
		}
	}
	return target, err
}

// destination looks at the directory or block device a seed is to be copied to; nil
// for memory.
func (s *Service) destination(ctx context.Context, sprout plan.Sprout, to string) (*plan.Target, error) {
	if to == plan.RAM {
		return nil, nil //nolint:nilnil // memory is no device, as a new zram is none
	}
	s.mu.Lock()
	media := s.records[sprout.FSID].Media.Disk
	s.mu.Unlock()
	target, err := s.kernel.Destination(ctx, to, media)
	if err != nil || target.Num.IsZero() {
		return target, err
	}
	return s.target(ctx, sprout, target.Device)
}

// releaseSeed copies the seed and shows how far that is.
func (s *Service) releaseSeed(ctx context.Context, j *job, step plan.Step) error {
	sprout, err := s.kernel.Detail(ctx, j.mountpoint)
	if err != nil {
		return err
	}
	var done atomic.Uint64
	var made SeedCopy
	watch := func(ctx context.Context) {
		ticker := time.NewTicker(sampleEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				j.meter.sample(Counters{Left: step.Bytes - min(step.Bytes, done.Load())}, s.now())
				s.update(j, func(*JobView) {})
			}
		}
	}
	err = beside(ctx, func() (err error) {
		r := Release{
			MountPoint: j.mountpoint, DevID: step.DevID, Seed: step.Device, SeedFSID: sprout.SeedFSID, To: step.Value,
			Progress: done.Store,
		}
		if j.record.Request.Operation == plan.Release {
			r.Device = j.record.Request.Target.ID
		}
		made, err = s.kernel.Release(ctx, r)
		return err
	}, watch)
	if err != nil {
		return err
	}
	j.record.Result.Copy, j.record.Result.CopyBytes = made.Path, made.Bytes
	if made.Path == "" {
		j.record.Result.Copy = plan.RAM
	}
	return nil
}

// followSeed records that the seed's loop goes by another sequence number: it
// does when another file was put behind it, which the daemon may not have lived
// to record.
func (s *Service) followSeed(sprout plan.Sprout) {
	seed, ok := plan.SeedOf(sprout.Members)
	s.mu.Lock()
	defer s.mu.Unlock()
	r, known := s.records[sprout.FSID]
	if !ok || !known || !r.Loop || r.Seed.Num != seed.ID.Num || r.Seed.Same(seed.ID) {
		return
	}
	r.Seed = seed.ID
	if err := s.keepLocked(r); err != nil {
		s.log.Warn("cannot record a sprout", slog.Any("error", err))
	}
}

// settleCopies tidies up what releases left that the end of an earlier daemon cut
// off. A part of a copy in memory has gone with that daemon, and one on a block
// device has no superblock: nobody can take it for anything.
func (s *Service) settleCopies(ctx context.Context, jobs []jobRecord) {
	for _, r := range jobs {
		dir, seed := r.Request.Target.ReleaseTo, r.Request.Target.SeedFSID
		if dir == "" || dir == plan.RAM || r.Request.Target.ID.Path != "" || seed == "" || r.State == JobDone {
			continue
		}
		if err := s.kernel.SettleCopy(ctx, dir, seed); err != nil {
			s.log.Warn("cannot tidy up what is left of a copy", slog.String("directory", dir), slog.Any("error", err))
		}
	}
}

// fulfil begins the release to memory that the kernel's command line asked for.
// That is done once in a boot: who cancelled it does not want it again.
func (s *Service) fulfil(ctx context.Context) {
	if !s.boot.ToRAM {
		return
	}
	s.mu.Lock()
	r, ok := s.records[s.boot.FSID]
	wanted := ok && !r.Asked && r.BootID == s.kernel.BootID()
	if wanted {
		r.Asked = true
		if err := s.keepLocked(r); err != nil {
			s.log.Warn("cannot record a sprout", slog.Any("error", err))
		}
	}
	s.mu.Unlock()
	if !wanted {
		return
	}
	if _, err := s.Start(ctx, Caller{}, r.FSID, RequestArgs{Operation: plan.Release, Target: plan.RAM}); err != nil {
		s.log.Warn("the seed stays on the media, though rd.sprout.ram was given", slog.Any("error", err))
		s.mu.Lock()
		s.refused = "rd.sprout.ram: the seed stays on the media: " + asFault(err).Text() + "."
		s.mu.Unlock()
		s.showAgain(ctx)
	}
}
