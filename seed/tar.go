package seed

import (
	"archive/tar"
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// readTar lists an archive. The content of a plain one is read where it lies; a
// compressed one, and sparse files, are unpacked into files without a name in
// work.
func (s *source) readTar(ctx context.Context, name, work string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	s.files = append(s.files, f)
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b:
		if f, err = s.gunzip(ctx, f, work); err != nil {
			return fmt.Errorf("cannot decompress %s: %w", name, err)
		}
	case string(magic) == "\x28\xb5\x2f\xfd" || string(magic) == "\xfd7zX" || string(magic[:3]) == "BZh":
		return fmt.Errorf("%w: of compressed archives only gzip is known here, so decompress %s first", ErrBadSource, name)
	}
	a := &archive{source: s, ctx: ctx, data: f, work: work, byPath: map[string]*entry{}}
	if err := a.list(); err != nil {
		return fmt.Errorf("cannot read the archive %s: %w", name, err)
	}
	return nil
}

func (s *source) gunzip(ctx context.Context, f *os.File, work string) (*os.File, error) {
	in, err := gzip.NewReader(bufio.NewReaderSize(f, mib))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadSource, err)
	}
	out, err := s.spool(work)
	if err != nil {
		return nil, err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{out}, &untilDone{ctx, in}, make([]byte, mib)); err != nil {
		return nil, err
	}
	_, err = out.Seek(0, io.SeekStart)
	return out, err
}

// untilDone reads until ctx ends.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r *untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// spool makes a file that is gone when it is closed.
func (s *source) spool(work string) (*os.File, error) {
	f, err := os.CreateTemp(work, "spool-")
	if err != nil {
		return nil, err
	}
	s.files = append(s.files, f)
	return f, os.Remove(f.Name())
}

type archive struct {
	*source
	ctx    context.Context
	work   string
	data   *os.File // the archive, not compressed
	sparse *os.File // content of sparse files, with their holes
	end    int64    // of sparse
	byPath map[string]*entry
	newest unix.Timespec
}

// counter is a reader that cannot seek, so that its place is known.
type counter struct {
	io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

func (a *archive) list() error {
	// No buffer: where the reader stands is where the content begins.
	at := &counter{Reader: &untilDone{a.ctx, a.data}}
	r := tar.NewReader(at)
	found := 0
	for ; ; found++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%w: %w", ErrBadSource, err)
		}
		if err != nil {
			return err
		}
		if err := a.add(h, r, at.n); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	if found == 0 {
		return fmt.Errorf("%w: there is nothing in it", ErrBadSource)
	}
	return a.finish()
}

func (a *archive) add(h *tar.Header, r io.Reader, offset int64) error {
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	e := &entry{
		path: name, mode: uint32(h.Mode) & 0o7777, uid: uint32(h.Uid), gid: uint32(h.Gid),
		mtime: unix.NsecToTimespec(h.ModTime.UnixNano()),
		rdev:  unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)),
	}
	e.mtime.Sec = h.ModTime.Unix() // has more range than UnixNano
	if e.mtime.Nsec = int64(h.ModTime.Nanosecond()); e.mtime.Nano() > a.newest.Nano() {
		a.newest = e.mtime
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		e.mode |= unix.S_IFREG
		e.size, e.data, e.file, e.offset = h.Size, h.Size, a.data, offset
		if h.Typeflag == tar.TypeGNUSparse || h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.size"] != "" || h.PAXRecords["GNU.sparse.map"] != "" {
			err = a.unpack(e, r)
		}
	case tar.TypeDir:
		e.mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		e.mode |= unix.S_IFLNK
		e.target = h.Linkname
	case tar.TypeLink:
		if e.target, err = clean(h.Linkname); err == nil {
			// An earlier entry of this name is replaced, but not by itself.
			if e.link = a.byPath[e.target]; e.link == nil || e.link.isDir() {
				err = fmt.Errorf("%w: a hard link to %s, which is not there", ErrBadSource, h.Linkname)
			}
			for e.link != nil && e.link.link != nil {
				e.link = e.link.link
			}
		}
	case tar.TypeChar:
		e.mode |= unix.S_IFCHR
	case tar.TypeBlock:
		e.mode |= unix.S_IFBLK
	case tar.TypeFifo:
		e.mode |= unix.S_IFIFO
	default:
		return fmt.Errorf("%w: an entry of the unknown type %q", ErrBadSource, h.Typeflag)
	}
	if err == nil {
		err = e.attributes(h.PAXRecords)
	}
	if e.link == nil || e.link.path != e.path {
		a.byPath[name] = e
	}
	return err
}

// clean gives a path below the top, and refuses those that lead out of it.
func clean(name string) (string, error) {
	if slices.Contains(strings.Split(name, "/"), "..") {
		return "", fmt.Errorf("%w: a path with \"..\"", ErrBadSource)
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// unpack writes a sparse file to a place where its holes can be seen.
func (a *archive) unpack(e *entry, r io.Reader) (err error) {
	if a.sparse == nil {
		if a.sparse, err = a.spool(a.work); err != nil {
			return err
		}
	}
	e.file, e.offset, e.data = a.sparse, a.end, 0
	buf, zero := make([]byte, mib), make([]byte, blockSize)
	for at := int64(0); at < e.size; {
		n, err := io.ReadFull(r, buf[:min(e.size-at, mib)])
		if err != nil {
			return fmt.Errorf("%w: %w", ErrBadSource, err)
		}
		for i := 0; i < n; i += blockSize {
			block := buf[i:min(i+blockSize, n)]
			if string(block) == string(zero[:len(block)]) {
				continue
			}
			if _, err := a.sparse.WriteAt(block, e.offset+at+int64(i)); err != nil {
				return err
			}
			e.data += int64(len(block))
		}
		at += int64(n)
	}
	a.end += blocks(e.size)
	return a.sparse.Truncate(a.end)
}

// attributes come in records that GNU tar, bsdtar and container tools write.
func (e *entry) attributes(records map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(records)) {
		value := records[key]
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			e.xattrs = append(e.xattrs, xattr{name, []byte(value)})
		} else if kind, ok := strings.CutPrefix(key, "SCHILY.acl."); ok && strings.TrimSpace(value) != "" {
			acl, err := parseACL(value)
			if err != nil {
				return err
			}
			e.xattrs = append(e.xattrs, xattr{"system.posix_acl_" + kind, acl})
		}
	}
	return nil
}

// finish puts the entries in order and makes up directories that are missing.
func (a *archive) finish() error {
	for _, name := range slices.Collect(maps.Keys(a.byPath)) {
		for name != "" {
			name = strings.TrimPrefix(path.Dir("/"+name), "/")
			switch parent := a.byPath[name]; {
			case parent == nil:
				a.byPath[name] = &entry{path: name, mode: unix.S_IFDIR | 0o755, mtime: a.newest}
			case !parent.isDir():
				return fmt.Errorf("%w: %s is no directory, but has entries", ErrBadSource, name)
			}
		}
	}
	// As a walk through directories gives them: "a", "a/b", "a.c".
	a.entries = slices.SortedFunc(maps.Values(a.byPath), func(x, y *entry) int {
		return slices.Compare(strings.Split(x.path, "/"), strings.Split(y.path, "/"))
	})
	if top := a.byPath[""]; !top.isDir() {
		return fmt.Errorf("%w: its top is no directory", ErrBadSource)
	}
	// Of the names of one file the first in the order is the one that is made.
	first := map[*entry]*entry{}
	for _, e := range a.entries {
		if e.link == nil {
			if first[e] == nil {
				first[e] = e
			}
			if first[e] != e {
				e.link = first[e]
			}
			continue
		}
		file := e.link
		if first[file] == nil {
			name := e.path
			*e = *file
			e.path = name
			first[file] = e
		}
		if first[file] != e {
			e.mode, e.link = file.mode, first[file]
		}
	}
	return nil
}

// parseACL turns the text form of an access control list, which is how archives
// hold it, into that of the kernel; linux/posix_acl_xattr.h.
func parseACL(text string) ([]byte, error) {
	type ace struct {
		tag, perm uint16
		id        uint32
	}
	var list []ace
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		f := strings.Split(strings.TrimSpace(strings.SplitN(line, "#", 2)[0]), ":")
		if len(f) < 3 {
			return nil, fmt.Errorf("%w: an access control list with %q", ErrBadSource, line)
		}
		tag, known := map[string]uint16{"user": 1, "group": 4, "mask": 0x10, "other": 0x20}[f[0]]
		entry := ace{tag: tag, id: 1<<32 - 1}
		if f[1] != "" {
			number := f[1]
			if len(f) > 3 { // bsdtar adds the number
				number = f[3]
			}
			id, err := strconv.ParseUint(number, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("%w: an access control list with the name %q: make the archive with --numeric-owner", ErrBadSource, f[1])
			}
			entry.tag, entry.id = tag*2, uint32(id) // ACL_USER and ACL_GROUP
		}
		for i, bit := range []uint16{4, 2, 1} {
			if i < len(f[2]) && f[2][i] == "rwx"[i] {
				entry.perm |= bit
			}
		}
		if !known || f[0] == "mask" && f[1] != "" {
			return nil, fmt.Errorf("%w: an access control list with %q", ErrBadSource, line)
		}
		list = append(list, entry)
	}
	slices.SortFunc(list, func(a, b ace) int { return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id)) })
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range list {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.perm)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	return acl, nil
}
