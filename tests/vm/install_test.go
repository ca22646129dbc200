package vm

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/vm/guest"
)

func TestInstalledOnNVMeTheSystemBootsFromItsDiskAlone(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("nvme", 3*gib)
	m.boot()
	m.run("sh", "-ec", "printf 'size=64M,type=uefi\ntype=linux\n' | sfdisk --quiet --wipe=never --label=gpt "+disk.path()+"; udevadm settle")
	files := m.files("/", lively...)
	m.flattenAndPull(files, stick, disk.path()+"-part2")
	m.bootable(disk.path() + "-part1")
	m.shutdown()

	m.boot()
	wantState(t, m.sprout(), "installed", "disk")
	m.wantFiles("/", files, lively...)
	m.wantNoComplaints()
}

func TestInstalledOnVirtio(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("virtio", 3*gib)
	m.session()
	m.flattenAndPull(m.files("/", lively...), stick, disk.path())
}

func TestInstalledOnSATAFromAPersistentSession(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("sata", 3*gib)
	m.bootWith()
	m.run("sproutctl", "persist", "free")
	m.flattenAndPull(m.files("/", lively...), stick, disk.path())
}

func TestStickPulledInTheMiddleOfAnInstallation(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("virtio", 3*gib)
	stick.slow, disk.limit = 4*mib, 8*mib // or all of it has been read ahead by then
	m.session()
	job := m.job("flatten", "--yes", "--bootloader=none", disk.path())
	m.at(job, 0, 0.3)
	m.pull(stick)

	m.await(guest.Condition{Warning: "was unplugged while the system still needs it"})
	m.says("sproutd: .*was unplugged while the system still needs it")
	if ended := m.end(job); ended.State != client.Failed || ended.ErrorMessage == "" {
		t.Errorf("the job is %s: %s", ended.State, ended.ErrorMessage)
	}
	if m.sprout().SafeToUnplug {
		t.Error("the service says that the stick can be unplugged")
	}
}

func TestStickPulledWhileNothingGoesOn(t *testing.T) {
	m := newMachine(t)
	stick := m.stick()
	m.session()
	m.sprout() // the service is started by its first caller
	m.pull(stick)
	m.await(guest.Condition{Warning: "was unplugged while the system still needs it"})
	m.says("sproutd: .*was unplugged while the system still needs it")
}

func TestReleasedToMemoryTheSessionNeedsNoStick(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("virtio", 3*gib)
	m.bootWith("rd.sprout.ram")
	if !m.releases() {
		m.wantWarning("rd.sprout.ram: the seed stays on the media")
		return
	}
	files := m.files("/", lively...)
	m.await(guest.Condition{Safe: true})
	m.pull(stick)
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantFiles("/", files, lively...)

	m.finish(m.job("flatten", "--yes", "--bootloader=none", disk.path()))
	wantState(t, m.sprout(), "installed", "disk")
	m.wantFiles("/", files, lively...)
	m.wantNoComplaints()
}

func TestReleasedToAPartitionTheNextBootNeedsNoStick(t *testing.T) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("virtio", 4*gib)
	m.bootWith()
	m.run("sh", "-ec", "printf 'size=1G,type=linux\ntype=linux\n' | sfdisk --quiet --label=gpt "+disk.path()+"; udevadm settle")
	if !m.releases() {
		if said := m.sh("sproutctl plan release " + disk.path() + "-part1").Text; !strings.Contains(said, "the seed cannot be released") {
			t.Errorf("the plan says %q", said)
		}
		return
	}
	m.run("sproutctl", "persist", disk.path()+"-part2")
	m.change()
	files := m.files("/", lively...)
	m.finish(m.job("release", disk.path()+"-part1"))
	m.await(guest.Condition{Safe: true})
	m.pull(stick)
	m.wantFiles("/", files, lively...)
	m.wantNoComplaints()
	m.shutdown()

	m.bootWith()
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	m.wantChanged(true)
	m.wantFiles("/", files, lively...)
	m.wantNoComplaints()
}

// releases reports whether a seed can be released with this kernel; see sproutd(8).
func (m *machine) releases() bool {
	m.t.Helper()
	var major, minor int
	if _, err := fmt.Sscanf(m.run("uname", "-r"), "%d.%d", &major, &minor); err != nil {
		m.fail("what version is this kernel? %v", err)
	}
	return major < 6 || major == 6 && minor <= 18
}

// lively are the paths of files that change by themselves.
var lively = []string{
	"work", "etc/machine-id", "etc/mtab", "etc/ld.so.cache", "etc/resolv.conf", "etc/.updated", "var/.updated",
	"var/lib/systemd", "var/lib/sproutd", "var/log", "var/cache", "var/tmp", "tmp", "run", "home", "root", "boot", "efi", "mnt",
}

// flattenAndPull moves the system to a disk with a writer and a reader at work,
// pulls the stick the moment that is safe, and looks whether anything was lost.
func (m *machine) flattenAndPull(files guest.Files, stick *disk, target string) {
	m.t.Helper()
	m.call("StartWriter", "/work", &guest.None{}, callTime)
	m.call("StartReader", guest.Tree{Dir: "/", Reference: files}, &guest.None{}, readTime)
	mounts := m.mounts()
	job := m.job("flatten", "--yes", "--bootloader=none", target)
	for step := uint32(2); ; step++ {
		now := m.at(job, step, 0)
		if !slices.Equal(m.mounts(), mounts) {
			m.t.Errorf("before step %d, %s, the mounts were %q, now they are %q", step, now.Step, mounts, m.mounts())
		}
		if now.Finished() {
			break
		}
	}
	m.finish(job)
	m.await(guest.Condition{Safe: true})
	m.pull(stick)

	m.call("AwaitFsyncs", 100, &guest.None{}, moveTime)
	var wrote seedtest.WriterStats
	m.call("StopWriter", guest.None{}, &wrote, callTime)
	var read uint64
	m.call("StopReader", guest.None{}, &read, callTime)
	m.wantFiles("/", files, lively...)
	wantState(m.t, m.sprout(), "installed", "disk")
	if !slices.Equal(m.mounts(), mounts) {
		m.t.Errorf("without the stick the mounts are %q, not %q", m.mounts(), mounts)
	}
	m.wantNoComplaints()
	m.t.Logf("the writer made %d fsyncs, the slowest took %v; the reader read %d files", wrote.Fsyncs, wrote.LongestFsync, read)
}

// bootable makes an ESP from which the firmware can start the installed system.
func (m *machine) bootable(esp string) {
	m.t.Helper()
	m.run("sh", "-ec", strings.ReplaceAll(`
		mkfs.vfat -F 32 -s 1 ESP >/dev/null
		mount ESP /mnt
		bootctl install --esp-path=/mnt --no-variables
		cp /boot/vmlinuz-* /mnt/linux
		cp /boot/initrd.img-* /mnt/initrd
		printf 'title Installed\nlinux /linux\ninitrd /initrd\noptions root=UUID=%s rw console=ttyS0\n' "$(findmnt -no UUID /)" >/mnt/loader/entries/installed.conf
		umount /mnt`, "ESP", esp))
}
