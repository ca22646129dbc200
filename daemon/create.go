package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// InspectSeed says what is on an image or device and whether it can become a sprout.
func (s *Service) InspectSeed(ctx context.Context, path string) (SeedReport, error) {
	return s.kernel.InspectSeed(ctx, path)
}

// CreateSprout makes a session of the seed and gives its fsid. On failure
// everything is taken down again.
func (s *Service) CreateSprout(ctx context.Context, _ Caller, seed, mountpoint string, o CreateOptions) (string, error) {
	if err := s.checkCreate(ctx, seed, mountpoint, &o); err != nil {
		return "", err
	}
	s.creating.Lock()
	defer s.creating.Unlock()
	r := sproutRecord{
		Key: fmt.Sprintf("creating-%d", s.now().UnixMicro()), Creating: true, Created: true,
		MountPoint: filepath.Clean(mountpoint), BootID: s.kernel.BootID(),
	}
	fsid, err := s.create(ctx, &r, seed, o)
	if err != nil {
		s.takeDown(context.WithoutCancel(ctx), r)
		return "", err
	}
	if err := s.Refresh(ctx); err != nil {
		s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
	}
	return fsid, nil
}

// create attaches, mounts, adds and makes writable, recording each device
// before the next thing is done.
func (s *Service) create(ctx context.Context, r *sproutRecord, seed string, o CreateOptions) (string, error) {
	var err error
	if r.Seed, r.Loop, err = s.kernel.AttachSeed(ctx, seed); err != nil {
		return "", err
	}
	if r.Media, err = s.kernel.Media(ctx, r.Seed); err != nil {
		return "", err
	}
	if err := s.journal.saveSprout(*r); err != nil {
		return "", err
	}
	options := []string{"discard=async", "compress=" + compressOption(o.Compress)}
	if o.MountOptions != "" {
		options = append(options, strings.Split(o.MountOptions, ",")...)
	}
	if err := s.kernel.MountSeed(ctx, r.Seed, r.MountPoint, options); err != nil {
		return "", err
	}
	first, err := s.firstDevice(ctx, r, o)
	if err != nil {
		return "", err
	}
	if err := s.kernel.Add(ctx, r.MountPoint, first); err != nil {
		return "", err
	}
	// Adding makes a sprout but leaves it read-only, and whether discard is on
	// was decided by the seed's device. Source: research on 6.13's sprout change.
	if err := s.kernel.MakeWritable(ctx, r.MountPoint, options...); err != nil {
		return "", err
	}
	sprout, err := s.kernel.Detail(ctx, r.MountPoint)
	if err != nil {
		return "", err
	}
	creating := r.Key
	final := *r
	final.Key, final.FSID, final.Creating = sprout.FSID, sprout.FSID, false
	if err := s.keep(final); err != nil {
		return "", err
	}
	if err := s.journal.removeSprout(creating); err != nil {
		return "", err
	}
	return final.FSID, nil
}

// keep records a sprout in the journal and in memory at once, so that what
// refresh finds out about a new sprout cannot come between.
func (s *Service) keep(r sproutRecord) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keepLocked(r)
}

func (s *Service) keepLocked(r sproutRecord) error {
	if err := s.journal.saveSprout(r); err != nil {
		return err
	}
	s.records[r.FSID] = r
	return nil
}

func compressOption(value string) string {
	switch value {
	case "":
		return "zstd:1"
	case "none":
		return "no"
	}
	return value
}

// firstDevice gives the device that makes the mounted seed a sprout.
func (s *Service) firstDevice(ctx context.Context, r *sproutRecord, o CreateOptions) (block.ID, error) {
	sprout, err := s.kernel.Detail(ctx, r.MountPoint)
	if err != nil {
		return block.ID{}, err
	}
	need := btrfs.FirstDeviceSize(sprout.Space.GlobalReserve)
	tooSmall := func(what string, size uint64) error {
		return fault.New(fault.TargetTooSmall, "%s has %s, but this seed needs at least %s", what, plan.BytesText(size), plan.BytesText(need))
	}
	if o.Device == "" {
		if o.ZramSize < need {
			return block.ID{}, tooSmall("the zram device", o.ZramSize)
		}
		return s.kernel.CreateZram(ctx, o.ZramSize, o.ZramAlgorithm, func(id block.ID) error {
			r.Zrams = withZram(r.Zrams, id)
			return s.journal.saveSprout(*r)
		})
	}
	target, err := s.resolve(ctx, sprout, o.Device)
	if err != nil {
		return block.ID{}, err
	}
	if err := plan.RefuseDevice(target, o.Wipe); err != nil {
		return block.ID{}, err
	}
	if target.Size < need {
		return block.ID{}, tooSmall(target.Path, target.Size)
	}
	if len(target.Signatures) > 0 {
		if err := s.kernel.Wipe(ctx, target.ID); err != nil {
			return block.ID{}, err
		}
	}
	return target.ID, nil
}

// defaultZram is half of the memory: even content that does not compress then
// leaves the other half to the programs.
func (s *Service) defaultZram() uint64 {
	const mib = 1 << 20
	return max(btrfs.MinZram, s.kernel.MemoryTotal()/2/mib*mib)
}

// checkCreate refuses what can be refused before anything is changed.
func (s *Service) checkCreate(ctx context.Context, seed, mountpoint string, o *CreateOptions) error {
	if !filepath.IsAbs(seed) || !filepath.IsAbs(mountpoint) {
		return fault.New(fault.InvalidArgs, "the seed and the mount point must be absolute paths")
	}
	info, err := os.Stat(mountpoint)
	if err != nil {
		return fault.New(fault.InvalidArgs, "cannot use %s as the mount point: %v", mountpoint, errors.Unwrap(err))
	}
	if !info.IsDir() {
		return fault.New(fault.InvalidArgs, "the mount point %s is no directory", mountpoint)
	}
	if err := plan.CheckCompress(o.Compress); err != nil {
		return err
	}
	for _, v := range s.View(ctx).Sprouts {
		if v.MountPoint == filepath.Clean(mountpoint) {
			return fault.New(fault.WrongState, "the sprout %s is mounted at %s already", v.FSID, mountpoint)
		}
	}
	if o.Device != "" && (o.ZramSize != 0 || o.ZramAlgorithm != "") {
		return fault.New(fault.InvalidArgs, "device and the zram options exclude each other")
	}
	if o.ZramSize == 0 {
		o.ZramSize = s.defaultZram()
	}
	report, err := s.kernel.InspectSeed(ctx, seed)
	if err != nil {
		return err
	}
	if !report.Seeding {
		return fault.New(fault.NotSeed, "%s is a Btrfs file system but no seed; `btrfstune -S 1 %s` makes it one", seed, seed)
	}
	if !report.Supported {
		return fault.New(fault.SeedUnsupported, "this kernel cannot use %s: %s", seed, strings.Join(report.Reasons, "; "))
	}
	return nil
}

// takeDown undoes a CreateSprout that failed or was cut off, as far as it came.
// What is in the way is logged: there is nobody left to tell.
func (s *Service) takeDown(ctx context.Context, r sproutRecord) {
	if err := s.dismantle(ctx, r); err != nil {
		s.log.Error("cannot take a sprout down", slog.String("mountpoint", r.MountPoint), slog.Any("error", err))
		return
	}
	if err := s.journal.removeSprout(r.Key); err != nil {
		s.log.Error("cannot forget a sprout", slog.Any("error", err))
	}
}

// dismantle unmounts a sprout if it is mounted, and frees its devices.
func (s *Service) dismantle(ctx context.Context, r sproutRecord) error {
	sprout, err := s.kernel.Detail(ctx, r.MountPoint)
	mounted := err == nil && slices.ContainsFunc(sprout.Members, func(m plan.Member) bool {
		return m.ID.Same(r.Seed) || slices.ContainsFunc(r.Zrams, m.ID.Same)
	})
	if mounted || r.FSID != "" && sprout.FSID == r.FSID {
		if err := s.kernel.Unmount(ctx, r.MountPoint); err != nil {
			return err
		}
	}
	ids := slices.Clone(r.Zrams)
	if r.Loop {
		ids = append(ids, r.Seed)
	}
	there, err := s.kernel.Attached(ctx, ids)
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range there {
		if id.Num.IsLoop() {
			errs = append(errs, s.kernel.DetachLoop(ctx, id))
		} else {
			errs = append(errs, s.kernel.FreeZram(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// Teardown unmounts a sprout that CreateSprout made and frees its devices.
func (s *Service) Teardown(ctx context.Context, fsid string) error {
	if err := s.claim(fsid); err != nil {
		return err
	}
	defer s.release(fsid)
	if _, ok := s.look(ctx, fsid); !ok {
		return fault.New(fault.NoSuchSprout, "there is no sprout %s", fsid)
	}
	s.mu.Lock()
	record := s.records[fsid]
	s.mu.Unlock()
	if !record.Created {
		return fault.New(fault.WrongState, "sproutd did not mount this sprout, so it does not unmount it")
	}
	if err := s.dismantle(ctx, record); err != nil {
		return err
	}
	if err := s.journal.removeSprout(record.Key); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.records, fsid)
	s.mu.Unlock()
	return s.Refresh(ctx)
}

// recordZram notes a zram device that is being made for a sprout.
func (s *Service) recordZram(fsid string, id block.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[fsid]
	if !ok {
		r = sproutRecord{Key: fsid, FSID: fsid, BootID: s.kernel.BootID()}
	}
	r.Zrams = withZram(r.Zrams, id)
	return s.keepLocked(r)
}

// withZram gives list with id, which takes the place of one that was only
// expected.
func withZram(list []block.ID, id block.ID) []block.ID {
	list = slices.DeleteFunc(slices.Clone(list), func(old block.ID) bool { return old.Num.IsZero() })
	return append(list, id)
}
