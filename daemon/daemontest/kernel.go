// Package daemontest has a kernel in memory for tests of the engine. It keeps
// the rules that matter to the engine (a seed is read-only, a removal moves
// block groups one at a time and stops cleanly, the last writable member cannot
// leave), counts every call, and can fail or "die" at any of them.
package daemontest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// Sizes for the models, in bytes.
const (
	MiB = 1 << 20
	GiB = 1 << 30
)

// ErrInjected is what a call fails with when it was told to.
var ErrInjected = errors.New("injected failure")

// ErrDead is what every call fails with after the daemon "died".
var ErrDead = errors.New("the daemon is dead")

// FileSystem is one mounted Btrfs.
type FileSystem struct {
	FSID, SeedFSID, Label, MountPoint, Compress string
	ReadOnly                                    bool
	Copies                                      uint64
	Members                                     []plan.Member
	// Replace is what the kernel copies by itself: nobody waits for it.
	Replace   *plan.Replace
	nextDevID uint64
}

// Kernel is a kernel in memory. Its fields may be set before use and read after.
type Kernel struct {
	mu sync.Mutex

	Disks   map[string]*block.Device // by path
	Loops   map[string]block.ID      // attached loops by path
	Zrams   map[string]block.ID      // zram devices with a size, by path
	Mounted map[string]*FileSystem   // by mount point
	Seeds   map[string]string        // seed path -> fsid
	Backing map[string]daemon.Media  // loop path -> where its file lies
	Sticks  map[string]string        // mount point of the media -> path of its disk
	Note    handover.Note
	Boot    string
	// Free is what is free on the stick for a new partition, Kept are the
	// partitions that were made there, and BtrfsOf says how many devices the
	// Btrfs on a path has.
	Free    uint64
	Kept    []string
	BtrfsOf map[string]uint64
	// NoReplace makes the kernel refuse to copy, and Damaged are the paths of
	// members that a check finds damaged.
	NoReplace bool
	Damaged   []string

	// Dirs are the directories a seed can be copied to, with what is free, and
	// Copies what copies of seeds are in them, or on disks: by path, whether it has
	// its name.
	Dirs   map[string]uint64
	Copies map[string]bool
	// Memory is the number of seeds that are read from memory.
	Memory int

	// Touched are the paths of devices that were wiped, added or freed.
	Touched []string

	// OnCall is called with the number (from 1) and the name of each call;
	// an error makes the call fail before it does anything. While a removal
	// runs it is called for each group.
	OnCall func(n int, call string) error
	// Freeing is called before a zram device is freed, and may wait for other calls;
	// it is set before there are any.
	Freeing func()
	calls   int
	dead    bool
	serial  uint64
	// reading is what a released seed is read from, by the path of its loop: [plan.RAM],
	// a directory or a disk.
	reading map[string]string
	ours    map[string]bool // zrams that this life of the daemon made or took over, by path
}

var _ daemon.Kernel = (*Kernel)(nil)

// New makes a kernel with a seed image on a stick, and some disks.
func New() *Kernel {
	k := &Kernel{
		Disks: map[string]*block.Device{}, Loops: map[string]block.ID{}, Zrams: map[string]block.ID{},
		Mounted: map[string]*FileSystem{}, Seeds: map[string]string{"/run/media/root.img": "5eed0000-0000-4000-8000-000000000001"},
		Backing: map[string]daemon.Media{}, Sticks: map[string]string{}, Boot: "boot-1",
		ours: map[string]bool{}, reading: map[string]string{}, Free: 4 * GiB, Dirs: map[string]uint64{"/mnt/disk": 4 * GiB, "/mnt/full": 100 * MiB}, Copies: map[string]bool{},
	}
	k.AddDisk("/dev/sda", 8, 0, 8*GiB).Holders = []block.Holder{{Kind: "mount", Name: "/run/media"}}
	k.AddDisk("/dev/sda2", 8, 2, 4*GiB).Disk = "sda"
	k.AddDisk("/dev/nvme0n1", 259, 0, 64*GiB)
	k.AddDisk("/dev/sdc", 8, 32, 16*GiB)
	k.AddDisk("/dev/sdb", 8, 16, 64*GiB).Signatures = []block.Signature{{Type: "ext4", Label: "precious"}}
	return k
}

// BootStick makes k the kernel of a system that was booted from the stick: the
// root is a sprout of the seed on it, with RAM or the given partition, and the
// early boot has left its note.
func (k *Kernel) BootStick(persistence string) (fsid string) {
	const root = "/"
	stick := k.Disks["/dev/sda"]
	stick.Holders = nil
	seed := k.newLoop()
	k.mountSeed(seed, root)
	mode, zram := handover.Persistent, block.ID{}
	if persistence != "" {
		k.addTo(k.Mounted[root], k.Disks[persistence].ID)
	} else {
		mode, zram = handover.Volatile, k.newZram(4*GiB)
		k.addTo(k.Mounted[root], zram)
	}
	k.Mounted[root].ReadOnly = false
	k.Sticks[handover.MediaMount] = stick.Path
	k.Note = handover.Note{
		BootID: k.Boot, Mode: mode, FSID: k.Mounted[root].FSID, Media: stick.ID, MediaMount: handover.MediaMount,
		Image: "/LiveOS/root.img", Seed: seed, Zram: zram,
	}
	return k.Note.FSID
}

// Reboot cuts the power and boots again, from the stick where the root needs its
// seed. It reports whether the root was mounted again: not if a part of it was in
// RAM. The names of the two disks that are as large as each other are given the
// other way round, and all that is known by number is known by another.
func (k *Kernel) Reboot() (mounted bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Boot += "+"
	k.Note, k.dead = handover.Note{}, false
	clear(k.Loops)
	clear(k.Zrams)
	clear(k.Backing)
	clear(k.reading)
	k.Memory = 0
	clear(k.ours)
	clear(k.Sticks)
	a, b := k.Disks["/dev/nvme0n1"], k.Disks["/dev/sdb"]
	before := map[block.DevNum]*block.Device{}
	for _, d := range k.Disks {
		before[d.Num] = d
	}
	a.Num, b.Num, a.Path, b.Path, a.Name, b.Name, a.Disk, b.Disk = b.Num, a.Num, b.Path, a.Path, b.Name, a.Name, b.Disk, a.Disk
	k.Disks[a.Path], k.Disks[b.Path] = a, b

	root := k.Mounted["/"]
	seed := -1
	for i := range root.Members {
		switch m := &root.Members[i]; {
		case m.Zram:
			delete(k.Mounted, "/")
			return false
		case m.Seed:
			m.ID, seed = k.newLoop(), i
		default:
			m.ID = before[m.ID.Num].ID
		}
	}
	if root.Replace != nil { // it goes on
		root.Replace.Target.ID = before[root.Replace.Target.ID.Num].ID
	}
	if seed >= 0 {
		stick := k.Disks["/dev/sda"]
		k.Sticks[handover.MediaMount] = stick.Path
		k.Note = handover.Note{
			BootID: k.Boot, Mode: handover.Persistent, FSID: root.FSID, Media: stick.ID, MediaMount: handover.MediaMount,
			Image: "/LiveOS/root.img", Seed: root.Members[seed].ID,
		}
	}
	return true
}

// Unplug takes a disk away, with whatever is on it.
func (k *Kernel) Unplug(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	disk := k.Disks[path].Disk
	for path, d := range k.Disks {
		if d.Disk != disk {
			continue
		}
		delete(k.Disks, path)
		for _, f := range k.Mounted {
			for i := range f.Members {
				if m := &f.Members[i]; m.ID.Num == d.Num {
					m.ID, m.Missing = block.ID{Path: path}, true
				}
			}
		}
	}
}

// AddDisk adds a block device.
func (k *Kernel) AddDisk(path string, major, minor uint32, size uint64) *block.Device {
	d := &block.Device{
		ID:   block.ID{Num: block.DevNum{Major: major, Minor: minor}, Path: path, DiskSeq: 1, Serial: "S" + path, Size: size},
		Name: path[len("/dev/"):], Disk: path[len("/dev/"):],
	}
	k.Disks[path] = d
	return d
}

// Reset lets a dead kernel serve again, as it serves the next daemon, and
// starts to count anew.
func (k *Kernel) Reset(onCall func(n int, call string) error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead {
		clear(k.ours)
		// A loop that nothing has mounted goes with the process that holds it.
		for path, id := range k.Loops {
			if !k.isMember(id) {
				delete(k.Loops, path)
				k.forgetCopy(path)
			}
		}
	}
	k.dead, k.calls, k.OnCall = false, 0, onCall
}

// Calls made since the last Reset.
func (k *Kernel) Calls() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.calls
}

// Die makes this and every later call fail.
func (k *Kernel) Die() { k.dead = true }

// call counts a call; the lock must be held.
func (k *Kernel) call(name string) error {
	if k.dead {
		return ErrDead
	}
	k.calls++
	if k.OnCall != nil {
		if err := k.OnCall(k.calls, name); err != nil {
			return err
		}
	}
	if k.dead {
		return ErrDead
	}
	return nil
}

func (k *Kernel) locked(name string) (unlock func(), err error) {
	k.mu.Lock()
	return k.mu.Unlock, k.call(name)
}

// sprout gives the planner's value of f.
func (k *Kernel) sprout(f *FileSystem) plan.Sprout {
	s := plan.Sprout{
		FSID: f.FSID, SeedFSID: f.SeedFSID, Label: f.Label, MountPoint: f.MountPoint, ReadOnly: f.ReadOnly,
		Compress: f.Compress, MemoryAvailable: 8 * GiB,
		Space: plan.Space{MetadataCopies: f.Copies, GlobalReserve: 6 * MiB, NodeSize: 16384},
	}
	for _, m := range f.Members {
		m.Groups = slices.Clone(m.Groups)
		s.Members = append(s.Members, m)
		if m.Writable {
			s.Space.Free += m.Size - min(m.Size, m.Used)
		}
	}
	if f.Replace != nil {
		s.Exclusive = "device replace"
		replace := *f.Replace
		s.Replace = &replace
	}
	return s
}

// Sprouts implements [daemon.Looker].
func (k *Kernel) Sprouts(_ context.Context, known func(string) bool) ([]plan.Sprout, error) {
	// known is called without the lock: it belongs to the caller.
	unlock, err := k.locked("Sprouts")
	var all []plan.Sprout
	if err == nil {
		for _, mnt := range slices.Sorted(maps.Keys(k.Mounted)) {
			all = append(all, k.sprout(k.Mounted[mnt]))
		}
	}
	unlock()
	all = slices.DeleteFunc(all, func(s plan.Sprout) bool {
		sprouted := slices.ContainsFunc(s.Members, func(m plan.Member) bool { return m.Zram }) ||
			len(s.Members) > 1 && slices.ContainsFunc(s.Members, func(m plan.Member) bool { return m.Seed })
		return !sprouted && !known(s.FSID)
	})
	return all, err
}

// Detail implements [daemon.Looker].
func (k *Kernel) Detail(_ context.Context, mountpoint string) (plan.Sprout, error) {
	unlock, err := k.locked("Detail")
	defer unlock()
	if err != nil {
		return plan.Sprout{}, err
	}
	f, ok := k.Mounted[mountpoint]
	if !ok {
		return plan.Sprout{}, fault.New(fault.WrongState, "nothing is mounted at %s", mountpoint)
	}
	return k.sprout(f), nil
}

// Measure implements [daemon.Looker]: this kernel has no extents.
func (k *Kernel) Measure(context.Context, *plan.Sprout, []uint64) error {
	unlock, err := k.locked("Measure")
	defer unlock()
	return err
}

// Devices implements [daemon.Looker].
func (k *Kernel) Devices(context.Context, bool) ([]block.Device, error) {
	unlock, err := k.locked("Devices")
	defer unlock()
	if err != nil {
		return nil, err
	}
	var list []block.Device
	for _, path := range slices.Sorted(maps.Keys(k.Disks)) {
		list = append(list, k.look(k.Disks[path]))
	}
	return list, nil
}

// look gives d with the file system that uses it as its holder.
func (k *Kernel) look(d *block.Device) block.Device {
	c := *d
	for mnt, f := range k.Mounted {
		members := f.Members
		if f.Replace != nil {
			members = append(slices.Clone(members), f.Replace.Target)
		}
		for _, m := range members {
			if m.ID.Num == d.Num {
				c.Holders = append(slices.Clone(c.Holders), block.Holder{Kind: "mount", Name: mnt})
				c.Signatures = []block.Signature{{Type: "btrfs"}}
			}
		}
	}
	for loop, to := range k.reading {
		if _, attached := k.Loops[loop]; attached && to == d.Path {
			c.Holders = append(slices.Clone(c.Holders), block.Holder{Kind: "loop", Name: loop})
		}
	}
	return c
}

// Device implements [daemon.Looker].
func (k *Kernel) Device(_ context.Context, path string) (block.Device, error) {
	unlock, err := k.locked("Device")
	defer unlock()
	if err != nil {
		return block.Device{}, err
	}
	if d, ok := k.Disks[path]; ok {
		return k.look(d), nil
	}
	for _, other := range []map[string]block.ID{k.Loops, k.Zrams} {
		if id, ok := other[path]; ok {
			return k.look(&block.Device{ID: id, Name: path[len("/dev/"):], Disk: path[len("/dev/"):]}), nil
		}
	}
	return block.Device{}, fault.New(fault.NoSuchDevice, "there is no device %s", path)
}

// Attached implements [daemon.Looker].
func (k *Kernel) Attached(_ context.Context, ids []block.ID) ([]block.ID, error) {
	unlock, err := k.locked("Attached")
	defer unlock()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(ids), func(id block.ID) bool {
		now := []block.ID{k.Loops[id.Path], k.Zrams[id.Path]}
		if d, ok := k.Disks[id.Path]; ok {
			now = append(now, d.ID)
		}
		return !slices.ContainsFunc(now, id.Same)
	}), nil
}

// IsMounted implements [daemon.Looker].
func (k *Kernel) IsMounted(_ context.Context, mountpoint string) (bool, error) {
	unlock, err := k.locked("IsMounted")
	defer unlock()
	return k.Mounted[mountpoint] != nil || k.Sticks[mountpoint] != "", err
}

// Media implements [daemon.Looker].
func (k *Kernel) Media(_ context.Context, seed block.ID) (daemon.Media, error) {
	unlock, err := k.locked("Media")
	defer unlock()
	if err != nil {
		return daemon.Media{}, err
	}
	if media, ok := k.Backing[seed.Path]; ok {
		return media, nil
	}
	return daemon.Media{Disk: seed, Part: seed}, nil
}

// MediaHolders implements [daemon.Looker].
func (k *Kernel) MediaHolders(_ context.Context, disk block.ID) ([]block.Holder, error) {
	unlock, err := k.locked("MediaHolders")
	defer unlock()
	if err != nil {
		return nil, err
	}
	var holders []block.Holder
	for path := range k.Loops {
		if k.Backing[path].Disk.Num == disk.Num {
			holders = append(holders, block.Holder{Kind: "loop", Name: path})
		}
	}
	if d, ok := k.Disks[disk.Path]; ok {
		holders = append(holders, d.Holders...)
		for path, part := range k.Disks {
			if part.Disk == d.Disk && k.isMember(part.ID) {
				holders = append(holders, block.Holder{Kind: "member", Name: path})
			}
		}
	}
	for mnt, path := range k.Sticks {
		if path == disk.Path {
			holders = append(holders, block.Holder{Kind: "mount", Name: mnt})
		}
	}
	return holders, nil
}

// SeedFile implements [daemon.Looker].
func (k *Kernel) SeedFile(_ context.Context, seed, media block.ID) (plan.SeedFile, error) {
	unlock, err := k.locked("SeedFile")
	defer unlock()
	if err != nil || k.Loops[seed.Path].Path == "" {
		return plan.SeedFile{}, err
	}
	f := plan.SeedFile{Loop: true, Path: "/run/media/root.img"}
	if dir := k.reading[seed.Path]; dir == plan.RAM {
		f.Path, f.Memory = "/memfd:seed (deleted)", true
	} else if d, ok := k.Disks[dir]; ok {
		f.Path, f.Device = dir, d.ID
	} else if dir != "" {
		f.Path = copyIn(dir, k.Copies[dir])
	}
	f.Limit = seed.Size
	f.Elsewhere = k.reading[seed.Path] != "" && !media.Num.IsZero()
	return f, nil
}

// seedFSID is that of the only seed there is.
const seedFSID = "5eed0000-0000-4000-8000-000000000001"

// copyIn gives the path of a copy, which has its name at the very end.
func copyIn(dir string, named bool) string {
	path := dir + "/" + plan.CopyName(seedFSID)
	if !named {
		path += ".partial"
	}
	return path
}

// Destination implements [daemon.Looker].
func (k *Kernel) Destination(_ context.Context, path string, _ block.ID) (*plan.Target, error) {
	unlock, err := k.locked("Destination")
	defer unlock()
	if d, ok := k.Disks[path]; err == nil && ok {
		return &plan.Target{Device: k.look(d)}, nil
	}
	free, ok := k.Dirs[path]
	if err == nil && !ok {
		err = fault.New(fault.NoSuchDevice, "there is no directory %s", path)
	}
	if err != nil {
		return nil, err
	}
	return &plan.Target{Device: block.Device{ID: block.ID{Path: path}}, Free: free}, nil
}

// Release implements [daemon.Changer].
func (k *Kernel) Release(ctx context.Context, r daemon.Release) (daemon.SeedCopy, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.call("Release"); err != nil {
		return daemon.SeedCopy{}, err
	}
	disk := k.Disks[r.Device.Path]
	if disk != nil {
		if len(disk.Signatures) > 0 {
			return daemon.SeedCopy{}, fault.New(fault.TargetNotEmpty, "%s is not empty any more", r.To)
		}
		k.Touched = append(k.Touched, r.To)
	} else if r.To != plan.RAM {
		k.Copies[r.To] = false
	}
	err := k.copySeed(ctx, r, disk)
	if err != nil {
		if !k.dead { // the dead do not tidy up
			delete(k.Copies, r.To)
			if disk != nil {
				disk.Signatures = nil
			}
		}
		return daemon.SeedCopy{}, err
	}
	// The kernel counts it as another medium.
	k.serial++
	seed := r.Seed
	seed.DiskSeq = 1000 + k.serial
	k.Loops[seed.Path], k.reading[seed.Path] = seed, r.To
	k.Backing[seed.Path] = daemon.Media{}
	for i := range k.Mounted[r.MountPoint].Members {
		if m := &k.Mounted[r.MountPoint].Members[i]; m.Seed {
			m.ID = seed
		}
	}
	if r.To == plan.RAM {
		k.Memory++
		return daemon.SeedCopy{Bytes: 480 * MiB}, k.call("Release.done")
	}
	if disk != nil {
		return daemon.SeedCopy{Path: r.To, Bytes: 480 * MiB}, k.call("Release.done")
	}
	if err := k.call("Release.name"); k.dead {
		return daemon.SeedCopy{}, err
	}
	k.Copies[r.To] = true
	return daemon.SeedCopy{Path: copyIn(r.To, true), Bytes: 480 * MiB}, nil
}

// copySeed copies to a disk if there is one, which is a seed then.
func (k *Kernel) copySeed(ctx context.Context, r daemon.Release, disk *block.Device) error {
	for n := range uint64(4) {
		if err := k.call("Release.copy"); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return fault.New(fault.Cancelled, "the copy was cancelled")
		}
		r.Progress((n + 1) * 120 * MiB)
	}
	if disk != nil {
		disk.Signatures, k.Copies[r.To] = []block.Signature{{Type: "btrfs", UUID: seedFSID}}, true
	}
	return k.call("Release.switch")
}

// SettleCopy implements [daemon.Changer].
func (k *Kernel) SettleCopy(_ context.Context, dir, _ string) error {
	unlock, err := k.locked("SettleCopy")
	defer unlock()
	if named, there := k.Copies[dir]; err != nil || named || !there {
		return err
	}
	for loop, to := range k.reading {
		if _, attached := k.Loops[loop]; attached && to == dir {
			k.Copies[dir] = true
			return nil
		}
	}
	delete(k.Copies, dir)
	return nil
}

// Room implements [daemon.Looker].
func (k *Kernel) Room(context.Context, block.ID) (daemon.Room, error) {
	unlock, err := k.locked("Room")
	defer unlock()
	r := daemon.Room{Free: k.Free}
	for _, path := range k.Kept {
		r.Partitions = append(r.Partitions, k.Disks[path].ID)
	}
	return r, err
}

// BtrfsDevices implements [daemon.Looker].
func (k *Kernel) BtrfsDevices(_ context.Context, id block.ID) (uint64, error) {
	unlock, err := k.locked("BtrfsDevices")
	defer unlock()
	return k.BtrfsOf[id.Path], err
}

// MakePartition implements [daemon.Changer].
func (k *Kernel) MakePartition(_ context.Context, disk block.ID) (block.ID, error) {
	unlock, err := k.locked("MakePartition")
	defer unlock()
	if err != nil {
		return block.ID{}, err
	}
	d := k.AddDisk(disk.Path+"9", disk.Num.Major, disk.Num.Minor+9, k.Free)
	d.Disk = k.Disks[disk.Path].Disk
	k.Kept, k.Free = append(k.Kept, d.Path), 0
	return d.ID, k.call("MakePartition.made")
}

// Moved implements [daemon.Looker].
func (k *Kernel) Moved(_ context.Context, mountpoint string, devid uint64, _, _ block.ID) (daemon.Counters, error) {
	unlock, err := k.locked("Moved")
	defer unlock()
	if err != nil {
		return daemon.Counters{}, err
	}
	var c daemon.Counters
	if f, ok := k.Mounted[mountpoint]; ok {
		for _, m := range f.Members {
			for _, g := range m.Groups {
				if m.DevID == devid {
					c.Left += g.Used
				}
			}
		}
	}
	return c, nil
}

// Wipe implements [daemon.Changer].
func (k *Kernel) Wipe(_ context.Context, id block.ID) error {
	unlock, err := k.locked("Wipe")
	defer unlock()
	if err != nil {
		return err
	}
	d := k.Disks[id.Path]
	d.Signatures, d.Partitions = nil, nil
	delete(k.Copies, id.Path)
	k.Touched = append(k.Touched, id.Path)
	return nil
}

// Add implements [daemon.Changer].
func (k *Kernel) Add(_ context.Context, mountpoint string, id block.ID) error {
	unlock, err := k.locked("Add")
	defer unlock()
	if err != nil {
		return err
	}
	if d, ok := k.Disks[id.Path]; ok {
		if len(d.Signatures) > 0 {
			return fault.New(fault.TargetNotEmpty, "%s is not empty", id.Path)
		}
		k.Touched = append(k.Touched, id.Path)
	}
	k.addTo(k.Mounted[mountpoint], id)
	return nil
}

func (k *Kernel) addTo(f *FileSystem, id block.ID) {
	if f.SeedFSID == "" { // the seed becomes a sprout
		k.serial++
		f.SeedFSID, f.FSID = f.FSID, fmt.Sprintf("f0000000-0000-4000-8000-%012d", k.serial)
	}
	f.nextDevID++
	m := plan.Member{
		DevID: f.nextDevID, UUID: fmt.Sprintf("dddddddd-0000-4000-8000-%012d", f.nextDevID), ID: id, Size: id.Size,
		Writable: true, Zram: k.Zrams[id.Path].Same(id) || k.Note.MemoryLoop.Same(id),
	}
	if len(f.Members) == 1 {
		m.Groups = []plan.Group{{Type: plan.Metadata, Length: 64 * MiB, Used: 2 * MiB}, {Type: plan.System, Length: 8 * MiB, Used: 16384}}
	}
	f.Members = append(f.Members, m)
}

// Remove implements [daemon.Changer].
func (k *Kernel) Remove(ctx context.Context, mountpoint string, devid uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.call("Remove"); err != nil {
		return err
	}
	f := k.Mounted[mountpoint]
	at := slices.IndexFunc(f.Members, func(m plan.Member) bool { return m.DevID == devid })
	to := slices.IndexFunc(f.Members, func(m plan.Member) bool { return m.Writable && m.DevID != devid })
	// The newest writable member takes what moves.
	for i, m := range f.Members {
		if m.Writable && m.DevID != devid {
			to = i
		}
	}
	if at < 0 || to < 0 {
		return fault.New(fault.WrongState, "member %d cannot be removed", devid)
	}
	for len(f.Members[at].Groups) > 0 {
		if err := k.call("Remove.group"); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return fault.New(fault.Cancelled, "the removal was cancelled")
		}
		g := f.Members[at].Groups[0]
		f.Members[at].Groups = f.Members[at].Groups[1:]
		f.Members[to].Groups = append(f.Members[to].Groups, g)
	}
	f.Members = slices.Delete(f.Members, at, at+1)
	if !slices.ContainsFunc(f.Members, func(m plan.Member) bool { return m.Seed }) {
		f.SeedFSID = "" // shown as such once no seed is left
	}
	return nil
}

// Replace implements [daemon.Changer]. When the daemon dies meanwhile the kernel
// goes on: by the time somebody looks it has finished, or it has not.
func (k *Kernel) Replace(ctx context.Context, mountpoint string, devid uint64, id block.ID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.call("Replace"); err != nil {
		return err
	}
	f := k.Mounted[mountpoint]
	at := slices.IndexFunc(f.Members, func(m plan.Member) bool { return m.DevID == devid })
	if at < 0 || f.Members[at].Seed || id.Size < f.Members[at].Size || f.ReadOnly || k.NoReplace {
		return fault.New(fault.Internal, "member %d cannot be copied", devid)
	}
	k.Touched = append(k.Touched, id.Path)
	f.Replace = &plan.Replace{DevID: devid, Target: plan.Member{UUID: "not its own for long", ID: id, Size: f.Members[at].Size, Writable: true}}
	for range f.Members[at].Groups {
		if err := k.call("Replace.group"); errors.Is(err, ErrDead) {
			if k.calls%2 == 0 {
				f.Members[at].ID, f.Replace = id, nil
			}
			return err
		} else if err != nil {
			f.Replace = nil
			return err
		}
		if ctx.Err() != nil {
			f.Replace = nil
			return fault.New(fault.Cancelled, "the copy was cancelled")
		}
	}
	f.Members[at].ID, f.Replace = id, nil
	return nil
}

// Check implements [daemon.Changer].
func (k *Kernel) Check(_ context.Context, mountpoint string, devid uint64) error {
	return k.ofMember("Check", mountpoint, devid, func(m *plan.Member) error {
		if slices.Contains(k.Damaged, m.ID.Path) {
			return &fault.Error{Code: fault.IOError, Message: "cannot read all that was copied", Files: []string{"home/letter"}}
		}
		return nil
	})
}

// Resize implements [daemon.Changer].
func (k *Kernel) Resize(_ context.Context, mountpoint string, devid uint64) error {
	return k.ofMember("Resize", mountpoint, devid, func(m *plan.Member) error {
		m.Size = m.ID.Size
		return nil
	})
}

func (k *Kernel) ofMember(name, mountpoint string, devid uint64, do func(*plan.Member) error) error {
	unlock, err := k.locked(name)
	defer unlock()
	if err != nil {
		return err
	}
	f := k.Mounted[mountpoint]
	at := slices.IndexFunc(f.Members, func(m plan.Member) bool { return m.DevID == devid })
	if at < 0 || f.Replace != nil {
		return fault.New(fault.Busy, "%s of member %d while %v is copied", name, devid, f.Replace)
	}
	return do(&f.Members[at])
}

// ReadAhead implements [daemon.Changer]: this kernel has everything in memory.
func (k *Kernel) ReadAhead(context.Context, string, uint64, block.ID, <-chan struct{}) (uint64, error) {
	return 0, fault.New(fault.NotSupported, "the seed's image lies in memory")
}

// MakeWritable implements [daemon.Changer].
func (k *Kernel) MakeWritable(_ context.Context, mountpoint string, _ ...string) error {
	return k.change("MakeWritable", mountpoint, func(f *FileSystem) { f.ReadOnly = false })
}

// SetCompress implements [daemon.Changer].
func (k *Kernel) SetCompress(_ context.Context, mountpoint, value string) error {
	return k.change("SetCompress", mountpoint, func(f *FileSystem) { f.Compress = value })
}

// SetLabel implements [daemon.Changer].
func (k *Kernel) SetLabel(_ context.Context, mountpoint, label string) error {
	return k.change("SetLabel", mountpoint, func(f *FileSystem) { f.Label = label })
}

// ConvertMetadata implements [daemon.Changer].
func (k *Kernel) ConvertMetadata(_ context.Context, mountpoint, profile string) error {
	return k.change("ConvertMetadata", mountpoint, func(f *FileSystem) {
		f.Copies = 1
		if profile == "dup" {
			f.Copies = 2
		}
	})
}

// Sync implements [daemon.Changer].
func (k *Kernel) Sync(_ context.Context, mountpoint string) error {
	return k.change("Sync", mountpoint, func(*FileSystem) {})
}

func (k *Kernel) change(name, mountpoint string, f func(*FileSystem)) error {
	unlock, err := k.locked(name)
	defer unlock()
	if err != nil {
		return err
	}
	f(k.Mounted[mountpoint])
	return nil
}

// CreateZram implements [daemon.Changer].
func (k *Kernel) CreateZram(_ context.Context, size uint64, _ string, record func(block.ID) error) (block.ID, error) {
	unlock, err := k.locked("CreateZram")
	if err != nil {
		unlock()
		return block.ID{}, err
	}
	id := k.newZram(size)
	k.ours[id.Path] = true
	delete(k.Zrams, id.Path) // it has no size yet
	unlock()
	if err := errors.Join(record(block.ID{Path: id.Path, Size: id.Size}), record(id)); err != nil {
		return block.ID{}, err
	}
	unlock, err = k.locked("CreateZram.size")
	defer unlock()
	if err != nil {
		return block.ID{}, err
	}
	k.Zrams[id.Path] = id
	return id, nil
}

func (k *Kernel) newZram(size uint64) block.ID {
	k.serial++
	id := block.ID{
		Num: block.DevNum{Major: 252, Minor: uint32(k.serial)}, Path: fmt.Sprintf("/dev/zram%d", k.serial), //nolint:gosec // small
		DiskSeq: k.serial, Size: size,
	}
	k.Zrams[id.Path] = id
	return id
}

// FreeZram implements [daemon.Changer].
func (k *Kernel) FreeZram(_ context.Context, id block.ID) error {
	if k.Freeing != nil {
		k.Freeing()
	}
	k.mu.Lock()
	ours := k.ours[id.Path]
	k.mu.Unlock()
	if !ours {
		return fault.New(fault.NotSupported, "%s was made by somebody else", id.Path)
	}
	return k.free("FreeZram", k.Zrams, id)
}

// DetachLoop implements [daemon.Changer].
func (k *Kernel) DetachLoop(_ context.Context, id block.ID) error {
	if err := k.free("DetachLoop", k.Loops, id); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forgetCopy(id.Path)
	return nil
}

// forgetCopy gives the memory back that a loop was over.
func (k *Kernel) forgetCopy(loop string) {
	if k.reading[loop] == plan.RAM {
		k.Memory--
	}
	delete(k.reading, loop)
}

func (k *Kernel) free(name string, from map[string]block.ID, id block.ID) error {
	unlock, err := k.locked(name)
	defer unlock()
	if err != nil {
		return err
	}
	if k.isMember(id) {
		return fault.New(fault.DeviceBusy, "%s is in use", id.Path)
	}
	delete(from, id.Path)
	return nil
}

func (k *Kernel) isMember(id block.ID) bool {
	for _, f := range k.Mounted {
		if slices.ContainsFunc(f.Members, func(m plan.Member) bool { return m.ID.Same(id) }) {
			return true
		}
	}
	return false
}

// InspectSeed implements [daemon.Seeder].
func (k *Kernel) InspectSeed(_ context.Context, path string) (daemon.SeedReport, error) {
	unlock, err := k.locked("InspectSeed")
	defer unlock()
	if err != nil {
		return daemon.SeedReport{}, err
	}
	fsid, ok := k.Seeds[path]
	if !ok {
		return daemon.SeedReport{}, fault.New(fault.NotSeed, "%s is no Btrfs seed", path)
	}
	return daemon.SeedReport{Seeding: true, Supported: true, FSID: fsid, Size: GiB, Used: 700 * MiB}, nil
}

// AttachSeed implements [daemon.Seeder].
func (k *Kernel) AttachSeed(context.Context, string) (block.ID, bool, error) {
	unlock, err := k.locked("AttachSeed")
	defer unlock()
	if err != nil {
		return block.ID{}, false, err
	}
	return k.newLoop(), true, nil
}

func (k *Kernel) newLoop() block.ID {
	k.serial++
	id := block.ID{
		Num: block.DevNum{Major: 7, Minor: uint32(k.serial)}, Path: fmt.Sprintf("/dev/loop%d", k.serial), //nolint:gosec // small
		DiskSeq: k.serial, Size: GiB,
	}
	k.Loops[id.Path] = id
	k.Backing[id.Path] = daemon.Media{Disk: k.Disks["/dev/sda"].ID, Part: k.Disks["/dev/sda"].ID}
	return id
}

// MountSeed implements [daemon.Seeder].
func (k *Kernel) MountSeed(_ context.Context, seed block.ID, mountpoint string, _ []string) error {
	unlock, err := k.locked("MountSeed")
	defer unlock()
	if err != nil {
		return err
	}
	k.mountSeed(seed, mountpoint)
	return nil
}

func (k *Kernel) mountSeed(seed block.ID, mountpoint string) {
	groups := []plan.Group{
		{Type: plan.Data, Length: 256 * MiB, Used: 250 * MiB}, {Type: plan.Data, Length: 256 * MiB, Used: 200 * MiB},
		{Type: plan.Metadata, Length: 64 * MiB, Used: 30 * MiB}, {Type: plan.System, Length: 8 * MiB, Used: 16384},
	}
	k.Mounted[mountpoint] = &FileSystem{
		FSID: k.Seeds["/run/media/root.img"], MountPoint: mountpoint, ReadOnly: true, Compress: "zstd:1", Copies: 1, nextDevID: 1,
		Members: []plan.Member{{DevID: 1, UUID: "dddddddd-0000-4000-8000-000000000001", ID: seed, Size: seed.Size, Seed: true, Groups: groups}},
	}
}

// Unmount implements [daemon.Seeder].
func (k *Kernel) Unmount(_ context.Context, mountpoint string) error {
	unlock, err := k.locked("Unmount")
	defer unlock()
	if err != nil {
		return err
	}
	if path := k.Sticks[mountpoint]; path != "" {
		for loop := range k.Loops {
			if k.Backing[loop].Disk.Path == path {
				return fault.New(fault.DeviceBusy, "%s is in use", mountpoint)
			}
		}
		delete(k.Sticks, mountpoint)
	}
	delete(k.Mounted, mountpoint)
	return nil
}

// Adopt implements [daemon.Seeder].
func (k *Kernel) Adopt(_ context.Context, zrams []block.ID) []block.ID {
	k.mu.Lock()
	defer k.mu.Unlock()
	there := slices.DeleteFunc(slices.Clone(zrams), func(id block.ID) bool {
		return !k.Zrams[id.Path].Same(id) && !k.Loops[id.Path].Same(id)
	})
	for _, id := range there {
		k.ours[id.Path] = true
	}
	return there
}

// BootNote implements [daemon.Seeder].
func (k *Kernel) BootNote() (handover.Note, error) {
	if k.Note.BootID != k.Boot {
		return handover.Note{}, nil
	}
	return k.Note, nil
}

// BootID implements [daemon.Seeder].
func (k *Kernel) BootID() string { return k.Boot }

// MemoryTotal implements [daemon.Seeder].
func (k *Kernel) MemoryTotal() uint64 { return 8 * GiB }
