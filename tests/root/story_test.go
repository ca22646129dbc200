package root

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// What the stories of this package have in common.

// noBootloader is what a flatten asks for that only moves the filesystem.
var noBootloader = client.MoveOptions{Bootloader: "none"}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func manifest(t *testing.T, dir string) seedtest.Manifest {
	t.Helper()
	m, err := seedtest.TakeManifest(t.Context(), dir)
	must(t, err)
	return m
}

// wantSame fails unless dir holds what it held when want was taken.
func wantSame(t *testing.T, when string, want seedtest.Manifest, dir string) {
	t.Helper()
	for _, line := range seedtest.Diff(want, manifest(t, dir)) {
		t.Errorf("%s: %s", when, line)
	}
}

// wantState fails unless a sprout is shown in a state and with members of the
// given roles.
func wantState(t *testing.T, s client.Sprout, state string, roles ...string) {
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

// wantWritable fails unless data can be written to dir and reaches the device.
// It leaves dir as it was.
func wantWritable(t *testing.T, dir string) {
	t.Helper()
	var before unix.Stat_t
	must(t, unix.Stat(dir, &before))
	must(t, save(filepath.Join(dir, "still-writable"), []byte("yes")))
	must(t, os.Remove(filepath.Join(dir, "still-writable")))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{before.Atim, before.Mtim}, 0))
}

// save writes a file and fsyncs it.
func save(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

// noise gives bytes that do not compress, the same for the same number.
func noise(number byte, size int) []byte {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{number}).Read(b)
	return b
}

// files is a seed content of n files of 1 MiB.
func files(n int) func(string) error {
	return func(dir string) error {
		for i := range n {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%02d", i)), noise(byte(i), seedtest.MiB), 0o644); err != nil {
				return err
			}
		}
		return nil
	}
}

// mounted mounts a filesystem until the end of the test.
func mounted(t *testing.T, device string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount(device, dir, "btrfs", 0, ""))
	t.Cleanup(func() {
		if err := seedtest.UnmountIdle(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// sum gives the SHA-256 of a file or device.
func sum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

// command runs a program that sproutd itself does without.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// losetup attaches an image read-only until the end of the test.
func losetup(t *testing.T, image string) string {
	t.Helper()
	loop := command(t, "losetup", "--find", "--show", "--read-only", image)
	t.Cleanup(func() {
		// The daemon detaches the loop of a seed that has left.
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil && !bytes.Contains(out, []byte("No such device")) {
			t.Errorf("cannot detach %s: %v: %s", loop, err, out)
		}
	})
	return loop
}

// zramThere reports whether there is a zram device of this name.
func zramThere(path string) bool {
	_, err := os.Stat("/sys/block/" + filepath.Base(path))
	return err == nil
}

func memberWith(t *testing.T, s client.Sprout, role string) client.Member {
	t.Helper()
	i := slices.IndexFunc(s.Members, func(m client.Member) bool { return m.Role == role })
	if i < 0 {
		t.Fatalf("the sprout has no member with the role %s: %+v", role, s.Members)
	}
	return s.Members[i]
}

// checkUnmounted tears a sprout down and looks at the target it was moved to:
// nothing is damaged and want is what it holds when it is mounted again.
func checkUnmounted(t *testing.T, w *harness.World, sprout, target string, want seedtest.Manifest) {
	t.Helper()
	must(t, w.Teardown(w.Context(), sprout))
	if err := seedtest.Check(w.Context(), target); err != nil {
		t.Error(err)
	}
	wantSame(t, "mounted again", want, mounted(t, target))
}
