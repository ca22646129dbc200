package vm

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

func TestALogOfWritesIsReplayed(t *testing.T) {
	var log bytes.Buffer
	add := func(data any) {
		must(t, binary.Write(&log, binary.LittleEndian, data))
		log.Write(make([]byte, (512-log.Len()%512)%512))
	}
	entry := func(sector, sectors, flags uint64) { add([]uint64{sector, sectors, flags, 0}) }
	add(struct {
		Magic, Version, Entries uint64
		SectorSize              uint32
	}{logMagic, 1, 5, 512})
	entry(1, 2, 0)
	add(bytes.Repeat([]byte("a"), 1024))
	entry(0, 0, logFlush)
	entry(2, 1, logDiscard)
	entry(0, 1, logFUA)
	add(bytes.Repeat([]byte("b"), 512))
	entry(3, 9, 0)
	add([]byte("the power failed here"))

	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "log"), log.Bytes(), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "disk"), make([]byte, 2048), 0o644))
	from, err := os.Open(filepath.Join(dir, "log"))
	must(t, err)
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_RDWR, 0)
	must(t, err)
	defer to.Close()
	entries, err := readWriteLog(from)
	must(t, err)
	if len(entries) != 4 || entries[1].flags != logFlush || entries[3].end != int64(log.Len())-512*2 {
		t.Errorf("the log is read as %+v", entries)
	}
	for _, e := range entries {
		must(t, e.apply(from, to))
	}
	got, err := os.ReadFile(to.Name())
	must(t, err)
	want := string(bytes.Repeat([]byte("b"), 512)) + string(bytes.Repeat([]byte("a"), 512)) + string(make([]byte, 1024))
	if string(got) != want {
		t.Errorf("the disk has %q", got)
	}
}
