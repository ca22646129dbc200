package machine

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/daemon/fault"
)

// TestOnlyFilesAndBlockDevicesAreOpened: anybody may ask for a look at a seed,
// and opening some things is an act. A pipe shows it: who opens one to read is
// seen by who opens it to write.
func TestOnlyFilesAndBlockDevicesAreOpened(t *testing.T) {
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
