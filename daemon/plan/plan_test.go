package plan_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func id(path string, major, minor uint32, size uint64) block.ID {
	return block.ID{Num: block.DevNum{Major: major, Minor: minor}, Path: path, DiskSeq: uint64(major)*1000 + uint64(minor), Size: size}
}

func member(devid uint64, id block.ID) plan.Member {
	return plan.Member{
		DevID: devid, UUID: fmt.Sprintf("uuid-%d", devid), ID: id, Size: id.Size,
		Seed: id.Num.Major == 7, Zram: id.Num.Major == 252, Writable: id.Num.Major != 7,
		Groups: []plan.Group{{Type: plan.Data, Length: 256 * mib, Used: 100 * mib}, {Type: plan.Metadata, Length: 64 * mib, Used: 5 * mib}},
	}
}

var (
	loop = id("/dev/loop0", 7, 0, gib)
	zram = id("/dev/zram1", 252, 1, 4*gib)
	usb  = id("/dev/sda4", 8, 4, 8*gib)
	disk = id("/dev/nvme0n1", 259, 0, 64*gib)
	part = id("/dev/sdc1", 8, 33, 2*gib)
)

// What a seed is read from.
var (
	onStick = plan.SeedFile{Loop: true, Path: "/media/root.img", Limit: loop.Size}
	inRAM   = plan.SeedFile{Loop: true, Path: "/memfd:seed (deleted)", Memory: true, Elsewhere: true}
	onPart  = plan.SeedFile{Loop: true, Path: part.Path, Device: part, Limit: loop.Size, Elsewhere: true}
	inDir   = plan.SeedFile{Loop: true, Path: "/disk/" + plan.CopyName("s"), Elsewhere: true}
)

func reading(s plan.Sprout, f plan.SeedFile) plan.Sprout {
	s.SeedFile = f
	return s
}

func release(to string) plan.Request {
	return plan.Request{Operation: plan.Release, Target: plan.TargetRef{ReleaseTo: to}}
}

// toPart releases to a partition; it may be wiped.
func toPart(wipe bool) plan.Request {
	r := release(part.Path)
	r.Target.ID, r.Options.Wipe = part, wipe
	return r
}

// partition is that partition.
func partition(change func(*plan.Target)) *plan.Target {
	t := &plan.Target{Device: block.Device{ID: part, Name: "sdc1", Disk: "sdc"}}
	if change != nil {
		change(t)
	}
	return t
}

// directory is what a release can copy to.
func directory(free uint64) *plan.Target {
	return &plan.Target{Device: block.Device{ID: block.ID{Path: "/disk"}}, Free: free}
}

func sprout(ids ...block.ID) plan.Sprout {
	s := plan.Sprout{FSID: "f", SeedFSID: "s", MountPoint: "/", MemoryAvailable: gib, SeedFile: onStick, Space: plan.Space{MetadataCopies: 1, GlobalReserve: 6 * mib}}
	for i, id := range ids {
		s.Members = append(s.Members, member(uint64(i+1), id)) //nolint:gosec // small
	}
	return s
}

func target(id block.ID) *plan.Target {
	return &plan.Target{Device: block.Device{ID: id}}
}

// room is the stick, in use as it is, with so much free space on it.
func room(free uint64) *plan.Target {
	t := target(id("/dev/sda", 8, 0, 16*gib))
	t.Partitions, t.Signatures = []string{"sda1"}, []block.Signature{{Type: "gpt"}}
	t.Holders, t.Media, t.Free = []block.Holder{{Kind: "partition", Name: "sda1"}}, true, free
	return t
}

func request(op plan.Operation, id block.ID) plan.Request {
	return plan.Request{Operation: op, Target: plan.TargetRef{ID: id}, Options: plan.Options{Bootloader: "none"}}
}

func kinds(p plan.Plan) string {
	var list []string
	for _, s := range p.Steps {
		list = append(list, strings.TrimSpace(fmt.Sprintf("%s %s", s.Kind, s.Device.Path)))
	}
	return strings.Join(list, ", ")
}

func TestTheStepsOfEachMove(t *testing.T) {
	dirty := target(disk)
	dirty.Signatures = []block.Signature{{Type: "ext4", Label: "old"}}
	wipe := request(plan.Flatten, disk)
	wipe.Options.Wipe = true
	finish := request(plan.Flatten, disk)
	finish.Options.Label, finish.Options.MetadataProfile, finish.Options.Compress = "home", "dup", "zstd"
	readOnly := sprout(loop, zram)
	readOnly.ReadOnly = true
	leftover := sprout(disk)
	leftover.Leftovers = []plan.Leftover{{ID: loop}}
	booted := sprout(loop, zram)
	booted.MediaMount = "/media"
	persisted := sprout(loop, usb)
	persisted.MediaMount = "/media"
	stillMounted := sprout(disk)
	stillMounted.MediaMount = "/media"
	inMemory := sprout(loop, id("/dev/loop1", 7, 1, gib))
	inMemory.Members[1].Seed, inMemory.Members[1].Zram, inMemory.Members[1].Writable = false, true, true
	same, small := id("/dev/sdb", 8, 16, usb.Size), id("/dev/sdb", 8, 16, usb.Size-4096)
	full, spread := sprout(loop, usb), sprout(loop, usb)
	full.Members[1].Groups = append(full.Members[1].Groups, plan.Group{Type: plan.Data, Length: 7 * gib, Used: 7 * gib})
	// There are free chunks, but not for all of the seed.
	spread.Members[0].Groups[0] = plan.Group{Type: plan.Data, Length: 3 * gib, Used: 3 * gib}
	spread.Members[1].Groups = append(spread.Members[1].Groups, plan.Group{Type: plan.Metadata, Length: 6 * gib, Used: gib})
	refused, unchecked := request(plan.Flatten, disk), request(plan.Flatten, disk)
	refused.NoReplace, unchecked.Target.Copy = true, "uuid-2"
	two := sprout(loop, usb, same)
	two.Members[2].Groups[0].Used += mib
	copying, after := sprout(loop, usb), sprout(loop, disk)
	copying.Replace, copying.Exclusive = &plan.Replace{DevID: 2, Target: member(0, disk)}, "device replace"
	suspended := copying
	suspended.Exclusive, suspended.ReadOnly = "", true
	after.Members[1].Size = usb.Size
	after.Intent = &unchecked
	releaseFirst := request(plan.Flatten, disk)
	releaseFirst.Options.ReleaseFirst = true
	early, late := booted, booted
	early.Members, late.Members = sprout(loop, zram, disk).Members, sprout(loop, disk).Members
	late.Intent = &releaseFirst
	half, begun := sprout(loop, zram), toPart(false)
	half.Intent = &begun
	copied := func(t *plan.Target) { t.Signatures = []block.Signature{{Type: "btrfs", UUID: "s"}} }
	for _, c := range []struct {
		what   string
		sprout plan.Sprout
		ask    plan.Request
		target *plan.Target
		steps  string
	}{
		{"release to memory", sprout(loop, zram), release(plan.RAM), nil, "release-seed /dev/loop0"},
		{"release to a directory", sprout(loop, usb), release("/disk"), directory(gib), "release-seed /dev/loop0"},
		{"release to a partition", sprout(loop, zram), toPart(false), partition(nil), "release-seed /dev/loop0"},
		{"release over what is on a partition", booted, toPart(true), partition(func(t *plan.Target) {
			t.Signatures = []block.Signature{{Type: "ext4"}}
		}), "wipe /dev/sdc1, release-seed /dev/loop0, unmount-media"},
		{"release to a partition that goes on over what was left there", half, toPart(false), partition(copied), "wipe /dev/sdc1, release-seed /dev/loop0"},
		{"flatten of what was released to a partition", reading(booted, onPart), request(plan.Flatten, disk), target(disk),
			"unmount-media, add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"release of a system that was booted from the stick", booted, release(plan.RAM), nil,
			"release-seed /dev/loop0, unmount-media"},
		{"release of a read-only sprout", readOnly, release(plan.RAM), nil, "release-seed /dev/loop0"},
		{"flatten of what was released", reading(booted, inDir), request(plan.Flatten, disk), target(disk),
			"unmount-media, add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten that begins with a release", booted, releaseFirst, target(disk),
			"release-seed /dev/loop0, unmount-media, add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, " +
				"remove /dev/loop0, detach-loop /dev/loop0"},
		{"the same, released to a directory before", reading(sprout(loop, zram), inDir), releaseFirst, target(disk),
			"add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"the same, cut off in the middle", reading(early, inRAM), releaseFirst, nil,
			"unmount-media, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"a flatten that goes on with a release first", late, releaseFirst, nil,
			"release-seed /dev/loop0, unmount-media, remove /dev/loop0, detach-loop /dev/loop0"},
		{"persist", sprout(loop, zram), request(plan.Persist, usb), target(usb),
			"add /dev/sda4, remove /dev/zram1, free-zram /dev/zram1"},
		{"flatten", sprout(loop, zram), request(plan.Flatten, disk), target(disk),
			"add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten after persist", sprout(loop, usb), request(plan.Flatten, disk), target(disk),
			"replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten after persist, over a file system", sprout(loop, usb), wipe, dirty,
			"wipe /dev/nvme0n1, replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten to a disk of the same size", sprout(loop, usb), request(plan.Flatten, same), target(same),
			"replace /dev/sdb, check /dev/sdb, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten to a smaller disk", sprout(loop, usb), request(plan.Flatten, small), target(small),
			"add /dev/sdb, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten of a partition without free chunks", full, request(plan.Flatten, disk), target(disk),
			"add /dev/nvme0n1, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten of a partition too spread for the rest", spread, request(plan.Flatten, same), target(same),
			"add /dev/sdb, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten after the kernel refused to replace", sprout(loop, usb), refused, target(disk),
			"add /dev/nvme0n1, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten with RAM beside the partition", sprout(loop, zram, usb), request(plan.Flatten, disk), target(disk),
			"add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten of two disks: the fuller one is copied", two, request(plan.Flatten, disk), target(disk),
			"replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten cut off while the kernel copies", copying, request(plan.Flatten, disk), nil,
			"replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten cut off by a crash while the kernel copied", suspended, request(plan.Flatten, disk), nil,
			"make-writable, replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten cut off after the copy", after, unchecked, nil,
			"check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten cut off after the check", after, request(plan.Flatten, disk), nil,
			"resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"persist from a partition to a new one", sprout(loop, usb), plan.Request{Operation: plan.Persist, Target: plan.TargetRef{Free: true}}, room(9 * gib),
			"make-partition /dev/sda, replace, check, resize"},
		{"flatten cut off after the zram left", sprout(loop, disk, usb), request(plan.Flatten, disk), nil,
			"remove /dev/sda4, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten cut off before the loop was detached", leftover, request(plan.Flatten, disk), nil, "detach-loop /dev/loop0"},
		{"flatten over a file system", sprout(loop, zram), wipe, dirty,
			"wipe /dev/nvme0n1, add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0"},
		{"flatten with everything set", sprout(loop, zram), finish, target(disk),
			"add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0, " +
				"convert-metadata /dev/nvme0n1, compress, set-label"},
		{"persist of a read-only sprout", readOnly, request(plan.Persist, usb), target(usb),
			"make-writable, add /dev/sda4, remove /dev/zram1, free-zram /dev/zram1"},
		{"flatten of a system that was booted from the stick", booted, request(plan.Flatten, disk), target(disk),
			"add /dev/nvme0n1, remove /dev/zram1, free-zram /dev/zram1, remove /dev/loop0, detach-loop /dev/loop0, unmount-media"},
		{"persist of a system that was booted from the stick", booted, request(plan.Persist, usb), target(usb),
			"add /dev/sda4, remove /dev/zram1, free-zram /dev/zram1"},
		{"flatten of it after that", persisted, request(plan.Flatten, disk), target(disk),
			"replace /dev/nvme0n1, check /dev/nvme0n1, resize /dev/nvme0n1, remove /dev/loop0, detach-loop /dev/loop0, unmount-media"},
		{"flatten cut off before the stick was unmounted", stillMounted, request(plan.Flatten, disk), nil, "unmount-media"},
		{"persist of a session in a file in memory", inMemory, request(plan.Persist, usb), target(usb),
			"add /dev/sda4, remove /dev/loop1, detach-loop /dev/loop1"},
		{"persist to a partition that is to be made", booted, plan.Request{Operation: plan.Persist, Target: plan.TargetRef{Free: true}}, room(4 * gib),
			"make-partition /dev/sda, add, remove /dev/zram1, free-zram /dev/zram1"},
		{"add a device", sprout(loop, zram), request(plan.AddDevice, usb), target(usb), "add /dev/sda4"},
		{"remove a device", sprout(loop, zram, usb), request(plan.RemoveDevice, usb), nil, "remove /dev/sda4"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if len(c.sprout.Members) == 1 { // all has moved already
				c.sprout.Intent = &c.ask
			}
			p := plan.Make(c.sprout, c.ask, c.target)
			if got := kinds(p); got != c.steps || p.Err() != nil {
				t.Errorf("the steps are\n%s, not\n%s (%v)", got, c.steps, p.Err())
			}
		})
	}
}

func TestStatesAndRoles(t *testing.T) {
	toDisk, toUSB := request(plan.Flatten, disk), request(plan.Persist, usb)
	for _, c := range []struct {
		members []block.ID
		intent  *plan.Request
		state   plan.State
		last    plan.Role
	}{
		{[]block.ID{loop, zram}, nil, plan.Volatile, plan.RoleZram},
		{[]block.ID{loop, zram}, &toDisk, plan.Volatile, plan.RoleZram}, // nothing has moved yet
		{[]block.ID{loop, zram, usb}, nil, plan.Partial, plan.RolePersistent},
		{[]block.ID{loop, zram, usb}, &toUSB, plan.Partial, plan.RolePersistent},
		{[]block.ID{loop, usb}, nil, plan.Persistent, plan.RolePersistent},
		{[]block.ID{loop, usb, disk}, &toDisk, plan.Partial, plan.RoleDisk},
		{[]block.ID{loop, disk}, &toDisk, plan.Partial, plan.RoleDisk},
		{[]block.ID{loop, disk}, nil, plan.Persistent, plan.RolePersistent},
		{[]block.ID{disk}, nil, plan.Installed, plan.RoleDisk},
		{[]block.ID{zram, disk}, nil, plan.Partial, plan.RoleDisk},
		{[]block.ID{usb, disk}, nil, plan.Partial, plan.RoleDisk},
	} {
		s := sprout(c.members...)
		last := s.Members[len(s.Members)-1]
		if got := plan.StateOf(s.Members, c.intent); got != c.state {
			t.Errorf("%v with %v is %s, not %s", c.members, c.intent, got, c.state)
		}
		if got := plan.RoleOf(last, s.Members, c.intent); got != c.last {
			t.Errorf("the last of %v is %s, not %s", c.members, got, c.last)
		}
	}
}

// world is a sprout whose kernel obeys: steps change it as the kernel would.
type world struct {
	plan.Sprout
	targets map[block.DevNum]*plan.Target
	request plan.Request
	named   block.ID // zero until the partition that was asked for is made
	wiped   bool
}

// obey does a step, or only a part of it when upTo says so.
func (w *world) obey(t *rapid.T, s plan.Step, whole bool) {
	at := slices.IndexFunc(w.Members, func(m plan.Member) bool { return m.DevID == s.DevID })
	switch s.Kind {
	case plan.StepWipe:
		if !s.Device.Same(w.named) || !w.wiped {
			t.Fatalf("the plan destroys %s, but %s was named (wipe: %v)", s.Device.Path, w.named.Path, w.wiped)
		}
		w.targets[s.Device.Num].Signatures = nil
	case plan.StepPartition:
		if !w.request.Target.Free || s.Device.Path != "/dev/sda" {
			t.Fatalf("the plan makes a partition on %s, for a request of %+v", s.Device.Path, w.request)
		}
		w.named = id("/dev/sda9", 8, 9, 4*gib)
		w.targets[w.named.Num] = target(w.named)
		w.request.Target = plan.TargetRef{ID: w.named} // as the engine does
	case plan.StepAdd:
		if s.Device.Num.IsZero() { // not known when the plan was made
			s.Device = w.named
		}
		if !s.Device.Same(w.named) {
			t.Fatalf("the plan adds %s, but %s was named", s.Device.Path, w.named.Path)
		}
		if len(w.targets[s.Device.Num].Signatures) > 0 {
			t.Fatalf("the plan adds %s before it is empty", s.Device.Path)
		}
		m := member(uint64(100+len(w.Members)), s.Device) //nolint:gosec // small
		m.Groups = nil
		w.Members = append(w.Members, m)
	case plan.StepReplace:
		w.replace(t, s, whole)
	case plan.StepCheck:
		if w.Replace != nil || !w.Members[at].ID.Same(w.named) {
			t.Fatalf("the plan checks %s while %v are the members", s.Device.Path, w.Members)
		}
		w.request.Target.Copy = ""
	case plan.StepResize:
		if w.request.Target.Copy != "" || !w.Members[at].ID.Same(w.named) {
			t.Fatalf("the plan resizes member %d of %v", s.DevID, w.Members)
		}
		w.Members[at].Size = w.Members[at].ID.Size
	case plan.StepRemove:
		to := slices.IndexFunc(w.Members, func(m plan.Member) bool { return m.Writable && m.DevID != s.DevID })
		for i, m := range w.Members {
			if m.ID.Same(w.named) && i != at {
				to = i
			}
		}
		if at < 0 || to < 0 {
			t.Fatalf("the plan removes member %d of %v", s.DevID, w.Members)
		}
		n := len(w.Members[at].Groups)
		if !whole {
			n = rapid.IntRange(0, n).Draw(t, "groups moved")
		}
		w.Members[to].Groups = append(w.Members[to].Groups, w.Members[at].Groups[:n]...)
		w.Members[at].Groups = w.Members[at].Groups[n:]
		if whole {
			m := w.Members[at]
			w.Members = slices.Delete(w.Members, at, at+1)
			if m.Zram || m.Seed {
				w.Leftovers = append(w.Leftovers, plan.Leftover{Zram: m.Zram, ID: m.ID})
			}
		}
	case plan.StepFreeZram, plan.StepDetach:
		if slices.ContainsFunc(w.Members, func(m plan.Member) bool { return m.ID.Same(s.Device) }) {
			t.Fatalf("the plan frees %s while it is a member", s.Device.Path)
		}
		w.Leftovers = slices.DeleteFunc(w.Leftovers, func(l plan.Leftover) bool { return l.ID.Same(s.Device) })
	case plan.StepRelease:
		if w.SeedFile.Elsewhere || !w.Members[at].Seed {
			t.Fatalf("the plan releases member %d, read from %+v", s.DevID, w.SeedFile)
		}
		if !whole {
			return // a part of a copy is nothing
		}
		w.SeedFile = inRAM
		switch s.Value {
		case plan.RAM:
		case part.Path:
			w.SeedFile = onPart
		default:
			w.SeedFile = inDir
		}
	case plan.StepUnmount:
		seed := func(m plan.Member) bool { return m.Seed }
		if !w.SeedFile.Elsewhere && (slices.ContainsFunc(w.Members, seed) || slices.ContainsFunc(w.Leftovers, func(l plan.Leftover) bool { return !l.Zram })) {
			t.Fatal("the plan unmounts the stick while the seed's image is in use")
		}
		w.MediaMount = ""
	case plan.StepWritable:
		w.ReadOnly = false
	case plan.StepCompress:
		w.Compress = s.Value
	case plan.StepLabel:
		w.Label = s.Value
	case plan.StepConvert:
		w.Space.MetadataCopies = map[string]uint64{"single": 1, "dup": 2}[s.Value]
	default:
		t.Fatalf("a plan with a step %q", s.Kind)
	}
}

// replace does a replace. If it is not done as a whole, the kernel has stopped,
// goes on, or has refused.
func (w *world) replace(t *rapid.T, s plan.Step, whole bool) {
	at := slices.IndexFunc(w.Members, func(m plan.Member) bool { return m.DevID == s.DevID })
	if s.Device.Num.IsZero() {
		s.Device = w.named
	}
	switch m := w.Members[at]; {
	case m.Seed || m.Zram || w.ReadOnly:
		t.Fatalf("the plan replaces %s (read-only: %v)", m.ID.Path, w.ReadOnly)
	case s.Copy != m.UUID || !s.From.Same(m.ID) || !s.Device.Same(w.named) || s.Device.Size < m.Size:
		t.Fatalf("the plan replaces %s by %s, but %s was named", m.ID.Path, s.Device.Path, w.named.Path)
	case w.Replace == nil && len(w.targets[s.Device.Num].Signatures) > 0:
		t.Fatalf("the plan copies to %s before it is empty", s.Device.Path)
	}
	w.request.Target.Copy = s.Copy // as the engine does
	if !whole {
		switch rapid.SampledFrom([]string{"stopped", "goes on", "refused"}).Draw(t, "replace") {
		case "stopped":
			w.Replace, w.Exclusive = nil, ""
		case "goes on":
			w.Replace, w.Exclusive = &plan.Replace{DevID: s.DevID, Target: plan.Member{ID: s.Device, Size: w.Members[at].Size}}, "device replace"
		case "refused":
			w.Replace, w.Exclusive = nil, ""
			w.request.NoReplace = true
		}
		return
	}
	w.Members[at].ID, w.Replace, w.Exclusive = s.Device, nil, ""
}

// TestPlanningAgainAlwaysComesToTheWantedMembers is the heart of resuming: from
// any members, cut off after any step or in the middle of any removal, as often
// as chance likes, planning again ends with the members that were asked for,
// and no step touches a device that was not named.
func TestPlanningAgainAlwaysComesToTheWantedMembers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{targets: map[block.DevNum]*plan.Target{}}
		ids := []block.ID{}
		if rapid.Bool().Draw(t, "seed") {
			ids = append(ids, loop)
		}
		for i := range rapid.IntRange(0, 2).Draw(t, "zrams") {
			ids = append(ids, id(fmt.Sprintf("/dev/zram%d", i+1), 252, uint32(i+1), 4*gib)) //nolint:gosec // small
		}
		for i := range rapid.IntRange(0, 2).Draw(t, "disks") {
			ids = append(ids, id(fmt.Sprintf("/dev/sd%c", 'a'+i), 8, uint32(16*i), 32*gib)) //nolint:gosec // small
		}
		w.Sprout = sprout(ids...)
		for i := range w.Members {
			if m := &w.Members[i]; !m.Seed && !m.Zram { // with and without free chunks, smaller and larger than the target
				m.ID.Size = rapid.SampledFrom([]uint64{400 * mib, 32 * gib, 128 * gib}).Draw(t, "size")
				m.Size = m.ID.Size
			}
		}
		w.ReadOnly = rapid.Bool().Draw(t, "read-only")
		w.MediaMount = rapid.SampledFrom([]string{"", "/media"}).Draw(t, "media")
		w.SeedFile = rapid.SampledFrom([]plan.SeedFile{onStick, inRAM, inDir, {}}).Draw(t, "seed file")
		op := rapid.SampledFrom([]plan.Operation{plan.Persist, plan.Flatten, plan.AddDevice, plan.RemoveDevice, plan.Release}).Draw(t, "operation")
		var signatures []block.Signature
		if rapid.Bool().Draw(t, "not empty") {
			signatures = []block.Signature{{Type: "xfs"}}
		}
		candidates := append(slices.Clone(ids), disk)
		w.named = rapid.SampledFrom(candidates).Draw(t, "target")
		r := request(op, w.named)
		if op == plan.Persist && rapid.Bool().Draw(t, "to free space") {
			w.named, r.Target = block.ID{}, plan.TargetRef{Free: true}
			w.targets[w.named.Num] = room(rapid.SampledFrom([]uint64{gib, 4 * gib}).Draw(t, "free"))
		}
		if op == plan.Release {
			w.named, r = block.ID{}, release(rapid.SampledFrom([]string{plan.RAM, "/disk", part.Path}).Draw(t, "destination"))
			w.targets[w.named.Num] = directory(rapid.SampledFrom([]uint64{gib, mib}).Draw(t, "free"))
			if r.Target.ReleaseTo == part.Path {
				w.named, r.Target.ID = part, part
				w.targets[part.Num] = partition(func(t *plan.Target) { t.Signatures = signatures })
			}
		}
		r.Options.ReleaseFirst = op == plan.Flatten && rapid.Bool().Draw(t, "release first")
		r.Options.Wipe = rapid.Bool().Draw(t, "wipe")
		r.Options.Label = rapid.SampledFrom([]string{"", "new"}).Draw(t, "label")
		r.Options.Compress = rapid.SampledFrom([]string{"", "zstd", "none"}).Draw(t, "compress")
		r.Options.MetadataProfile = rapid.SampledFrom([]string{"", "dup"}).Draw(t, "profile")
		w.wiped = r.Options.Wipe
		w.targets[disk.Num] = target(disk)
		w.targets[disk.Num].Signatures = signatures
		for _, id := range ids {
			w.targets[id.Num] = target(id)
		}
		before := len(w.Members)

		w.request = r
		p := plan.Make(w.Sprout, w.request, w.targets[w.named.Num])
		if p.Err() != nil {
			if len(p.Steps) > 0 {
				t.Fatal("a plan with problems has steps")
			}
			return // refused, and nothing was touched
		}
		w.Intent = &w.request
		for round := 0; ; round++ {
			p := plan.Make(w.Sprout, w.request, w.targets[w.named.Num])
			if err := p.Err(); err != nil {
				t.Fatalf("what was begun is refused in round %d: %v", round, err)
			}
			if len(p.Steps) == 0 {
				break
			}
			if round > 60 {
				t.Fatalf("no end after %d rounds; the next step is %s", round, p.Steps[0].Text)
			}
			n := rapid.IntRange(0, len(p.Steps)-1).Draw(t, "steps before the cut")
			for _, s := range p.Steps[:n] {
				w.obey(t, s, true)
			}
			cut := p.Steps[n]
			partly := cut.Kind == plan.StepRemove || cut.Kind == plan.StepRelease || cut.Kind == plan.StepReplace
			w.obey(t, cut, !partly || rapid.Bool().Draw(t, "whole"))
			if round > 30 { // luck may cut the same removal for ever
				for _, s := range plan.Make(w.Sprout, w.request, w.targets[w.named.Num]).Steps {
					w.obey(t, s, true)
				}
			}
		}
		var data uint64
		for _, m := range w.Members {
			for _, g := range m.Groups {
				data += g.Used
			}
		}
		if want := uint64(before) * 105 * mib; data != want {
			t.Fatalf("%d bytes of content are there, not %d", data, want)
		}
		present := slices.ContainsFunc(w.Members, func(m plan.Member) bool { return m.ID.Same(w.named) })
		seeds := 0
		for _, m := range w.Members {
			if m.Seed {
				seeds++
			}
		}
		switch op {
		case plan.Release:
			if len(w.Members) != before || !w.SeedFile.Elsewhere || w.MediaMount != "" {
				t.Fatalf("after release the members are %v, and the seed is read from %+v, with a mount %q", w.Members, w.SeedFile, w.MediaMount)
			}
		case plan.Persist:
			if !present || len(w.Members) != 1+seeds || seeds == 0 {
				t.Fatalf("after persist the members are %v", w.Members)
			}
		case plan.Flatten:
			if !present || len(w.Members) != 1 {
				t.Fatalf("after flatten the members are %v", w.Members)
			}
		case plan.AddDevice:
			if !present || len(w.Members) != before+1 {
				t.Fatalf("after adding the members are %v", w.Members)
			}
		case plan.RemoveDevice:
			if present || len(w.Members) != before-1 {
				t.Fatalf("after removing the members are %v", w.Members)
			}
		}
		for _, m := range w.Members {
			if m.ID.Same(w.named) && m.Size < m.ID.Size || w.Replace != nil || w.request.Target.Copy != "" {
				t.Fatalf("%s uses %d of %d bytes, and is copied to: %v, unchecked: %q", m.ID.Path, m.Size, m.ID.Size, w.Replace, w.request.Target.Copy)
			}
		}
		if len(w.Leftovers) > 0 || seeds == 0 && w.MediaMount != "" {
			t.Fatalf("left behind: %v, mount %q", w.Leftovers, w.MediaMount)
		}
	})
}

func TestWhatIsRefused(t *testing.T) {
	missing := sprout(loop, zram)
	missing.Members[0].Missing = true
	busy := sprout(loop, zram)
	busy.Exclusive = "balance"
	copied := sprout(loop, usb)
	copied.Replace, copied.Exclusive = &plan.Replace{DevID: 2, Target: member(0, id("/dev/sdc", 8, 32, 64*gib))}, "device replace"
	stopped := copied
	stopped.Exclusive = ""
	swap := sprout(loop, zram)
	swap.Swapfiles = []string{"/swapfile"}
	poor := sprout(loop, zram)
	poor.MemoryAvailable = 10 * mib
	full := sprout(loop, zram, usb)
	full.Members[1].Size, full.Members[1].ID.Size = 64*mib, 64*mib
	with := func(change func(*plan.Target)) *plan.Target {
		t := target(disk)
		change(t)
		return t
	}
	flatten, persist := request(plan.Flatten, disk), request(plan.Persist, usb)
	free := plan.Request{Operation: plan.Persist, Target: plan.TargetRef{Free: true}}
	readOnly := room(4 * gib)
	readOnly.ReadOnly = true
	fixed := plan.SeedFile{Loop: true, Fixed: "the loop device can be written"}
	dirWith := func(change func(*plan.Target)) *plan.Target {
		t := directory(gib)
		change(t)
		return t
	}
	ext4 := func(t *plan.Target) { t.Signatures = []block.Signature{{Type: "ext4"}} }
	aCopy := func(t *plan.Target) { t.Signatures = []block.Signature{{Type: "btrfs", UUID: "s"}} }
	wiped := release(plan.RAM)
	wiped.Options.Wipe = true
	flattenAfter := request(plan.Flatten, disk)
	flattenAfter.Options.ReleaseFirst = true
	pulled, dropped := sprout(loop, zram), sprout(loop, usb)
	pulled.Unplugged, dropped.WillReset = true, true
	grow := plan.Request{Operation: plan.AddDevice, Target: plan.TargetRef{Zram: true}, Options: plan.Options{Size: 100 * mib}}
	for _, c := range []struct {
		what   string
		sprout plan.Sprout
		ask    plan.Request
		target *plan.Target
		code   fault.Code
	}{
		{"release of an installed sprout", sprout(disk), release(plan.RAM), nil, fault.WrongState},
		{"release of a seed without a loop", reading(sprout(loop, zram), plan.SeedFile{}), release(plan.RAM), nil, fault.NotSupported},
		{"release of a seed whose loop is fixed", reading(sprout(loop, zram), fixed), release(plan.RAM), nil, fault.NotSupported},
		{"a second release", reading(sprout(loop, zram), inDir), release(plan.RAM), nil, fault.WrongState},
		{"a second release to the same place", reading(sprout(loop, zram), inDir), release("/disk"), directory(gib), fault.WrongState},
		{"a second release to memory", reading(sprout(loop, zram), inRAM), release(plan.RAM), nil, fault.WrongState},
		{"a release from memory", reading(sprout(loop, zram), inRAM), release("/disk"), directory(gib), fault.WrongState},
		{"a release into too little memory", poor, release(plan.RAM), nil, fault.NoMemory},
		{"a release from a stick that was pulled", pulled, release(plan.RAM), nil, fault.IOError},
		{"a release to no directory", sprout(loop, zram), release("/disk"), nil, fault.NoSuchDevice},
		{"a release to a full directory", sprout(loop, zram), release("/disk"), directory(50 * mib), fault.NoSpace},
		{"a release to the sprout itself", sprout(loop, zram), release("/disk"), dirWith(func(t *plan.Target) { t.MemberOf = "f" }), fault.DeviceIsMember},
		{"a release to the stick", sprout(loop, zram), release("/disk"), dirWith(func(t *plan.Target) { t.Media = true }), fault.DeviceIsMedia},
		{"a release to what cannot be written", sprout(loop, zram), release("/disk"), dirWith(func(t *plan.Target) { t.ReadOnly = true }), fault.DeviceReadOnly},
		{"a release to a partition with something on it", sprout(loop, zram), toPart(false), partition(ext4), fault.TargetNotEmpty},
		{"a release to a partition with a seed on it", sprout(loop, zram), toPart(false), partition(aCopy), fault.TargetNotEmpty},
		{"a release to a partition that is too small", sprout(loop, zram), toPart(false), partition(func(t *plan.Target) { t.Size = gib - 512 }), fault.TargetTooSmall},
		{"a release to a larger partition without a limit", reading(sprout(loop, zram), plan.SeedFile{Loop: true}), toPart(false), partition(nil), fault.NotSupported},
		{"a release of a seed in the middle of a file", reading(sprout(loop, zram), plan.SeedFile{Loop: true, Offset: 4096, Limit: gib}), toPart(false), partition(nil), fault.NotSupported},
		{"a release to a partition of the stick", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.SameDisk = true }), fault.DeviceIsMedia},
		{"a release to the partition of the seed", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.Media = true }), fault.DeviceIsMedia},
		{"a release to a disk with partitions", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.Partitions = []string{"sdc11"} }), fault.TargetNotEmpty},
		{"a release to a disk with a partition table", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) {
			t.Name, t.Signatures = t.Disk, []block.Signature{{Type: "gpt", Usage: "partition-table"}}
		}), fault.TargetNotEmpty},
		{"a release to a partition in use", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.Holders = []block.Holder{{Kind: "swap"}} }), fault.DeviceBusy},
		{"a release to a read-only partition", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.ReadOnly = true }), fault.DeviceReadOnly},
		{"a release to a partition of a seed whose loop is fixed", reading(sprout(loop, zram), fixed), toPart(false), partition(nil), fault.NotSupported},
		{"a release to a member", sprout(loop, part), toPart(true), partition(nil), fault.DeviceIsMember},
		{"a release to a member of another sprout", sprout(loop, zram), toPart(true), partition(func(t *plan.Target) { t.MemberOf = "x" }), fault.DeviceIsMember},
		{"a release to a partition that is gone", sprout(loop, zram), toPart(true), nil, fault.NoSuchDevice},
		{"a second release to the same partition", reading(sprout(loop, zram), onPart), toPart(true), partition(nil), fault.WrongState},
		{"a release from a partition", reading(sprout(loop, zram), onPart), release(plan.RAM), nil, fault.WrongState},
		{"a release to memory that is to be wiped", sprout(loop, zram), wiped, nil, fault.InvalidArgs},
		{"a flatten with a release into too little memory", poor, flattenAfter, target(disk), fault.NoMemory},
		{"a flatten with a release of a seed without a loop", reading(sprout(loop, zram), plan.SeedFile{}), flattenAfter, target(disk), fault.NotSupported},
		{"a missing member", missing, flatten, target(disk), fault.IOError},
		{"another exclusive operation", busy, flatten, target(disk), fault.Busy},
		{"a copy to another disk", copied, flatten, target(disk), fault.Busy},
		{"a copy to another disk that waits", stopped, flatten, target(disk), fault.Busy},
		{"removing what is being copied", copied, request(plan.RemoveDevice, usb), nil, fault.Busy},
		{"an active swap file", swap, flatten, target(disk), fault.DeviceBusy},
		{"no target", sprout(loop, zram), flatten, nil, fault.NoSuchDevice},
		{"a held target", sprout(loop, zram), flatten, with(func(t *plan.Target) { t.Holders = []block.Holder{{Kind: "mount", Name: "/x"}} }), fault.DeviceBusy},
		{"a target with partitions", sprout(loop, zram), flatten, with(func(t *plan.Target) { t.Partitions = []string{"sda1"} }), fault.TargetNotEmpty},
		{"the media", sprout(loop, zram), flatten, with(func(t *plan.Target) { t.Media = true }), fault.DeviceIsMedia},
		{"a member of another file system", sprout(loop, zram), flatten, with(func(t *plan.Target) { t.MemberOf = "x" }), fault.DeviceIsMember},
		{"the seed as target", sprout(loop, zram), request(plan.Flatten, loop), target(loop), fault.DeviceIsMember},
		{"the zram as target", sprout(loop, zram), request(plan.Persist, zram), target(zram), fault.DeviceIsMember},
		{"the persistence partition as target", sprout(loop, usb), request(plan.Flatten, usb), target(usb), fault.DeviceIsMember},
		{"persist of an installed sprout", sprout(disk), persist, target(usb), fault.WrongState},
		{"a stick that was pulled", pulled, flatten, target(disk), fault.IOError},
		{"a sprout that is to be dropped", dropped, flatten, target(disk), fault.WrongState},
		{"free space that is too small", sprout(loop, zram), free, room(10 * mib), fault.TargetTooSmall},
		{"no free space", sprout(loop, zram), free, room(0), fault.TargetTooSmall},
		{"free space that cannot be written", sprout(loop, zram), free, readOnly, fault.DeviceReadOnly},
		{"free space for a sprout that needs no stick", sprout(disk), free, room(4 * gib), fault.WrongState},
		{"removing the only writable member", sprout(loop, zram), request(plan.RemoveDevice, zram), target(zram), fault.WrongState},
		{"removing into too little memory", poor, request(plan.RemoveDevice, loop), target(loop), fault.NoMemory},
		{"removing into too little space", full, request(plan.RemoveDevice, usb), target(usb), fault.NoSpace},
		{"adding memory to an installed sprout", sprout(disk), plan.Request{
			Operation: plan.AddDevice, Target: plan.TargetRef{Zram: true}, Options: plan.Options{Size: gib},
		}, nil, fault.WrongState},
		{"a tiny zram", sprout(loop, zram), grow, nil, fault.InvalidArgs},
		{"nothing to resume", sprout(loop, zram), plan.Request{Operation: plan.Resume}, nil, fault.NothingToResume},
		{"an unknown operation", sprout(loop, zram), request("format", disk), target(disk), fault.InvalidArgs},
	} {
		t.Run(c.what, func(t *testing.T) {
			if c.what == "removing into too little space" {
				c.sprout.Members = c.sprout.Members[1:] // no seed: the zram is small
			}
			p := plan.Make(c.sprout, c.ask, c.target)
			if got := fault.CodeOf(p.Err()); got != c.code {
				t.Errorf("refused with %q, not %q: %v", got, c.code, p.Err())
			}
			if len(p.Steps) > 0 {
				t.Errorf("a refused plan has steps: %s", kinds(p))
			}
		})
	}
}

func TestCheckCompress(t *testing.T) {
	for _, good := range []string{"", "none", "no", "lzo", "zlib", "zlib:9", "zstd", "zstd:1", "zstd:15"} {
		if err := plan.CheckCompress(good); err != nil {
			t.Errorf("%q is refused: %v", good, err)
		}
	}
	for _, bad := range []string{"gzip", "zstd:0", "zstd:16", "zstd:", "zstd:3,discard", "lzo:1", "zlib:x", "zstd:03"} {
		if err := plan.CheckCompress(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
