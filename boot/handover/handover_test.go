package handover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"sproutd.org/sproutd/block"
)

func TestWhatIsWrittenIsRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "run", "boot.json")
	note := Note{
		Mode: Persistent, FSID: "3f7c", Seed: block.ID{Num: block.DevNum{Major: 7}, Path: "/dev/loop0", Size: 1 << 30},
		Warnings: []string{"one thing", "another"}, MountedMS: 4200,
	}
	if err := note.Write(file); err != nil {
		t.Fatal(err)
	}
	got, err := Read(file)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, note) {
		t.Errorf("read %+v, want %+v", got, note)
	}
}

func TestNoNoteIsToldFromABadOne(t *testing.T) {
	file := filepath.Join(t.TempDir(), "boot.json")
	if _, err := Read(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("reading no file gave %v, want os.ErrNotExist", err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(file); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("reading half a file gave %v, want another error", err)
	}
}
