package vm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A log of all that was written to a disk, as QEMU's blklogwrites and the
// kernel's dm-log-writes keep it. Source: Linux, drivers/md/dm-log-writes.c.
//
// The log begins with a sector for the head. An entry has a sector of its own,
// and what was written follows it.
const (
	logMagic   = 0x6a736677736872
	logFlush   = 1 << 0 // all that was written before is on the disk for good
	logFUA     = 1 << 1 // this is, when it is done
	logDiscard = 1 << 2
)

// logEntry is something that the disk was asked to do.
type logEntry struct {
	flags        uint64
	offset, size int64 // on the disk, in bytes
	data         int64 // where in the log is what was written
	end          int64 // of the entry, in the log
}

// readWriteLog gives the entries of a log, in their order. An entry that is not
// complete is the end: the power failed.
func readWriteLog(log *os.File) ([]logEntry, error) {
	var head struct {
		Magic, Version, Entries uint64
		SectorSize              uint32
	}
	if err := binary.Read(io.NewSectionReader(log, 0, 512), binary.LittleEndian, &head); err != nil {
		return nil, fmt.Errorf("cannot read the log of what was written: %w", err)
	}
	if head.Magic != logMagic || head.Version != 1 || head.SectorSize < 512 {
		return nil, fmt.Errorf("%s is not a log of what was written", log.Name())
	}
	info, err := log.Stat()
	if err != nil {
		return nil, err
	}
	sector := int64(head.SectorSize)
	var entries []logEntry
	for at := sector; ; {
		var raw struct{ Sector, Sectors, Flags, Length uint64 }
		err := binary.Read(io.NewSectionReader(log, at, sector), binary.LittleEndian, &raw)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return entries, nil
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the log of what was written: %w", err)
		}
		e := logEntry{flags: raw.Flags, offset: int64(raw.Sector) * sector, size: int64(raw.Sectors) * sector, data: at + sector}
		e.end = e.data
		if e.flags&logDiscard == 0 {
			e.end += e.size
		}
		if e.end > info.Size() || raw.Flags == 0 && raw.Sectors == 0 {
			return entries, nil
		}
		entries = append(entries, e)
		at = e.end
	}
}

// apply does to a disk what an entry says.
func (e logEntry) apply(log, disk *os.File) error {
	if e.size == 0 {
		return nil
	}
	if e.flags&logDiscard != 0 {
		if err := unix.Fallocate(int(disk.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.offset, e.size); err != nil {
			return fmt.Errorf("cannot discard as the log says: %w", err)
		}
		return nil
	}
	if _, err := io.Copy(io.NewOffsetWriter(disk, e.offset), io.NewSectionReader(log, e.data, e.size)); err != nil {
		return fmt.Errorf("cannot write as the log says: %w", err)
	}
	return nil
}
