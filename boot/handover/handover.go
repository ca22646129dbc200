// Package handover is the note that the early boot leaves for the daemon: what
// it found, what it made and what it could not do. It is written once, before
// the system starts, and holds for this boot only.
package handover

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"sproutd.org/sproutd/block"
)

// Dir is where the early boot keeps what the system finds later: the note, and
// the mount of the media. /run goes along from the initramfs to the system.
const Dir = "/run/sprout"

// File is the note.
const File = Dir + "/boot.json"

// MediaMount is where the file system of the media is mounted that the image is in.
const MediaMount = Dir + "/media"

// Mode says what the early boot mounted as the root.
type Mode string

// The modes.
const (
	Volatile   Mode = "volatile"   // the seed and RAM
	Persistent Mode = "persistent" // a sprout that was there, with the seed
)

// Note is what the early boot did. The zero value of a field says that there
// was no such thing.
type Note struct {
	// BootID of the boot that it is about, from /proc/sys/kernel/random/boot_id.
	BootID string
	Mode   Mode
	// FSID of the mounted sprout, with dashes.
	FSID string
	// Media is the device that was given as root=sprout:…, and MediaMount where
	// it is mounted; "" if the seed is the device itself.
	Media      block.ID
	MediaMount string
	// Image is the path of the seed image on the media, "" if the seed is a device.
	Image string
	// Seed is the seed's device, a loop in most cases.
	Seed block.ID
	// Zram is the zram device made for this boot.
	Zram block.ID
	// MemoryLoop is the loop over a file in RAM that took the place of a zram
	// device where the kernel has none.
	MemoryLoop block.ID
	// ToRAM is the wish that the daemon releases the seed to memory.
	ToRAM bool
	// Checked says that the seed was read and compared with its checksums, and
	// BadFiles names those that are damaged.
	Checked  bool
	BadFiles []string
	// Warnings are what was asked for and not done, found and not used, one
	// sentence each, in the order in which it happened. The user is shown them.
	Warnings []string
	// Milliseconds since the kernel started: when the program began, when it
	// had found the media, and when the root was mounted.
	BeganMS, MediaMS, MountedMS uint64
}

// Write writes the note to path, replacing what is there at once.
func (n Note) Write(path string) error {
	data, err := json.MarshalIndent(n, "", "\t")
	if err != nil {
		return fmt.Errorf("cannot write down what the early boot did: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot write down what the early boot did: %w", err)
	}
	if err := renameio.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("cannot write down what the early boot did: %w", err)
	}
	return nil
}

// Read reads the note at path. The error wraps os.ErrNotExist where the system
// was not booted this way.
func Read(path string) (Note, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Note{}, fmt.Errorf("cannot read what the early boot did: %w", err)
	}
	var n Note
	if err := json.Unmarshal(data, &n); err != nil {
		return Note{}, fmt.Errorf("cannot read what the early boot did: %s: %w", path, err)
	}
	return n, nil
}
