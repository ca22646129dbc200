package data_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sproutd.org/sproutd/tests/testenv"
)

// generate runs the generator of the dracut module with a kernel command line and
// gives the directory that it wrote to.
func generate(t *testing.T, cmdline string) string {
	t.Helper()
	dir := t.TempDir()
	file, early := filepath.Join(dir, "cmdline"), filepath.Join(dir, "early")
	if err := os.WriteFile(file, []byte(cmdline+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(early, 0o755); err != nil {
		t.Fatal(err)
	}
	script := `mount --bind "$0" /proc/cmdline && exec sh dracut/70sprout/sprout-generator.sh normal "$1" late`
	out, err := exec.CommandContext(t.Context(), "unshare", "--mount", "sh", "-c", script, file, early).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("the generator: %v: %s", err, out)
	}
	return early
}

func TestTheRootOfADracutInitramfsIsAMountOfOurType(t *testing.T) {
	testenv.NeedRoot(t)
	dir := generate(t, `quiet root=UUID=1234 root=sprout:LABEL=MY\x20LIVE%d rd.sprout.check`)
	unit := read(t, filepath.Join(dir, "sysroot.mount"))
	// A % is special in a unit.
	for _, line := range []string{`What=sprout:LABEL=MY\x20LIVE%%d`, "Where=/sysroot", "Type=sprout", "TimeoutSec=infinity"} {
		if !strings.Contains(unit, line+"\n") {
			t.Errorf("the unit has no %s:\n%s", line, unit)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "initrd-root-fs.target.requires", "sysroot.mount")); err != nil {
		t.Errorf("the boot would not wait for the root: %v", err)
	}
}

func TestTheGeneratorLeavesOtherRootsAlone(t *testing.T) {
	testenv.NeedRoot(t)
	for _, cmdline := range []string{"quiet", "root=UUID=1234", "root=live:LABEL=sprout:x", "rd.root=sprout:LABEL=x", "root=sprout:LABEL=x root=/dev/sda1"} {
		if left, _ := os.ReadDir(generate(t, cmdline)); len(left) > 0 {
			t.Errorf("%s: the generator wrote %s", cmdline, left)
		}
	}
}

// Systemd cuts off what a * in the middle of a path of TEST stands for.
func TestTheUdevRuleLooksForNoUUIDWithAStar(t *testing.T) {
	for line := range strings.Lines(read(t, "65-sproutd.rules")) {
		if !strings.HasPrefix(line, "#") && strings.Contains(line, "/*/") {
			t.Errorf("udev will not find it: %s", line)
		}
	}
}

func TestInstallAndUninstallAreOfOneMind(t *testing.T) {
	dir := t.TempDir()
	files := func() (all []string) {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				all = append(all, strings.TrimPrefix(path, dir))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	run := func(target string) {
		out, err := exec.CommandContext(t.Context(), "make", "-s", "-C", "..", target, "DESTDIR="+dir).CombinedOutput()
		if err != nil {
			t.Fatalf("make %s: %v\n%s", target, err, out)
		}
	}
	run("install")
	installed := files()
	for _, name := range []string{
		"/usr/libexec/sprout-initrd",
		"/usr/lib/udev/rules.d/65-sproutd.rules",
		"/usr/lib/dracut/modules.d/70sprout/module-setup.sh",
		"/usr/share/initramfs-tools/hooks/sprout",
		"/usr/share/initramfs-tools/scripts/sprout",
	} {
		if !slices.Contains(installed, name) {
			t.Errorf("%s is not installed", name)
		}
	}
	run("uninstall")
	if left := files(); len(left) > 0 {
		t.Errorf("make uninstall leaves %s", left)
	}
}
