package vm

import (
	"slices"
	"strings"
	"testing"

	"sproutd.org/sproutd/tests/vm/guest"
)

// Sizes in bytes.
const (
	mib = 1 << 20
	gib = 1 << 30
)

func TestFirmwareBootsTheStickIntoASession(t *testing.T) {
	m := newMachine(t)
	m.stick()
	m.boot()
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantSays("/ is volatile", "sproutctl", "status")
	m.wantNoComplaints()

	// The person at the screen may keep the session; who is not there may do nothing.
	// For logind nobody else is there before the session that getty began has ended.
	m.run("systemctl", "stop", "getty@tty1")
	m.run("timeout", "20", "sh", "-c", "while loginctl --no-legend list-sessions | grep -w tty1; do sleep 0.1; done")
	m.run("systemd-run", "--quiet", "--wait", "--uid=live", "--property=PAMName=login", "--property=TTYPath=/dev/tty1",
		"--property=StandardInput=tty", "--property=StandardOutput=journal", "sproutctl", "persist", "--no-ask-password", "free")
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	const notAllowed = 4
	if denied := m.sh("setpriv --reuid=nobody --clear-groups sproutctl --yes --no-ask-password reset"); denied.Code != notAllowed {
		t.Errorf("nobody in particular asks for a reset: %d %s", denied.Code, denied.Text)
	}
}

func TestWhatIsPersistedIsThereAfterEachReboot(t *testing.T) {
	m := newMachine(t)
	m.stick()
	m.session()
	m.change()
	m.run("sproutctl", "persist", "free")
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	m.run("sh", "-c", "dd if=/dev/urandom of=/home/live/large bs=1M count=200 status=none && sync -f /home")

	m.reboot()
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	m.wantChanged(true)
	before := m.sprout().Free
	m.run("sh", "-c", "rm /home/live/large && sync -f /home")
	if grown := m.await(guest.Condition{Free: before + 150*mib}).Free - before; grown < 150*mib {
		t.Errorf("a file of 200 MiB was deleted and there are %d MiB more", grown/mib)
	}

	m.reboot("rd.sprout.persist=no")
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantChanged(false)
	m.reboot()
	wantState(t, m.sprout(), "persistent", "seed", "persistent")
	m.wantChanged(true)
	m.wantNoComplaints()
}

func TestResetStartsOver(t *testing.T) {
	m := newMachine(t)
	m.stick()
	m.session()
	m.change()
	m.run("sproutctl", "persist", "free")
	m.run("sproutctl", "reset", "--yes")

	m.reboot()
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantWarning("was dropped (asked for in the last session)")
	m.wantChanged(false)
	m.change()
	m.run("sproutctl", "persist", "--yes", "free")

	m.reboot("rd.sprout.reset")
	wantState(t, m.sprout(), "volatile", "seed", "zram")
	m.wantWarning("was dropped (rd.sprout.reset)")
	m.wantChanged(false)
}

// change does to the system what people do: a package, settings, files at home.
func (m *machine) change() {
	m.t.Helper()
	m.run("sh", "-ec", `
		mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin
		printf '#!/bin/sh\necho of the package\n' >/tmp/p/usr/bin/of-the-test
		chmod 755 /tmp/p/usr/bin/of-the-test
		printf 'Package: of-the-test\nVersion: 1\nArchitecture: all\nMaintainer: none <none@example.org>\nDescription: test\n' >/tmp/p/DEBIAN/control
		dpkg-deb --build /tmp/p /tmp/p.deb
		dpkg --install /tmp/p.deb
		echo changed >/etc/motd
		su live -c 'echo mine >~/mine'
		sync -f /`)
}

// wantChanged fails the test unless what change did is there, or is not.
func (m *machine) wantChanged(want bool) {
	m.t.Helper()
	got := m.sh("dpkg --status of-the-test && of-the-test && grep changed /etc/motd && cat /home/live/mine")
	if there := got.Code == 0 && strings.HasSuffix(got.Text, "of the package\nchanged\nmine\n"); there != want {
		m.t.Errorf("the changes are there: %v, want %v: %s", there, want, got.Text)
	}
}

// reboot has the system switch the machine off, and boots it.
func (m *machine) reboot(words ...string) {
	m.t.Helper()
	m.shutdown()
	m.bootWith(words...)
}

// wantSays runs a program that has to succeed and to say something.
func (m *machine) wantSays(words string, args ...string) {
	m.t.Helper()
	if said := m.run(args...); !strings.Contains(said, words) {
		m.t.Errorf("%s says %q, not %q", strings.Join(args, " "), said, words)
	}
}

// wantWarning fails the test unless the service shows a warning with these words.
func (m *machine) wantWarning(words string) {
	m.t.Helper()
	if shown := m.sprout().Warnings; !slices.ContainsFunc(shown, func(w string) bool { return strings.Contains(w, words) }) {
		m.t.Errorf("no warning says %q: %q", words, shown)
	}
}

// wantNoComplaints fails the test if the kernel told of trouble.
func (m *machine) wantNoComplaints() {
	m.t.Helper()
	for _, line := range guest.Complaints(m.kernelLog()) {
		m.t.Errorf("the kernel says: %s", line)
	}
}
