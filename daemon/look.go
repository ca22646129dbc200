package daemon

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// freshFor is how old a view may be that a reader gets.
const freshFor = 100 * time.Millisecond

// lookFor is how long a reader waits for the kernel before it gets the last
// view instead: a device that hangs must not hang the readers.
const lookFor = 250 * time.Millisecond

// View gives what is shown now. It is at most 100 ms old, unless the kernel
// takes long to answer or ctx ends; then it is the last view.
func (s *Service) View(ctx context.Context) *View {
	if s.now().UnixMicro()-s.viewed.Load() <= freshFor.Microseconds() {
		return s.view.Load()
	}
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	looked := make(chan struct{})
	s.work.Go(func() {
		defer close(looked)
		// A look that takes long is finished for the readers that come next.
		// Whoever else waits for a fresh view made one meanwhile.
		if err := s.refresh(ctx, s.life, freshFor); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
		}
	})
	select {
	case <-looked:
	case <-ctx.Done():
	}
	return s.view.Load()
}

// Refresh reads the sprouts from the kernel and publishes what changed.
func (s *Service) Refresh(ctx context.Context) error { return s.refresh(ctx, ctx, 0) }

// refresh waits for its turn until wait ends. It does nothing if the view is
// younger than notOlder when its turn comes.
func (s *Service) refresh(wait, ctx context.Context, notOlder time.Duration) error {
	select {
	case s.looking <- struct{}{}:
	case <-wait.Done():
		return wait.Err()
	}
	defer func() { <-s.looking }()
	if notOlder > 0 && s.now().UnixMicro()-s.viewed.Load() <= notOlder.Microseconds() {
		return nil
	}
	sprouts, err := s.kernel.Sprouts(ctx, s.known)
	if err != nil {
		return err
	}
	shown := make([]SproutView, 0, len(sprouts))
	for _, sprout := range sprouts {
		s.remember(ctx, sprout)
		s.followSeed(sprout)
		warnings := s.warnings(ctx, sprout) // before what could take a while
		view := s.show(ctx, sprout)
		view.Warnings = warnings
		shown = append(shown, view)
	}
	if err := ctx.Err(); err != nil {
		return err // what was seen may not be all there is
	}
	slices.SortFunc(shown, func(a, b SproutView) int { return strings.Compare(a.FSID, b.FSID) })
	s.publishing.Lock()
	defer s.publishing.Unlock()
	s.viewed.Store(s.now().UnixMicro())
	s.replaceView(func(v *View) { v.Sprouts = shown })
	return nil
}

// known reports whether fsid is a sprout though it has no seed any more: a job
// of ours or CreateSprout made it what it is.
func (s *Service) known(fsid string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.records[fsid]; ok {
		return true
	}
	for _, j := range s.jobs {
		if j.record.FSID == fsid {
			return true
		}
	}
	return false
}

// remember records where the seed of a sprout lies that somebody else mounted,
// and what was made for it. Once the seed has left, nothing tells any more which
// stick it came from.
func (s *Service) remember(ctx context.Context, sprout plan.Sprout) {
	s.mu.Lock()
	r, ok := s.records[sprout.FSID]
	s.mu.Unlock()
	if ok && r.BootID == s.kernel.BootID() {
		return
	}
	r = sproutRecord{Key: sprout.FSID, FSID: sprout.FSID, MountPoint: sprout.MountPoint, BootID: s.kernel.BootID()}
	from := block.ID{}
	if sprout.FSID == s.boot.FSID {
		made := slices.DeleteFunc([]block.ID{s.boot.Zram, s.boot.MemoryLoop}, func(id block.ID) bool { return id.Num.IsZero() })
		r.Zrams, from = s.kernel.Adopt(ctx, made), s.boot.Media
	}
	if seed, ok := plan.SeedOf(sprout.Members); ok {
		r.Seed, r.Loop, from = seed.ID, seed.ID.Num.IsLoop(), seed.ID
	}
	if r.NoMedia = from.Num.IsZero(); !r.NoMedia {
		var err error
		if r.Media, err = s.kernel.Media(ctx, from); err != nil {
			s.log.Warn("cannot tell where the seed lies", slog.String("sprout", sprout.FSID), slog.Any("error", err))
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now, ok := s.records[r.FSID]; ok && now.BootID == r.BootID {
		return // CreateSprout was done meanwhile, and it knows more
	}
	if err := s.journal.saveSprout(r); err != nil {
		s.log.Warn("cannot record a sprout", slog.Any("error", err))
	}
	s.records[r.FSID] = r
}

// show makes the view of a sprout.
func (s *Service) show(ctx context.Context, sprout plan.Sprout) SproutView {
	s.mu.Lock()
	var intent *plan.Request
	if j := s.intent(sprout.FSID); j != nil {
		r := j.record.Request
		intent = &r
	}
	if n := s.claims[sprout.FSID]; n != 0 {
		r := s.jobs[n].request()
		intent = &r
	}
	record := s.records[sprout.FSID]
	s.mu.Unlock()
	if intent != nil {
		s.joined(sprout, &intent.Target)
	}

	v := SproutView{
		FSID: sprout.FSID, SeedFSID: sprout.SeedFSID, Label: sprout.Label, MountPoint: sprout.MountPoint,
		Free: sprout.Space.Free,
	}
	members := sprout.Members
	if sprout.Replace != nil { // it is written to like a member, and cannot be missed
		members = append(slices.Clone(members), sprout.Replace.Target)
	}
	v.State = plan.StateOf(members, intent)
	for _, m := range members {
		v.Members = append(v.Members, MemberView{
			DevID: m.DevID, Path: m.ID.Path, Size: m.Size, Used: m.Used,
			Role: plan.RoleOf(m, members, intent), Writable: m.Writable,
		})
		if !m.Seed && m.DevID != 0 {
			v.Size += m.Size
		}
	}
	const fewBytes = 256 << 20
	v.LowSpace = v.State == plan.Volatile && (v.Free < v.Size/10 || v.Free < fewBytes)
	v.MediaHolders = s.media.holders(ctx, s, sprout, record)
	v.SafeToUnplug = len(v.MediaHolders) == 0
	return v
}

// request gives what a running job works towards. Only its own goroutine
// changes the record, and only in parts that do not matter here.
func (j *job) request() plan.Request { return j.asked }

// mediaCache keeps the holders of the media of each sprout for a moment:
// finding them means to look at every open file of every process.
type mediaCache struct {
	mu      sync.Mutex
	entries map[string]mediaEntry
}

type mediaEntry struct {
	read    time.Time
	members string // for which members
	holders []string
}

// mediaFreshFor is how old a statement about the media may be.
const mediaFreshFor = 250 * time.Millisecond

// holders lists what still uses the media of a sprout, one line each. An empty
// list is proof that it can be unplugged.
func (c *mediaCache) holders(ctx context.Context, s *Service, sprout plan.Sprout, record sproutRecord) []string {
	var members strings.Builder
	for _, m := range sprout.Members {
		members.WriteString(m.ID.Num.String() + " ")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.entries[sprout.FSID]
	if ok && entry.members == members.String() && s.now().Sub(entry.read) < mediaFreshFor {
		return entry.holders
	}
	entry = mediaEntry{read: s.now(), members: members.String()}
	var err error
	if entry.holders, err = findHolders(ctx, s, sprout, record); err != nil {
		return append(entry.holders, "cannot look at the media: "+err.Error())
	}
	if ctx.Err() != nil {
		return entry.holders // nobody is shown what was not seen to its end
	}
	if c.entries == nil {
		c.entries = map[string]mediaEntry{}
	}
	c.entries[sprout.FSID] = entry
	return entry.holders
}

// forget makes the next question about any media look again.
func (c *mediaCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.entries)
}

func findHolders(ctx context.Context, s *Service, sprout plan.Sprout, record sproutRecord) ([]string, error) {
	var list []string
	file, err := s.seedFile(ctx, sprout, record)
	for _, m := range sprout.Members {
		if m.Seed && !file.Elsewhere {
			list = append(list, "seed "+m.ID.Path+" is a member of the file system")
		}
	}
	if err != nil {
		return list, err
	}
	if record.Media.Disk.Num.IsZero() {
		if len(list) == 0 && !record.NoMedia {
			list = append(list, "it is not known which media the seed came from")
		}
		return list, nil
	}
	holders, err := s.kernel.MediaHolders(ctx, record.Media.Disk)
	if err != nil {
		return list, err
	}
	for _, h := range holders {
		list = append(list, plan.HoldersText([]block.Holder{h}))
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// look gives the shown sprout as it is right now.
func (s *Service) look(ctx context.Context, fsid string) (SproutView, bool) {
	s.media.forget()
	if err := s.Refresh(ctx); err != nil {
		s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
	}
	for _, v := range s.view.Load().Sprouts {
		if v.FSID == fsid {
			return v, true
		}
	}
	return SproutView{}, false
}

// detail gives the sprout mounted at mountpoint with all that planning needs.
func (s *Service) detail(ctx context.Context, mountpoint string) (plan.Sprout, error) {
	sprout, err := s.kernel.Detail(ctx, mountpoint)
	if err != nil {
		return plan.Sprout{}, err
	}
	s.mu.Lock()
	record := s.records[sprout.FSID]
	if j := s.intent(sprout.FSID); j != nil {
		r := j.record.Request
		s.joined(sprout, &r.Target)
		sprout.Intent = &r
	}
	s.mu.Unlock()
	if sprout.Leftovers, err = s.leftovers(ctx, sprout, record); err != nil {
		return plan.Sprout{}, err
	}
	if sprout.SeedFile, err = s.seedFile(ctx, sprout, record); err != nil {
		return plan.Sprout{}, err
	}
	_, sprout.Unplugged = s.unplugged(ctx, sprout)
	sprout.WillReset = s.resets(sprout.FSID)
	if sprout.FSID == s.boot.FSID && s.boot.MediaMount != "" {
		mounted, err := s.kernel.IsMounted(ctx, s.boot.MediaMount)
		if err != nil {
			return plan.Sprout{}, err
		}
		if mounted {
			sprout.MediaMount = s.boot.MediaMount
		}
	}
	return sprout, nil
}

// leftovers lists the devices that were made for a sprout, are no members and
// are still there.
func (s *Service) leftovers(ctx context.Context, sprout plan.Sprout, record sproutRecord) ([]plan.Leftover, error) {
	ids := record.Zrams
	if record.Loop {
		ids = append(slices.Clone(ids), record.Seed)
	}
	ids = slices.DeleteFunc(slices.Clone(ids), func(id block.ID) bool {
		return slices.ContainsFunc(sprout.Members, func(m plan.Member) bool { return m.ID.Num == id.Num })
	})
	there, err := s.kernel.Attached(ctx, ids)
	if err != nil {
		return nil, err
	}
	var left []plan.Leftover
	for _, id := range there {
		left = append(left, plan.Leftover{Zram: slices.ContainsFunc(record.Zrams, id.Same), ID: id})
	}
	return left, nil
}

// resolve looks at the device a user named by its path.
func (s *Service) resolve(ctx context.Context, sprout plan.Sprout, path string) (*plan.Target, error) {
	switch {
	case path == "":
		return nil, fault.New(fault.InvalidArgs, "no device was named")
	case path == "free":
		return nil, fault.New(fault.InvalidArgs, "only persist makes a partition in the free space of the stick")
	case !filepath.IsAbs(path):
		return nil, fault.New(fault.InvalidArgs, "%q is not the absolute path of a device", path)
	}
	d, err := s.kernel.Device(ctx, path)
	if err != nil {
		return nil, err
	}
	return s.target(ctx, sprout, d)
}

// recall finds the device of a request again that was made earlier, perhaps in
// another boot. It returns nil if the device is a member or is gone.
func (s *Service) recall(ctx context.Context, sprout plan.Sprout, r *plan.Request) (*plan.Target, error) {
	if s.joined(sprout, &r.Target) {
		return nil, nil
	}
	if r.Target.Zram || r.Operation == plan.RemoveDevice || r.Target.UUID != "" {
		return nil, nil
	}
	if r.Target.Free {
		return s.free(ctx, sprout, r)
	}
	if r.Operation == plan.Release && r.Target.ID.Path == "" {
		return s.destination(ctx, sprout, r.Target.ReleaseTo)
	}
	if r.Target.BootID == s.kernel.BootID() {
		d, err := s.kernel.Device(ctx, r.Target.ID.Path)
		if err != nil {
			return nil, err
		}
		if !d.Same(r.Target.ID) {
			return nil, fault.New(fault.NoSuchDevice, "%s is another device now", r.Target.ID.Path)
		}
		return s.target(ctx, sprout, d)
	}
	devices, err := s.kernel.Devices(ctx, true)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if d.Size == r.Target.ID.Size && sameHardware(d.ID, r.Target.ID) {
			r.Target.ID, r.Target.BootID = d.ID, s.kernel.BootID()
			if r.Operation == plan.Release {
				r.Target.ReleaseTo = d.Path
			}
			// What may be on the device now is not what the user saw then.
			r.Options.Wipe = false
			return s.target(ctx, sprout, d)
		}
	}
	r.Target.ID.Num = block.DevNum{} // another device may have it in this boot
	return nil, nil
}

// joined reports whether the device that a request names is a member, or the
// kernel copies one to it, and brings t up to date: the kernel may have finished
// in this boot what was begun in an earlier one.
func (s *Service) joined(sprout plan.Sprout, t *plan.TargetRef) bool {
	for _, m := range sprout.Members {
		if t.UUID == m.UUID && m.UUID != "" || t.UUID == "" && s.sameDevice(*t, m) {
			t.UUID, t.ID, t.BootID = m.UUID, m.ID, s.kernel.BootID()
			return true
		}
	}
	if c := sprout.Replace; c != nil && t.UUID == "" && s.sameDevice(*t, c.Target) {
		t.ID, t.BootID = c.Target.ID, s.kernel.BootID()
		return true
	}
	return false
}

// sameDevice reports whether m is on the device that t names. What was added is
// found again by its UUID in another boot; what another was copied to has the UUID
// of that, and a disk that says nothing of itself is known by being larger.
func (s *Service) sameDevice(t plan.TargetRef, m plan.Member) bool {
	if t.BootID == s.kernel.BootID() {
		return t.ID.Same(m.ID)
	}
	copying := m.DevID == 0
	if t.Copy == "" || t.ID.Size != m.ID.Size || !copying && m.UUID != t.Copy {
		return false
	}
	silent := t.ID.Serial+t.ID.PartUUID+m.ID.Serial+m.ID.PartUUID == ""
	return sameHardware(t.ID, m.ID) || silent && (copying || m.Grows())
}

// free finds the target of a persist to the free space of the stick: the
// partition that an earlier one made, which r names from then on, or the disk on
// which it is to be made.
func (s *Service) free(ctx context.Context, sprout plan.Sprout, r *plan.Request) (*plan.Target, error) {
	media, err := s.mediaOf(ctx, sprout)
	if err != nil {
		return nil, err
	}
	if media.Disk.Num.IsZero() {
		return nil, fault.New(fault.NotSupported, "the seed is on no disk on which a partition could be made")
	}
	room, err := s.kernel.Room(ctx, media.Disk)
	if err != nil {
		return nil, err
	}
	var found *plan.Target
	for _, id := range room.Partitions {
		d, err := s.kernel.Device(ctx, id.Path)
		if err != nil {
			return nil, err
		}
		t, err := s.target(ctx, sprout, d)
		if err != nil {
			return nil, err
		}
		if empty := len(d.Signatures) == 0 && d.ProbeError == nil; found == nil || empty {
			found = t
		}
	}
	if found != nil {
		r.Target = plan.TargetRef{ID: found.ID, BootID: s.kernel.BootID()}
		return found, nil
	}
	disk, err := s.kernel.Device(ctx, media.Disk.Path)
	if err != nil {
		return nil, err
	}
	if !disk.Same(media.Disk) {
		return nil, fault.New(fault.NoSuchDevice, "%s is another device now", media.Disk.Path)
	}
	return &plan.Target{Device: disk, Free: room.Free}, nil
}

// sameHardware reports whether a and b are the same disk or partition, seen in
// different boots.
func sameHardware(a, b block.ID) bool {
	if a.PartUUID != "" || b.PartUUID != "" {
		return a.PartUUID == b.PartUUID
	}
	return a.Serial != "" && a.Serial == b.Serial
}

// target adds to a device what it is to the sprout.
func (s *Service) target(ctx context.Context, sprout plan.Sprout, d block.Device) (*plan.Target, error) {
	t := &plan.Target{Device: d}
	media, err := s.mediaOf(ctx, sprout)
	if err != nil {
		return nil, err
	}
	if !media.Disk.Num.IsZero() {
		// A stick that was released and unplugged may have left its number to another.
		t.Media = d.Same(media.Disk) || d.Same(media.Part)
		t.SameDisk = "/dev/"+d.Disk == media.Disk.Path
	}
	t.Media = t.Media || d.Same(sprout.SeedFile.Device)
	members := sprout.Members
	if sprout.Replace != nil {
		members = append(slices.Clone(members), sprout.Replace.Target)
	}
	for _, m := range members {
		if m.ID.Num == d.Num {
			// Known to the planner as a member; what uses it is the sprout itself.
			t.Holders = nil
			return t, nil
		}
	}
	for _, other := range s.view.Load().Sprouts {
		for _, m := range other.Members {
			if m.Path == d.Path {
				t.MemberOf = other.FSID
			}
		}
	}
	isBtrfs := func(sig block.Signature) bool { return sig.Type == "btrfs" }
	if len(d.Holders) == 0 && slices.ContainsFunc(d.Signatures, isBtrfs) {
		// It is for the text of a refusal; what is on the device is known.
		t.BtrfsDevices, _ = s.kernel.BtrfsDevices(ctx, d.ID)
	}
	return t, nil
}

// mediaOf tells where the seed of a sprout lies, or lay: the copy of a seed that
// was released lies on no media.
func (s *Service) mediaOf(ctx context.Context, sprout plan.Sprout) (Media, error) {
	if seed, ok := plan.SeedOf(sprout.Members); ok && !sprout.SeedFile.Elsewhere {
		return s.kernel.Media(ctx, seed.ID)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records[sprout.FSID].Media, nil
}

// Devices looks at every block device now and says what it is good for.
func (s *Service) Devices(ctx context.Context) ([]DeviceView, error) { return s.devices(ctx, true) }

// devices looks at every block device; unless again is true, with what is known
// of those that have not changed.
func (s *Service) devices(ctx context.Context, again bool) ([]DeviceView, error) {
	devices, err := s.kernel.Devices(ctx, again)
	if err != nil {
		return nil, err
	}
	list := make([]DeviceView, 0, len(devices))
	sprouts := s.detailAll(ctx)
	for _, d := range devices {
		list = append(list, s.assess(ctx, d, sprouts))
	}
	s.publishing.Lock()
	defer s.publishing.Unlock()
	s.replaceView(func(v *View) { v.Devices = list })
	return list, nil
}

// detailAll gives every sprout with detail; those that cannot be read are left out.
func (s *Service) detailAll(ctx context.Context) []plan.Sprout {
	var list []plan.Sprout
	for _, v := range s.view.Load().Sprouts {
		sprout, err := s.detail(ctx, v.MountPoint)
		if err != nil {
			s.log.Warn("cannot look at a sprout", slog.String("sprout", v.FSID), slog.Any("error", err))
			continue
		}
		var devids []uint64
		for _, m := range sprout.Members {
			devids = append(devids, m.DevID)
		}
		if err := s.kernel.Measure(ctx, &sprout, devids); err != nil {
			s.log.Warn("cannot measure a sprout", slog.String("sprout", v.FSID), slog.Any("error", err))
			continue
		}
		sprout.MinSizes, sprout.Rough = map[string]uint64{}, true
		list = append(list, sprout)
	}
	return list
}

// assess says for which operations a device could be the target. With more than
// one sprout it is enough that one of them could take it. A device that needs
// only `wipe` counts as eligible: whether to destroy is the user's decision.
func (s *Service) assess(ctx context.Context, d block.Device, sprouts []plan.Sprout) DeviceView {
	v := DeviceView{Device: d, Reasons: map[string]string{}}
	for _, sprout := range sprouts {
		for _, m := range sprout.Members {
			if m.ID.Num == d.Num {
				v.Role = string(plan.RoleOf(m, sprout.Members, sprout.Intent))
			}
		}
		target, err := s.target(ctx, sprout, d)
		if err != nil {
			continue
		}
		if v.Role == "" && target.Media {
			v.Role = "media"
		}
		for _, op := range []plan.Operation{plan.Persist, plan.Flatten, plan.Release, plan.AddDevice} {
			r := plan.Request{
				Operation: op, Target: plan.TargetRef{ID: d.ID, BootID: s.kernel.BootID()},
				Options: plan.Options{Wipe: true, Bootloader: "none"},
			}
			if op == plan.Release {
				r.Target.ReleaseTo = d.Path
			}
			p := plan.Make(sprout, r, target)
			if err := p.Err(); err != nil {
				v.Reasons[string(op)] = err.Error()
			} else if !slices.Contains(v.EligibleFor, string(op)) {
				v.EligibleFor = append(v.EligibleFor, string(op))
			}
		}
	}
	for _, op := range v.EligibleFor {
		delete(v.Reasons, op)
	}
	return v
}

// asFault gives err as a fault, Internal if it is none.
func asFault(err error) *fault.Error {
	var f *fault.Error
	if errors.As(err, &f) {
		return f
	}
	return &fault.Error{Code: fault.Internal, Message: "cannot look at the device", Err: err}
}
