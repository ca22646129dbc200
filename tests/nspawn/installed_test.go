package nspawn

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/seedtest"
)

// little is a content that is quick to move.
func little(dir string) error {
	return os.WriteFile(filepath.Join(dir, "file"), []byte("of the seed\n"), 0o644)
}

// busctl is the start of a command line that talks to the service.
func busctl(args ...string) []string { return append([]string{"busctl"}, args...) }

func TestTheServiceIsStartedByItsFirstCaller(t *testing.T) {
	c := start(t)
	if got := c.property("ActiveState"); got != "inactive" {
		t.Fatalf("before anybody calls it the service is %s", got)
	}
	if got := c.run(busctl("call", names.Bus, names.Root, names.Manager, "ListJobs")...); got != "a(osss) 0" {
		t.Errorf("the first call gave %q", got)
	}
	// It has its name, and answers, a moment before it says that it is ready.
	c.await("the service to be ready", "systemctl is-active --quiet sproutd.service")
	for name, want := range map[string]string{"Type": "notify", "BusName": names.Bus, "NRestarts": "0", "Result": "success"} {
		if got := c.property(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := c.run(busctl("get-property", names.Bus, names.Root, names.Manager, "Version")...); !strings.HasPrefix(got, `s "`) {
		t.Errorf("the version is %q", got)
	}

	// The sandbox is on, and leaves the mounts alone.
	pid := c.property("MainPID")
	process := c.run("cat", "/proc/"+pid+"/status")
	const capabilities = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH |
		1<<unix.CAP_CHOWN | 1<<unix.CAP_FOWNER | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_SYSLOG
	for _, want := range []string{
		"Seccomp:\t2", "NoNewPrivs:\t1",
		fmt.Sprintf("CapBnd:\t%016x", capabilities), fmt.Sprintf("CapEff:\t%016x", capabilities),
	} {
		if !strings.Contains(process, want+"\n") {
			t.Errorf("%q is not in the status of the process:\n%s", want, process)
		}
	}
	if strings.Contains(process, "VmLck:\t       0 kB\n") {
		t.Errorf("the program does not stay in memory:\n%s", process)
	}
	if own, all := c.run("readlink", "/proc/"+pid+"/ns/mnt"), c.run("readlink", "/proc/1/ns/mnt"); own != all {
		t.Errorf("the service has the mount namespace %s, the system %s", own, all)
	}
	for path, mode := range map[string]string{"/var/lib/sproutd": "700", "/run/sproutd": "700"} {
		if got := c.run("stat", "--format=%a", path); got != mode {
			t.Errorf("%s has the mode %s, want %s", path, got, mode)
		}
	}

	c.run("systemctl", "stop", "sproutd.service")
	if got := c.property("Result"); got != "success" {
		t.Errorf("told to stop, the service ended with %s", got)
	}
}

func TestTheWholeStoryAsInstalled(t *testing.T) {
	c := start(t)
	seed, persist := c.stick(seedtest.Spec{})
	disk := c.disk(seedtest.DiskSpec{Gate: true})

	c.run("sproutctl", "create", seed, "/mnt/live")
	if got := c.sprout(); got.State != "volatile" || got.MountPoint != "/mnt/live" {
		t.Errorf("a new sprout is shown as %+v", got)
	}
	// What the service mounts is for all to see.
	if got := c.run("findmnt", "--task", "1", "--noheadings", "--output", "FSTYPE", "/mnt/live"); got != "btrfs" {
		t.Errorf("systemd sees %q at the mount point", got)
	}
	c.run("sh", "-c", "echo of the session >/mnt/live/session")

	c.run("sproutctl", "persist", persist)
	if got := c.sprout(); got.State != "persistent" {
		t.Errorf("after persist the sprout is shown as %+v", got)
	}
	if got := c.run("systemd-inhibit", "--list", "--no-legend", "--no-pager"); strings.Contains(got, "sproutd") {
		t.Errorf("no job runs, but there is a lock:\n%s", got)
	}

	held := make(chan error, 1)
	go func() { held <- disk.HoldAfter(c.ctx, 4*seedtest.MiB) }()
	c.run("sproutctl", "flatten", "--yes", "--bootloader=none", "--no-wait", disk.Path)
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	locks := c.run("systemd-inhibit", "--list", "--no-legend", "--no-pager")
	if err := disk.Let(); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"sproutd", "shutdown:sleep", "block"} {
		if !strings.Contains(locks, word) {
			t.Errorf("while a job runs the locks do not say %q:\n%s", word, locks)
		}
	}
	c.run("sproutctl", "watch", "2")
	c.await("the lock to go", "! systemd-inhibit --list --no-legend --no-pager | grep -q sproutd")
	if got := c.sprout(); got.State != "installed" || len(got.Members) != 1 || got.Members[0].Path != disk.Path {
		t.Errorf("after flatten the sprout is shown as %+v", got)
	}
	c.run("umount", "/run/stick")
	c.await("the stick to be safe to unplug", `sproutctl --json status | grep -q '"safe_to_unplug":true'`)
	if got := c.run("cat", "/mnt/live/session"); got != "of the session" {
		t.Errorf("what was written before the moves is now %q", got)
	}

	// Scripts find a job by its fields.
	fields := map[string]map[string]bool{}
	for line := range strings.Lines(c.run("journalctl", "--output=json", "--no-pager", "--unit=sproutd.service", "SPROUTD_JOB=2")) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatal(err)
		}
		for key, value := range entry {
			if strings.HasPrefix(key, "SPROUTD_") {
				if fields[key] == nil {
					fields[key] = map[string]bool{}
				}
				fields[key][fmt.Sprint(value)] = true
			}
		}
	}
	for key, value := range map[string]string{
		"SPROUTD_JOB": "2", "SPROUTD_OPERATION": "flatten", "SPROUTD_STEP": "remove",
		"SPROUTD_SPROUT": c.sprout().Fsid, "SPROUTD_DEVICE": disk.Path,
		"SPROUTD_DEV_T": strings.TrimSpace(read(t, "/sys/class/block/"+filepath.Base(disk.Path)+"/dev")),
	} {
		if !fields[key][value] {
			t.Errorf("no entry of the journal has %s=%s, there is %v", key, value, fields)
		}
	}

	c.run("sproutctl", "teardown", "--yes", "/mnt/live")
	if got := c.sprouts(); len(got) != 0 {
		t.Errorf("after teardown there is %+v", got)
	}
	if got := c.property("NRestarts"); got != "0" {
		t.Errorf("the service was started again %s times", got)
	}
	c.stop()
	if err := seedtest.Check(t.Context(), disk.Path); err != nil {
		t.Error(err)
	}
}

func TestAPartitionIsMadeInTheSandbox(t *testing.T) {
	c := start(t)
	seed, stick := c.plug(seedtest.StickSpec{Seed: seedtest.New(t, seedtest.Spec{Content: little}).Path, Free: seedtest.GiB})
	c.run("sproutctl", "create", seed, "/mnt/live")
	// There is no udev here: the node of the new partition comes from the test.
	if said, err := c.try("sproutctl", "persist", "free"); err == nil || !strings.Contains(said, stick.Path+"p2") {
		t.Fatalf("without a node it says %q, %v", said, err)
	}
	c.node(stick.Path + "p2")
	c.run("sproutctl", "persist", "free")
	if got := c.sprout(); got.State != "persistent" {
		t.Errorf("after persist the sprout is shown as %+v", got)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestAServiceThatHangsIsStartedAgain(t *testing.T) {
	c := start(t)
	seed, _ := c.stick(seedtest.Spec{Content: little})
	c.run("mkdir", "-p", "/run/systemd/system/sproutd.service.d")
	c.run("sh", "-c", `printf '[Service]\nWatchdogSec=3s\n' >/run/systemd/system/sproutd.service.d/watchdog.conf`)
	c.run("systemctl", "daemon-reload")
	c.run("sproutctl", "create", seed, "/mnt/live")
	before := c.sprout()
	c.run("sh", "-c", "echo of the session >/mnt/live/session")

	pid := c.property("MainPID")
	c.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", "sproutd.service")
	c.await("a new process", `[ "$(systemctl show --property=NRestarts --value sproutd.service)" = 1 ] && systemctl is-active --quiet sproutd.service`)
	if now := c.property("MainPID"); now == pid {
		t.Errorf("the process %s was not replaced", pid)
	}
	after := c.sprout()
	if after.State != "volatile" || after.Fsid != before.Fsid || len(after.Members) != len(before.Members) {
		t.Errorf("the sprout is shown as %+v, it was %+v", after, before)
	}
	if got := c.run("cat", "/mnt/live/session"); got != "of the session" {
		t.Errorf("what was written before is now %q", got)
	}
	// It knows what is its own: teardown frees the zram it did not make itself.
	made := map[string]string{}
	for _, m := range before.Members {
		made[m.Path] = diskSeq(m.Path)
	}
	c.run("sproutctl", "teardown", "--yes", "/mnt/live")
	for path, seq := range made {
		if size, err := os.ReadFile("/sys/class/block/" + filepath.Base(path) + "/size"); err == nil && diskSeq(path) == seq && strings.TrimSpace(string(size)) != "0" {
			t.Errorf("%s is still there", path)
		}
	}
}

// diskSeq tells a device from the next one that gets its name, "" if there is
// none.
func diskSeq(path string) string {
	seq, _ := os.ReadFile("/sys/class/block/" + filepath.Base(path) + "/diskseq")
	return string(seq)
}

func TestARestartInTheMiddleOfAJob(t *testing.T) {
	c := start(t)
	seed, _ := c.stick(seedtest.Spec{})
	disk := c.disk(seedtest.DiskSpec{Gate: true})
	c.run("sproutctl", "create", seed, "/mnt/live")
	fsid := c.sprout().Fsid

	held := make(chan error, 1)
	go func() { held <- disk.HoldAfter(c.ctx, 4*seedtest.MiB) }()
	c.run("sproutctl", "flatten", "--yes", "--bootloader=none", "--no-wait", disk.Path)
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	// The kernel cannot stop before the disk goes on.
	c.run("systemctl", "restart", "--no-block", "sproutd.service")
	c.await("the service to end", `[ "$(systemctl show --property=ActiveState --value sproutd.service)" = deactivating ]`)
	if err := disk.Let(); err != nil {
		t.Fatal(err)
	}
	c.await("the service to start", `systemctl is-active --quiet sproutd.service`)
	if got := c.property("Result"); got != "success" {
		t.Errorf("the service ended with %s", got)
	}

	if got := c.jobs(); len(got) != 1 || got[0].State != "interrupted" || !strings.HasSuffix(got[0].ErrorName, ".Interrupted") {
		t.Errorf("the job that was cut off is shown as %+v", got)
	}
	if s := c.sprout(); s.State != "partial" || s.Fsid != fsid || len(s.Intent) == 0 {
		t.Errorf("after the restart the sprout is shown as %+v", s)
	}
	c.run("sh", "-c", "echo still writable >/mnt/live/session")
	c.run("sproutctl", "resume")
	if s := c.sprout(); s.State != "installed" || s.Fsid != fsid || len(s.Members) != 1 {
		t.Errorf("after resume the sprout is shown as %+v", s)
	}
	c.run("sproutctl", "teardown", "--yes", "/mnt/live")
	c.stop()
	if err := seedtest.Check(t.Context(), disk.Path); err != nil {
		t.Error(err)
	}
}

func TestUsersMayLookButNotTouch(t *testing.T) {
	c := start(t)
	seed, _ := c.stick(seedtest.Spec{Content: little})
	disk := c.disk(seedtest.DiskSpec{})
	c.run("sproutctl", "create", seed, "/mnt/live")
	c.run("sproutctl", "add", "zram", "--size=1G")
	sprout := c.sprout()

	for _, read := range [][]string{
		busctl("get-property", names.Bus, sprout.Path, names.Sprout, "State"),
		busctl("introspect", names.Bus, sprout.Path),
		busctl("tree", names.Bus),
		busctl("call", names.Bus, names.Root, names.Manager, "ListJobs"),
		busctl("call", names.Bus, names.Root, names.Manager, "ListDevices", "a{sv}", "0"),
		{"sproutctl", "status"}, {"sproutctl", "devices"}, {"sproutctl", "jobs"},
		{"sproutctl", "plan", "flatten", "--bootloader=none", disk.Path},
	} {
		if out, err := c.try(user(read...)...); err != nil {
			t.Errorf("a user cannot %v: %v\n%s", read, err, out)
		}
	}

	const exitDenied = 4 // of sproutctl
	jobs := c.jobs()
	for _, change := range [][]string{
		{"create", seed, "/mnt"},
		{"add", "zram", "--size=1G"},
		{"remove", sprout.Members[1].Path},
		{"persist", disk.Path},
		{"flatten", "--yes", "--bootloader=none", disk.Path},
		{"teardown", "--yes", "/mnt/live"},
	} {
		for _, ask := range []string{"--no-ask-password", "--no-ask-password=false"} {
			out, err := c.try(user(append([]string{"sproutctl", ask}, change...)...)...)
			exit, ok := err.(*exec.ExitError) //nolint:errorlint // of os/exec, never wrapped
			if !ok || exit.ExitCode() != exitDenied {
				t.Errorf("a user's `sproutctl %s %s` gave %v, want exit code %d\n%s", ask, strings.Join(change, " "), err, exitDenied, out)
			}
		}
	}
	for _, call := range [][]string{
		{sprout.Path, names.Sprout, "Resume", "a{sv}", "0"},
		{jobs[0].Path, names.Job, "Cancel", "a{sv}", "0"},
	} {
		out, err := c.try(user(busctl(slices.Concat([]string{"call", names.Bus}, call)...)...)...)
		if err == nil || !strings.Contains(out, "Access denied") && !strings.Contains(out, "authentication required") {
			t.Errorf("a user's call %v gave %v, %s", call, err, out)
		}
	}
	if after := c.sprout(); len(c.jobs()) != len(jobs) || len(after.Members) != len(sprout.Members) || after.State != sprout.State {
		t.Errorf("what was denied changed %+v to %+v", sprout, after)
	}

	// An administrator may allow it by a rule.
	c.run("sh", "-c", `cat >/etc/polkit-1/rules.d/40-test.rules <<'END'
polkit.addRule(function(action, subject) {
	if (action.id == "org.sproutd.sprout1.manage-devices")
		return polkit.Result.YES;
});
END
systemctl restart polkit.service`)
	c.run(user("sproutctl", "--no-ask-password", "add", "zram", "--size=1G")...)
	if got := c.jobs(); len(got) != 2 || got[1].StartedByUID != 1000 || got[1].State != "done" {
		t.Errorf("the user's job is shown as %+v", got)
	}
	c.run("sproutctl", "teardown", "--yes", "/mnt/live")
}
