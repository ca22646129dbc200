package daemon_test

import (
	"slices"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/daemontest"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// The journal lies in the sprout itself, so it is what was on disk when the power
// went. The next boot gives the two disks each other's names and numbers: what is
// meant is found by serial number, or by what the file system says.
func TestAPowerCutAtAnyCallLosesNothingThatWasKeptAndCanBeResumed(t *testing.T) {
	const target = "S/dev/nvme0n1" // the serial number of the disk that was named
	for _, persistence := range []string{"", "/dev/sda2"} {
		n, lost, kept := 1, 0, 0
		for ; !t.Failed(); n++ {
			k := daemontest.New()
			fsid := k.BootStick(persistence)
			l := mustStart(t, k)
			journal, reached := l.dieIn(n, fsid, flatten)
			if reached == "" {
				break
			}
			if !k.Reboot() {
				if lost++; persistence != "" {
					t.Errorf("after a cut at call %d (%s) a persistent sprout is lost", n, reached)
				}
				continue
			}
			kept++
			next, err := start(t, k, journal)
			if err != nil {
				t.Fatal(err)
			}
			err = next.do(fsid, resume)
			if fault.CodeOf(err) == fault.NothingToResume {
				again := flatten
				again.Target = "/dev/sdb" // its name now
				err = next.do(fsid, again)
				if code := fault.CodeOf(err); code == fault.WrongState || code == fault.DeviceIsMember {
					err = nil // all was done
				}
			}
			if err != nil {
				t.Errorf("after a cut at call %d (%s) it cannot go on: %v", n, reached, err)
			}
			installedOn(t, next, fsid, target)
			next.stop()
		}
		if !t.Failed() && (kept < 10 || (persistence == "") != (lost > 0)) {
			t.Errorf("of %d cuts of a system on %q %d lost it and %d did not", n-1, persistence, lost, kept)
		}
	}
}

// installedOn asserts that a sprout is on one disk alone, with all of its data,
// and that no other disk was touched.
func installedOn(t *testing.T, l *life, fsid, serial string) {
	t.Helper()
	v := l.shown(fsid)
	if v.State != plan.Installed || v.Intent != nil || !v.SafeToUnplug {
		t.Errorf("it is shown as %+v, held by %v", v, v.MediaHolders)
	}
	root := l.kernel.Mounted["/"]
	var data uint64
	for _, g := range root.Members[0].Groups {
		if g.Type == plan.Data {
			data += g.Used
		}
	}
	if root.Members[0].ID.Serial != serial || len(root.Members) != 1 || data != 450*daemontest.MiB {
		t.Errorf("%d bytes of data are on %+v", data, root.Members)
	}
	for _, d := range l.kernel.Disks {
		if d.Serial == "S/dev/sdb" && len(d.Signatures) == 0 {
			t.Error("a disk was wiped that nobody named")
		}
	}
}

// Where disks have no serial number, a record of another boot that does not say
// which member is meant may fit another disk by name and number.
func TestATargetOfAnotherBootIsNotTakenForTheDiskThatHasItsName(t *testing.T) {
	for n := 1; !t.Failed(); n += 2 {
		k := daemontest.New()
		fsid := k.BootStick("/dev/sda2")
		meant, other := k.Disks["/dev/nvme0n1"], k.Disks["/dev/sdb"]
		meant.Serial, other.Serial, other.Signatures = "", "", nil
		l := mustStart(t, k)
		journal, reached := l.dieIn(n, fsid, flatten)
		if reached == "" {
			return
		}
		touched := len(k.Touched)
		k.Reboot()
		next, err := start(t, k, journal)
		if err != nil {
			t.Fatal(err)
		}
		if err := next.do(fsid, resume); err != nil {
			again := flatten
			again.Target = meant.Path
			if err := next.do(fsid, again); err != nil && fault.CodeOf(err) != fault.DeviceIsMember {
				t.Errorf("after a cut at call %d (%s): %v", n, reached, err)
			}
		}
		if slices.Contains(k.Touched[touched:], other.Path) {
			t.Errorf("after a cut at call %d (%s) the wrong disk was used", n, reached)
		}
		if v := next.shown(fsid); v.State != plan.Installed || v.Members[0].Path != meant.Path {
			t.Errorf("after a cut at call %d (%s) it is shown as %+v", n, reached, v)
		}
		next.stop()
	}
}

// A release to a disk that a power cut ended goes on to that disk, whatever it is
// called now. What it may have left there complete is destroyed only if somebody
// says so again.
func TestAReleaseToADiskGoesOnToThatDiskAfterAPowerCut(t *testing.T) {
	resumed, complete := 0, 0
	for n := 1; !t.Failed(); n++ {
		k := daemontest.New()
		fsid := k.BootStick("/dev/sda2")
		meant, other := k.Disks["/dev/nvme0n1"], k.Disks["/dev/sdb"]
		l := mustStart(t, k)
		journal, reached := l.dieIn(n, fsid, daemon.RequestArgs{Operation: plan.Release, Target: meant.Path})
		if reached == "" {
			break
		}
		whole := len(meant.Signatures) > 0
		k.Reboot()
		next, err := start(t, k, journal)
		if err != nil {
			t.Fatal(err)
		}
		err = next.do(fsid, resume)
		if whole && fault.CodeOf(err) == fault.TargetNotEmpty {
			complete++
			err = next.do(fsid, daemon.RequestArgs{Operation: plan.Release, Target: meant.Path, Options: plan.Options{Wipe: true}})
		} else if fault.CodeOf(err) == fault.NothingToResume {
			err = next.do(fsid, daemon.RequestArgs{Operation: plan.Release, Target: meant.Path, Options: plan.Options{Wipe: whole}})
		} else {
			resumed++
		}
		if err != nil {
			t.Errorf("after a cut at call %d (%s): %v", n, reached, err)
		}
		if v := next.shown(fsid); !slices.ContainsFunc(v.Members, func(m daemon.MemberView) bool { return m.Role == plan.RoleSeed }) || !k.Copies[meant.Path] {
			t.Errorf("after a cut at call %d (%s) it is shown as %+v, with copies %v", n, reached, v, k.Copies)
		}
		if len(other.Signatures) == 0 || slices.ContainsFunc(other.Signatures, func(s block.Signature) bool { return s.Type == "btrfs" }) {
			t.Errorf("after a cut at call %d (%s) another disk was used", n, reached)
		}
		next.stop()
	}
	if !t.Failed() && (resumed == 0 || complete == 0) {
		t.Errorf("%d were resumed, and %d complete already", resumed, complete)
	}
}
