// Package testenv says what a test may expect of the machine it runs on.
//
// Tests that need root call [NeedRoot] first. Without root they are skipped,
// with the reason; with SPROUTD_TEST_ROOT=1 in the environment, which `make
// test` and CI set, a test that would be skipped fails instead.
package testenv

import (
	"os"
	"os/exec"
	"testing"
)

// Required reports whether a skip counts as a failure in this run.
func Required() bool { return os.Getenv("SPROUTD_TEST_ROOT") == "1" }

// NeedRoot skips t unless it runs as root on a kernel with Btrfs, loop and
// zram devices.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root: run `sudo make test`")
	}
	for _, node := range []string{"/dev/btrfs-control", "/dev/loop-control", "/sys/class/zram-control/hot_add"} {
		if _, err := os.Stat(node); err != nil {
			Skip(t, "needs "+node+": load the btrfs, loop and zram modules")
		}
	}
}

// NeedTool skips t unless every named program is installed.
func NeedTool(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			Skip(t, "needs the program "+name+": `sudo make setup` installs it")
		}
	}
}

// Skip skips t for the given reason, or fails it where nothing may be skipped.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if Required() {
		t.Fatalf("this run must not skip a test: %s", reason)
	}
	t.Skip(reason)
}
