package machine

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/mount"
)

// Sprouts implements [daemon.Looker].
func (m *Machine) Sprouts(ctx context.Context, known func(fsid string) bool) ([]plan.Sprout, error) {
	entries, err := m.mounts.List()
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "cannot list the mounts")
	}
	var list []plan.Sprout
	for _, e := range mainMounts(entries) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s, err := m.read(e, false)
		for range birthTries {
			// EAGAIN: it is becoming a sprout this very moment, see [btrfs.FS.Members].
			if !errors.Is(err, unix.EAGAIN) {
				break
			}
			time.Sleep(birthPause)
			s, err = m.read(e, false)
		}
		if err != nil {
			// It was unmounted just now, or its device is gone: that is no
			// reason not to show the others.
			continue
		}
		sprouted := slices.ContainsFunc(s.Members, func(m plan.Member) bool { return m.Seed || m.Zram })
		if sprouted || known(s.FSID) {
			list = append(list, s)
		}
	}
	return list, nil
}

// A seed takes some tens of milliseconds to become a sprout.
const (
	birthTries = 10
	birthPause = 10 * time.Millisecond
)

// mainMounts gives one mount of each Btrfs: the root if it is one, else its
// top level, else any; never one that another mount covers.
func mainMounts(entries []mount.Entry) []mount.Entry {
	covered := map[string]int{} // mount point -> id of the mount on top
	for _, e := range entries {
		covered[e.MountPoint] = e.ID
	}
	rank := func(e mount.Entry) int {
		switch {
		case e.MountPoint == "/":
			return 0
		case e.Root == "/":
			return 1
		}
		return 2
	}
	best := map[block.DevNum]mount.Entry{}
	for _, e := range entries {
		if e.FSType != "btrfs" || covered[e.MountPoint] != e.ID {
			continue
		}
		if b, ok := best[e.Num]; !ok || rank(e) < rank(b) {
			best[e.Num] = e
		}
	}
	var list []mount.Entry
	for _, e := range entries {
		if best[e.Num].ID == e.ID {
			list = append(list, e)
		}
	}
	return list
}

// Detail implements [daemon.Looker].
func (m *Machine) Detail(_ context.Context, mountpoint string) (plan.Sprout, error) {
	e, err := m.mounts.At(mountpoint)
	if err != nil {
		return plan.Sprout{}, fault.Wrap(err, fault.WrongState, "nothing is mounted at %s", mountpoint)
	}
	s, err := m.read(e, true)
	return s, explain(err, "cannot look at the file system at %s", mountpoint)
}

// read asks the kernel about the file system of a mount.
func (m *Machine) read(e mount.Entry, detail bool) (plan.Sprout, error) {
	f, err := btrfs.Open(e.MountPoint)
	if err != nil {
		return plan.Sprout{}, err
	}
	defer f.Close()
	info, err := f.Info()
	if err != nil {
		return plan.Sprout{}, err
	}
	members, err := f.Members()
	if err != nil {
		return plan.Sprout{}, err
	}
	s := plan.Sprout{
		FSID: info.FSID.String(), MountPoint: e.MountPoint,
		ReadOnly: slices.Contains(e.SuperOptions, "ro") || slices.Contains(e.Options, "ro"),
		Compress: compressOf(e.SuperOptions),
		Space:    plan.Space{NodeSize: uint64(info.NodeSize)},
	}
	if s.Label, err = f.Label(); err != nil {
		return plan.Sprout{}, err
	}
	for _, member := range members {
		p, err := m.member(f, member, detail)
		if err != nil {
			return plan.Sprout{}, err
		}
		if p.Seed {
			s.SeedFSID = member.FSID.String()
		}
		s.Members = append(s.Members, p)
	}
	if s.Replace, err = m.replacing(f); err != nil {
		return plan.Sprout{}, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(e.MountPoint, &st); err != nil {
		return plan.Sprout{}, fmt.Errorf("cannot read the free space of %s: %w", e.MountPoint, err)
	}
	s.Space.Free = st.Bavail * uint64(st.Bsize) //nolint:gosec // a block size is never negative
	if !detail {
		return s, nil
	}
	return s, m.detail(f, &s, e)
}

// member turns one member into the planner's value.
func (m *Machine) member(f *btrfs.FS, member btrfs.Member, detail bool) (plan.Member, error) {
	p := plan.Member{
		DevID: member.DevID, UUID: member.UUID.String(), Size: member.Size, Used: member.Used, Seed: member.Seed,
		Writable: member.Writable && !member.Seed, Missing: member.Missing || member.Gone, Leaving: member.Leaving,
		ID: block.ID{Num: member.Num, Path: member.Path},
	}
	if id, err := m.blocks.Identify(member.Num); err == nil {
		p.ID = id
	} else if !member.Num.IsZero() && !errors.Is(err, fs.ErrNotExist) {
		return plan.Member{}, err
	}
	p.Zram = strings.HasPrefix(p.ID.Path, "/dev/zram") || p.ID.Same(m.note.MemoryLoop)
	if !detail {
		return p, nil
	}
	groups, err := f.Groups(member.DevID)
	if err != nil {
		return plan.Member{}, err
	}
	for _, g := range groups {
		kind := plan.Data
		switch g.Type() {
		case btrfs.Metadata:
			kind = plan.Metadata
		case btrfs.System:
			kind = plan.System
		}
		p.Groups = append(p.Groups, plan.Group{Type: kind, Logical: g.Logical, Length: g.DevLength, Used: g.Used})
	}
	return p, nil
}

// replacing gives what is being copied, nil for nothing.
func (m *Machine) replacing(f *btrfs.FS) (*plan.Replace, error) {
	status, err := f.ReplaceStatus()
	if err != nil || status.Over() {
		return nil, err
	}
	target, ok, err := f.ReplaceTarget()
	if err != nil || !ok { // it has just ended
		return nil, err
	}
	p, err := m.member(f, target, false)
	return &plan.Replace{DevID: status.DevID, Target: p}, err
}

// detail adds what only planning needs.
func (m *Machine) detail(f *btrfs.FS, s *plan.Sprout, e mount.Entry) error {
	spaces, err := f.Spaces()
	if err != nil {
		return err
	}
	s.Space.DataUsed, s.Space.MetadataUsed, s.Space.SystemUsed = spaces.DataUsed(), spaces.MetadataUsed(), spaces.SystemUsed()
	s.Space.MetadataCopies = uint64(max(1, spaces.MetadataCopies())) //nolint:gosec // 1 or 2
	if s.Space.GlobalReserve, err = f.GlobalReserve(); err != nil {
		return err
	}
	exclusive, err := f.ExclusiveOperation()
	if err != nil {
		return err
	}
	if exclusive != "none" {
		s.Exclusive = exclusive
	}
	if s.MemoryAvailable, err = meminfo("MemAvailable"); err != nil {
		return err
	}
	s.Swapfiles, err = m.swapfiles(e)
	return err
}

// compressOf gives the value of compress= or compress-force=.
func compressOf(options []string) string {
	for _, o := range options {
		if key, value, ok := strings.Cut(o, "="); ok && (key == "compress" || key == "compress-force") {
			return value
		}
	}
	return ""
}

// swapfiles lists the active swap files on the file system of a mount.
func (m *Machine) swapfiles(e mount.Entry) ([]string, error) {
	file, err := os.Open("/proc/swaps")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without swap
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the swap files: %w", err)
	}
	defer file.Close()
	entries, err := m.mounts.List()
	if err != nil {
		return nil, err
	}
	var list []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[1] != "file" {
			continue
		}
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, fields[0], unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
			continue // not to be seen from here, so not on this mount
		}
		if slices.ContainsFunc(entries, func(o mount.Entry) bool { return uint64(o.ID) == st.Mnt_id && o.Num == e.Num }) { //nolint:gosec // an id is never negative
			list = append(list, fields[0])
		}
	}
	return list, lines.Err()
}

// extentCache keeps the extents of data groups as long as as many bytes are used
// in them: those of a seed never change, and reading them all takes a while.
type extentCache struct {
	mu     sync.Mutex
	fsid   string // of the file system the entries are of; one at a time is kept
	groups map[uint64]cachedGroup
}

type cachedGroup struct {
	used    uint64
	extents []plan.Extent
}

// Measure implements [daemon.Looker].
func (m *Machine) Measure(ctx context.Context, s *plan.Sprout, devids []uint64) error {
	if len(devids) == 0 {
		return nil
	}
	f, err := btrfs.Open(s.MountPoint)
	if err != nil {
		return explain(err, "cannot open the file system at %s", s.MountPoint)
	}
	defer f.Close()
	m.extents.mu.Lock()
	defer m.extents.mu.Unlock()
	if m.extents.fsid != s.FSID {
		m.extents.fsid, m.extents.groups = s.FSID, map[uint64]cachedGroup{}
	}
	current := map[uint64]cachedGroup{}
	for i := range s.Members {
		if !slices.Contains(devids, s.Members[i].DevID) {
			continue
		}
		for j := range s.Members[i].Groups {
			g := &s.Members[i].Groups[j]
			if g.Type != plan.Data {
				continue
			}
			if err := ctx.Err(); err != nil {
				return explain(err, "cannot measure %s", s.MountPoint)
			}
			entry, ok := m.extents.groups[g.Logical]
			if !ok || entry.used != g.Used {
				if entry, err = readExtents(f, *g); err != nil {
					return explain(err, "cannot measure %s", s.MountPoint)
				}
			}
			current[g.Logical] = entry
			g.Extents = entry.extents
		}
	}
	m.extents.groups = current
	return nil
}

func readExtents(f *btrfs.FS, g plan.Group) (cachedGroup, error) {
	found, err := f.Extents(btrfs.Group{Logical: g.Logical, Length: g.Length})
	if err != nil {
		return cachedGroup{}, err
	}
	entry := cachedGroup{used: g.Used, extents: make([]plan.Extent, len(found))}
	for i, e := range found {
		entry.extents[i] = plan.Extent{Start: e.Start, Length: e.Length}
	}
	return entry, nil
}

// Devices implements [daemon.Looker].
func (m *Machine) Devices(ctx context.Context, again bool) ([]block.Device, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	known := m.seen.known()
	if again {
		known = nil
	}
	list, err := m.blocks.List(ctx, known)
	m.seen.keep(list)
	return list, explain(err, "cannot list the block devices")
}

// seen keeps what is on devices that have not changed since they were looked at.
type seen struct {
	mu      sync.Mutex
	devices map[block.DevNum]block.Device
	changed map[block.DevNum]bool // since the look that is under way began
	all     bool                  // of which it is not known what has changed
}

// known begins a look and gives what is known before it.
func (s *seen) known() func(block.ID) ([]block.Signature, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changed, s.all = map[block.DevNum]bool{}, false
	before := maps.Clone(s.devices)
	return func(id block.ID) ([]block.Signature, bool) {
		d, ok := before[id.Num]
		return d.Signatures, ok && d.Same(id)
	}
}

// keep takes in what a look has found, but for what changed meanwhile.
func (s *seen) keep(list []block.Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devices = map[block.DevNum]block.Device{}
	for _, d := range list {
		if d.ProbeError == nil && !s.all && !s.changed[d.Num] {
			s.devices[d.Num] = d
		}
	}
}

// forget makes the next look open a device; with a zero number all of them.
func (s *seen) forget(num block.DevNum) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if num.IsZero() {
		s.all = true
		clear(s.devices)
		return
	}
	if s.changed != nil {
		s.changed[num] = true
	}
	delete(s.devices, num)
}

// Device implements [daemon.Looker].
func (m *Machine) Device(ctx context.Context, path string) (block.Device, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	d, err := m.blocks.ByPath(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return d, fault.New(fault.NoSuchDevice, "there is no device %s", path)
	}
	return d, explain(err, "cannot use %s", path)
}

// BtrfsDevices implements [daemon.Looker].
func (m *Machine) BtrfsDevices(ctx context.Context, id block.ID) (uint64, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	h, err := m.blocks.Open(ctx, id.Path)
	if err != nil {
		return 0, explain(err, "cannot open %s", id.Path)
	}
	defer h.Close()
	if !h.ID().Same(id) {
		return 0, fault.New(fault.NoSuchDevice, "%s is another device now", id.Path)
	}
	super, err := btrfs.ReadSuper(h.File(), int64(id.Size)) //nolint:gosec // sysfs counts in sectors
	return super.NumDevices, explain(err, "cannot read the superblock of %s", id.Path)
}

// Attached implements [daemon.Looker].
func (m *Machine) Attached(_ context.Context, ids []block.ID) ([]block.ID, error) {
	var there []block.ID
	for _, id := range ids {
		var now block.ID
		var err error
		if id.Num.IsLoop() {
			var l block.Loop
			l, err = m.blocks.LoopStatus(id.Num)
			now = l.ID
		} else {
			now, err = m.blocks.Identify(id.Num)
			now.Size = cmp.Or(now.Size, id.Size) // 0 where it was cut off while it was being made
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, explain(err, "cannot look at %s", id.Path)
		}
		if err == nil && now.Same(id) && now.Size > 0 {
			there = append(there, id)
		}
	}
	return there, nil
}

// IsMounted implements [daemon.Looker].
func (m *Machine) IsMounted(_ context.Context, mountpoint string) (bool, error) {
	entries, err := m.mounts.List()
	if err != nil {
		return false, fault.Wrap(err, fault.Internal, "cannot list the mounts")
	}
	return slices.ContainsFunc(entries, func(e mount.Entry) bool { return e.MountPoint == mountpoint }), nil
}

// Media implements [daemon.Looker].
func (m *Machine) Media(_ context.Context, seed block.ID) (daemon.Media, error) {
	part := seed
	if seed.Num.IsLoop() {
		backing, err := m.blocks.BackingDevice(seed.Num)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Not a loop over a file: a partition of a loop, or a loop that is
			// gone. It is then its own media.
		case errors.Is(err, block.ErrNoDevice):
			return daemon.Media{}, nil
		case err != nil:
			return daemon.Media{}, explain(err, "cannot tell where the seed lies")
		default:
			part = backing
		}
	}
	disk, err := m.blocks.WholeDisk(part.Num)
	if err != nil {
		return daemon.Media{}, explain(err, "cannot tell which disk %s is on", part.Path)
	}
	return daemon.Media{Disk: disk, Part: part}, nil
}

// MediaHolders implements [daemon.Looker].
func (m *Machine) MediaHolders(ctx context.Context, disk block.ID) ([]block.Holder, error) {
	m.probing.Lock()
	defer m.probing.Unlock()
	now, err := m.blocks.Identify(disk.Num)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now.DiskSeq != disk.DiskSeq {
		return nil, nil // it is unplugged already
	}
	if err != nil {
		return nil, explain(err, "cannot look at %s", disk.Path)
	}
	_, holders, err := m.blocks.Unused(ctx, disk.Num)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return holders, explain(err, "cannot look at %s", disk.Path)
}

// Moved implements [daemon.Looker].
func (m *Machine) Moved(_ context.Context, mountpoint string, devid uint64, from, to block.ID) (daemon.Counters, error) {
	f, err := btrfs.Open(mountpoint)
	if err != nil {
		return daemon.Counters{}, explain(err, "cannot open the file system at %s", mountpoint)
	}
	defer f.Close()
	groups, err := f.Groups(devid)
	if err != nil {
		return daemon.Counters{}, explain(err, "cannot read what is left on member %d", devid)
	}
	var c daemon.Counters
	switch status, err := f.ReplaceStatus(); {
	case err != nil:
		return daemon.Counters{}, explain(err, "cannot read how much of member %d is copied", devid)
	case !status.Over():
		c = replaced(status, groups, from.Size)
	default:
		for _, g := range groups {
			c.Left += g.Used
		}
		if len(groups) > 0 {
			c.Group = groups[0].Used
		}
	}
	source, err := m.blocks.IOStat(from.Num)
	if err != nil {
		return daemon.Counters{}, explain(err, "cannot read the traffic of %s", from.Path)
	}
	c.Read = source.ReadBytes
	if !to.Num.IsZero() {
		target, err := m.blocks.IOStat(to.Num)
		if err != nil {
			return daemon.Counters{}, explain(err, "cannot read the traffic of %s", to.Path)
		}
		c.Written = target.WrittenBytes
	}
	return c, nil
}
