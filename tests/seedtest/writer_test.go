package seedtest

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/tests/testenv"
)

// patience is how long a test waits for what should happen at once.
const patience = 30 * time.Second

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestWriterFindsAllItWrote(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	dir := filepath.Join(newBtrfs(t), "work")
	w, err := StartWriter(dir)
	must(t, err)
	must(t, w.AwaitFsyncs(soon(t), 500))
	if err := w.Verify(dir); err == nil {
		t.Error("a running writer was verified")
	}
	must(t, w.Stop())
	must(t, w.Verify(dir))
	if s := w.Stats(); s.Ops < 100 || s.Fsyncs < 500 || s.LongestFsync == 0 {
		t.Errorf("the counters say %+v", s)
	}
}

// TestWriterFindsWhatIsLost tampers with the tree of a writer, one way at a
// time, and looks for the complaint.
func TestWriterFindsWhatIsLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "work")
	w, err := StartWriter(dir)
	must(t, err)
	must(t, w.AwaitFsyncs(soon(t), 400))
	must(t, w.Stop())
	must(t, w.Verify(dir))

	var there, deleted string
	for name, s := range w.files {
		if s.sure == 0 {
			deleted = name
		} else {
			there = name
		}
	}
	var log string
	for name, l := range w.logs {
		if l.synced-l.first > 3 {
			log = name
		}
	}
	if there == "" || deleted == "" || log == "" {
		t.Fatalf("the writer did not do enough: %q %q %q", there, deleted, log)
	}
	cut := func(name string, keep int64) func(string) error {
		return func(dir string) error { return os.Truncate(filepath.Join(dir, name), keep) }
	}
	for _, c := range []struct {
		name   string
		tamper func(dir string) error
		want   string
	}{
		{"a log's last records", cut(log, 40), "are lost"},
		{"a log", func(dir string) error { return os.Remove(filepath.Join(dir, log)) }, "no such file"},
		{"a bit of a log", func(dir string) error {
			return writeAt(filepath.Join(dir, log), []byte{0xff, 0xee}, 30)
		}, "damaged"},
		{"a file", func(dir string) error { return os.Remove(filepath.Join(dir, there)) }, "is lost"},
		{"a file's end", cut(there, 8), "damaged"},
		{"a file, all of it", cut(there, 0), "short"},
		{"a file's newest version", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, there), w.content(there, 1), 0o644)
		}, "holds version 1"},
		{"a deletion", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, deleted), nil, 0o644)
		}, "is there again"},
		{"order", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "stray"), nil, 0o644)
		}, "should not be there"},
		{"a block of the table", func(dir string) error {
			return writeAt(filepath.Join(dir, "table"), make([]byte, blockSize), 7*blockSize)
		}, "block 7"},
		{"a byte of the table", func(dir string) error {
			return writeAt(filepath.Join(dir, "table"), []byte{0xaa, 0x55}, 9*blockSize+100)
		}, "block 9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tampered := t.TempDir()
			_, err := CopyTree(tampered, dir, 0)
			must(t, err)
			must(t, w.Verify(tampered))
			must(t, c.tamper(tampered))
			if err := w.Verify(tampered); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the writer said %v, want: %s", err, c.want)
			}
		})
	}
}

func TestWriterRemembersAnError(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	dir := filepath.Join(newBtrfs(t), "work")
	w, err := StartWriter(dir)
	must(t, err)
	must(t, w.AwaitFsyncs(soon(t), 10))
	must(t, os.RemoveAll(filepath.Join(dir, "files")))
	<-w.done
	if err := w.AwaitFsyncs(soon(t), 1_000_000); err == nil {
		t.Error("waiting for a writer that failed ended well")
	}
	if err := w.Stop(); err == nil || !strings.Contains(err.Error(), "files") {
		t.Errorf("the writer stopped with %v, want what is missing", err)
	}
}

func TestWhatWasPromisedIsVerifiedByAnother(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "work")
	var told bytes.Buffer
	w, err := StartPromising(dir, &told)
	must(t, err)
	must(t, w.AwaitFsyncs(soon(t), 400))
	must(t, w.Stop())

	other, err := Promised(bytes.NewReader(told.Bytes()))
	must(t, err)
	must(t, other.Verify(dir))
	cut, err := Promised(bytes.NewReader(told.Bytes()[:told.Len()-3]))
	must(t, err)
	must(t, cut.Verify(dir))

	// What only the last lines tell of has to be there, then.
	if early, err := Promised(bytes.NewReader(told.Bytes()[:told.Len()/2])); err != nil || early.Verify(dir) == nil {
		t.Errorf("the newer work is right by what was promised half-way: %v", err)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "files")))
	if other.Verify(dir) == nil {
		t.Error("the loss of files that were promised is not noticed")
	}
	if none, err := Promised(strings.NewReader("")); none != nil || err != nil {
		t.Errorf("without promises there is a writer: %v %v", none, err)
	}
}

func TestReader(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c"} {
		must(t, os.WriteFile(filepath.Join(dir, name), content(name, 1, 50*KiB), 0o644))
	}
	m, err := TakeManifest(t.Context(), dir)
	must(t, err)
	r, err := StartReader(dir, m)
	must(t, err)
	for {
		if n, _ := r.Stats(); n >= 10 {
			break
		}
		select {
		case <-r.done:
			t.Fatal(r.Stop())
		case <-time.After(readerPause):
		}
	}
	must(t, writeAt(filepath.Join(dir, "b"), []byte("not b"), 4000))
	<-r.done
	if err := r.Stop(); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "b")) {
		t.Errorf("the reader stopped with %v, want what was changed", err)
	}
	if _, err := StartReader(dir, Manifest{}); err == nil {
		t.Error("a reader with nothing to read was started")
	}
}

func TestVersionsHaveContentOfTheirOwn(t *testing.T) {
	if slices.Equal(content("a", 1, 100)[8:], content("a", 2, 100)[8:]) || slices.Equal(content("a", 1, 100), content("b", 1, 100)) {
		t.Error("two versions or two files have the same content")
	}
}
