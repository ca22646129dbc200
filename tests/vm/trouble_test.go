package vm

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"sproutd.org/sproutd/dbus/client"
)

func TestTwoIdenticalSticks(t *testing.T) {
	m := newMachine(t)
	m.stick()
	m.session()
	m.change()
	m.run("sproutctl", "persist", "free")
	m.shutdown()

	m.copyOf(m.disks[0])
	m.bootWith()
	m.wantWarning("root=sprout:LABEL=SPROUTLIVE is on more than one device")
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	m.wantChanged(true)
	disk := strings.TrimRight(m.memberPath("persistent"), "0123456789")
	if seed := m.run("findmnt", "--noheadings", "--output", "SOURCE", "/run/sprout/media"); !strings.HasPrefix(seed, disk) {
		t.Errorf("the seed is on %s and the sprout on %s", seed, disk)
	}
}

func TestASproutOfAnotherSeedIsLeftAlone(t *testing.T) {
	m := newMachine(t)
	m.stick()
	disk := m.disk("virtio", 2*gib)
	m.session()
	m.run("sh", "-ec", strings.ReplaceAll(`
		truncate -s 200M /run/other.img
		mkfs.btrfs --quiet --label SPROUTLIVE -m single /run/other.img
		btrfstune -S 1 /run/other.img
		mount -o ro,loop /run/other.img /mnt
		btrfs device add --force --nodiscard DISK /mnt
		mount -o remount,rw /mnt
		echo other >/mnt/other
		umount /mnt`, "DISK", disk.path()))

	m.reboot()
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantWarning("belongs to another seed")
	m.wantSays("BHRfS", "sh", "-c", "dd status=none bs=8 count=1 skip=$((65600 / 8)) if="+disk.path())
}

func TestAFlippedByteIsNamedBeforeTheSessionStarts(t *testing.T) {
	m := newMachine(t)
	stick := m.stick()
	disk := m.disk("virtio", 3*gib)
	m.session()
	const file = "usr/share/common-licenses/GPL-3" // and others, which share its extent
	place := m.placeOnStick("/" + file)
	m.shutdown()
	flip(t, stick, place)

	m.bootWith("rd.sprout.check")
	m.says("sprout: The seed is damaged: .*" + file)
	m.wantWarning(file)
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	if job := m.end(m.job("flatten", "--yes", "--bootloader=none", disk.path())); job.State != client.Failed || !strings.Contains(job.ErrorMessage, file) {
		t.Errorf("the flatten is %s: %s", job.State, job.ErrorMessage)
	}
	m.wantSays("Input/output error", "sh", "-c", "cat /"+file+" 2>&1 >/dev/null || true")
}

func TestNonsenseOnTheCommandLineIsNamed(t *testing.T) {
	m := newMachine(t)
	m.stick()
	words := []string{
		"rd.sprout.zram=much", "rd.sprout.check=perhaps", "rd.sprout.reset=2", "rd.sprout.ram=2",
		"rd.sprout.timeout=soon", "rd.sprout.nonsense", "rd.sprout.persist=LABEL=NOTHERE",
	}
	m.bootWith(append(words, "module_blacklist=zram")...)
	for _, word := range words {
		m.says("sprout: " + word)
		m.wantWarning(word)
	}
	m.wantWarning("a file in memory is used instead")
}

func TestLittleMemoryIsNamed(t *testing.T) {
	m := newMachine(t)
	m.memory = 288
	m.stick()
	m.bootWith()
	m.wantWarning("of memory are available: this session has little room")
}

func TestWhereNothingCanBeBootedTheConsoleSaysWhy(t *testing.T) {
	for _, c := range []struct{ name, words, says string }{
		{"media", "root=sprout:LABEL=NOTHERE rd.sprout.timeout=5", "root=sprout:LABEL=NOTHERE did not appear within 5 seconds"},
		{"image", "rd.sprout.image=/LiveOS/nothere.img", "there is no rd.sprout.image=.*/LiveOS/nothere.img"},
		{"seed", "root=sprout:LABEL=ESP rd.sprout.image=/live/linux", "/live/linux.* is no seed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			m.stick()
			m.startWith(strings.Fields(c.words)...)
			m.says("sprout: .*" + c.says)
			m.says("nothing could be booted|emergency")
		})
	}
}

func TestADamagedSeedIsNoRoot(t *testing.T) {
	m := newMachine(t)
	stick := m.stick()
	m.session()
	image := m.imageOnStick()
	m.shutdown()
	flip(t, stick, image+64*1024+0x60) // in the superblock, under its checksum
	m.startWith()
	m.says("sprout: .*(is no seed|damaged|cannot use the seed)")
	m.says("nothing could be booted|emergency")
}

// copyOf adds a stick that has, to the byte, what another one has.
func (m *machine) copyOf(d *disk) {
	m.t.Helper()
	twin := m.add(d.bus, d.name+"COPY", 0, "")
	host(m.t, "qemu-img", "convert", "-O", "qcow2", d.file, twin.file)
}

func (m *machine) memberPath(role string) string {
	m.t.Helper()
	for _, member := range m.sprout().Members {
		if member.Role == role {
			return member.Path
		}
	}
	m.fail("the sprout has no member with the role %s", role)
	return ""
}

// imageOnStick is where on the stick the image of the seed begins.
func (m *machine) imageOnStick() int64 {
	m.t.Helper()
	var at, start int64
	m.call("Place", "/run/sprout/media/LiveOS/root.img", &at, callTime)
	said := m.run("sh", "-c", `cat /sys/class/block/"$(basename "$(findmnt -no SOURCE /run/sprout/media)")"/start`)
	if _, err := fmt.Sscan(said, &start); err != nil {
		m.fail("cannot find the image on the stick: %v: %s", err, said)
	}
	return start*512 + at
}

// placeOnStick is where on the stick a file of the seed begins.
func (m *machine) placeOnStick(file string) int64 {
	m.t.Helper()
	var logical, physical int64
	m.call("Place", file, &logical, callTime)
	said := m.run("sh", "-c", fmt.Sprintf(
		`btrfs-map-logical -l %d /run/sprout/media/LiveOS/root.img | sed -n 's/.*physical \([0-9]*\) .*/\1/p;q'`, logical))
	if _, err := fmt.Sscan(said, &physical); err != nil {
		m.fail("cannot find %s in the image: %v: %s", file, err, said)
	}
	return m.imageOnStick() + physical
}

// flip changes a byte of a disk.
func flip(t *testing.T, d *disk, at int64) {
	t.Helper()
	const sector = 512
	begin := at / sector * sector
	dump := host(t, "qemu-io", "-r", "-c", fmt.Sprintf("read -v %d %d", begin, sector), d.file)
	before := ""
	for line := range strings.Lines(dump) {
		var address int64
		fields := strings.Fields(line)
		if len(fields) < 17 {
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x:", &address); err != nil || address != at/16*16 {
			continue
		}
		before = fields[1+at%16]
	}
	var value int
	if _, err := fmt.Sscanf(before, "%x", &value); err != nil {
		t.Fatalf("cannot read the byte at %d: %v: %s", at, err, dump)
	}
	after := fmt.Sprintf("write -P %d %d 1", value^0xff, at)
	if out, err := exec.Command("qemu-io", "-c", after, d.file).CombinedOutput(); err != nil {
		t.Fatalf("cannot flip a byte: %v: %s", err, out)
	}
}
