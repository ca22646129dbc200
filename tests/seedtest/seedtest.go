// Package seedtest prepares seeds, sticks and disks for the root tests, the
// demo and the benchmark, and checks that a move lost nothing.
//
//   - [Build] makes a seed image, [NewStick] puts it on a "USB stick",
//     [NewDisk] makes an empty "internal disk".
//   - [TakeManifest] and [Diff] compare every byte, mode, owner, time and
//     extended attribute before and after.
//   - [StartWriter] and [StartReader] keep a tree busy while it moves.
//   - [Check] runs a full check of an unmounted filesystem.
//
// Only this package runs btrfs-progs, losetup and their like: what is shipped
// does without. Nothing here calls sync(2); strace shows that mkfs.btrfs,
// btrfstune and mke2fs use fsync(2) only.
package seedtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// Sizes in bytes.
const (
	KiB = 1 << 10
	MiB = 1 << 20
	GiB = 1 << 30
)

// New builds a seed for a test, in a directory that goes away with the test.
func New(t testing.TB, spec Spec) Seed {
	t.Helper()
	if spec.Dir == "" {
		spec.Dir = t.TempDir()
	}
	seed, err := Build(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return seed
}

// run runs a program to its end and gives what it printed. The error holds
// the program's own words.
func run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// Ctrl-C is for the program that tidies up after this one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("cannot run %s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return text, nil
}
