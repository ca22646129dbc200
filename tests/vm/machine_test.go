// Package vm has the tests of the whole in a virtual machine: firmware, stick,
// disk, real hot unplug and real power cuts.
//
// This file is all the machinery. A test makes a [machine] with disks, switches
// it on and asks the agent in it (see package guest) to do things. QEMU runs in
// software emulation where there is no KVM; the console is only kept as a log.
package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"
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
	"sproutd.org/sproutd/tests/vm/guest"
)

// How long things take on a quiet machine with two processors, without KVM. They
// get as many times as long as patience says.
const (
	bootTime  = 60 * time.Second // to a system that is up
	callTime  = 20 * time.Second // a small program
	readTime  = 60 * time.Second // every file of the root
	moveTime  = 90 * time.Second // a persist or flatten
	eventTime = 5 * time.Second  // QEMU itself
	offTime   = 25 * time.Second // shutdown
)

// patient is how long is waited for what takes so long on a quiet machine.
func patient(quiet time.Duration) time.Duration { return time.Duration(patience * float64(quiet)) }

// image is the live stick that `make live-image` built, and what is in it.
type image struct {
	path           string
	kernel, initrd string // taken from its ESP
	early          string // the same initramfs with the agent in it
	options        string // of its boot entry
	memory         string // of a session, "" before there was one
}

// openImage takes the kernel and its options out of the ESP, into dir.
func openImage(path, dir string) (*image, error) {
	table, err := exec.Command("sfdisk", "--json", path).Output()
	if err != nil {
		return nil, fmt.Errorf("cannot read the partition table of %s: %w", path, err)
	}
	var parsed struct {
		PartitionTable struct {
			Partitions []struct {
				Start int64
				Type  string
			}
		}
	}
	if err := json.Unmarshal(table, &parsed); err != nil {
		return nil, fmt.Errorf("cannot understand the partition table of %s: %w", path, err)
	}
	const esp = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
	start := int64(-1)
	for _, p := range parsed.PartitionTable.Partitions {
		if p.Type == esp {
			start = p.Start * 512
		}
	}
	if start < 0 {
		return nil, fmt.Errorf("%s has no ESP", path)
	}
	from := fmt.Sprintf("%s@@%d", path, start)
	// The boot menu offers the first by name.
	listed, err := exec.Command("mdir", "-b", "-i", from, "::/loader/entries").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot list the boot entries of %s: %w", path, err)
	}
	names := strings.Fields(string(listed))
	if len(names) == 0 {
		return nil, fmt.Errorf("%s has no boot entry", path)
	}
	entry, err := exec.Command("mcopy", "-n", "-i", from, slices.Min(names), "-").Output()
	if err != nil {
		return nil, fmt.Errorf("cannot read the boot entry of %s: %w", path, err)
	}
	img := &image{path: path, kernel: filepath.Join(dir, "kernel"), initrd: filepath.Join(dir, "initrd")}
	for line := range strings.Lines(string(entry)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSpace(value)
		switch key {
		case "options":
			img.options = value
			return img, img.addAgent(dir)
		case "linux", "initrd":
			to := map[string]string{"linux": img.kernel, "initrd": img.initrd}[key]
			if out, err := exec.Command("mcopy", "-n", "-i", from, "::"+value, to).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("cannot copy %s from the stick: %w: %s", value, err, out)
			}
		}
	}
	return nil, fmt.Errorf("the boot entry of %s has no options", path)
}

// agentInit is the first program of an early boot that is looked at.
const agentInit = `#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /proc /sys /dev /run /tmp /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for udev in /usr/lib/systemd/systemd-udevd /lib/systemd/systemd-udevd /usr/bin/udevadm; do
	[ -x $udev ] && ln -sf $udev /run/systemd-udevd && break
done
(exec -a systemd-udevd /run/systemd-udevd --daemon) || /run/systemd-udevd --daemon
udevadm trigger --type=subsystems --action=add
udevadm trigger --type=devices --action=add
modprobe -a virtio_console btrfs loop isofs 2>/dev/null
udevadm settle
exec /agent
`

// addAgent makes an initramfs that has the agent: the kernel unpacks one archive
// after the other.
func (img *image) addAgent(dir string) error {
	root := filepath.Join(dir, "early")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "agent-init"), []byte(agentInit), 0o755); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(root, "agent"), "sproutd.org/sproutd/tests/vm/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build the agent: %w: %s", err, out)
	}
	img.early = filepath.Join(dir, "initrd-with-agent")
	pack := exec.Command("sh", "-ec", `
		cat "$0" >"$1"
		truncate -s %512 "$1"
		cd "$2"
		printf 'agent\nagent-init\n' | cpio --quiet -o -H newc >>"$1"`, img.initrd, img.early, root)
	if out, err := pack.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot pack the agent: %w: %s", err, out)
	}
	return nil
}

// disk is a drive of a machine, with the data that is on it: it lives on when
// the machine is switched off.
type disk struct {
	name   string // its serial number too
	bus    string // usb, nvme, virtio, sata
	file   string // qcow2
	limit  int64  // bytes that can be written in a second, 0 for any number
	slow   int64  // bytes that can be read in a second, 0 for any number
	record string // file for a log of all that is written, "" for none
	out    bool   // has been pulled
}

// path is the name that udev gives the disk in the guest.
func (d *disk) path() string {
	switch d.bus {
	case "usb":
		return "/dev/disk/by-id/usb-QEMU_QEMU_HARDDISK_" + d.name + "-0:0"
	case "nvme":
		return "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_" + d.name
	case "sata":
		return "/dev/disk/by-id/ata-QEMU_HARDDISK_" + d.name
	}
	return "/dev/disk/by-id/virtio-" + d.name
}

// machine is a computer: disks that keep their data, and QEMU while it is on.
type machine struct {
	t      testing.TB
	live   *image // of its sticks
	dir    string // of its disks and logs
	disks  []*disk
	memory int // MiB
	vars   string
	boots  int
	told   []promise // by the writer, in the last boot
	*running
}

// running is a machine that is on.
type running struct {
	qemu    *exec.Cmd
	ended   chan struct{}
	console *console
	monitor *monitor
	agent   *rpc.Client
	unlock  func()
	again   func() // starts it as it was started

	noted    chan struct{} // closed when promises is complete
	promises []promise
}

// newMachine gives a machine without disks, switched off.
func newMachine(t testing.TB) *machine {
	t.Helper()
	return newMachineIn(t, filepath.Join(artefacts, strings.ReplaceAll(t.Name(), "/", "_")))
}

// needVM skips a test where there is no stick to boot. That is not for testenv to
// fail: these tests have a command of their own.
func needVM(t testing.TB) {
	t.Helper()
	if live == nil {
		t.Skip("needs a virtual machine: run `sudo make test-vm`")
	}
}

func newMachineIn(t testing.TB, dir string) *machine {
	t.Helper()
	needVM(t)
	m := &machine{t: t, live: live, dir: dir, memory: 2048}
	must(t, os.RemoveAll(m.dir))
	must(t, os.MkdirAll(m.dir, 0o755))
	m.vars = filepath.Join(m.dir, "firmware-variables")
	copyFile(t, firmware("VARS"), m.vars)
	began := time.Now()
	t.Cleanup(func() {
		if m.running != nil {
			m.cut()
		}
		if t.Failed() {
			t.Logf("the disks and logs of the machine are in %s", m.dir)
			return
		}
		t.Logf("took %.0f s, %d boots", time.Since(began).Seconds(), m.boots)
		for _, d := range m.disks {
			_ = os.Remove(d.file)
		}
	})
	return m
}

// firmware is a file of OVMF.
func firmware(what string) string {
	for _, pattern := range []string{
		"/usr/share/OVMF/OVMF_%s_4M.fd", "/usr/share/edk2/ovmf/OVMF_%s_4M.fd",
		"/usr/share/OVMF/OVMF_%s.fd", "/usr/share/edk2/ovmf/OVMF_%s.fd",
	} {
		if path := fmt.Sprintf(pattern, what); exists(path) {
			return path
		}
	}
	return "OVMF_" + what + ".fd"
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// stick adds a copy of the live stick.
func (m *machine) stick() *disk {
	m.t.Helper()
	return m.add("usb", fmt.Sprintf("STICK%d", len(m.disks)), 0, m.live.path)
}

// disk adds an empty disk.
func (m *machine) disk(bus string, size int64) *disk {
	m.t.Helper()
	return m.add(bus, fmt.Sprintf("DISK%d", len(m.disks)), size, "")
}

// add makes a disk that reads what is in base, a raw image, where nothing was
// written to it yet.
func (m *machine) add(bus, name string, size int64, base string) *disk {
	m.t.Helper()
	d := m.overlay(bus, name, base)
	if base == "" {
		host(m.t, "qemu-img", "create", "-q", "-f", "qcow2", d.file, strconv.FormatInt(max(size, 1<<20), 10))
	} else if size > 0 {
		host(m.t, "qemu-img", "resize", "-q", d.file, strconv.FormatInt(size, 10))
	}
	m.disks = append(m.disks, d)
	return d
}

// overlay makes what a disk is kept in.
func (m *machine) overlay(bus, name, base string) *disk {
	m.t.Helper()
	d := &disk{name: name, bus: bus, file: filepath.Join(m.dir, name+".qcow2")}
	if base != "" {
		host(m.t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", d.file)
	}
	return d
}

// boot switches the machine on and lets the firmware find what to boot. It
// returns when the system is up.
func (m *machine) boot() {
	m.t.Helper()
	m.start(m.disks,
		"-drive", "if=pflash,format=raw,readonly=on,file="+firmware("CODE"),
		"-drive", "if=pflash,format=raw,file="+m.vars)
	m.awaitSystem()
}

// bootWith boots the stick's kernel without firmware, which is quicker, with
// more words on its command line.
func (m *machine) bootWith(words ...string) {
	m.t.Helper()
	m.startWith(words...)
	m.awaitSystem()
}

// startEarlyBoot boots the stick's kernel and initramfs and stops there: the agent
// is the first program, with udev beside it.
func (m *machine) startEarlyBoot() {
	m.t.Helper()
	m.start(m.disks, "-kernel", m.live.kernel, "-initrd", m.live.early,
		"-append", m.live.options+" rdinit=/agent-init")
}

// startWith is bootWith for a system that may not come up.
func (m *machine) startWith(words ...string) {
	m.t.Helper()
	m.start(m.disks, "-kernel", m.live.kernel, "-initrd", m.live.initrd,
		"-append", strings.Join(append([]string{m.live.options}, words...), " "))
}

// start switches the machine on with some of its disks.
func (m *machine) start(disks []*disk, args ...string) {
	m.t.Helper()
	if m.running != nil {
		m.t.Fatal("the machine is on already")
	}
	m.boots++
	r := &running{
		ended: make(chan struct{}), noted: make(chan struct{}), unlock: lock(m.t),
		again: func() { m.t.Helper(); m.start(disks, args...) },
	}
	log, err := os.Create(filepath.Join(m.dir, fmt.Sprintf("console-%d.log", m.boots)))
	must(m.t, err)
	r.console = &console{log: log, changed: make(chan struct{}), panicked: make(chan struct{})}
	ours, theirs, err := socketPairs(3)
	must(m.t, err)

	all := []string{
		"-machine", "q35,usb=off", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(m.memory),
		"-accel", accelerator, "-nodefaults", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-chardev", "socket,id=monitor,fd=3", "-mon", "chardev=monitor,mode=control",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=calls,fd=4", "-device", "virtserialport,chardev=calls,name=" + filepath.Base(guest.CallPort),
		"-chardev", "socket,id=promises,fd=5", "-device", "virtserialport,chardev=promises,name=" + filepath.Base(guest.PromisePort),
		"-device", "qemu-xhci,id=usb",
	}
	for slot := range slots {
		all = append(all, "-device", fmt.Sprintf("pcie-root-port,id=slot%d,chassis=%d", slot, slot+1))
	}
	for _, d := range m.disks {
		if d.out {
			continue
		}
		all = append(all, m.nodes(d)...)
		if slices.Contains(disks, d) {
			all = append(all, "-device", text(m.device(d)))
		}
	}
	r.qemu = exec.Command(qemu, append(all, args...)...)
	r.qemu.Stdout, r.qemu.Stderr = r.console, r.console
	r.qemu.ExtraFiles = theirs
	r.qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	must(m.t, r.qemu.Start())
	go func() {
		defer close(r.ended)
		_ = r.qemu.Wait() // killed, mostly
	}()
	for _, f := range theirs {
		_ = f.Close()
	}
	r.monitor = newMonitor(ours[0])
	r.agent = jsonrpc.NewClient(ours[1])
	go r.note(m.disks, ours[2]) // until the connection ends, with QEMU
	m.running = r
	m.qmp("qmp_capabilities", nil)
}

// slots is how many disks that are not USB or SATA can be plugged in.
const slots = 4

// nodes gives QEMU's arguments for what is behind a disk: the file, and what is
// done to the data on the way there.
func (m *machine) nodes(d *disk) []string {
	nodes := []map[string]any{
		{"driver": "file", "filename": d.file, "discard": "unmap"},
		{"driver": "qcow2", "discard": "unmap"},
	}
	var args []string
	if d.limit > 0 || d.slow > 0 {
		group := map[string]any{"qom-type": "throttle-group", "id": d.name + "-limit", "limits": map[string]any{"bps-write": d.limit, "bps-read": d.slow}}
		args = append(args, "-object", text(group))
		nodes = append(nodes, map[string]any{"driver": "throttle", "throttle-group": d.name + "-limit"})
	}
	if d.record != "" {
		must(m.t, os.WriteFile(d.record, nil, 0o644))
		args = append(args, "-blockdev", text(map[string]any{"driver": "file", "filename": d.record, "node-name": d.name + "-log"}))
		nodes = append(nodes, map[string]any{"driver": "blklogwrites", "log": d.name + "-log", "log-sector-size": 512})
	}
	for i, node := range nodes {
		node["node-name"] = fmt.Sprintf("%s-%d", d.name, i)
		if i > 0 {
			node["file"] = fmt.Sprintf("%s-%d", d.name, i-1)
		}
		if i == len(nodes)-1 {
			node["node-name"] = d.name + "-top"
		}
		args = append(args, "-blockdev", text(node))
	}
	return args
}

// device is what the guest sees of a disk.
func (m *machine) device(d *disk) map[string]any {
	index := slices.Index(m.disks, d)
	device := map[string]any{"id": d.name, "drive": d.name + "-top", "serial": d.name, "bootindex": index + 1}
	switch d.bus {
	case "usb":
		device["driver"], device["bus"], device["removable"] = "usb-storage", "usb.0", true
	case "sata":
		device["driver"], device["bus"] = "ide-hd", fmt.Sprintf("ide.%d", index)
	case "nvme":
		device["driver"], device["bus"] = "nvme", fmt.Sprintf("slot%d", index)
	default:
		device["driver"], device["bus"] = "virtio-blk-pci", fmt.Sprintf("slot%d", index)
		// QEMU merges requests up to the 1024 pieces that one system call may have,
		// and blklogwrites adds one to each: "Input/output error" in the guest.
		device["request-merging"] = d.record == ""
	}
	return device
}

func text(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(raw)
}

// promise is what the writer in the guest told, and how long the logs of what
// was written to the disks were then.
type promise struct {
	line []byte
	logs map[*disk]int64
}

// note takes note of what the writer promises. The writer goes on when it is told
// so, and not before.
func (r *running) note(disks []*disk, port net.Conn) {
	defer close(r.noted)
	defer port.Close()
	for lines := bufio.NewReader(port); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		p := promise{line, map[*disk]int64{}}
		for _, d := range disks {
			if info, err := os.Stat(d.record); d.record != "" && err == nil {
				p.logs[d] = info.Size()
			}
		}
		r.promises = append(r.promises, p)
		if _, err := port.Write([]byte{0}); err != nil {
			return
		}
	}
}

// promised gives what the writer told, all of it or as long as may says so. The
// machine has to be off.
func promised(promises []promise, may func(promise) bool) []byte {
	var told []byte
	for _, p := range promises {
		if may == nil || may(p) {
			told = append(told, p.line...)
		}
	}
	return told
}

// awaitAgent waits for the agent of a machine that was just switched on. A kernel
// that changes its own code while another processor runs it dies now and then in
// QEMU's emulation, early in the boot: such a machine is switched on again.
func (m *machine) awaitAgent() {
	m.t.Helper()
	for {
		var id string
		err := m.tryCall("Boot", guest.None{}, &id, bootTime)
		if err == nil {
			return
		}
		if !strings.Contains(m.console.tail(100), "Oops: int3") {
			m.fail("the machine does not boot: %v", err)
		}
		m.t.Logf("boot %d: %v (int3): once more", m.boots, err)
		again := m.again
		m.cut()
		again()
	}
}

// awaitSystem waits until systemd says that all is up.
func (m *machine) awaitSystem() {
	m.t.Helper()
	began := time.Now()
	m.awaitAgent()
	up := m.runFor(bootTime, "systemctl", "is-system-running", "--wait")
	m.t.Logf("boot %d: %s after %.1f s", m.boots, up.Text, time.Since(began).Seconds())
	if strings.TrimSpace(up.Text) != "running" {
		m.t.Errorf("the system is %s", m.sh("systemctl is-system-running; systemctl --failed --no-legend --plain; systemctl list-jobs").Text)
	}
	m.call("Connect", guest.None{}, &guest.None{}, callTime)
}

// call asks the agent for something.
func (m *machine) call(method string, argument, reply any, quiet time.Duration) {
	m.t.Helper()
	if err := m.tryCall(method, argument, reply, quiet); err != nil {
		m.fail("%s: %v", method, err)
	}
}

func (m *machine) tryCall(method string, argument, reply any, quiet time.Duration) error {
	if m.running == nil {
		return errors.New("the machine is off")
	}
	timer := time.NewTimer(patient(quiet))
	defer timer.Stop()
	select {
	case call := <-m.agent.Go(guest.Service+"."+method, argument, reply, make(chan *rpc.Call, 1)).Done:
		return call.Error
	case <-m.ended:
		return errors.New("the machine has switched itself off")
	case <-m.console.panicked:
		return errors.New("the kernel of the machine has panicked")
	case <-timer.C:
		return fmt.Errorf("no answer from the machine in %v", patient(quiet))
	}
}

// fail ends the test with the last words of the console.
func (m *machine) fail(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("%s\nthe console said last:\n%s", fmt.Sprintf(format, args...), m.console.tail(40))
}

// sh runs a shell script in the guest.
func (m *machine) sh(script string) guest.Output {
	m.t.Helper()
	return m.runFor(moveTime, "sh", "-c", script)
}

// run runs a program that has to succeed, and gives what it printed.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out := m.runFor(moveTime, args...)
	if out.Code != 0 {
		m.fail("%s ended with %d: %s", strings.Join(args, " "), out.Code, out.Text)
	}
	return strings.TrimSpace(out.Text)
}

func (m *machine) runFor(quiet time.Duration, args ...string) (out guest.Output) {
	m.t.Helper()
	m.call("Run", guest.Command{Args: args, Timeout: patient(quiet)}, &out, quiet+callTime)
	return out
}

// sprout is the one that is mounted at /, as the service shows it.
func (m *machine) sprout() client.Sprout {
	m.t.Helper()
	objects := m.objects()
	i := slices.IndexFunc(objects.Sprouts, func(s client.Sprout) bool { return s.MountPoint == "/" })
	if i < 0 {
		m.fail("the service shows no sprout at /: %+v", objects.Sprouts)
	}
	return objects.Sprouts[i]
}

func (m *machine) objects() (objects client.Objects) {
	m.t.Helper()
	var raw []byte
	m.call("Objects", guest.None{}, &raw, callTime)
	must(m.t, json.Unmarshal(raw, &objects))
	return objects
}

// job starts one with sproutctl and gives its path.
func (m *machine) job(args ...string) string {
	m.t.Helper()
	before := m.objects().Jobs
	m.run(append([]string{"sproutctl"}, append(args, "--no-wait")...)...)
	for _, job := range m.objects().Jobs {
		if !slices.ContainsFunc(before, func(b client.Job) bool { return b.Path == job.Path }) {
			return job.Path
		}
	}
	m.fail("sproutctl %v started no job", args)
	return ""
}

// at waits for a job to get to a step and to a part of its work, or to end, and
// gives it as it is then.
func (m *machine) at(path string, step uint32, progress float64) (job client.Job) {
	m.t.Helper()
	var raw []byte
	m.call("AwaitPoint", guest.Point{Job: path, Step: step, Progress: progress, Timeout: patient(moveTime)}, &raw, moveTime+callTime)
	must(m.t, json.Unmarshal(raw, &job))
	return job
}

// end waits for the end of a job.
func (m *machine) end(path string) client.Job {
	m.t.Helper()
	return m.at(path, math.MaxUint32, 0)
}

// await waits until the service shows something of the sprout.
func (m *machine) await(what guest.Condition) (sprout client.Sprout) {
	m.t.Helper()
	what.Timeout = patient(moveTime)
	var raw []byte
	m.call("AwaitSprout", what, &raw, moveTime+callTime)
	must(m.t, json.Unmarshal(raw, &sprout))
	return sprout
}

// finish waits for the end of a job, which has to be a good one.
func (m *machine) finish(path string) {
	m.t.Helper()
	if job := m.end(path); job.State != client.Done {
		m.fail("the %s ended with %s: %s", job.Operation, job.State, job.ErrorMessage)
	}
}

// kernelLog is what the kernel said since the boot.
func (m *machine) kernelLog() (log string) {
	m.t.Helper()
	m.call("KernelLog", guest.None{}, &log, callTime)
	return log
}

// wantState fails the test unless a sprout is shown in a state and with members
// of the given roles.
func wantState(t testing.TB, s client.Sprout, state string, roles ...string) {
	t.Helper()
	var got []string
	for _, m := range s.Members {
		got = append(got, m.Role)
	}
	slices.Sort(got)
	slices.Sort(roles)
	if s.State != state || !slices.Equal(got, roles) {
		t.Errorf("the sprout is %s with the members %v, want %s with %v", s.State, got, state, roles)
	}
}

// mounts are the mounts, "type at place", without those of the media and without
// what systemd mounts and unmounts by itself in /run.
func (m *machine) mounts() (list []string) {
	m.t.Helper()
	var all []guest.Mount
	m.call("Mounts", guest.None{}, &all, callTime)
	for _, mount := range all {
		if !strings.HasPrefix(mount.Point, "/run/") {
			list = append(list, mount.Type+" at "+mount.Point)
		}
	}
	return list
}

// files reads all that is under a directory.
func (m *machine) files(dir string, without ...string) (files guest.Files) {
	m.t.Helper()
	m.call("Manifest", guest.Tree{Dir: dir, Without: without}, &files, readTime)
	return files
}

// wantFiles reads all files again, from the devices, and compares.
func (m *machine) wantFiles(dir string, want guest.Files, without ...string) {
	m.t.Helper()
	m.call("DropCaches", guest.None{}, &guest.None{}, callTime)
	var differ []string
	m.call("Compare", guest.Tree{Dir: dir, Reference: want, Without: without}, &differ, readTime)
	for _, line := range differ {
		m.t.Error(line)
	}
}

// session starts a session from the stick, which is the first disk, and plugs in
// the other disks. It is as after a boot, but quicker: the memory of a machine
// that was booted before is restored, and a stick that was just booted is still
// as it was. What has to be seen of a boot itself needs [machine.bootWith].
func (m *machine) session() {
	m.t.Helper()
	if live.memory == "" {
		first := newMachineIn(m.t, filepath.Join(artefacts, "session"))
		first.stick()
		first.bootWith()
		first.save(filepath.Join(artefacts, "session", "memory"))
		live.memory = filepath.Join(artefacts, "session", "memory")
	}
	m.start(m.disks[:1], "-incoming", "exec:cat "+live.memory)
	m.awaitAgent()
	for _, d := range m.disks[1:] {
		m.plug(d)
		m.awaitDisk(d)
	}
}

// save writes the memory of a machine into a file and switches it off.
func (m *machine) save(path string) {
	m.t.Helper()
	m.qmp("migrate-set-capabilities", map[string]any{"capabilities": []map[string]any{{"capability": "events", "state": true}}})
	m.qmp("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 33})
	m.qmp("migrate", map[string]any{"uri": "exec:cat >" + path})
	m.monitor.await(m, bootTime, "MIGRATION", func(data map[string]any) bool { return data["status"] == "completed" })
	m.cut()
}

// awaitDisk waits until udev has named a disk.
func (m *machine) awaitDisk(d *disk) {
	m.t.Helper()
	m.run("udevadm", "wait", "--settle", d.path())
}

// pull unplugs a disk while the machine is on.
func (m *machine) pull(d *disk) {
	m.t.Helper()
	m.monitor.forget()
	m.qmp("device_del", map[string]any{"id": d.name})
	m.monitor.await(m, eventTime, "DEVICE_DELETED", func(data map[string]any) bool { return data["device"] == d.name })
	d.out = true
}

// plug plugs a disk in that was pulled in this boot.
func (m *machine) plug(d *disk) {
	m.t.Helper()
	m.qmp("device_add", m.device(d))
	d.out = false
}

// qmp gives QEMU a command.
func (m *machine) qmp(command string, arguments map[string]any) {
	m.t.Helper()
	if err := m.monitor.command(command, arguments); err != nil {
		m.fail("QEMU refuses %s %v: %v", command, arguments, err)
	}
}

// cut cuts the power: what QEMU was told to write is all that is on the disks.
func (m *machine) cut() {
	m.t.Helper()
	_ = m.qemu.Process.Kill() // it may be off
	m.off()
}

// shutdown has the system switch the machine off.
func (m *machine) shutdown() {
	m.t.Helper()
	_ = m.tryCall("Run", guest.Command{Args: []string{"systemctl", "poweroff"}, Timeout: patient(callTime)}, &guest.Output{}, callTime)
	select {
	case <-m.ended:
	case <-time.After(patient(offTime)):
		m.fail("the system does not switch the machine off")
	}
	m.off()
}

// off waits for the end of QEMU.
func (m *machine) off() {
	<-m.ended
	<-m.noted
	m.told = m.promises
	_ = m.agent.Close()
	_ = m.monitor.conn.Close()
	_ = m.console.log.Close()
	m.unlock()
	m.running = nil
}

// lock waits until no other QEMU of these tests is running on this machine; the
// program itself is the lock, so that nothing is left behind.
func lock(t testing.TB) (unlock func()) {
	t.Helper()
	f, err := os.Open(qemu)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	return func() { _ = f.Close() }
}

// socketPairs gives n connections: our ends, and the other ends as files.
func socketPairs(n int) (ours []net.Conn, theirs []*os.File, err error) {
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("cannot connect to QEMU: %w", err)
		}
		our := os.NewFile(uintptr(fds[0]), "qemu")
		conn, err := net.FileConn(our)
		_ = our.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("cannot connect to QEMU: %w", err)
		}
		ours, theirs = append(ours, conn), append(theirs, os.NewFile(uintptr(fds[1]), "qemu"))
	}
	return ours, theirs, nil
}

// console is what the serial port says: a log, and words to wait for where no
// agent can tell.
type console struct {
	log *os.File

	mu       sync.Mutex
	text     bytes.Buffer
	changed  chan struct{}
	panicked chan struct{} // closed when the kernel has
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	words := []byte("Kernel panic")
	before := bytes.Contains(c.text.Bytes(), words)
	c.text.Write(p)
	if !before && bytes.Contains(c.text.Bytes(), words) {
		close(c.panicked)
	}
	close(c.changed)
	c.changed = make(chan struct{})
	return c.log.Write(p)
}

// tail gives the last n lines.
func (c *console) tail(n int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(c.text.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// says waits for words on the console.
func (m *machine) says(pattern string) {
	m.t.Helper()
	words := regexp.MustCompile(pattern)
	timer := time.NewTimer(patient(bootTime))
	defer timer.Stop()
	for {
		m.console.mu.Lock()
		found, changed := words.Match(m.console.text.Bytes()), m.console.changed
		m.console.mu.Unlock()
		if found {
			return
		}
		select {
		case <-changed:
		case <-m.ended:
			m.fail("the machine went off and did not say %q", pattern)
		case <-m.console.panicked:
			m.fail("the kernel of the machine has panicked, and did not say %q", pattern)
		case <-timer.C:
			m.fail("the console does not say %q", pattern)
		}
	}
}

// monitor is the connection to QEMU itself.
type monitor struct {
	conn    net.Conn
	replies chan message

	mu      sync.Mutex
	events  []message
	changed chan struct{}
}

type message struct {
	QMP    *struct{}
	Event  string
	Data   map[string]any
	Return json.RawMessage
	Error  *struct{ Desc string }
}

// newMonitor begins to read what QEMU says, to the end of the connection, which
// comes with that of QEMU.
func newMonitor(conn net.Conn) *monitor {
	q := &monitor{conn: conn, replies: make(chan message, 1), changed: make(chan struct{})}
	go q.read(conn)
	return q
}

func (q *monitor) read(in io.Reader) {
	defer close(q.replies)
	for decoder := json.NewDecoder(in); ; {
		var m message
		if decoder.Decode(&m) != nil {
			return
		}
		switch {
		case m.QMP != nil: // the greeting
			continue
		case m.Event == "":
			q.replies <- m
			continue
		}
		q.mu.Lock()
		q.events = append(q.events, m)
		close(q.changed)
		q.changed = make(chan struct{})
		q.mu.Unlock()
	}
}

func (q *monitor) command(name string, arguments map[string]any) error {
	request := map[string]any{"execute": name}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if _, err := q.conn.Write([]byte(text(request) + "\n")); err != nil {
		return err
	}
	select {
	case reply, ok := <-q.replies:
		if !ok {
			return errors.New("QEMU has ended")
		}
		if reply.Error != nil {
			return errors.New(reply.Error.Desc)
		}
		return nil
	case <-time.After(patient(eventTime)):
		return errors.New("no answer")
	}
}

func (q *monitor) await(m *machine, quiet time.Duration, name string, is func(map[string]any) bool) {
	m.t.Helper()
	timer := time.NewTimer(patient(quiet))
	defer timer.Stop()
	for {
		q.mu.Lock()
		found, changed := slices.ContainsFunc(q.events, func(e message) bool { return e.Event == name && is(e.Data) }), q.changed
		q.mu.Unlock()
		if found {
			return
		}
		select {
		case <-changed:
		case <-m.ended:
			m.fail("QEMU ended before it said %s", name)
		case <-timer.C:
			m.fail("QEMU does not say %s", name)
		}
	}
}

// forget drops the events that came so far.
func (q *monitor) forget() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.events = nil
}

// host runs a program on this machine.
func host(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	must(t, cmp.Or(err, os.WriteFile(to, data, 0o644)))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
