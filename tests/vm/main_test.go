package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// What TestMain finds for all tests.
var (
	live      *image // the stick
	artefacts string // where each test has a directory of its own
	qemu      string
	patience  = 4.0
	// accelerator is an argument of QEMU's.
	accelerator = "tcg,thread=multi"
)

// TestMain runs the tests if SPROUTD_TEST_VM=1 is set, as `make test-vm` does.
// SPROUTD_VM_IMAGE is the image of a stick with the agent in it,
// SPROUTD_VM_ARTEFACTS the directory for disks and logs. With SPROUTD_VM_KVM=1 the
// processor is a real one: that is not found out, as there are machines with a
// KVM that is there and does not work. SPROUTD_VM_PATIENCE=10 is for a machine with
// much else to do. SPROUTD_VM_SESSION is the memory of a session that an earlier run
// with the same stick has saved, session/memory in its artefacts.
func TestMain(m *testing.M) {
	if os.Getenv("SPROUTD_TEST_VM") == "1" {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func prepare() (err error) {
	if os.Getenv("SPROUTD_VM_KVM") == "1" {
		accelerator = "kvm"
	}
	if factor, err := strconv.ParseFloat(os.Getenv("SPROUTD_VM_PATIENCE"), 64); err == nil {
		patience = factor
	}
	if qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return fmt.Errorf("%w: `sudo make setup` installs it", err)
	}
	if artefacts, err = filepath.Abs(os.Getenv("SPROUTD_VM_ARTEFACTS")); err != nil {
		return err
	}
	if err := os.MkdirAll(artefacts, 0o755); err != nil {
		return err
	}
	path, err := filepath.Abs(os.Getenv("SPROUTD_VM_IMAGE"))
	if err != nil {
		return err
	}
	if live, err = openImage(path, artefacts); err == nil {
		live.memory = os.Getenv("SPROUTD_VM_SESSION")
	}
	return err
}
