package machine

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/daemon/fault"
)

// Anybody may ask for a look at a seed, so whatever a path names has to be
// answered, and at once: a pipe that was opened for reading would block.
func TestWhatIsNoSeedIsNamed(t *testing.T) {
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pipe, text := filepath.Join(dir, "pipe"), filepath.Join(dir, "text")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(text, []byte("no file system"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, code := range map[string]fault.Code{
		pipe: fault.NotSeed, dir: fault.NotSeed, text: fault.NotSeed, "/dev/null": fault.NotSeed,
		filepath.Join(dir, "missing"): fault.NoSuchDevice,
	} {
		if _, err := m.InspectSeed(t.Context(), path); fault.CodeOf(err) != code {
			t.Errorf("%s: %v, not %s", path, err, code)
		}
	}
}
