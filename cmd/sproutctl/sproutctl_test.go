package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/client/clienttest"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/testenv"
)

var update = flag.Bool("update", false, "write what the command line prints to testdata")

// The test binary is the program as well, so that what is tested is a process
// with signals, a terminal and an exit code.
func TestMain(m *testing.M) {
	if os.Getenv("SPROUTCTL_TEST_AS_PROGRAM") != "" {
		os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, seeds{build: fakeBuild, inspect: fakeInspect}))
	}
	os.Exit(m.Run())
}

type props = clienttest.Props

const (
	liveFsid  = "0b1c2d3e-0000-4000-8000-00000000beef"
	otherFsid = "11111111-0000-4000-8000-00000000cafe"
	mib       = uint64(1) << 20
	gib       = uint64(1) << 30
)

var (
	livePath  = string(names.SproutPath(liveFsid))
	otherPath = string(names.SproutPath(otherFsid))
	job3      = string(names.JobPath(3))
	job4      = string(names.JobPath(4))
)

func liveSprout() props {
	return props{
		"Fsid": liveFsid, "SeedFsid": "5eed5eed-0000-4000-8000-000000005eed", "Label": "SOAS", "MountPoint": "/", "State": "volatile",
		"Members": []props{
			{"devid": uint64(1), "path": "/dev/loop0", "size": 1900 * mib, "used": 1700 * mib, "role": "seed", "writable": false},
			{"devid": uint64(2), "path": "/dev/zram1", "size": 8 * gib, "used": 640 * mib, "role": "zram", "writable": true},
		},
		"Size": 8 * gib, "Free": 7 * gib, "LowSpace": false, "Intent": props{}, "CurrentJob": godbus.ObjectPath("/"),
		"SafeToUnplug": false, "MediaHolders": []string{"/dev/loop0 is a member of /", "/run/media/stick is mounted from /dev/sdb1"},
	}
}

func installed() props {
	return props{
		"SeedFsid": "", "State": "installed", "SafeToUnplug": true, "MediaHolders": []string{},
		"Members": []props{{"devid": uint64(3), "path": "/dev/nvme0n1p2", "size": 100 * gib, "used": 3 * gib, "role": "disk", "writable": true}},
	}
}

func with(base props, changes props) props {
	maps.Copy(base, changes)
	return base
}

func runningJob(operation string) props {
	return props{
		"Operation": operation, "Sprout": godbus.ObjectPath(livePath), "StartedByUid": uint32(1000), "StartTime": uint64(1),
		"State": "running", "Step": "", "StepNumber": uint32(0), "StepCount": uint32(3), "Progress": 0.0,
		"BytesDone": uint64(0), "BytesTotal": 2340 * mib, "Rate": uint64(0), "ExpectedEndTime": uint64(0), "Cancelable": true,
		"ErrorName": "", "ErrorMessage": "", "Result": props{},
	}
}

func moving() props {
	return props{
		"Step": "move 1.7 GiB off /dev/loop0 and remove it", "StepNumber": uint32(2), "Progress": 0.45,
		"BytesDone": 1053 * mib, "Rate": 120 * mib,
	}
}

func device(path string, bytes uint64, changes props) props {
	return with(props{
		"Path": path, "Size": bytes, "Model": "", "Serial": "", "Removable": false, "ReadOnly": false, "Signatures": []string{},
		"Holders": []string{}, "Role": "", "EligibleFor": []string{}, "Reasons": map[string]string{},
	}, changes)
}

// plan is what the service says to Plan.
func plan(changes props) clienttest.Method {
	return func(clienttest.Call) ([]any, error) {
		return []any{clienttest.Variants(with(props{
			"steps": []props{
				{"kind": "add", "device": "/dev/nvme0n1p2", "bytes": uint64(0), "text": "add /dev/nvme0n1p2"},
				{"kind": "remove", "device": "/dev/loop0", "bytes": 1700 * mib, "text": "move 1.7 GiB off /dev/loop0 and remove it"},
				{"kind": "remove", "device": "/dev/zram1", "bytes": 640 * mib, "text": "move 640 MiB off /dev/zram1 and remove it"},
			},
			"bytes_to_move": 2340 * mib, "target_size": 100 * gib, "min_target_size": 3 * gib,
			"destroys": []string{}, "problems": []props{}, "resumes": false,
		}, changes))}, nil
	}
}

// scenes are the machines the golden tests look at.
func scenes() map[string]func(*clienttest.Service) {
	return map[string]func(*clienttest.Service){
		"nothing": func(*clienttest.Service) {},
		"live": func(s *clienttest.Service) {
			s.Put(livePath, names.Sprout, liveSprout())
			s.Put(string(names.DevicePath("loop0")), names.Device, device("/dev/loop0", 1900*mib, props{
				"Role": "seed", "Signatures": []string{"btrfs"}, "Holders": []string{"sprout /"},
				"Reasons": map[string]string{"persist": "it holds the seed", "flatten": "it holds the seed", "add-device": "it holds the seed"},
			}))
			s.Put(string(names.DevicePath("sdb3")), names.Device, device("/dev/sdb3", 28*gib, props{
				"Model": "Ultra Fit", "Removable": true, "EligibleFor": []string{"persist", "add-device"},
				"Reasons": map[string]string{"flatten": "it is on the stick"},
			}))
			s.Put(string(names.DevicePath("nvme0n1p2")), names.Device, device("/dev/nvme0n1p2", 100*gib, props{
				"Model": "Fast Disk", "Signatures": []string{`ext4 "home"`}, "EligibleFor": []string{"persist", "flatten", "release", "add-device"},
			}))
			s.Handle(names.Sprout, "Plan", plan(nil))
			s.Handle(names.Manager, "InspectSeed", func(clienttest.Call) ([]any, error) {
				return []any{clienttest.Variants(props{
					"seeding": false, "fsid": liveFsid, "label": "SOAS", "size": 1900 * mib, "used": 1700 * mib, "csum_type": "crc32c",
					"metadata_profile": "dup", "supported": false, "reasons": []string{"it has no seed flag"},
				})}, nil
			})
			s.Handle(names.Manager, "CreateSprout", func(call clienttest.Call) ([]any, error) {
				s.Put(livePath, names.Sprout, with(liveSprout(), props{"MountPoint": call.Args[1]}))
				return []any{godbus.ObjectPath(livePath)}, nil
			})
			s.Handle(names.Sprout, "Teardown", func(clienttest.Call) ([]any, error) { return nil, nil })
			s.Handle(names.Sprout, "Reset", func(clienttest.Call) ([]any, error) { return nil, nil })
		},
		"unplugged": func(s *clienttest.Service) {
			scenes()["live"](s)
			s.Put(livePath, names.Sprout, with(liveSprout(), props{"Warnings": []string{
				"The stick (/dev/sdb) was unplugged while the system still needs it.", "No persistence was used:\n/dev/sdb3 is damaged.",
			}}))
		},
		// moves end well as soon as somebody looks at them
		"quick": func(s *clienttest.Service) {
			scenes()["live"](s)
			for _, member := range []string{"Persist", "Flatten", "Release", "AddDevice", "RemoveDevice", "Resume"} {
				s.Handle(names.Sprout, member, func(clienttest.Call) ([]any, error) {
					s.Put(job3, names.Job, runningJob(strings.ToLower(member)))
					s.OnRead(job3, func() {
						s.Change(job3, names.Job, props{"Step": "add the target", "StepNumber": uint32(1)})
						s.Change(job3, names.Job, moving())
						s.Change(job3, names.Job, with(moving(), props{"Progress": 0.5}))
						s.Change(livePath, names.Sprout, installed())
						s.Change(job3, names.Job, props{
							"State": "done", "Step": "", "Progress": 1.0, "BytesDone": 2340 * mib,
							"Result": props{"notes": []string{"the compression stays as it is"}},
						})
					})
					return []any{godbus.ObjectPath(job3)}, nil
				})
			}
		},
		"held": func(s *clienttest.Service) {
			scenes()["quick"](s)
			s.Handle(names.Sprout, "Flatten", func(clienttest.Call) ([]any, error) {
				s.Put(livePath, names.Sprout, with(liveSprout(), with(installed(), props{
					"SafeToUnplug": false, "MediaHolders": []string{"/run/media/stick is mounted from /dev/sdb1", "swap on /dev/sdb2"},
				})))
				s.Put(job3, names.Job, with(runningJob("flatten"), props{"State": "done", "Progress": 1.0}))
				return []any{godbus.ObjectPath(job3)}, nil
			})
		},
		"released": func(s *clienttest.Service) {
			scenes()["live"](s)
			s.Handle(names.Sprout, "Release", func(clienttest.Call) ([]any, error) {
				s.Put(livePath, names.Sprout, with(liveSprout(), props{"SafeToUnplug": true, "MediaHolders": []string{}}))
				s.Put(job3, names.Job, with(runningJob("release"), props{"State": "done", "Progress": 1.0}))
				return []any{godbus.ObjectPath(job3)}, nil
			})
		},
		"failing": func(s *clienttest.Service) {
			scenes()["live"](s)
			s.Handle(names.Sprout, "Persist", func(clienttest.Call) ([]any, error) {
				s.Put(job3, names.Job, runningJob("persist"))
				s.OnRead(job3, func() {
					s.Change(job3, names.Job, moving())
					s.Change(job3, names.Job, props{
						"State": "failed", "ErrorName": names.ErrorPrefix + "IOError", "ErrorMessage": "/dev/sdb3 failed while /home/a was moved",
					})
				})
				return []any{godbus.ObjectPath(job3)}, nil
			})
		},
		"destructive": func(s *clienttest.Service) {
			scenes()["quick"](s)
			s.Handle(names.Sprout, "Plan", plan(props{"destroys": []string{`the ext4 file system "home" on /dev/nvme0n1p2`}}))
		},
		"refused": func(s *clienttest.Service) {
			scenes()["quick"](s)
			s.Handle(names.Sprout, "Plan", plan(props{
				"steps": []props{}, "bytes_to_move": uint64(0),
				"problems": []props{
					{"error": names.ErrorPrefix + "TargetNotEmpty", "message": `there is the ext4 file system "home" on /dev/nvme0n1p2`},
					{"error": names.ErrorPrefix + "TargetTooSmall", "message": "/dev/nvme0n1p2 has 1.0 GiB and needs 3.0 GiB"},
				},
			}))
		},
		"busy": func(s *clienttest.Service) {
			scenes()["live"](s)
			s.Put(livePath, names.Sprout, with(liveSprout(), props{"State": "partial", "CurrentJob": godbus.ObjectPath(job3)}))
			s.Put(job3, names.Job, with(runningJob("flatten"), moving()))
			s.Put(string(names.JobPath(2)), names.Job, with(runningJob("persist"), props{
				"State": "cancelled", "Progress": 0.3, "ErrorName": names.ErrorPrefix + "Cancelled", "ErrorMessage": "the job was cancelled",
			}))
			s.Handle(names.Job, "Cancel", func(clienttest.Call) ([]any, error) {
				s.OnRead(job3, func() {
					s.Change(job3, names.Job, props{
						"State": "cancelled", "ErrorName": names.ErrorPrefix + "Cancelled", "ErrorMessage": "the job was cancelled",
					})
				})
				return nil, nil
			})
		},
		"partial": func(s *clienttest.Service) {
			scenes()["quick"](s)
			s.Put(livePath, names.Sprout, with(liveSprout(), props{
				"State": "partial", "LowSpace": true, "Free": 200 * mib,
				"Intent": props{"operation": "flatten", "target": "/dev/nvme0n1p2", "job": uint32(2), "state": "interrupted"},
			}))
			s.Handle(names.Sprout, "Plan", plan(props{"resumes": true}))
		},
		"two": func(s *clienttest.Service) {
			s.Put(livePath, names.Sprout, with(liveSprout(), props{"MountPoint": "/mnt/a"}))
			s.Put(otherPath, names.Sprout, with(liveSprout(), props{"MountPoint": "/mnt/b", "Fsid": otherFsid, "Label": "other"}))
			s.Put(job3, names.Job, runningJob("flatten"))
			s.Put(job4, names.Job, with(runningJob("persist"), props{"Sprout": godbus.ObjectPath(otherPath)}))
		},
		"denied": func(s *clienttest.Service) {
			scenes()["live"](s)
			s.Handle(names.Sprout, "Persist", func(clienttest.Call) ([]any, error) {
				return nil, godbus.NewError(names.ErrorAccessDenied, []any{"you are not allowed to do that"})
			})
		},
	}
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	// The race detector would sleep for a second at the end of each process.
	cmd.Env = append(os.Environ(), "SPROUTCTL_TEST_AS_PROGRAM=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// exit waits for a process and gives its exit code.
func exit(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	var status *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &status) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

func startScene(t *testing.T, name string) *clienttest.Service {
	t.Helper()
	service := clienttest.Start(t, clienttest.StartBus(t))
	service.Handle(names.Manager, "ListDevices", func(clienttest.Call) ([]any, error) { return []any{[][]any{}}, nil })
	scenes()[name](service)
	return service
}

func TestWhatIsPrinted(t *testing.T) {
	for _, c := range []struct {
		name, scene, args string
	}{
		{"status-nothing", "nothing", "status"},
		{"status-live", "live", "status"},
		{"status-warned", "unplugged", "status"},
		{"status-busy", "busy", "status"},
		{"status-partial", "partial", "status"},
		{"status-two", "two", "status"},
		{"status-one-of-two", "two", "status --sprout /mnt/b"},
		{"status-json", "busy", "status --json"},
		{"status-unknown-sprout", "two", "status --sprout /mnt/c"},
		{"devices", "live", "devices"},
		{"devices-none", "nothing", "devices"},
		{"devices-json", "live", "devices --json"},
		{"plan", "live", "plan flatten /dev/nvme0n1p2"},
		{"plan-destructive", "destructive", "plan install --wipe /dev/nvme0n1p2"},
		{"plan-refused", "refused", "plan flatten /dev/nvme0n1p2"},
		{"plan-resume", "partial", "plan resume"},
		{"plan-json", "live", "plan --json persist /dev/sdb3"},
		{"plan-nonsense", "live", "plan fly /dev/sdb3"},
		{"plan-without-target", "live", "plan persist"},
		{"persist", "quick", "persist /dev/sdb3"},
		{"persist-no-wait", "quick", "persist --no-wait /dev/sdb3"},
		{"persist-json", "quick", "persist --json /dev/sdb3"},
		{"persist-failing", "failing", "persist /dev/sdb3"},
		{"persist-failing-json", "failing", "persist --json /dev/sdb3"},
		{"persist-denied", "denied", "persist /dev/sdb3"},
		{"persist-several", "two", "persist /dev/sdb3"},
		{"persist-nothing", "nothing", "persist /dev/sdb3"},
		{"persist-refused", "refused", "persist /dev/nvme0n1p2"},
		{"persist-destructive", "destructive", "persist --wipe /dev/nvme0n1p2"},
		{"flatten-unconfirmed", "quick", "flatten /dev/nvme0n1p2"},
		{"flatten-yes", "quick", "flatten --yes --bootloader none /dev/nvme0n1p2"},
		{"flatten-held", "held", "install -y /dev/nvme0n1p2"},
		{"add-zram", "quick", "add zram --size 4G"},
		{"add-bad-size", "quick", "add zram --size much"},
		{"release", "released", "release ram"},
		{"release-destructive", "destructive", "release --wipe /dev/nvme0n1p2"},
		{"remove", "quick", "remove /dev/zram1"},
		{"resume", "partial", "resume"},
		{"jobs", "busy", "jobs"},
		{"jobs-none", "live", "jobs"},
		{"jobs-json", "busy", "jobs --json"},
		{"watch-nothing", "live", "watch"},
		{"watch-nothing-json", "live", "watch --json"},
		{"watch-several", "two", "watch"},
		{"watch-finished", "busy", "watch 2"},
		{"watch-unknown", "busy", "watch 99"},
		{"watch-nonsense", "busy", "watch that"},
		{"cancel", "busy", "cancel 3"},
		{"cancel-json", "busy", "cancel --json 3"},
		{"cancel-unknown", "busy", "cancel 99"},
		{"create", "live", "create /images/root.img /mnt/new --size 2G"},
		{"create-wipe-unconfirmed", "live", "create /images/root.img /mnt/new --device /dev/sdb3 --wipe"},
		{"reset", "live", "reset --yes"},
		{"reset-undo", "live", "reset --undo"},
		{"reset-json", "live", "reset --yes --json"},
		{"reset-unconfirmed", "live", "reset"},
		{"teardown", "live", "teardown --yes /"},
		{"teardown-unconfirmed", "live", "teardown /"},
		{"seed-inspect", "live", "seed inspect /images/root.img"},
		{"seed-inspect-json", "live", "seed inspect --json /images/root.img"},
		{"seed-inspect-mounted", "live", "seed inspect /images/mounted.img"},
		{"seed-inspect-not-root", "live", "seed inspect --json /images/secret.img"},
		{"seed-build", "nothing", "seed build --label live /trees/good root.img"},
		{"seed-build-json", "nothing", "seed build --json /trees/good root.img"},
		{"seed-build-empty", "nothing", "seed build /trees/empty root.img"},
		{"seed-build-no-source", "nothing", "seed build /trees/none root.img"},
		{"seed-build-exists", "nothing", "seed build /trees/good exists.img"},
		{"seed-build-full", "nothing", "seed build /trees/good /full/root.img"},
		{"seed-build-changed", "nothing", "seed build /trees/busy root.img"},
		{"seed-build-no-tool", "nothing", "seed build /trees/no-tool root.img"},
		{"seed-build-denied", "nothing", "seed build /trees/denied root.img"},
		{"seed-build-failed-json", "nothing", "seed build --json /trees/bad-disk root.img"},
		{"seed-build-bad-csum", "nothing", "seed build --csum md5 /trees/good root.img"},
		{"seed-build-bad-level", "nothing", "seed build --compress-level 19 /trees/good root.img"},
		{"seed", "live", "seed"},
		{"no-such-command", "nothing", "fly"},
		{"no-such-flag", "nothing", "status --fly"},
		{"too-few-arguments", "nothing", "persist"},
		{"old-service", "live", "persist /dev/sdb3"},
		{"completion-nonsense", "nothing", "completion csh"},
		{"complete-targets", "live", "__complete persist /dev/"},
		{"complete-add", "live", "__complete add ''"},
		{"complete-members", "live", "__complete remove ''"},
		{"complete-jobs", "two", "__complete cancel ''"},
		{"complete-sprouts", "two", "__complete status --sprout ''"},
		{"complete-release", "live", "__complete release /dev/"},
		{"complete-plan", "live", "__complete plan flatten ''"},
	} {
		t.Run(c.name, func(t *testing.T) {
			startScene(t, c.scene)
			var out, errOut bytes.Buffer
			args := strings.Fields(c.args)
			for i := range args {
				args[i] = strings.Trim(args[i], "'")
			}
			cmd := program(t, args...)
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			code := exit(t, cmd)
			if strings.Contains(c.args, "--json") {
				wantJSONLines(t, out.String())
			}
			golden(t, c.name, fmt.Sprintf("$ sproutctl %s\n%s--- stderr ---\n%s--- exit %d: %s ---\n",
				c.args, out.String(), errOut.String(), code, exitMeanings()[code]))
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test -update writes it)", err)
	}
	if got != string(want) {
		t.Errorf("it prints\n%s\nwant\n%s", got, want)
	}
}

func wantJSONLines(t *testing.T, out string) {
	t.Helper()
	if out == "" {
		t.Error("no JSON was printed")
	}
	for line := range strings.Lines(out) {
		var object map[string]any
		if err := json.Unmarshal([]byte(line), &object); err != nil {
			t.Errorf("no JSON object: %q: %v", line, err)
		}
	}
}

func TestWithoutAServiceOrABusItSaysHowToStartOne(t *testing.T) {
	run := func(want string) {
		t.Helper()
		var errOut bytes.Buffer
		cmd := program(t, "status")
		cmd.Stderr = &errOut
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if code := exit(t, cmd); code != exitUnavailable {
			t.Errorf("it exits with %d", code)
		}
		for _, part := range []string{want, "systemctl start sproutd"} {
			if !strings.Contains(errOut.String(), part) {
				t.Errorf("it says %q, without %q", errOut.String(), part)
			}
		}
	}
	clienttest.StartBus(t)
	run("cannot show the status: ")
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
	run("cannot connect to the system bus: ")

	// Completion is silent then.
	out, err := program(t, "__complete", "persist", "").CombinedOutput()
	if err != nil || strings.Contains(string(out), "bus") {
		t.Errorf("completion says %q, %v", out, err)
	}
}

// follower is a sproutctl that watches a job, with what it printed so far.
type follower struct {
	cmd    *exec.Cmd
	out    *lines
	errOut *lines
}

// lines collects what a process prints and lets a test wait for some text.
type lines struct {
	chunks chan string
	text   string
}

func collect(r io.Reader) *lines {
	l := &lines{chunks: make(chan string, 1024)}
	go func() {
		defer close(l.chunks)
		buffer := make([]byte, 4096)
		for {
			n, err := r.Read(buffer)
			if n > 0 {
				l.chunks <- string(buffer[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	return l
}

// until waits for text; it gives up where the tests have a limit anyway.
func (l *lines) until(t *testing.T, text string) {
	t.Helper()
	patience := time.After(30 * time.Second)
	for !strings.Contains(l.text, text) {
		select {
		case chunk, open := <-l.chunks:
			if !open {
				t.Fatalf("it ended without %q: %q", text, l.text)
			}
			l.text += chunk
		case <-patience:
			t.Fatalf("it never said %q: %q", text, l.text)
		}
	}
}

func (l *lines) rest() string {
	for chunk := range l.chunks {
		l.text += chunk
	}
	return l.text
}

func startFollower(t *testing.T, args ...string) *follower {
	t.Helper()
	return follow(t, program(t, args...))
}

func follow(t *testing.T, cmd *exec.Cmd) *follower {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errOut, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // an error means that it has ended
	return &follower{cmd, collect(out), collect(errOut)}
}

func (f *follower) interrupt(t *testing.T) {
	t.Helper()
	if err := f.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
}

// end gives the exit code and what was printed to standard error.
func (f *follower) end(t *testing.T) (int, string) {
	t.Helper()
	f.out.rest()
	errOut := f.errOut.rest()
	return exit(t, f.cmd), errOut
}

func TestCtrlCDetachesAndSaysHowToComeBack(t *testing.T) {
	service := startScene(t, "busy")
	f := startFollower(t, "watch")
	f.out.until(t, "Step 2 of 3")
	f.interrupt(t)
	code, said := f.end(t)
	if code != exitDetached {
		t.Errorf("it exits with %d", code)
	}
	for _, part := range []string{"Job 3 goes on", "sproutctl watch 3", "sproutctl cancel 3"} {
		if !strings.Contains(said, part) {
			t.Errorf("it says %q, without %q", said, part)
		}
	}
	if calls := service.Calls(); len(calls) != 0 {
		t.Errorf("it called %v", calls)
	}
}

func TestCtrlCCancelsWhenAskedTo(t *testing.T) {
	service := startScene(t, "busy")
	service.Handle(names.Job, "Cancel", func(clienttest.Call) ([]any, error) {
		service.Change(job3, names.Job, props{"State": "cancelling"})
		service.Change(job3, names.Job, props{
			"State": "cancelled", "ErrorName": names.ErrorPrefix + "Cancelled", "ErrorMessage": "the job was cancelled",
		})
		return nil, nil
	})
	f := startFollower(t, "watch", "--cancel-on-interrupt")
	f.out.until(t, "Step 2 of 3")
	f.interrupt(t)
	f.out.until(t, "Cancelling")
	code, said := f.end(t)
	if code != exitCancelled || !strings.Contains(said, "sproutctl resume") {
		t.Errorf("it exits with %d and says %q", code, said)
	}
}

func TestASecondCtrlCEndsAtOnce(t *testing.T) {
	service := startScene(t, "busy")
	cancelled, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	service.Handle(names.Job, "Cancel", func(clienttest.Call) ([]any, error) {
		close(cancelled)
		<-release
		return nil, nil
	})
	f := startFollower(t, "watch", "--cancel-on-interrupt")
	f.out.until(t, "Step 2 of 3")
	f.interrupt(t)
	<-cancelled
	f.interrupt(t)
	if code, _ := f.end(t); code != exitKilled {
		t.Errorf("it exits with %d", code)
	}
}

func TestADaemonThatGoesAwayIsAnErrorAndNoHang(t *testing.T) {
	service := startScene(t, "busy")
	f := startFollower(t, "watch", "3")
	f.out.until(t, "Step 2 of 3")
	service.Stop()
	code, said := f.end(t)
	if code != exitUnavailable || !strings.Contains(said, "the service went away while job 3 ran") {
		t.Errorf("it exits with %d and says %q", code, said)
	}
}

// terminalPair opens a pseudo terminal of so many columns.
func terminalPair(t *testing.T, width uint16) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testenv.Skip(t, "needs pseudo terminals: "+err.Error())
	}
	t.Cleanup(func() { ours.Close() })
	var unlock int32
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, ours.Fd(), unix.TIOCSPTLCK, uintptr(unsafe.Pointer(&unlock))); errno != 0 {
		t.Fatal(errno)
	}
	number, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(ours.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: width}); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// onTerminal starts sproutctl on a pseudo terminal of 80 columns.
func onTerminal(t *testing.T, args ...string) (cmd *exec.Cmd, keyboard io.Writer, screen *lines) {
	t.Helper()
	return onTerminalOf(t, 80, args...)
}

func onTerminalOf(t *testing.T, width uint16, args ...string) (cmd *exec.Cmd, keyboard io.Writer, screen *lines) {
	t.Helper()
	ours, theirs := terminalPair(t, width)
	cmd = program(t, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // an error means that it has ended
	return cmd, ours, collect(ours)
}

func TestOnATerminalThereIsABarAndAQuestion(t *testing.T) {
	service := startScene(t, "destructive")
	goOn := make(chan struct{})
	service.Handle(names.Sprout, "Flatten", func(clienttest.Call) ([]any, error) {
		service.Put(job3, names.Job, with(runningJob("flatten"), moving()))
		service.OnRead(job3, func() {
			<-goOn
			service.Change(livePath, names.Sprout, installed())
			service.Change(job3, names.Job, props{"State": "done", "Step": "", "Progress": 1.0, "BytesDone": 2340 * mib})
		})
		return []any{godbus.ObjectPath(job3)}, nil
	})
	cmd, keyboard, screen := onTerminal(t, "flatten", "--wipe", "/dev/nvme0n1p2")
	screen.until(t, "Type yes to go on: ")
	if !strings.Contains(screen.text, `THIS DESTROYS: the ext4 file system "home"`) {
		t.Errorf("the question does not say what is lost: %q", screen.text)
	}
	if len(service.Calls()) != 1 { // Plan
		t.Errorf("something was done before the answer: %v", service.Calls())
	}
	fmt.Fprint(keyboard, "yes\r")
	screen.until(t, "45 %")
	for _, part := range []string{"step 2 of 3: move 1.7 GiB off /dev/loop0", "[====", "1.0 GiB of 2.3 GiB", "120 MiB/s"} {
		screen.until(t, part)
	}
	close(goOn)
	screen.until(t, "The stick can be unplugged now.")
	text := screen.rest()
	if code := exit(t, cmd); code != exitOK || !strings.Contains(text, "100 %") {
		t.Errorf("it exits with %d: %q", code, text)
	}
	for line := range strings.SplitSeq(regexp.MustCompile(`\x1b\[[0-9;?]*[A-Za-z]`).ReplaceAllString(text, ""), "\n") {
		if n := len([]rune(strings.TrimRight(line, "\r"))); n > 80 {
			t.Errorf("a line of %d columns does not fit: %q", n, line)
		}
	}
}

func TestATerminalWithoutRoomForABarGetsLines(t *testing.T) {
	for _, width := range []uint16{0, 20} {
		startScene(t, "quick")
		cmd, _, screen := onTerminalOf(t, width, "persist", "/dev/sdb3")
		screen.until(t, "Step 2 of 3: move 1.7 GiB off /dev/loop0 and remove it")
		screen.rest()
		if code := exit(t, cmd); code != exitOK {
			t.Errorf("with %d columns it exits with %d", width, code)
		}
	}
}

func TestAnyAnswerButYesChangesNothing(t *testing.T) {
	for _, answer := range []string{"no\r", "\r", "\x04"} {
		service := startScene(t, "quick")
		cmd, keyboard, screen := onTerminal(t, "flatten", "/dev/nvme0n1p2")
		screen.until(t, "Type yes to go on: ")
		fmt.Fprint(keyboard, answer)
		text := screen.rest()
		if code := exit(t, cmd); code != exitUnconfirmed || !strings.Contains(text, "Nothing was changed") {
			t.Errorf("after %q it exits with %d: %q", answer, code, text)
		}
		for _, call := range service.Calls() {
			if call.Member != "Plan" {
				t.Errorf("after %q it called %s", answer, call.Member)
			}
		}
	}
}

func TestCtrlCAtTheQuestionChangesNothing(t *testing.T) {
	service := startScene(t, "quick")
	cmd, keyboard, screen := onTerminal(t, "flatten", "/dev/nvme0n1p2")
	screen.until(t, "Type yes to go on: ")
	fmt.Fprint(keyboard, "\x03")
	screen.rest()
	if code := exit(t, cmd); code != exitKilled || len(service.Calls()) != 1 {
		t.Errorf("it exits with %d after %v", code, service.Calls())
	}
}

func TestCtrlCOnATerminalLeavesTheBarAndDetaches(t *testing.T) {
	startScene(t, "busy")
	cmd, keyboard, screen := onTerminal(t, "watch")
	screen.until(t, "45 %")
	fmt.Fprint(keyboard, "\x03")
	screen.until(t, "Detached. Job 3 goes on.")
	screen.rest()
	if code := exit(t, cmd); code != exitDetached {
		t.Errorf("it exits with %d", code)
	}
}

func TestOptionsArriveAtTheService(t *testing.T) {
	service := startScene(t, "quick")
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args, member string
		want         []any
	}{
		{
			"persist --wipe -y --compress zstd:3 --label home ./part", "Persist",
			[]any{cwd + "/part", props{"wipe": true, "compress": "zstd:3", "label": "home"}},
		},
		{"install -y --bootloader none /dev/sda2", "Flatten", []any{"/dev/sda2", props{"bootloader": "none"}}},
		{"install -y --release-first --bootloader none /dev/sda2", "Flatten", []any{"/dev/sda2", props{"bootloader": "none", "release_first": true}}},
		{"release ram", "Release", []any{"ram", props{}}},
		{"release --wipe /dev/sdb3", "Release", []any{"/dev/sdb3", props{"wipe": true}}},
		{"release ./copies", "Release", []any{cwd + "/copies", props{}}},
		{"add zram --size 512MiB --zram-algorithm lz4", "AddDevice", []any{"zram", props{"size": 512 * mib, "algorithm": "lz4"}}},
		{"remove /dev/zram1", "RemoveDevice", []any{"/dev/zram1", props{}}},
		{"reset -y", "Reset", []any{props{}}},
		{"reset --undo", "Reset", []any{props{"undo": true}}},
		{
			"create root.img mnt --size 4G --compress none --mount-options noatime --zram-algorithm lzo", "CreateSprout",
			[]any{cwd + "/root.img", cwd + "/mnt", props{
				"zram_size": 4 * gib, "compress": "none", "mount_options": "noatime", "zram_algorithm": "lzo",
			}},
		},
	} {
		cmd := program(t, strings.Fields(c.args)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c.args, err, out)
		}
		calls := service.Calls()
		last := calls[len(calls)-1]
		for i, want := range c.want {
			if p, ok := want.(props); ok {
				want = clienttest.Variants(p)
			}
			if fmt.Sprint(last.Args[i]) != fmt.Sprint(want) {
				t.Errorf("%s: argument %d is %v, want %v", c.args, i, last.Args[i], want)
			}
		}
		if last.Member != c.member || !last.Interactive {
			t.Errorf("%s: called %s, interactive %v", c.args, last.Member, last.Interactive)
		}
	}
	if out, err := program(t, "remove", "--no-ask-password", "/dev/zram1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if calls := service.Calls(); calls[len(calls)-1].Interactive {
		t.Error("with --no-ask-password the service may ask for one")
	}
}

func TestMarkRunsBtrfstune(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	mark := func() (int, string) {
		cmd := program(t, "seed", "mark", "/images/root.img")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return exit(t, cmd), out.String()
	}
	if code, said := mark(); code != exitUnsupported || !strings.Contains(said, "btrfs-progs") {
		t.Errorf("without btrfstune it exits with %d: %s", code, said)
	}
	tool := func(script string) {
		if err := os.WriteFile(filepath.Join(dir, "btrfstune"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tool(`echo "$@" > ` + dir + "/args\n")
	if code, said := mark(); code != exitOK || said != "/images/root.img is a seed now.\n" {
		t.Errorf("it exits with %d: %s", code, said)
	}
	if args, err := os.ReadFile(dir + "/args"); err != nil || string(args) != "-S 1 /images/root.img\n" {
		t.Errorf("btrfstune got %q, %v", args, err)
	}
	tool("echo 'ERROR: it is mounted' >&2; exit 1\n")
	if code, said := mark(); code != exitSeed || !strings.Contains(said, "cannot mark /images/root.img: it is mounted\n") {
		t.Errorf("it exits with %d: %s", code, said)
	}
}

func TestEveryFaultHasAnExitCodeAndARemedy(t *testing.T) {
	for _, code := range fault.Codes() {
		advice := adviceFor(string(code))
		if advice.remedy == "" || exitMeanings()[advice.exit] == "" {
			t.Errorf("%s has the exit code %d and the remedy %q", code, advice.exit, advice.remedy)
		}
		if advice.exit == exitInternal && code != fault.Internal {
			t.Errorf("%s has no row", code)
		}
	}
	for _, code := range ownCodes() {
		if adviceFor(code).remedy == "" {
			t.Errorf("%s has no row", code)
		}
	}
}

func TestSizesAreReadAsFileSystemsMeanThem(t *testing.T) {
	for text, want := range map[string]uint64{
		"4G": 4 * gib, "4g": 4 * gib, "4Gi": 4 * gib, "4GiB": 4 * gib, "4GB": 4_000_000_000, "512MiB": 512 * mib, "1.5G": 3 * gib / 2,
		"1048576": mib, "2 T": 2048 * gib,
	} {
		var size sizeFlag
		if err := size.Set(text); err != nil || uint64(size) != want {
			t.Errorf("%q is %d, %v, want %d", text, size, err, want)
		}
	}
	for _, text := range []string{"", "0", "much", "-1G", "4X", "G"} {
		var size sizeFlag
		if err := size.Set(text); err == nil {
			t.Errorf("%q is %d", text, size)
		}
	}
}

func TestLinesComeAtStepsAndOnlyNowAndThenBetween(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	view := lineView{out: &out, now: func() time.Time { return now }}
	job := client.Job{Path: job3, State: "running", StepCount: 2, BytesTotal: 100 * mib, Rate: mib}
	job.Step, job.StepNumber = "adding", 1
	for i := range 40 { // ten seconds at four updates a second
		if i == 20 {
			job.Step, job.StepNumber = "moving", 2
		}
		job.Progress = float64(i) / 40
		job.BytesDone = uint64(i) * mib
		job.ExpectedEndTime = uint64(now.Add(90 * time.Second).UnixMicro())
		view.update(job)
		now = now.Add(250 * time.Millisecond)
	}
	now = now.Add(time.Second)
	view.update(job)
	const want = "Step 1 of 2: adding\nStep 2 of 2: moving\n  97 %, 39 MiB of 100 MiB, 1.0 MiB/s, 1 min 28 s left\n"
	if out.String() != want {
		t.Errorf("it prints\n%swant\n%s", out.String(), want)
	}
}

func TestCompletionScriptsAreMadeForEachShell(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, err := program(t, "completion", shell).Output()
		if err != nil || !bytes.Contains(out, []byte("sproutctl")) {
			t.Errorf("%s: %v, %d bytes", shell, err, len(out))
		}
	}
}
