package root

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// The exit codes of sproutctl(1) that these tests meet.
const (
	exitUsage       = 2
	exitUnavailable = 3
	exitNotFound    = 5
	exitSeed        = 6
	exitTarget      = 7
	exitBusy        = 9
	exitState       = 10
	exitUnsupported = 11
	exitCancelled   = 13
	exitUnconfirmed = 15
	exitKilled      = 130
)

// shell is a user at a prompt, without a terminal.
type shell struct {
	*harness.World
	t *testing.T
	// sprout is the mount point of the sprout that commands are about. Others
	// on the machine may have sprouts as well.
	sprout string
}

// said is what a command printed and how it ended.
type said struct {
	out, err string
	exit     int
}

// running is a command that has not ended yet.
type running struct {
	t        *testing.T
	cmd      *exec.Cmd
	out, err bytes.Buffer
}

func (s *shell) start(args ...string) *running {
	s.t.Helper()
	r := &running{t: s.t}
	all := slices.Clone(args)
	if s.sprout != "" {
		all = append([]string{"--sprout", s.sprout}, all...)
	}
	r.cmd = exec.CommandContext(s.Context(), filepath.Join(programs, "sproutctl"), all...)
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.err
	if err := r.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// end waits for the end of a command.
func (r *running) end() said {
	r.t.Helper()
	err := r.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	if strings.Contains(r.err.String(), "DATA RACE") {
		r.t.Errorf("sproutctl has a data race:\n%s", &r.err)
	}
	return said{r.out.String(), r.err.String(), r.cmd.ProcessState.ExitCode()}
}

func (s *shell) try(args ...string) said { s.t.Helper(); return s.start(args...).end() }

// do runs a command that must succeed and print each of the words.
func (s *shell) do(args []string, words ...string) string {
	s.t.Helper()
	got := s.try(args...)
	if got.exit != 0 {
		s.t.Fatalf("sproutctl %s gave exit code %d\n%s%s", strings.Join(args, " "), got.exit, got.out, got.err)
	}
	for _, word := range words {
		if !strings.Contains(got.out, word) {
			s.t.Errorf("sproutctl %s does not say %q:\n%s", strings.Join(args, " "), word, got.out)
		}
	}
	return got.out
}

// fails runs a command that must end with that exit code, say each of the words
// and, with --json, give the same as an object.
func (s *shell) fails(exit int, args []string, words ...string) {
	s.t.Helper()
	got := s.try(args...)
	if got.exit != exit {
		s.t.Errorf("sproutctl %s gave exit code %d, want %d\n%s%s", strings.Join(args, " "), got.exit, exit, got.out, got.err)
	}
	for _, word := range words {
		if !strings.Contains(got.err, word) {
			s.t.Errorf("sproutctl %s does not say %q:\n%s", strings.Join(args, " "), word, got.err)
		}
	}
	got = s.try(append([]string{"--json"}, args...)...)
	var reply struct {
		Error struct {
			Code, Message string
			Exit          int
		}
	}
	decode(s.t, got.out, &reply)
	if got.exit != exit || reply.Error.Exit != exit || reply.Error.Code == "" || reply.Error.Message == "" {
		s.t.Errorf("sproutctl --json %s gave exit code %d and %s, want %d", strings.Join(args, " "), got.exit, got.out, exit)
	}
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Errorf("%v: %s", err, text)
	}
}

func TestTheStoryOnTheCommandLine(t *testing.T) {
	s := &shell{World: harness.New(t, programs), t: t}
	stick := s.OpenStick(seedtest.StickSpec{Seed: seedtest.New(t, seedtest.Spec{}).Path, PersistSize: seedtest.GiB})
	disk := s.OpenDisk(seedtest.DiskSpec{})
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "precious", disk.Path)
	mnt := filepath.Join(s.Dir, "live")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}

	s.do([]string{"create", stick.Seed, mnt, "--size", "2G"}, mnt+" is volatile", "seed", "zram", "safe to unplug: no")
	s.sprout = mnt
	s.do([]string{"status"}, mnt+" is volatile", "2.0 GiB")
	var status struct {
		Sprouts []client.Sprout
		Jobs    []client.Job
	}
	decode(t, s.do([]string{"--json", "status"}), &status)
	if len(status.Sprouts) != 1 || status.Sprouts[0].State != "volatile" || len(status.Sprouts[0].Members) != 2 || len(status.Jobs) != 0 {
		t.Errorf("the status is %+v", status)
	}
	s.do([]string{"devices"}, disk.Path, stick.Persist, "ext4")

	s.do([]string{"plan", "persist", stick.Persist}, "The steps:", "add "+stick.Persist, "To be moved:")
	var plan client.Plan
	decode(t, s.do([]string{"--json", "plan", "flatten", "--wipe", "--bootloader", "none", disk.Path}), &plan)
	if len(plan.Steps) == 0 || plan.BytesToMove == 0 || len(plan.Destroys) != 1 || len(plan.Problems) != 0 {
		t.Errorf("the plan is %+v", plan)
	}
	s.do([]string{"plan", "flatten", "--bootloader", "none", disk.Path}, "It would be refused:", "precious", "--wipe")

	s.do([]string{"persist", stick.Persist}, "Step 1 of", "add "+stick.Persist, "Done: "+mnt+" is persistent.")

	// Nobody is there to say yes.
	before := fingerprint(t, disk.Path)
	s.fails(exitUnconfirmed, []string{"flatten", "--wipe", "--bootloader", "none", disk.Path}, "THIS DESTROYS:", "precious", "--yes")
	if !bytes.Equal(before, fingerprint(t, disk.Path)) {
		t.Error("the disk was written to without a yes")
	}
	s.do([]string{"status"}, mnt+" is persistent")

	s.do([]string{"flatten", "--yes", "--wipe", "--bootloader", "none", "--label", "installed", disk.Path},
		"Done: "+mnt+" is installed.", "Do not unplug the stick yet", stick.MountPoint)
	s.do([]string{"status"}, mnt+" is installed", disk.Path)
	s.do([]string{"jobs"}, "persist", "flatten", "done", "100")
	var jobs struct{ Jobs []client.Job }
	decode(t, s.do([]string{"--json", "jobs"}), &jobs)
	if len(jobs.Jobs) != 2 || jobs.Jobs[1].Operation != "flatten" || jobs.Jobs[1].State != client.Done || jobs.Jobs[1].Progress != 1 {
		t.Errorf("the jobs are %+v", jobs)
	}
	s.do([]string{"teardown", mnt}, mnt+" is unmounted.")
	s.sprout = ""
	s.fails(exitNotFound, []string{"teardown", mnt}, "no sprout")
}

func TestAJobThatRunsOnTheCommandLine(t *testing.T) {
	s := &shell{World: harness.New(t, programs), t: t}
	seed, disk, other := seedtest.New(t, seedtest.Spec{}), s.OpenDisk(seedtest.DiskSpec{Gate: true}), s.OpenDisk(seedtest.DiskSpec{})
	s.sprout = s.Create(seed.Path, client.CreateOptions{}).MountPoint
	hold := func(ctx context.Context) <-chan error {
		held := make(chan error, 1)
		go func() { held <- disk.HoldAfter(ctx, 4*seedtest.MiB) }()
		return held
	}

	// One command begins it, another one watches, a third one stops it.
	held := hold(s.Context())
	s.do([]string{"flatten", "--yes", "--bootloader", "none", "--no-wait", disk.Path}, "Job 1 was started.", "sproutctl watch 1", "sproutctl cancel 1")
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	s.do([]string{"status"}, s.sprout+" is partial", "flatten")
	s.do([]string{"jobs"}, "flatten", "running")
	s.fails(exitBusy, []string{"persist", other.Path}, "job 1 (flatten)")

	watch, lines, cancel := s.start("watch", "1"), s.start("--json", "watch"), s.start("cancel", "1")
	s.AwaitJob("/org/sproutd/Sprout1/job/1", func(j client.Job) bool { return j.State == "cancelling" || j.Finished() })
	if err := disk.Let(); err != nil {
		t.Fatal(err)
	}
	if got := cancel.end(); got.exit != 0 || !strings.Contains(got.out, "Job 1 was cancelled") || !strings.Contains(got.out, "sproutctl resume") {
		t.Errorf("cancel said %+v", got)
	}
	if got := watch.end(); got.exit != exitCancelled || !strings.Contains(got.out, "Step") || !strings.Contains(got.err, "sproutctl resume") {
		t.Errorf("watch said %+v", got)
	}
	got := lines.end()
	var last struct {
		Error struct{ Code string }
	}
	all := strings.Split(strings.TrimSpace(got.out), "\n")
	for i, line := range all {
		var job client.Job
		decode(t, line, &job)
		if i < len(all)-1 && job.Operation != "flatten" {
			t.Errorf("a line of watch is %s", line)
		}
	}
	if decode(t, all[len(all)-1], &last); got.exit != exitCancelled || last.Error.Code != "Cancelled" {
		t.Errorf("watch --json ended with %d and %s", got.exit, all[len(all)-1])
	}

	s.do([]string{"status"}, s.sprout+" is partial", "resume")
	s.do([]string{"plan", "resume"}, "The steps that are left:")
	var end client.Job
	out := strings.Split(strings.TrimSpace(s.do([]string{"--json", "resume"})), "\n")
	if decode(t, out[len(out)-1], &end); end.State != client.Done || end.Progress != 1 {
		t.Errorf("resume ended with %s", out[len(out)-1])
	}
	s.do([]string{"status"}, s.sprout+" is installed")
	s.fails(exitState, []string{"resume"}, "undone")
	s.fails(exitState, []string{"cancel", "2"}, "ended already")
}

func TestMoreZramOnTheCommandLine(t *testing.T) {
	s := &shell{World: harness.New(t, programs), t: t}
	path := s.Create(smallSeed(t, seedtest.Spec{}).Path, client.CreateOptions{ZramSize: seedtest.GiB}).Path
	s.sprout = s.Show(path).MountPoint
	s.do([]string{"add", "zram", "--size", "1G"}, "Done: "+s.sprout+" is volatile.")
	members := s.Show(path).Members
	if len(members) != 3 || members[2].Role != "zram" || members[2].Size != seedtest.GiB {
		t.Fatalf("after add there is %+v", members)
	}
	s.do([]string{"remove", members[1].Path}, "remove it", "memory", "Done")
	if now := s.Show(path).Members; len(now) != 2 || now[1].Path != members[2].Path {
		t.Errorf("after remove there is %+v", now)
	}
	s.fails(exitState, []string{"remove", members[2].Path}, "only writable")
	// What is in RAM only would be lost.
	s.fails(exitUnconfirmed, []string{"teardown", s.sprout}, "THIS DESTROYS:", "RAM")
	sequence := "/sys/class/block/" + filepath.Base(members[2].Path) + "/diskseq"
	before, err := os.ReadFile(sequence)
	if err != nil {
		t.Fatal(err)
	}
	s.do([]string{"teardown", "--yes", s.sprout}, "is unmounted")
	if now, err := os.ReadFile(sequence); err == nil && bytes.Equal(now, before) { // not the next of that name
		t.Errorf("%s is still there", members[2].Path)
	}
}

func TestASeedIsBuiltOnTheCommandLine(t *testing.T) {
	s := &shell{World: harness.New(t, programs), t: t}
	source, dir := t.TempDir(), t.TempDir()
	if err := seedtest.Standard(source, seedtest.StandardOptions{Random: 9}); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "root.img")
	build := []string{"seed", "build", "--label", "by hand", "--compress-level", "1", source, image}

	interrupted := s.start(build...)
	for started := false; !started; time.Sleep(time.Millisecond) {
		made, err := os.ReadDir(dir)
		if err != nil || s.Context().Err() != nil {
			t.Fatal(err, s.Context().Err())
		}
		started = len(made) > 0
	}
	if err := interrupted.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if got := interrupted.end(); got.exit != exitKilled {
		t.Errorf("interrupted it gave %+v", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("interrupted it left %v, %v", left, err)
	}

	s.do(build, image+" is a seed.", "share extents", "data extents")
	s.fails(exitTarget, build, "exists", "--overwrite")
	s.do(append(build, "--overwrite"), image+" is a seed.")
	s.fails(exitUsage, []string{"seed", "build", source + ".missing", image + ".other"}, "not a usable source")
	s.do([]string{"seed", "inspect", image}, "usable here", "by hand", "data extents", "estimated")
	mnt := filepath.Join(s.Dir, "live")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	s.do([]string{"create", image, mnt}, mnt+" is volatile")
	s.do([]string{"teardown", "--yes", mnt}, "is unmounted")
}

func TestEachClassOfErrorsHasItsExitCode(t *testing.T) {
	s := &shell{World: harness.New(t, programs), t: t}
	plain := smallSeed(t, seedtest.Spec{Plain: true}).Path
	full, free, little := s.OpenDisk(seedtest.DiskSpec{}), s.OpenDisk(seedtest.DiskSpec{}), s.OpenDisk(seedtest.DiskSpec{Size: 8 * seedtest.MiB})
	tool(t, "mkswap", full.Path)
	mnt := t.TempDir()
	s.fails(exitSeed, []string{"create", plain, mnt}, "no seed", "sproutctl seed mark")
	s.fails(exitNotFound, []string{"create", plain + ".missing", mnt}, "missing")
	s.fails(exitUsage, []string{"create", plain})
	if got := s.try("explode"); got.exit != exitUsage || !strings.Contains(got.err, "explode") {
		t.Errorf("a command that is none gave %+v", got)
	}
	s.fails(exitUsage, []string{"persist", "--colour", "blue", free.Path}, "colour")
	s.fails(exitNotFound, []string{"cancel", "99"}, "no job 99")

	s.sprout = s.Create(smallSeed(t, seedtest.Spec{}).Path, client.CreateOptions{}).MountPoint
	s.fails(exitTarget, []string{"persist", full.Path}, "swap", "--wipe")
	s.fails(exitTarget, []string{"persist", little.Path}, "needed", "larger device")
	s.fails(exitTarget, []string{"persist", s.theSprout().Members[1].Path}, "member")
	s.fails(exitNotFound, []string{"persist", "/dev/no-such-device"}, "/dev/no-such-device", "sproutctl devices")
	s.fails(exitUnsupported, []string{"flatten", "--yes", free.Path}, "boot loader", "--bootloader none")
	s.fails(exitUsage, []string{"persist", "--compress", "rot13", free.Path}, "rot13")
	s.fails(exitState, []string{"resume"}, "undone")
	s.sprout = "/nowhere"
	s.fails(exitNotFound, []string{"resume"}, "no sprout /nowhere")

	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(s.Dir, "no bus"))
	s.fails(exitUnavailable, []string{"status"}, "system bus")
}

// theSprout gives the sprout the commands are about.
func (s *shell) theSprout() client.Sprout {
	s.t.Helper()
	return s.AwaitSproutAt(s.sprout)
}
