package daemon_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/daemontest"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// shown gives a sprout as it is shown now.
func (l *life) shown(fsid string) daemon.SproutView {
	l.t.Helper()
	if err := l.Refresh(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
	for _, v := range l.View(l.t.Context()).Sprouts {
		if v.FSID == fsid {
			return v
		}
	}
	l.t.Fatalf("the sprout %s is not shown", fsid)
	return daemon.SproutView{}
}

func TestWhatTheEarlyBootSaysIsShownForTheRootAlone(t *testing.T) {
	k := daemontest.New()
	root := k.BootStick("")
	k.Note.Warnings = []string{"no persistence: /dev/sda2 belongs to another seed"}
	l := mustStart(t, k)
	other := l.sprout()
	if got := l.shown(root).Warnings; !slices.Equal(got, k.Note.Warnings) {
		t.Errorf("the root is shown with the warnings %q", got)
	}
	if got := l.shown(other).Warnings; len(got) > 0 {
		t.Errorf("another sprout is shown with the warnings %q", got)
	}
}

// ramless is a kernel whose early boot put the session in a file in memory.
func ramless() (k *daemontest.Kernel, fsid string) {
	k = daemontest.New()
	fsid = k.BootStick("")
	zram := k.Note.Zram
	delete(k.Zrams, zram.Path)
	loop := zram
	loop.Num.Major, loop.Path = 7, "/dev/loop77"
	k.Loops[loop.Path], k.Note.Zram, k.Note.MemoryLoop = loop, handover.Note{}.Zram, loop
	k.Mounted["/"].Members[1].ID = loop
	return k, fsid
}

func TestASessionInAFileInMemoryIsVolatileAndGivesItBack(t *testing.T) {
	k, fsid := ramless()
	l := mustStart(t, k)
	if v := l.shown(fsid); v.State != plan.Volatile || v.Members[1].Role != plan.RoleZram {
		t.Errorf("it is shown as %+v", v)
	}
	l.stop()
	l, err := start(t, k, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.do(fsid, flatten); err != nil {
		t.Fatal(err)
	}
	if v := l.shown(fsid); v.State != plan.Installed || !v.SafeToUnplug || len(k.Loops) > 0 {
		t.Errorf("after flatten there are the loops %v, and it is shown as %+v", k.Loops, v)
	}
}

// noteless is a kernel whose note of the early boot cannot be read.
type noteless struct{ *daemontest.Kernel }

func (noteless) BootNote() (handover.Note, error) {
	return handover.Note{FSID: "nonsense"}, errors.New("cannot read what the early boot did")
}

func TestABrokenNoteIsLoggedAndNoReasonNotToWork(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	var log strings.Builder
	s, err := daemon.New(t.Context(), daemon.Config{
		Kernel: noteless{k}, StateDir: ramDir(t), Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
	if v := s.View(t.Context()).Sprouts; len(v) != 1 || v[0].FSID != fsid || !strings.Contains(log.String(), "early boot") {
		t.Errorf("the sprouts are %+v; the log says %s", v, &log)
	}
}

func TestTheNoteOfAnotherBootSaysNothing(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	k.Note.Warnings, k.Boot = []string{"old"}, "boot-2"
	l := mustStart(t, k)
	if v := l.shown(fsid); len(v.Warnings) > 0 {
		t.Errorf("it is shown with the warnings %q", v.Warnings)
	}
}

func TestAnInstalledSystemNeedsNoStickInTheNextBoot(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	l := mustStart(t, k)
	if err := l.do(fsid, flatten); err != nil {
		t.Fatal(err)
	}
	l.stop()
	k.Boot = "boot-2"
	// The names of disks are given anew: the internal one is the first now.
	disk := *k.Disks["/dev/nvme0n1"]
	disk.Num, disk.Path = k.Disks["/dev/sda"].Num, "/dev/sda"
	k.Disks["/dev/sda"] = &disk
	k.Mounted["/"].Members[0].ID = disk.ID
	l, err := start(t, k, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if v := l.shown(fsid); v.State != plan.Installed || !v.SafeToUnplug {
		t.Errorf("it is shown as %+v", v)
	}
}

func TestAStickThatIsPulledTooEarlyIsToldAtOnceAndOnce(t *testing.T) {
	for _, persistence := range []string{"", "/dev/sda2"} {
		k := daemontest.New()
		fsid := k.BootStick(persistence)
		var mu sync.Mutex
		var told []string
		var log strings.Builder
		s, err := daemon.New(t.Context(), daemon.Config{
			Kernel: k, StateDir: ramDir(t), Logger: slog.New(slog.NewTextHandler(&log, nil)),
			Alarm: func(text string) { mu.Lock(); defer mu.Unlock(); told = append(told, text) },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx) }()
		l := &life{t: t, kernel: k, Service: s}

		if v := l.shown(fsid); len(v.Warnings) > 0 {
			t.Errorf("before, the warnings are %q", v.Warnings)
		}
		k.Unplug("/dev/sda")
		for range 2 {
			v := l.shown(fsid)
			if len(v.Warnings) != 1 || !strings.Contains(v.Warnings[0], "The stick (/dev/sda) was unplugged") || v.SafeToUnplug {
				t.Errorf("it is shown as %+v", v)
			}
		}
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		if len(told) != 1 || strings.Count(log.String(), "level=ERROR") != 1 {
			t.Errorf("it was told %q and logged as %s", told, &log)
		}
	}
}

func TestASproutThatTurnsReadOnlyIsTold(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("/dev/sda2")
	l := mustStart(t, k)
	l.shown(fsid)
	k.Mounted["/"].ReadOnly = true
	if got := l.shown(fsid).Warnings; len(got) != 1 || !strings.Contains(got[0], "read-only") {
		t.Errorf("the warnings are %q", got)
	}
}

func TestAPersistenceThatWasCutOffIsNamedAndTakenWhenItMayBeWiped(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	// What a power cut left: a member of a file system whose RAM is gone.
	left := k.AddDisk("/dev/sda9", 8, 9, 4*daemontest.GiB)
	left.Disk, left.Signatures = "sda", []block.Signature{{Type: "btrfs", Label: "live"}}
	k.Kept, k.BtrfsOf = []string{left.Path}, map[string]uint64{left.Path: 3}
	l := mustStart(t, k)

	_, err := l.Start(t.Context(), daemon.Caller{}, fsid, makeRoom)
	if fault.CodeOf(err) != fault.TargetNotEmpty || !strings.Contains(err.Error(), "/dev/sda9") || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("it is refused with %v", err)
	}
	devices, err := l.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if d.Path == left.Path && !slices.Contains(d.EligibleFor, "persist") {
			t.Errorf("it is not offered: %v", d.Reasons)
		}
	}
	again := makeRoom
	again.Options.Wipe = true
	if err := l.do(fsid, again); err != nil {
		t.Fatal(err)
	}
	if v := l.shown(fsid); v.State != plan.Persistent || v.Members[1].Path != left.Path || len(k.Kept) != 1 {
		t.Errorf("after all the partitions are %v, and it is shown as %+v", k.Kept, v)
	}
}

func TestAPartitionIsMadeForPersistAlone(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	l := mustStart(t, k)
	args := flatten
	args.Target = "free"
	if _, err := l.Start(t.Context(), daemon.Caller{}, fsid, args); fault.CodeOf(err) != fault.InvalidArgs {
		t.Errorf("flatten to free space is refused with %v", err)
	}
	k.Free = 10 * daemontest.MiB
	if _, err := l.Start(t.Context(), daemon.Caller{}, fsid, makeRoom); fault.CodeOf(err) != fault.TargetTooSmall {
		t.Errorf("too little free space is refused with %v", err)
	}
	p, err := l.Plan(t.Context(), fsid, makeRoom)
	if err != nil || p.TargetSize != k.Free || p.MinTargetSize <= k.Free || len(k.Kept) > 0 {
		t.Errorf("the plan is %+v, %v", p, err)
	}
}

func TestAResetIsForThePersistentSystemThatWasBooted(t *testing.T) {
	k := daemontest.New()
	root := k.BootStick("")
	l := mustStart(t, k)
	refused := func(fsid string, undo bool, code fault.Code) {
		t.Helper()
		if err := l.Reset(t.Context(), fsid, undo); fault.CodeOf(err) != code {
			t.Errorf("it gave %v, wanted was %q", err, code)
		}
	}
	refused(root, false, fault.WrongState) // volatile
	refused(l.sprout(), false, fault.NotSupported)
	refused("no-such-sprout", false, fault.NoSuchSprout)
	if err := l.do(root, persist); err != nil {
		t.Fatal(err)
	}
	refused(root, true, fault.WrongState) // there is nothing to take back
	refused(root, false, "")
	// This is what the early boot looks for.
	if _, err := os.Stat(filepath.Join(l.dir, "reset")); err != nil {
		t.Error(err)
	}
	if got := l.shown(root).Warnings; len(got) != 1 || !strings.Contains(got[0], "dropped at the next boot") {
		t.Errorf("the warnings are %q", got)
	}
	// It would go along to the disk, where the next boot would find it.
	if _, err := l.Start(t.Context(), daemon.Caller{}, root, flatten); fault.CodeOf(err) != fault.WrongState || !strings.Contains(err.Error(), "undo") {
		t.Errorf("a flatten meanwhile: %v", err)
	}
	l.stop()
	l, err := start(t, k, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	refused(root, true, "")
	if got := l.shown(root).Warnings; len(got) > 0 {
		t.Errorf("after undo the warnings are %q", got)
	}
	if err := l.do(root, flatten); err != nil {
		t.Fatal(err)
	}
	refused(root, false, fault.WrongState) // installed
}

func TestTheEarlyBootCanWishForARelease(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	k.Note.ToRAM = true
	l := mustStart(t, k)
	// The job is the first one; who cancels it does not get it again.
	await(t, l, func(v *daemon.View) bool { return len(v.Jobs) == 1 && v.Jobs[0].State.Finished() })
	if v, err := l.Wait(t.Context(), 1); err != nil || v.Operation != plan.Release || v.State != daemon.JobDone {
		t.Errorf("the job is %+v (%v)", v, err)
	}
	if v := l.shown(fsid); !v.SafeToUnplug || len(v.Warnings) > 0 {
		t.Errorf("it is shown as %+v", v)
	}
	l.stop()
	l, err := start(t, k, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	if v := l.shown(fsid); len(v.Warnings) > 0 || len(l.View(t.Context()).Jobs) != 1 {
		t.Errorf("after a restart it is shown as %+v, with the jobs %+v", v, l.View(t.Context()).Jobs)
	}
}

func TestAWishThatCannotBeFulfilledIsAWarning(t *testing.T) {
	k := daemontest.New()
	fsid := k.BootStick("")
	k.Note.ToRAM = true
	delete(k.Loops, k.Note.Seed.Path) // as a seed that is on a partition itself
	l := mustStart(t, k)
	await(t, l, func(v *daemon.View) bool { return len(v.Sprouts) == 1 && len(v.Sprouts[0].Warnings) > 0 })
	if v := l.shown(fsid); !strings.Contains(v.Warnings[0], "rd.sprout.ram: the seed stays on the media: the seed is on a block device") {
		t.Errorf("the warnings are %q", v.Warnings)
	}
	if jobs := l.View(t.Context()).Jobs; len(jobs) > 0 {
		t.Errorf("there are the jobs %+v", jobs)
	}
}

// await waits until what is shown is as wanted.
func await(t *testing.T, l *life, want func(*daemon.View) bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !want(l.View(t.Context())) {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("it does not come")
		}
	}
}
