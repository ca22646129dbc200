package seedtest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	logLimit    = 4 * MiB // a log that got this long is deleted and begun anew
	maxFiles    = 64
	blockSize   = 4096
	tableBlocks = 256
	writerPause = time.Millisecond
)

// WriterStats counts what a [Writer] did.
type WriterStats struct {
	// Ops and Fsyncs that succeeded.
	Ops, Fsyncs uint64
	// LongestFsync is how long the slowest fsync(2) took.
	LongestFsync time.Duration
}

// Writer is a program at work on a filesystem: it appends to logs, replaces
// files by rename, deletes, links unnamed files, writes in place and keeps a
// deleted file open. What it has fsynced it remembers in memory, to be
// compared by [Writer.Verify]. It uses a few MiB.
type Writer struct {
	dir    string
	tell   io.Writer // of promises, nil for nobody
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	stats   WriterStats
	lap     WriterStats   // as stats were when the lap began
	longest time.Duration // fsync of this lap
	changed chan struct{} // closed and replaced after each operation
	err     error

	// The rest belongs to the goroutine until done is closed.
	rnd *rand.Rand
	// logs and what of them is on disk for certain.
	logs map[string]*logState
	// files, by name. version 0 is "not there".
	files map[string]*fileState
	// table is a file written in place, a block at a time.
	table      *os.File
	blocks     [tableBlocks]state
	nextNumber uint64
	// orphan is open but has no name any more.
	orphan *os.File
}

// state is a version that is certain, and one that may be there instead since
// an operation began; equal when none is under way.
type state struct{ sure, maybe uint64 }

func (s state) allows(v uint64) bool { return v == s.sure || v == s.maybe }

type fileState struct{ state }

type logState struct {
	first, synced, next uint64 // numbers of records; synced and next are exclusive
	file                *os.File
	size                int64
	deleting            bool // may be gone or not
}

// StartWriter makes dir, if it is not there, and starts to work in it.
func StartWriter(dir string) (*Writer, error) { return StartPromising(dir, nil) }

// StartPromising is StartWriter for a machine whose power may fail. It writes to
// tell, a line at a time, what may be on the disk from now on and what is there
// for certain: each line before, or after, the work it is about. With what has
// arrived, [Promised] makes a writer to verify with.
func StartPromising(dir string, tell io.Writer) (*Writer, error) {
	ctx, cancel := context.WithCancel(context.Background())
	w := &Writer{
		dir: dir, cancel: cancel, done: make(chan struct{}), changed: make(chan struct{}),
		rnd: rand.New(rand.NewPCG(1, 2)), logs: map[string]*logState{}, files: map[string]*fileState{},
	}
	if err := w.prepare(); err != nil {
		cancel()
		return nil, fmt.Errorf("cannot start to write in %s: %w", dir, errors.Join(err, w.close()))
	}
	w.tell = tell
	for i := range w.blocks {
		if err := w.promiseBlock(i); err != nil {
			cancel()
			return nil, fmt.Errorf("cannot start to write in %s: %w", dir, errors.Join(err, w.close()))
		}
	}
	go func() {
		defer close(w.done)
		w.work(ctx)
	}()
	return w, nil
}

func (w *Writer) prepare() error {
	if err := os.MkdirAll(w.path("files"), 0o755); err != nil {
		return err
	}
	var err error
	if w.table, err = os.Create(w.path("table")); err != nil {
		return err
	}
	for i := range w.blocks {
		if err := w.writeBlock(i); err != nil {
			return err
		}
		w.blocks[i].sure = w.blocks[i].maybe // synced below, before anything starts
	}
	if w.orphan, err = os.Create(w.path("orphan")); err != nil {
		return err
	}
	if _, err := w.orphan.Write(content("orphan", 1, 300*KiB)); err != nil {
		return err
	}
	return cmp.Or(w.orphan.Sync(), w.table.Sync(), os.Remove(w.path("orphan")), w.syncDir("."), w.syncDir(".."))
}

func (w *Writer) path(rel string) string { return filepath.Join(w.dir, rel) }

// Dir is the directory the writer works in.
func (w *Writer) Dir() string { return w.dir }

func (w *Writer) work(ctx context.Context) {
	pause := time.NewTicker(writerPause)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		var err error
		switch w.rnd.IntN(8) {
		case 0, 1, 2:
			err = w.appendLog(fmt.Sprintf("log-%d", w.rnd.IntN(3)))
		case 3, 4:
			err = w.replace(w.anyName())
		case 5:
			err = w.remove(w.anyName())
		case 6:
			err = w.linkUnnamed(w.anyName())
		case 7:
			err = w.rewriteBlock(w.rnd.IntN(tableBlocks))
		}
		w.mu.Lock()
		if err != nil {
			w.err = err
		} else {
			w.stats.Ops++
		}
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (w *Writer) anyName() string { return fmt.Sprintf("files/%02d", w.rnd.IntN(maxFiles)) }

func (w *Writer) number() uint64 {
	w.nextNumber++
	return w.nextNumber
}

// sync is fsync(2) with a stop watch.
func (w *Writer) sync(f *os.File) error {
	start := time.Now()
	if err := f.Sync(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Fsyncs++
	took := time.Since(start)
	w.stats.LongestFsync, w.longest = max(w.stats.LongestFsync, took), max(w.longest, took)
	return nil
}

func (w *Writer) syncDir(rel string) error {
	d, err := os.Open(w.path(rel))
	if err != nil {
		return err
	}
	return errors.Join(w.sync(d), d.Close())
}

// appendLog appends a record: its number, the length and checksum of its data,
// the data. A log that has grown long is deleted for good first.
func (w *Writer) appendLog(name string) error {
	l := w.logs[name]
	if l != nil && l.size > logLimit {
		l.deleting = true
		if err := w.promiseLog(name); err != nil {
			return err
		}
		if err := cmp.Or(l.file.Close(), os.Remove(w.path(name)), w.syncDir(".")); err != nil {
			return err
		}
		delete(w.logs, name)
		if err := w.promiseLog(name); err != nil {
			return err
		}
		l = nil
	}
	if l == nil {
		first := w.number()
		l = &logState{first: first, synced: first, next: first}
		w.logs[name] = l
		err := w.promiseLog(name)
		if err != nil {
			return err
		}
		if l.file, err = os.OpenFile(w.path(name), os.O_CREATE|os.O_EXCL|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
			return err
		}
		if err := w.syncDir("."); err != nil {
			return err
		}
	}
	data := content(name, l.next, w.rnd.IntN(6000))
	var record bytes.Buffer
	_ = binary.Write(&record, binary.LittleEndian, []uint64{l.next, uint64(len(data)), uint64(crc32.ChecksumIEEE(data))})
	record.Write(data)
	n, err := l.file.Write(record.Bytes())
	l.size += int64(n)
	if err != nil {
		return err
	}
	l.next++
	// Not every record is synced: a program that is careful with some of its
	// data only.
	if w.rnd.IntN(3) == 0 {
		return nil
	}
	if err := w.sync(l.file); err != nil {
		return err
	}
	l.synced = l.next
	return w.promiseLog(name)
}

// replace is how a careful program saves: new file, fsync, rename, fsync of
// the directory.
func (w *Writer) replace(name string) error {
	s := w.file(name)
	s.maybe = w.number()
	if err := w.promiseFile(name); err != nil {
		return err
	}
	f, err := os.Create(w.path(name + ".new"))
	if err != nil {
		return err
	}
	_, err = f.Write(w.content(name, s.maybe))
	if err = errors.Join(cmp.Or(err, w.sync(f)), f.Close()); err != nil {
		return err
	}
	if err := cmp.Or(os.Rename(w.path(name+".new"), w.path(name)), w.syncDir(filepath.Dir(name))); err != nil {
		return err
	}
	s.sure = s.maybe
	return w.promiseFile(name)
}

func (w *Writer) remove(name string) error {
	s := w.file(name)
	if s.sure == 0 {
		return nil
	}
	s.maybe = 0
	if err := w.promiseFile(name); err != nil {
		return err
	}
	if err := cmp.Or(os.Remove(w.path(name)), w.syncDir(filepath.Dir(name))); err != nil {
		return err
	}
	s.sure = 0
	return w.promiseFile(name)
}

// linkUnnamed gives a finished O_TMPFILE file a name.
func (w *Writer) linkUnnamed(name string) error {
	s := w.file(name)
	if s.sure != 0 {
		return w.remove(name)
	}
	fd, err := unix.Open(w.path("files"), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &fs.PathError{Op: "open unnamed", Path: w.path("files"), Err: err}
	}
	f := os.NewFile(uintptr(fd), "unnamed")
	defer f.Close()
	s.maybe = w.number()
	if err := w.promiseFile(name); err != nil {
		return err
	}
	if _, err := f.Write(w.content(name, s.maybe)); err != nil {
		return err
	}
	if err := w.sync(f); err != nil {
		return err
	}
	err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), unix.AT_FDCWD, w.path(name), unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return &fs.PathError{Op: "link", Path: w.path(name), Err: err}
	}
	// Btrfs does nothing to sync a file without a name, since nobody could find
	// it after a crash (fs/btrfs/tree-log.c, btrfs_log_inode_parent), and to sync
	// the directory keeps the name with an empty file. So it is synced again.
	if err := cmp.Or(w.sync(f), w.syncDir("files")); err != nil {
		return err
	}
	s.sure = s.maybe
	return w.promiseFile(name)
}

// writeBlock writes block i of the table, without fsync.
func (w *Writer) writeBlock(i int) error {
	w.blocks[i].maybe = w.number()
	if err := w.promiseBlock(i); err != nil {
		return err
	}
	_, err := w.table.WriteAt(content("table", w.blocks[i].maybe, blockSize), int64(i)*blockSize)
	return err
}

// rewriteBlock writes block i for good.
func (w *Writer) rewriteBlock(i int) error {
	if err := w.writeBlock(i); err != nil {
		return err
	}
	if err := w.sync(w.table); err != nil {
		return err
	}
	w.blocks[i].sure = w.blocks[i].maybe
	return w.promiseBlock(i)
}

func (w *Writer) file(name string) *fileState {
	if w.files[name] == nil {
		w.files[name] = &fileState{}
	}
	return w.files[name]
}

// content of a file: its version, then data that follows from name and
// version, up to 64 KiB of it.
func (w *Writer) content(name string, version uint64) []byte {
	size := 8 + rand.New(rand.NewPCG(version, 3)).IntN(64*KiB)
	return content(name, version, size)
}

// content gives size bytes (8 at least) that start with version, half of them
// hard to compress.
func content(name string, version uint64, size int) []byte {
	size = max(size, 8)
	b := binary.LittleEndian.AppendUint64(nil, version)
	r := rand.New(rand.NewPCG(version, uint64(crc32.ChecksumIEEE([]byte(name)))))
	for len(b) < size {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
		b = append(b, "sproutd "...)
	}
	return b[:size]
}

// Stats gives the counters as they are now.
func (w *Writer) Stats() WriterStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// Lap gives what was done since the last Lap, or since the start.
func (w *Writer) Lap() WriterStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	lap := WriterStats{Ops: w.stats.Ops - w.lap.Ops, Fsyncs: w.stats.Fsyncs - w.lap.Fsyncs, LongestFsync: w.longest}
	w.lap, w.longest = w.stats, 0
	return lap
}

// AwaitFsyncs waits until n more fsyncs have succeeded, and so shows that the
// filesystem takes writes.
func (w *Writer) AwaitFsyncs(ctx context.Context, n uint64) error {
	goal := w.Stats().Fsyncs + n
	for {
		w.mu.Lock()
		count, err, changed := w.stats.Fsyncs, w.err, w.changed
		w.mu.Unlock()
		if count >= goal {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-w.done:
			return errors.New("the writer was stopped")
		case <-ctx.Done():
			return fmt.Errorf("cannot see the writer go on: %w", context.Cause(ctx))
		}
	}
}

// Stop ends the work and gives the first error it met, if any. A deleted file
// that was open all the time is compared as well. Stop may be called twice.
func (w *Writer) Stop() error {
	w.cancel()
	<-w.done
	var err error
	if w.orphan != nil {
		err = w.verifyOrphan()
	}
	return errors.Join(w.err, err, w.close())
}

func (w *Writer) verifyOrphan() error {
	got, err := io.ReadAll(io.NewSectionReader(w.orphan, 0, MiB))
	if err != nil {
		return fmt.Errorf("cannot read a deleted file that is still open: %w", err)
	}
	if !bytes.Equal(got, content("orphan", 1, 300*KiB)) {
		return errors.New("a deleted file that is still open has changed")
	}
	return nil
}

func (w *Writer) close() error {
	var errs []error
	for _, f := range []*os.File{w.table, w.orphan} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	w.table, w.orphan = nil, nil
	for _, l := range w.logs {
		if l.file != nil {
			errs = append(errs, l.file.Close())
			l.file = nil
		}
	}
	return errors.Join(errs...)
}

// Verify compares dir, the writer's directory under whatever path it has now,
// with what the writer fsynced: all of it must be there, and nothing that was
// deleted for good. Of what was under way both outcomes are right, as after a
// crash. Call it after [Writer.Stop]. The error lists everything that is wrong.
func (w *Writer) Verify(dir string) error {
	select {
	case <-w.done:
	default:
		return errors.New("cannot verify what is still being written: stop the writer first")
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(w.logs)) {
		errs = append(errs, w.logs[name].verify(filepath.Join(dir, name), name))
	}
	for _, name := range slices.Sorted(maps.Keys(w.files)) {
		errs = append(errs, w.verifyFile(filepath.Join(dir, name), name))
	}
	errs = append(errs, w.verifyTable(filepath.Join(dir, "table")), w.verifyNames(dir))
	return errors.Join(errs...)
}

// verify reads a log from its start: all synced records must be there and
// right. What comes after may be cut off, at any place.
func (l *logState) verify(path, name string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) && (l.deleting || l.synced == l.first) {
			return nil
		}
		return err
	}
	for seq := l.first; seq < l.synced; seq++ {
		lost := fmt.Errorf("%s: records %d to %d are lost", path, seq, l.synced-1)
		const header = 24
		if len(raw) < header {
			return lost
		}
		number, size, sum := binary.LittleEndian.Uint64(raw), binary.LittleEndian.Uint64(raw[8:]), binary.LittleEndian.Uint64(raw[16:])
		if number != seq {
			return fmt.Errorf("%s: record %d is damaged", path, seq)
		}
		if size > uint64(len(raw)-header) {
			return lost
		}
		data := raw[header : header+size]
		if uint64(crc32.ChecksumIEEE(data)) != sum || !bytes.Equal(data, content(name, seq, len(data))) {
			return fmt.Errorf("%s: the data of record %d is damaged", path, seq)
		}
		raw = raw[header+size:]
	}
	return nil
}

func (w *Writer) verifyFile(path, name string) error {
	s := w.files[name]
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !s.allows(0) {
			return fmt.Errorf("%s: version %d is lost", path, s.sure)
		}
		return nil
	case err != nil:
		return err
	case s.sure == 0 && s.maybe == 0:
		return fmt.Errorf("%s: was deleted and is there again", path)
	case len(raw) < 8:
		return fmt.Errorf("%s: is %d bytes short", path, 8-len(raw))
	}
	version := binary.LittleEndian.Uint64(raw)
	if !s.allows(version) {
		return fmt.Errorf("%s: holds version %d, not %d", path, version, s.sure)
	}
	if !bytes.Equal(raw, w.content(name, version)) {
		return fmt.Errorf("%s: the data of version %d is damaged", path, version)
	}
	return nil
}

func (w *Writer) verifyTable(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(raw) != tableBlocks*blockSize {
		return fmt.Errorf("%s: has %d bytes, not %d", path, len(raw), tableBlocks*blockSize)
	}
	var errs []error
	for i := range w.blocks {
		block := raw[i*blockSize : (i+1)*blockSize]
		version := binary.LittleEndian.Uint64(block)
		if !w.blocks[i].allows(version) || !bytes.Equal(block, content("table", version, blockSize)) {
			errs = append(errs, fmt.Errorf("%s: block %d holds version %d or damage, not version %d", path, i, version, w.blocks[i].sure))
		}
	}
	return errors.Join(errs...)
}

// verifyNames looks for what nobody made, or what was deleted for good.
func (w *Writer) verifyNames(dir string) error {
	var errs []error
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		_, isLog := w.logs[rel]
		_, isFile := w.files[rel]
		// A ".new" stays behind where a crash came before the rename.
		base, isNew := cutNew(rel)
		if s := w.files[base]; isNew && s != nil && s.sure != s.maybe {
			return nil
		}
		if !isLog && !isFile && rel != "table" {
			errs = append(errs, fmt.Errorf("%s: should not be there", path))
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

func cutNew(rel string) (string, bool) {
	base := rel[:len(rel)-min(len(rel), len(".new"))]
	return base, base+".new" == rel
}
