// Package nspawn has the tests of what `make install` installs, under a real
// systemd with D-Bus, logind, polkit and the journal: in a container whose
// root is this machine's own, with everything that is written to it in memory.
//
// There are no uevents in a container and its /dev is its own, so device nodes
// are made by hand.
package nspawn

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// installed is what `make install` gave; TestMain sets it.
var installed string

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 { // every test skips itself, with the reason
		os.Exit(m.Run())
	}
	var err error
	if installed, err = os.MkdirTemp("", "sproutd-installed-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := os.Chmod(installed, 0o755); err != nil { // it becomes the container's /
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	install := exec.Command("make", "-s", "-C", "../..", "install", "DESTDIR="+installed)
	if out, err := install.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot install: %v\n%s", err, out)
		os.Exit(1)
	}
	code := testenv.Main(m)
	_ = os.RemoveAll(installed)
	os.Exit(code)
}

// patience is how long a test may take: what takes longer hangs.
const patience = 2 * time.Minute

// bootTime is how long a container may take to boot: some seconds on a loaded
// machine.
const bootTime = 30 * time.Second

// boot runs in a mount namespace of its own and becomes systemd-nspawn. It is
// the first of a process namespace, so that all goes when it does. Where
// this machine has no systemd of its own, the container gets a cgroup made by
// hand, and a plain cgroup2 in the place of whatever is mounted there.
const boot = `set -e
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs "$DIR"
mkdir "$DIR/upper" "$DIR/work" "$DIR/root"
mount -t overlay -o "lowerdir=/,upperdir=$DIR/upper,workdir=$DIR/work" overlay "$DIR/root"
cp -a "$INSTALLED/." "$DIR/root/"
etc=$DIR/root/etc
ln -sfn test.target "$etc/systemd/system/default.target"
printf '%s\n' '[Unit]' Requires=basic.target 'Wants=dbus.socket systemd-logind.service' \
	'After=basic.target dbus.socket systemd-logind.service' AllowIsolate=yes >"$etc/systemd/system/test.target"
grep -q '^[^:]*:[^:]*:1000:' "$etc/passwd" || echo 'user:x:1000:1000::/:/bin/sh' >>"$etc/passwd"
keep=
if [ ! -d /run/systemd/system ]; then
	umount -l /sys/fs/cgroup
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	mkdir "/sys/fs/cgroup/$NAME"
	echo $$ >"/sys/fs/cgroup/$NAME/cgroup.procs"
	keep=--keep-unit
fi
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=1
exec systemd-nspawn --quiet --boot --notify-ready=yes --register=no $keep --machine="$NAME" --directory="$DIR/root" \
	--private-network --capability=all --link-journal=no --console=pipe \
	--bind=/dev/loop-control --bind=/dev/btrfs-control --bind=/sys/fs/btrfs
`

// container is a booted system with sproutd installed.
type container struct {
	t      *testing.T
	ctx    context.Context
	name   string
	leader int // its systemd
	watch  *testenv.Watch
	// stop ends the container, once. It comes before the disks that the
	// container uses go: see [container.disk].
	stop func()
}

// start boots a container that ends with the test.
func start(t *testing.T) *container {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "systemd-nspawn", "nsenter", "dbus-daemon", "busctl")
	watch := testenv.NoLeftovers(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	short, err := os.MkdirTemp("", "sn-") // the name of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(short, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()

	c := &container{t: t, ctx: ctx, name: "sproutd-" + strings.TrimPrefix(filepath.Base(short), "sn-"), watch: watch}
	var console strings.Builder
	cmd := exec.Command("sh", "-c", boot)
	cmd.Env = append(os.Environ(), "DIR="+t.TempDir(), "INSTALLED="+installed, "NAME="+c.name, "NOTIFY_SOCKET="+notify.LocalAddr().String())
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // killed at the end; the console tells of all else
	}()
	c.stop = sync.OnceFunc(func() {
		var zrams []string
		if c.leader != 0 {
			zrams = c.clear()
		}
		_ = cmd.Process.Kill() // nothing in it is worth an orderly shutdown
		<-ended
		c.removeZrams(zrams)
		c.removeCgroups()
		if t.Failed() {
			t.Logf("the container's console:\n%s", &console)
		}
	})
	t.Cleanup(c.stop)
	if err := awaitReady(notify, ended); err != nil {
		t.Fatalf("the container did not boot: %v", err)
	}
	// systemd-nspawn has one child, and knows it by another number.
	children := read(t, fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", cmd.Process.Pid))
	if c.leader, err = strconv.Atoi(strings.TrimSpace(children)); err != nil {
		t.Fatalf("cannot find the container's first process: %v", err)
	}
	// Nodes of what may come to be: with none of it there, to open them fails.
	for i := range 64 {
		c.run("mknod", fmt.Sprintf("/dev/loop%d", i), "b", "7", fmt.Sprint(i))
	}
	zram := zramMajor(t)
	for i := range 32 {
		c.run("mknod", fmt.Sprintf("/dev/zram%d", i), "b", zram, fmt.Sprint(i))
	}
	return c
}

// awaitReady waits until the container's systemd says that it is up.
func awaitReady(notify *net.UnixConn, ended <-chan struct{}) error {
	_ = notify.SetReadDeadline(time.Now().Add(bootTime))
	go func() {
		<-ended
		_ = notify.SetReadDeadline(time.Now())
	}()
	message := make([]byte, 4096)
	for {
		n, err := notify.Read(message)
		if err != nil || strings.Contains(string(message[:n]), "READY=1\n") {
			return err
		}
	}
}

// zramMajor gives the major number of zram devices, which is given out anew at
// each boot.
func zramMajor(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile("/proc/devices")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^ *(\d+) zram$`).FindSubmatch(raw)
	if found == nil {
		t.Fatal("the kernel has no zram devices")
	}
	return string(found[1])
}

// clear takes away what is left inside: sprouts and mounts. It gives the numbers
// of the zram devices of sprouts that are stuck.
func (c *container) clear() (zrams []string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience/4)
	defer cancel()
	if c.t.Failed() {
		out, _ := c.command(ctx, "journalctl", "--no-pager", "--output=short-precise").CombinedOutput()
		c.t.Logf("the container's journal:\n%s", out)
	}
	// Whatever of this goes wrong shows in what is left behind.
	_, _ = c.command(ctx, "sh", "-c", "for mnt in /mnt/*/; do sproutctl teardown --yes $mnt; done; umount /run/stick").CombinedOutput()
	records, _ := c.command(ctx, "sh", "-c", "cat /var/lib/sproutd/sprouts/*.json").Output()
	for _, zram := range regexp.MustCompile(`"/dev/zram(\d+)"`).FindAllSubmatch(records, -1) {
		zrams = append(zrams, string(zram[1]))
	}
	return zrams
}

// removeZrams removes zram devices that were in use inside. With the container
// their mounts are gone, or will be in a moment.
func (c *container) removeZrams(numbers []string) {
	for _, number := range numbers {
		var err error
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			err = os.WriteFile("/sys/block/zram"+number+"/reset", []byte("1"), 0)
			if err == nil {
				err = os.WriteFile("/sys/class/zram-control/hot_remove", []byte(number), 0)
			}
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		c.t.Logf("zram%s of a sprout that was left was removed (%v)", number, err)
		c.watch.Zram("zram" + number)
	}
}

// removeCgroups removes the cgroups that were made by hand, which are empty now
// or soon.
func (c *container) removeCgroups() {
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		top := filepath.Join(root, c.name)
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			var dirs []string
			_ = filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			var err error
			for _, dir := range slices.Backward(dirs) {
				err = errors.Join(err, os.Remove(dir))
			}
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				c.t.Errorf("left behind: %v", err)
				break
			}
		}
	}
}

func (c *container) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", fmt.Sprint(c.leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--",
	}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Dir = "/"
	return cmd
}

// try runs a command inside and gives what it printed.
func (c *container) try(args ...string) (string, error) {
	out, err := c.command(c.ctx, args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// run runs a command inside that must succeed.
func (c *container) run(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// user is the start of a command line that runs as uid 1000.
func user(args ...string) []string {
	return append([]string{"setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"}, args...)
}

// property gives a property of the unit.
func (c *container) property(name string) string {
	c.t.Helper()
	return c.run("systemctl", "show", "--property="+name, "--value", "sproutd.service")
}

// await runs a shell command inside again and again until it succeeds.
func (c *container) await(what, command string) {
	c.t.Helper()
	if out, err := c.try("sh", "-c", "until "+command+"; do sleep 0.1; done"); err != nil {
		c.t.Fatalf("waited in vain for %s: %v\n%s", what, err, out)
	}
}

// sprouts and jobs give what sproutctl shows.
func (c *container) sprouts() []client.Sprout {
	c.t.Helper()
	var got struct{ Sprouts []client.Sprout }
	c.decode(&got, "status")
	return got.Sprouts
}

func (c *container) jobs() []client.Job {
	c.t.Helper()
	var got struct{ Jobs []client.Job }
	c.decode(&got, "jobs")
	return got.Jobs
}

func (c *container) decode(into any, command string) {
	c.t.Helper()
	if err := json.Unmarshal([]byte(c.run("sproutctl", "--json", command)), into); err != nil {
		c.t.Fatal(err)
	}
}

// sprout gives the only sprout.
func (c *container) sprout() client.Sprout {
	c.t.Helper()
	all := c.sprouts()
	if len(all) != 1 {
		c.t.Fatalf("%d sprouts are shown, want one", len(all))
	}
	return all[0]
}

// node makes the node of a device of this machine inside the container.
func (c *container) node(device string) string {
	c.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		c.t.Fatal(err)
	}
	c.run("sh", "-c", fmt.Sprintf("[ -e %[1]s ] || mknod %[1]s b %[2]d %[3]d", device, unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	return device
}

// disk attaches a disk for use inside.
func (c *container) disk(spec seedtest.DiskSpec) *seedtest.Disk {
	c.t.Helper()
	disk := seedtest.OpenDisk(c.t, spec)
	c.t.Cleanup(c.stop)
	c.node(disk.Path)
	return disk
}

// stick plugs a stick with a seed in and mounts it inside. It gives the path of
// the seed and the partition for persistence.
func (c *container) stick(spec seedtest.Spec) (seed, persist string) {
	c.t.Helper()
	seed, stick := c.plug(seedtest.StickSpec{Seed: seedtest.New(c.t, spec).Path, PersistSize: seedtest.GiB})
	return seed, c.node(stick.Persist)
}

// plug makes a stick, mounted at /run/stick, and gives the path of its seed.
func (c *container) plug(spec seedtest.StickSpec) (seed string, stick *seedtest.Stick) {
	c.t.Helper()
	stick = seedtest.OpenStick(c.t, spec)
	c.t.Cleanup(c.stop)
	if err := stick.Unmount(); err != nil {
		c.t.Fatal(err)
	}
	c.node(stick.Path)
	c.run("mkdir", "-p", "/run/stick", "/mnt/live")
	c.run("mount", "-o", "ro", c.node(stick.Media), "/run/stick")
	return "/run/stick/LiveOS/root.img", stick
}
