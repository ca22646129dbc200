package root

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// incompressible fills dir with n files of the given size that do not compress, the same
// ones each time.
func incompressible(dir string, n, size int) error {
	random := rand.NewChaCha8([32]byte([]byte("the same noise for the same size")))
	data := make([]byte, size)
	var errs []error
	for i := range n {
		_, _ = random.Read(data)
		errs = append(errs, os.WriteFile(filepath.Join(dir, fmt.Sprintf("noise-%d-%d", size, i)), data, 0o644))
	}
	return errors.Join(errs...)
}

// layout is a sprout of which the least size of a target is asked.
type layout struct {
	name string
	seed seedtest.Spec
	// write is what the session writes; nil for nothing.
	write func(dir string) error
	// persist asks for the size for a persist, not a flatten.
	persist bool
}

func layouts() []layout {
	files := func(n, size int) func(string) error {
		return func(dir string) error { return incompressible(dir, n, size) }
	}
	const kib, mib = seedtest.KiB, seedtest.MiB
	small, large, bits := files(4000, 24*kib), files(2, 150*mib), files(120, mib)
	return []layout{
		{name: "small files", seed: seedtest.Spec{Content: small}},
		{name: "small files, zstd, dup", seed: seedtest.Spec{Content: small, Compress: "zstd", Metadata: "dup"}},
		{name: "large files", seed: seedtest.Spec{Content: large}},
		{name: "large files, dup", seed: seedtest.Spec{Content: large, Metadata: "dup"}},
		{name: "many small extents", seed: seedtest.Spec{Content: bits}},
		{name: "rootdir", seed: seedtest.Spec{Content: bits, Method: seedtest.RootDir}},
		{name: "rootdir, dup", seed: seedtest.Spec{Content: bits, Method: seedtest.RootDir, Metadata: "dup"}},
		{name: "a bit of everything", seed: seedtest.Spec{Compress: "zstd"}},
		{name: "nearly empty", seed: seedtest.Spec{Content: files(1, 4*mib)}},
		{name: "nearly empty, dup", seed: seedtest.Spec{Content: files(1, 4*mib), Metadata: "dup"}},
		{name: "much written", seed: seedtest.Spec{Content: files(1, 4*mib)}, write: bits},
		{name: "persist of nothing", seed: seedtest.Spec{Content: bits}, persist: true},
		{name: "persist of small files", seed: seedtest.Spec{Content: files(1, 4*mib)}, write: small, persist: true},
		{name: "persist of a large file", seed: seedtest.Spec{Content: files(1, 4*mib)}, write: files(1, 200*mib), persist: true},
	}
}

// sprout makes the layout.
func (l layout) sprout(t *testing.T, w *harness.World, seed string) client.Sprout {
	t.Helper()
	s := w.Create(seed, client.CreateOptions{})
	if l.write != nil {
		if err := l.write(s.MountPoint); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, "btrfs", "filesystem", "sync", s.MountPoint)
	return s
}

// bare does the move by hand, with nobody asking whether it can be done, and
// gives the first error.
func (l layout) bare(s client.Sprout, target string) error {
	commands := [][]string{{"add", "-f", target, s.MountPoint}}
	for _, role := range []string{"zram", "seed"} {
		for _, m := range s.Members {
			if m.Role == role && (role != "seed" || !l.persist) {
				commands = append(commands, []string{"remove", m.Path, s.MountPoint})
			}
		}
	}
	for _, args := range commands {
		if out, err := exec.Command("btrfs", append([]string{"device"}, args...)...).CombinedOutput(); err != nil {
			return fmt.Errorf("device %s: %w: %s", args[0], err, out)
		}
	}
	return stillUsable(s.MountPoint)
}

// stillUsable writes a small file to the end.
func stillUsable(dir string) error {
	f, err := os.Create(filepath.Join(dir, "a small file after the move"))
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 4*seedtest.KiB))
	return errors.Join(err, f.Sync(), f.Close())
}

// tooMuch is how much larger than the true need the least size may be.
const tooMuch = 1.15

func TestTheLeastTargetSizeSuffices(t *testing.T) {
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			w := harness.New(t, programs)
			seed := seedtest.New(t, l.seed).Path
			operation, start := "flatten", w.Flatten
			options := client.MoveOptions{Bootloader: "none"}
			if l.persist {
				operation, start, options.Bootloader = "persist", w.Persist, ""
			}
			s := l.sprout(t, w, seed)
			probe := w.OpenDisk(seedtest.DiskSpec{})
			plan, err := w.Plan(w.Context(), s.Path, operation, probe.Path, options)
			if err != nil || plan.Err() != nil {
				t.Fatalf("the plan gives %v, %v", err, plan.Err())
			}
			least := int64(plan.MinTargetSize)

			// One block less is refused; the least size is enough.
			under := w.OpenDisk(seedtest.DiskSpec{Size: least - 4*seedtest.KiB})
			if _, err := start(w.Context(), s.Path, under.Path, options); client.CodeOf(err) != "TargetTooSmall" {
				t.Errorf("a target of 4 KiB less gave %v, want TargetTooSmall", err)
			}
			enough := w.OpenDisk(seedtest.DiskSpec{Size: least})
			w.Done(start(w.Context(), s.Path, enough.Path, options))
			if err := stillUsable(s.MountPoint); err != nil {
				t.Errorf("after %s to a target of the least size: %v", operation, err)
			}
			if err := w.Teardown(w.Context(), s.Path); err != nil {
				t.Fatal(err)
			}

			// The need is the size from which on everything works. It can work
			// further down as well: chunks grow in steps with the device.
			for _, ratio := range []float64{tooMuch, 1.10, 1.06, 1.03} {
				size := int64(float64(least)/ratio) / 4096 * 4096
				disk := w.OpenDisk(seedtest.DiskSpec{Size: size})
				s := l.sprout(t, w, seed)
				failure := l.bare(w.Show(s.Path), disk.Path)
				if err := w.Teardown(w.Context(), s.Path); err != nil {
					t.Fatal(err)
				}
				if failure != nil {
					t.Logf("moves %.1f MiB; needs %d MiB; with %.1f MiB (1/%.2f) it fails: %v", mebibytes(plan.BytesToMove), least>>20, mebibytes(uint64(size)), ratio, failure)
					return
				}
			}
			t.Errorf("moves %.1f MiB; is said to need %d MiB, but works with 1/%.2f of it", mebibytes(plan.BytesToMove), least>>20, tooMuch)
		})
	}
}

func mebibytes(n uint64) float64 { return float64(n) / seedtest.MiB }
