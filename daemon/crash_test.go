package daemon_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/daemontest"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// life is one life of the daemon on a fake kernel.
type life struct {
	t      *testing.T
	kernel *daemontest.Kernel
	dir    string
	*daemon.Service
	stop func()
}

// start begins a life of the daemon with the journal in dir.
func start(t *testing.T, k *daemontest.Kernel, dir string) (*life, error) {
	t.Helper()
	s, err := daemon.New(t.Context(), daemon.Config{Kernel: k, StateDir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() { cancel(); <-ran })
	t.Cleanup(stop)
	return &life{t: t, kernel: k, dir: dir, Service: s, stop: stop}, nil
}

// ramDir gives a temporary directory in memory where there is one: thousands of
// lives each fsync their journal several times.
func ramDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sproutd-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func mustStart(t *testing.T, k *daemontest.Kernel) *life {
	t.Helper()
	l, err := start(t, k, ramDir(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// dieIn asks for a move that dies, with the daemon, in its nth call of the kernel.
// It gives what was on disk at that moment, which is all that the next life has,
// and the call, "" if the move came to its end before.
func (l *life) dieIn(n int, fsid string, move daemon.RequestArgs) (journal, reached string) {
	l.t.Helper()
	journal = ramDir(l.t)
	l.kernel.Reset(func(i int, call string) error {
		if i == n {
			reached = call
			if err := os.CopyFS(journal, os.DirFS(l.dir)); err != nil {
				l.t.Error(err)
			}
			l.kernel.Die()
		}
		return nil
	})
	_ = l.do(fsid, move) // nobody hears what a dead daemon says
	l.stop()
	l.kernel.Reset(nil)
	return journal, reached
}

// sprout makes a volatile sprout and gives its fsid.
func (l *life) sprout() string {
	l.t.Helper()
	mnt := filepath.Join(ramDir(l.t), "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		l.t.Fatal(err)
	}
	fsid, err := l.CreateSprout(l.t.Context(), daemon.Caller{}, "/run/media/root.img", mnt, daemon.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return fsid
}

// do runs one operation to its end.
func (l *life) do(fsid string, args daemon.RequestArgs) error {
	n, err := l.Start(l.t.Context(), daemon.Caller{}, fsid, args)
	if err != nil {
		return err
	}
	v, err := l.Wait(l.t.Context(), n)
	if err != nil {
		return err
	}
	if v.Err != nil {
		return v.Err
	}
	return nil
}

func (l *life) state(fsid string) plan.State {
	for _, v := range l.View(l.t.Context()).Sprouts {
		if v.FSID == fsid {
			return v.State
		}
	}
	return "gone"
}

var (
	persist   = daemon.RequestArgs{Operation: plan.Persist, Target: "/dev/sda2"}
	flatten   = daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/nvme0n1", Options: plan.Options{Bootloader: "none", Label: "home", MetadataProfile: "dup"}}
	overwrite = daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/sdb", Options: plan.Options{Bootloader: "none", Wipe: true}}
	grow      = daemon.RequestArgs{Operation: plan.AddDevice, Target: "zram", Options: plan.Options{Size: 2 * daemontest.GiB}}
	makeRoom  = daemon.RequestArgs{Operation: plan.Persist, Target: "free"}
	toRAM     = daemon.RequestArgs{Operation: plan.Release, Target: plan.RAM}
	toDir     = daemon.RequestArgs{Operation: plan.Release, Target: "/mnt/disk"}
	toDisk    = daemon.RequestArgs{Operation: plan.Release, Target: "/dev/sdc"}
	toFull    = daemon.RequestArgs{Operation: plan.Release, Target: "/dev/sdb", Options: plan.Options{Wipe: true}}
	unplug    = daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/nvme0n1", Options: plan.Options{Bootloader: "none", ReleaseFirst: true}}
	resume    = daemon.RequestArgs{Operation: plan.Resume}
)

// story is a move, what comes before it, and what must be there at its end.
type story struct {
	name    string
	booted  string // "" for CreateSprout, else the system was booted from the stick: "volatile", or its persistence
	before  []daemon.RequestArgs
	move    daemon.RequestArgs
	state   plan.State
	members []string // paths, in order
	refuses bool     // the kernel refuses to copy a member
	// inMemory is how many seeds are read from memory at the end, and inDirs how many
	// copies are in directories and on disks.
	inMemory, inDirs int
}

// freesStick reports whether the stick of a booted system can be unplugged after
// the move.
func (st story) freesStick() bool {
	return st.booted != "" && (st.state == plan.Installed || st.inMemory+st.inDirs > 0 && st.booted == "volatile")
}

var stories = []story{
	{"volatile to persistent", "", nil, persist, plan.Persistent, []string{"loop", "/dev/sda2"}, false, 0, 0},
	{"persistent to installed", "", []daemon.RequestArgs{persist}, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 0},
	{"volatile to installed over something else", "", nil, overwrite, plan.Installed, []string{"/dev/sdb"}, false, 0, 0},
	{"a volatile sprout grows", "", nil, grow, plan.Volatile, []string{"loop", "zram", "zram"}, false, 0, 0},
	{"a grown sprout moves", "", []daemon.RequestArgs{grow}, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 0},
	{"the kernel refuses to copy", "", []daemon.RequestArgs{persist}, flatten, plan.Installed, []string{"/dev/nvme0n1"}, true, 0, 0},
	{"the booted stick makes room for itself", "volatile", nil, makeRoom, plan.Persistent, []string{"loop", "/dev/sda9"}, false, 0, 0},
	{"the booted stick is installed", "volatile", nil, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 0},
	{"the persistent stick is installed", "/dev/sda2", nil, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 0},
	{"the stick is released to memory", "volatile", nil, toRAM, plan.Volatile, []string{"loop", "zram"}, false, 1, 0},
	{"the stick is released to a directory", "volatile", nil, toDir, plan.Volatile, []string{"loop", "zram"}, false, 0, 1},
	{"the persistent stick is released", "/dev/sda2", nil, toRAM, plan.Persistent, []string{"loop", "/dev/sda2"}, false, 1, 0},
	{"a seed is released", "", nil, toDir, plan.Volatile, []string{"loop", "zram"}, false, 0, 1},
	{"the stick is released to a disk", "volatile", nil, toDisk, plan.Volatile, []string{"loop", "zram"}, false, 0, 1},
	{"the stick is released over something else", "volatile", nil, toFull, plan.Volatile, []string{"loop", "zram"}, false, 0, 1},
	{"what was released to a disk is installed", "volatile", []daemon.RequestArgs{toDisk}, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 1},
	{"what was released is installed", "volatile", []daemon.RequestArgs{toDir}, flatten, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 1},
	{"the stick is released and installed", "volatile", nil, unplug, plan.Installed, []string{"/dev/nvme0n1"}, false, 0, 0},
}

// begin lives a story up to its move.
func (st story) begin(t *testing.T) (l *life, fsid string) {
	k := daemontest.New()
	switch st.booted {
	case "":
		l = mustStart(t, k)
		fsid = l.sprout()
	case "volatile":
		fsid = k.BootStick("")
		l = mustStart(t, k)
	default:
		fsid = k.BootStick(st.booted)
		l = mustStart(t, k)
	}
	for _, args := range st.before {
		if err := l.do(fsid, args); err != nil {
			t.Fatal(err)
		}
	}
	k.NoReplace = st.refuses
	return l, fsid
}

// check asserts what must hold at any time: nothing is lost, nothing was
// touched that was not named, and the file system can be written.
func (st story) check(t *testing.T, k *daemontest.Kernel) {
	t.Helper()
	allowed := append([]string{st.move.Target}, k.Kept...)
	for _, args := range st.before {
		allowed = append(allowed, args.Target)
	}
	for _, path := range k.Touched {
		if !slices.Contains(allowed, path) {
			t.Errorf("%s was touched, but only %v were named", path, allowed)
		}
	}
	if sig := k.Disks["/dev/sdb"].Signatures; len(sig) == 0 && !st.move.Options.Wipe {
		t.Error("/dev/sdb was wiped though nobody allowed it")
	}
	for _, f := range k.Mounted {
		if f.ReadOnly {
			t.Error("the file system is read-only")
		}
		var data uint64
		for _, m := range f.Members {
			for _, g := range m.Groups {
				if g.Type == plan.Data {
					data += g.Used
				}
			}
		}
		if want := uint64(450 * daemontest.MiB); data != want {
			t.Errorf("the file system holds %d bytes of data, not %d", data, want)
		}
	}
	if len(k.Mounted) != 1 {
		t.Errorf("%d file systems are mounted, not one", len(k.Mounted))
	}
}

// ended asserts that the move has come to its end and left nothing behind.
func (st story) ended(t *testing.T, l *life, fsid string) {
	t.Helper()
	st.check(t, l.kernel)
	if got := l.state(fsid); got != st.state {
		t.Errorf("the state is %s, not %s", got, st.state)
	}
	var members []string
	loops, zrams := 0, 0
	for _, f := range l.kernel.Mounted {
		for _, m := range f.Members {
			switch {
			case m.Seed:
				members = append(members, "loop")
				loops++
			case m.Zram:
				members = append(members, "zram")
				zrams++
			default:
				members = append(members, m.ID.Path)
			}
			if m.Grows() || f.Replace != nil {
				t.Errorf("of %s %d bytes are used; copied is %+v", m.ID.Path, m.Size, f.Replace)
			}
		}
	}
	if !slices.Equal(members, st.members) {
		t.Errorf("the members are %v, not %v", members, st.members)
	}
	if len(l.kernel.Loops) != loops || len(l.kernel.Zrams) != zrams {
		t.Errorf("left behind: loops %v, zrams %v", l.kernel.Loops, l.kernel.Zrams)
	}
	free := st.state == plan.Installed || st.inMemory+st.inDirs > 0
	if st.booted != "" && (len(l.kernel.Sticks) == 0) != free {
		t.Errorf("%s, the stick's mounts are %v", st.state, l.kernel.Sticks)
	}
	named := 0
	for dir, whole := range l.kernel.Copies {
		if !whole {
			t.Errorf("in %s is a part of a copy, or one without its name", dir)
		}
		named++
	}
	if l.kernel.Memory != st.inMemory || named != st.inDirs {
		t.Errorf("there are %d copies in memory and %v in directories", l.kernel.Memory, l.kernel.Copies)
	}
	if err := l.Refresh(t.Context()); err != nil {
		t.Error(err)
	}
	for _, v := range l.View(t.Context()).Sprouts {
		if want := st.freesStick(); v.SafeToUnplug != want {
			t.Errorf("safe to unplug: %v; it is held by %v", v.SafeToUnplug, v.MediaHolders)
		}
	}
	if err := l.do(fsid, resume); fault.CodeOf(err) != fault.NothingToResume {
		t.Errorf("after the end there is still something to resume: %v", err)
	}
}

// goOn brings a move to its end after it was cut off: by Resume where the
// daemon remembers it, else by asking for the same again.
func (st story) goOn(t *testing.T, l *life, fsid string) {
	t.Helper()
	for _, j := range l.View(t.Context()).Jobs {
		if j.Number == 1+uint32(len(st.before)) && j.State == daemon.JobDone {
			return
		}
	}
	err := l.do(fsid, resume)
	if fault.CodeOf(err) == fault.NothingToResume {
		err = l.do(fsid, st.move)
		if code := fault.CodeOf(err); code == fault.WrongState || code == fault.DeviceIsMember {
			err = nil // it had been done before it was cut off
		}
	}
	if err != nil {
		t.Fatalf("cannot go on: %v", err)
	}
}

// everyCall runs f for each call that the kernel sees during the story's move.
func everyCall(t *testing.T, f func(t *testing.T, st story, n int) (reached bool)) {
	for _, st := range stories {
		t.Run(st.name, func(t *testing.T) {
			t.Parallel()
			n := 1
			for ; f(t, st, n) && !t.Failed(); n++ {
			}
			if n < 10 {
				t.Errorf("only %d calls were tried", n)
			}
		})
	}
}

func TestEveryMoveComesToItsEnd(t *testing.T) {
	for _, st := range stories {
		t.Run(st.name, func(t *testing.T) {
			l, fsid := st.begin(t)
			if err := l.do(fsid, st.move); err != nil {
				t.Fatal(err)
			}
			st.ended(t, l, fsid)
		})
	}
}

func TestAFailureAtAnyCallLosesNothingAndCanBeResumed(t *testing.T) {
	everyCall(t, func(t *testing.T, st story, n int) bool {
		l, fsid := st.begin(t)
		defer l.stop()
		reached := false
		l.kernel.Reset(func(i int, _ string) error {
			if i == n {
				reached = true
				return daemontest.ErrInjected
			}
			return nil
		})
		err := l.do(fsid, st.move)
		l.kernel.Reset(nil)
		st.check(t, l.kernel)
		if err != nil {
			st.goOn(t, l, fsid)
		}
		st.ended(t, l, fsid)
		if t.Failed() {
			t.Logf("failed at call %d", n)
		}
		return reached
	})
}

func TestDeathAtAnyCallLosesNothingAndCanBeResumed(t *testing.T) {
	everyCall(t, func(t *testing.T, st story, n int) bool {
		l, fsid := st.begin(t)
		journal, reached := l.dieIn(n, fsid, st.move)
		if reached == "" {
			return false
		}
		st.check(t, l.kernel)
		next, startErr := start(t, l.kernel, journal)
		if startErr != nil {
			t.Fatalf("the daemon does not start after it died at call %d (%s): %v", n, reached, startErr)
		}
		defer next.stop()
		for _, j := range next.View(t.Context()).Jobs {
			if !j.State.Finished() {
				t.Errorf("job %d is shown as %s by a daemon that has just started", j.Number, j.State)
			}
		}
		st.goOn(t, next, fsid)
		st.ended(t, next, fsid)
		if t.Failed() {
			t.Logf("died at call %d (%s)", n, reached)
		}
		return true
	})
}

func TestCancelAtAnyCallLeavesAFileSystemThatCanGoOn(t *testing.T) {
	everyCall(t, func(t *testing.T, st story, n int) bool {
		l, fsid := st.begin(t)
		defer l.stop()
		reached := false
		l.kernel.Reset(func(i int, _ string) error {
			if i == n {
				reached = true
				go func() { _ = l.Cancel(context.WithoutCancel(t.Context()), 1+uint32(len(st.before))) }()
			}
			return nil
		})
		err := l.do(fsid, st.move)
		l.kernel.Reset(nil)
		st.check(t, l.kernel)
		if code := fault.CodeOf(err); err != nil && code != fault.Cancelled {
			t.Errorf("a cancelled job ended with %s: %v", code, err)
		}
		if err != nil {
			st.goOn(t, l, fsid)
		}
		st.ended(t, l, fsid)
		return reached
	})
}

func TestTheResultSaysWhichWayWasTaken(t *testing.T) {
	for _, c := range []struct {
		refuses bool
		way     string
		notes   int
	}{{false, "replace", 0}, {true, "remove", 1}} {
		l, fsid := story{before: []daemon.RequestArgs{persist}, refuses: c.refuses}.begin(t)
		n, err := l.Start(t.Context(), daemon.Caller{}, fsid, flatten)
		if err != nil {
			t.Fatal(err)
		}
		v, err := l.Wait(t.Context(), n)
		notes, _ := v.Result["notes"].([]string)
		if err != nil || v.State != daemon.JobDone || v.Result["way"] != c.way || len(notes) != c.notes {
			t.Errorf("the kernel refuses to copy: %v; the job is %s with %v (%v)", c.refuses, v.State, v.Result, err)
		}
	}
}

// The memory of the session is given back while the seed is being moved, which
// does not wait for that; and the job ends well if somebody else holds it.
func TestMemoryIsGivenBackWhileTheSeedMoves(t *testing.T) {
	for _, held := range []error{nil, fault.New(fault.DeviceBusy, "somebody has it open")} {
		l := mustStart(t, daemontest.New())
		fsid := l.sprout()
		freeing, moving := make(chan struct{}), make(chan struct{})
		l.kernel.Freeing = func() {
			close(freeing)
			select {
			case <-moving:
			case <-time.After(time.Minute):
				t.Error("the seed waits for the memory")
			}
		}
		seedMoves := sync.OnceFunc(func() { <-freeing; close(moving) })
		l.kernel.Reset(func(_ int, call string) error {
			switch {
			case call == "FreeZram":
				return held
			case call == "Remove.group" && !hasZram(l.kernel):
				seedMoves()
			}
			return nil
		})
		n, err := l.Start(t.Context(), daemon.Caller{}, fsid, flatten)
		if err != nil {
			t.Fatal(err)
		}
		v, err := l.Wait(t.Context(), n)
		notes, _ := v.Result["notes"].([]string)
		if err != nil || v.State != daemon.JobDone || (held == nil) != (len(l.kernel.Zrams) == 0) || (held == nil) != (len(notes) == 0) {
			t.Errorf("held: %v; the job is %s with %v (%v), and there are the zrams %v", held, v.State, v.Result, err, l.kernel.Zrams)
		}
	}
}

func hasZram(k *daemontest.Kernel) bool {
	for _, f := range k.Mounted {
		if slices.ContainsFunc(f.Members, func(m plan.Member) bool { return m.Zram }) {
			return true
		}
	}
	return false
}

// A copy that nobody has read is not taken for whole: not by the job that made
// it, nor by one that goes on, whoever asks for that.
func TestACopyIsNotUsedBeforeItWasRead(t *testing.T) {
	l, fsid := story{before: []daemon.RequestArgs{persist}}.begin(t)
	l.kernel.Damaged = []string{flatten.Target}
	for _, args := range []daemon.RequestArgs{flatten, resume, flatten} {
		err := l.do(fsid, args)
		var f *fault.Error
		if !errors.As(err, &f) || f.Code != fault.IOError {
			t.Errorf("%s of a damaged copy ended with %v", args.Operation, err)
		}
		if got := l.state(fsid); got != plan.Partial {
			t.Errorf("with a damaged copy the state is %s", got)
		}
	}
	l.kernel.Damaged = nil // the file was deleted
	if err := l.do(fsid, resume); err != nil {
		t.Error(err)
	}
	if got := l.state(fsid); got != plan.Installed {
		t.Errorf("the state is %s", got)
	}
}

// While the kernel copies by itself, as it does after a crash, the target is
// shown and the sprout is taken for what it is.
func TestACopyThatGoesOnIsShownAndWaitedFor(t *testing.T) {
	l, fsid := story{before: []daemon.RequestArgs{persist}}.begin(t)
	var root *daemontest.FileSystem
	for _, root = range l.kernel.Mounted {
	}
	l.kernel.Reset(func(_ int, call string) error {
		if call == "Replace.group" {
			root.Replace = nil
			return daemontest.ErrInjected
		}
		if call == "Add" { // so the job fails, and there is something to resume
			return daemontest.ErrInjected
		}
		return nil
	})
	if err := l.do(fsid, flatten); err == nil {
		t.Fatal("the job ended well")
	}
	l.kernel.Reset(nil)
	disk := l.kernel.Disks["/dev/nvme0n1"]
	root.Replace = &plan.Replace{DevID: root.Members[1].DevID, Target: plan.Member{ID: disk.ID, Size: root.Members[1].Size, Writable: true}}
	v := l.shown(fsid)
	if last := v.Members[len(v.Members)-1]; v.State != plan.Partial || len(v.Members) != 3 || last.Path != disk.Path || last.Role != plan.RoleDisk || v.Size != root.Members[1].Size {
		t.Errorf("while it is copied the sprout is shown as %+v", v)
	}
	for _, args := range []daemon.RequestArgs{overwrite, {Operation: plan.RemoveDevice, Target: "/dev/sda2"}} {
		if err := l.do(fsid, args); fault.CodeOf(err) != fault.Busy {
			t.Errorf("%s of another device meanwhile: %v", args.Operation, err)
		}
	}
	if err := l.do(fsid, flatten); err != nil {
		t.Error(err)
	}
	story{before: []daemon.RequestArgs{persist}, move: flatten, state: plan.Installed, members: []string{"/dev/nvme0n1"}}.ended(t, l, fsid)
}

func TestCreateSproutIsAllOrNothing(t *testing.T) {
	for _, how := range []string{"fails", "dies"} {
		t.Run(how, func(t *testing.T) {
			for n := 1; ; n++ {
				k, reached := daemontest.New(), ""
				l := mustStart(t, k)
				journal := ramDir(t)
				k.Reset(func(i int, call string) error {
					if i != n {
						return nil
					}
					reached = call
					if how == "fails" {
						return daemontest.ErrInjected
					}
					if err := os.CopyFS(journal, os.DirFS(l.dir)); err != nil {
						t.Error(err)
					}
					k.Die()
					return nil
				})
				mnt := ramDir(t)
				_, err := l.CreateSprout(t.Context(), daemon.Caller{}, "/run/media/root.img", mnt, daemon.CreateOptions{})
				l.stop()
				if reached == "" {
					return
				}
				k.Reset(nil)
				if how == "dies" {
					next, err := start(t, k, journal)
					if err != nil {
						t.Fatal(err)
					}
					next.stop()
				}
				whole := len(k.Mounted) == 1 && len(k.Loops) == 1 && len(k.Zrams) == 1
				nothing := len(k.Mounted) == 0 && len(k.Loops) == 0 && len(k.Zrams) == 0
				if how == "fails" && (err == nil) != whole || !whole && !nothing {
					t.Errorf("call %d (%s): error %v, mounted %d, loops %v, zrams %v", n, reached, err, len(k.Mounted), k.Loops, k.Zrams)
				}
			}
		})
	}
}

func TestASecondJobIsRefusedAndNamesTheFirst(t *testing.T) {
	l := mustStart(t, daemontest.New())
	fsid := l.sprout()
	inside, goOn := make(chan struct{}), make(chan struct{})
	l.kernel.Reset(func(_ int, call string) error {
		if call == "Wipe" {
			close(inside)
			<-goOn
		}
		return nil
	})
	n, err := l.Start(t.Context(), daemon.Caller{UID: 1000}, fsid, overwrite)
	if err != nil {
		t.Fatal(err)
	}
	<-inside
	_, err = l.Start(t.Context(), daemon.Caller{}, fsid, flatten)
	if fault.CodeOf(err) != fault.Busy || !strings.Contains(err.Error(), fmt.Sprintf("job %d", n)) {
		t.Errorf("the second job was not refused with the name of the first: %v", err)
	}
	if err := l.Teardown(t.Context(), fsid); fault.CodeOf(err) != fault.Busy {
		t.Errorf("teardown during a job: %v", err)
	}
	close(goOn)
	if v, err := l.Wait(t.Context(), n); err != nil || v.State != daemon.JobDone || v.Progress != 1 || v.StartedByUID != 1000 {
		t.Errorf("the first job did not end well: %+v, %v", v, err)
	}
}

func TestTheDaemonEndsAJobAsInterrupted(t *testing.T) {
	k := daemontest.New()
	l := mustStart(t, k)
	fsid := l.sprout()
	moving := make(chan struct{}, 16)
	hold := make(chan struct{})
	k.Reset(func(_ int, call string) error {
		if call == "Remove.group" {
			moving <- struct{}{}
			<-hold
		}
		return nil
	})
	n, err := l.Start(t.Context(), daemon.Caller{}, fsid, flatten)
	if err != nil {
		t.Fatal(err)
	}
	<-moving
	ended := make(chan struct{})
	go func() { l.stop(); close(ended) }()
	// The kernel goes on only once the daemon has asked the job to stop.
	<-l.Ending()
	close(hold)
	<-ended
	k.Reset(nil)
	next, err := start(t, k, l.dir)
	if err != nil {
		t.Fatal(err)
	}
	v, err := next.Wait(t.Context(), n)
	if err != nil || v.State != daemon.JobInterrupted || v.Err == nil || v.Err.Code != fault.Interrupted {
		t.Errorf("the job is shown as %+v, %v", v, err)
	}
	if got := next.state(fsid); got != plan.Partial {
		t.Errorf("the state is %s, not partial", got)
	}
	if err := next.do(fsid, resume); err != nil {
		t.Error(err)
	}
	if got := next.state(fsid); got != plan.Installed {
		t.Errorf("the state is %s, not installed", got)
	}
}

func TestBadRequestsAreRefusedBeforeAnythingChanges(t *testing.T) {
	l := mustStart(t, daemontest.New())
	fsid := l.sprout()
	with := func(op plan.Operation, target string, o plan.Options) daemon.RequestArgs {
		return daemon.RequestArgs{Operation: op, Target: target, Options: o}
	}
	none := plan.Options{Bootloader: "none"}
	l.kernel.AddDisk("/dev/tiny", 8, 48, 100*daemontest.MiB)
	l.kernel.AddDisk("/dev/ro", 8, 64, 8*daemontest.GiB).ReadOnly = true
	broken := l.kernel.AddDisk("/dev/broken", 8, 80, 8*daemontest.GiB)
	broken.ProbeError = errors.New("input/output error")
	for _, c := range []struct {
		what string
		args daemon.RequestArgs
		code fault.Code
	}{
		{"a missing path", with(plan.Persist, "/dev/none", plan.Options{}), fault.NoSuchDevice},
		{"no path", with(plan.Persist, "", plan.Options{}), fault.InvalidArgs},
		{"the media", with(plan.Flatten, "/dev/sda", none), fault.DeviceIsMedia},
		{"a device with a file system", with(plan.Flatten, "/dev/sdb", none), fault.TargetNotEmpty},
		{"a device that cannot be read", with(plan.Flatten, "/dev/broken", none), fault.IOError},
		{"a small device", with(plan.Persist, "/dev/tiny", plan.Options{Wipe: true}), ""},
		{"a small device for all", with(plan.Flatten, "/dev/tiny", none), fault.TargetTooSmall},
		{"a read-only device", with(plan.Flatten, "/dev/ro", none), fault.DeviceReadOnly},
		{"a boot loader", with(plan.Flatten, "/dev/nvme0n1", plan.Options{Bootloader: "grub"}), fault.NotSupported},
		{"a compression nobody knows", with(plan.Persist, "/dev/sda2", plan.Options{Compress: "zstd:99"}), fault.InvalidArgs},
		{"a profile nobody knows", with(plan.Flatten, "/dev/nvme0n1", plan.Options{Bootloader: "none", MetadataProfile: "raid5"}), fault.InvalidArgs},
		{"a label that is too long", with(plan.Persist, "/dev/sda2", plan.Options{Label: strings.Repeat("x", 256)}), fault.InvalidArgs},
		{"removing what is no member", with(plan.RemoveDevice, "/dev/sdb", plan.Options{}), fault.NoSuchDevice},
		{"a release to a disk with something on it", with(plan.Release, "/dev/sdb", plan.Options{}), fault.TargetNotEmpty},
		{"a release to the stick", with(plan.Release, "/dev/sda2", plan.Options{Wipe: true}), fault.DeviceIsMedia},
		{"a release to a small disk", with(plan.Release, "/dev/tiny", plan.Options{Wipe: true}), fault.TargetTooSmall},
		{"a release to a directory that is to be wiped", with(plan.Release, "/mnt/disk", plan.Options{Wipe: true}), fault.InvalidArgs},
		{"nothing to resume", resume, fault.NothingToResume},
	} {
		t.Run(c.what, func(t *testing.T) {
			touched := len(l.kernel.Touched)
			p, err := l.Plan(t.Context(), fsid, c.args)
			if err != nil {
				t.Fatal(err)
			}
			if got := fault.CodeOf(p.Err()); got != c.code {
				t.Errorf("Plan says %q, not %q: %v", got, c.code, p.Err())
			}
			if c.code == "" {
				return
			}
			if _, err := l.Start(t.Context(), daemon.Caller{}, fsid, c.args); fault.CodeOf(err) != c.code {
				t.Errorf("Start says %v, not %s", err, c.code)
			}
			if len(l.kernel.Touched) != touched || len(l.View(t.Context()).Jobs) != 0 {
				t.Error("something was changed")
			}
		})
	}
	if _, err := l.Start(t.Context(), daemon.Caller{}, "no-such-fsid", persist); fault.CodeOf(err) != fault.NoSuchSprout {
		t.Errorf("an unknown sprout: %v", err)
	}
	if err := l.Cancel(t.Context(), 99); fault.CodeOf(err) != fault.NoSuchJob {
		t.Errorf("an unknown job: %v", err)
	}
}
