package seedtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Inode flags of FS_IOC_SETFLAGS; linux/fs.h.
const (
	flagCompress  = 0x00000004
	flagImmutable = 0x00000010
	flagAppend    = 0x00000020
	flagNoDump    = 0x00000040
	flagNoAtime   = 0x00000080
	flagNoCow     = 0x00800000
)

// StandardOptions says how [Standard] fills a tree.
type StandardOptions struct {
	// Random picks the data: the same number gives the same content.
	Random uint64
	// Btrfs says that the tree is on a Btrfs that may keep what a directory
	// to be copied from should not have: subvolumes, snapshots, reflinks,
	// files that cannot be changed any more, and large attributes.
	Btrfs bool
}

// Standard fills dir with about 60 MiB of everything a filesystem can hold:
// each kind of file, links, attributes, capabilities, ACLs, holes, odd names,
// modes, owners and times, files of every interesting size, data that does
// and does not compress and, where asked for, what only Btrfs has. It needs
// root.
func Standard(dir string, opt StandardOptions) error {
	m := &maker{
		root: dir,
		btr:  opt.Btrfs,
		rnd:  rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), opt.Random))),
		time: map[string]unix.Timespec{},
	}
	m.pick = rand.New(m.rnd)
	for _, part := range []func(){m.sizes, m.many, m.bulk, m.names, m.links, m.special, m.attributes, m.owners, m.holes, m.times} {
		part()
	}
	if m.btr {
		m.reflinks()
		m.inodeFlags()
		m.subvolumes()
	}
	m.stamp(dir)
	if m.btr {
		m.snapshots()
		m.lock()
	}
	if m.err != nil {
		return fmt.Errorf("cannot fill %s: %w", dir, m.err)
	}
	return nil
}

// maker makes files below root. After the first error it does nothing more.
type maker struct {
	root string
	btr  bool
	rnd  *rand.ChaCha8
	pick *rand.Rand
	// time holds the modification times that are not for stamp to choose, by
	// path below root.
	time map[string]unix.Timespec
	err  error
}

func (m *maker) path(rel string) string { return m.root + "/" + rel }

// do notes the first error.
func (m *maker) do(err error) {
	if m.err == nil {
		m.err = err
	}
}

func (m *maker) sys(op, rel string, err error) {
	if err != nil {
		m.do(&fs.PathError{Op: op, Path: m.path(rel), Err: err})
	}
}

func (m *maker) dir(rel string) {
	if m.err == nil {
		m.do(os.MkdirAll(m.path(rel), 0o755))
	}
}

func (m *maker) file(rel string, data []byte) {
	if m.err == nil {
		m.do(os.WriteFile(m.path(rel), data, 0o644))
	}
}

// noise is data that does not compress, text is data that does.
func (m *maker) noise(n int) []byte {
	b := make([]byte, n)
	_, _ = m.rnd.Read(b)
	return b
}

func (m *maker) text(n int) []byte {
	words := []string{"seed ", "sprout ", "stick ", "extent ", "member ", "a ", "the ", "\n"}
	var b bytes.Buffer
	for b.Len() < n {
		b.WriteString(words[m.pick.IntN(len(words))])
	}
	return b.Bytes()[:n]
}

// sizes makes files around every size at which Btrfs stores data another way:
// inline, one sector, one compressed extent, several extents.
func (m *maker) sizes() {
	m.dir("sizes")
	for _, n := range []int{
		0, 1, 2, 100, 1023, 1024, 2046, 2047, 2048, 2049, 4095, 4096, 4097, 8192,
		128*KiB - 1, 128 * KiB, 128*KiB + 1, MiB - 1, MiB, MiB + 1,
	} {
		m.file(fmt.Sprintf("sizes/noise-%d", n), m.noise(n))
		m.file(fmt.Sprintf("sizes/text-%d", n), m.text(n))
	}
}

// many makes many small files, so that there is metadata to move as well.
func (m *maker) many() {
	for d := range 20 {
		m.dir(fmt.Sprintf("many/%02d", d))
		for f := range 75 {
			m.file(fmt.Sprintf("many/%02d/file-%03d", d, f), m.text(m.pick.IntN(8*KiB)))
		}
	}
}

func (m *maker) bulk() {
	m.dir("bulk")
	m.file("bulk/noise", m.noise(20*MiB))
	m.file("bulk/text", m.text(20*MiB))
	m.file("bulk/zeros", make([]byte, 4*MiB))
	// Half of this compresses: some extents end up compressed, some not.
	m.file("bulk/mixed", slices.Concat(m.text(MiB), m.noise(MiB), m.text(MiB), m.noise(MiB)))
}

func (m *maker) names() {
	m.dir("names")
	for i, name := range []string{
		strings.Repeat("n", 255), strings.Repeat("\u00e9", 127) + "x", // 255 bytes both
		"caf\xe9 latin-1", "\xff\xfe\x80", "new\nline", "tab\tand\\backslash", " leading", "-rf", "*?[a]$HOME'\"", "\u65e5\u672c\u8a9e", "..."} {
		m.file("names/"+name, fmt.Appendf(nil, "name %d\n", i))
	}
	m.dir("names/" + strings.Repeat("d", 255))
	m.file("names/"+strings.Repeat("d", 255)+"/inside", []byte("inside"))
	m.dir("names/empty directory")
	deep := "deep" + strings.Repeat("/level", 60)
	m.dir(deep)
	m.file(deep+"/bottom", []byte("bottom"))
}

func (m *maker) links() {
	m.dir("links/there")
	m.file("links/first", m.noise(70*KiB))
	link := func(from, to string) { m.do(os.Link(m.path(from), m.path(to))) }
	link("links/first", "links/second")
	link("links/first", "links/there/third")
	link("sizes/text-4097", "links/there/from another directory")
	// More links than fit the inode's own item: Btrfs then uses another kind
	// of reference (extended reference).
	m.file("links/many", []byte("many"))
	for i := range 80 {
		link("links/many", fmt.Sprintf("links/there/%s-%02d", strings.Repeat("l", 200), i))
	}
	symlink := func(target, rel string) { m.do(os.Symlink(target, m.path(rel))) }
	symlink("first", "links/symlink")
	symlink("/no/such/file", "links/dangling")
	symlink("loop", "links/loop")
	symlink("caf\xe9", "links/latin-1 target")
	symlink(strings.Repeat("long/", 400)+"end", "links/long")
}

func (m *maker) special() {
	m.dir("special")
	node := func(rel string, mode uint32, dev uint64) {
		m.sys("mknod", rel, unix.Mknod(m.path(rel), mode, int(dev)))
	}
	node("special/null", unix.S_IFCHR|0o666, unix.Mkdev(1, 3))
	node("special/char", unix.S_IFCHR|0o600, unix.Mkdev(511, 1048575))
	node("special/block", unix.S_IFBLK|0o660, unix.Mkdev(259, 70000))
	node("special/fifo", unix.S_IFIFO|0o640, 0)
	node("special/socket", unix.S_IFSOCK|0o755, 0)
}

func (m *maker) xattr(rel, name string, value []byte) {
	if err := unix.Lsetxattr(m.path(rel), name, value, 0); err != nil {
		m.sys("setxattr "+name, rel, err)
	}
}

func (m *maker) attributes() {
	m.dir("attributes/acl directory")
	m.file("attributes/user", []byte("user"))
	m.xattr("attributes/user", "user.empty", nil)
	m.xattr("attributes/user", "user.text", []byte("some text"))
	m.xattr("attributes/user", "user.binary", []byte{0, 1, 2, 0xff, 0})
	m.xattr("attributes/user", "user."+strings.Repeat("x", 200), []byte("long name"))
	large := 2000 // what ext4 takes, where a tree is prepared for --rootdir
	if m.btr {
		large = 12000
	}
	m.file("attributes/large", []byte("large"))
	m.xattr("attributes/large", "user.large", m.noise(large))
	m.file("attributes/trusted", []byte("trusted"))
	m.xattr("attributes/trusted", "trusted.sproutd", []byte("only root sees this"))
	m.xattr("attributes/trusted", "security.sproutd", []byte("no module knows this"))
	m.xattr("attributes", "user.directory", []byte("on a directory"))
	m.do(os.Symlink("user", m.path("attributes/symlink")))
	m.xattr("attributes/symlink", "trusted.symlink", []byte("on a symbolic link"))

	// cap_net_raw and cap_net_admin, effective: struct vfs_cap_data of
	// linux/capability.h, revision 2.
	m.file("attributes/capable", []byte("#!/bin/true\n"))
	m.xattr("attributes/capable", "security.capability", words(0x02000001, 1<<13|1<<12, 0, 0, 0))

	// struct posix_acl_xattr_header and its entries, linux/posix_acl_xattr.h:
	// tag, permissions, id.
	type entry struct {
		Tag, Perm uint16
		ID        uint32
	}
	const none = 0xffffffff
	var acl bytes.Buffer
	acl.Write(words(2))
	_ = binary.Write(&acl, binary.LittleEndian, []entry{
		{0x01, 7, none}, {0x02, 4, 12345}, {0x02, 6, 54321}, {0x04, 5, none}, {0x08, 1, 4242}, {0x10, 7, none}, {0x20, 0, none},
	})
	m.file("attributes/acl", []byte("acl"))
	m.xattr("attributes/acl", "system.posix_acl_access", acl.Bytes())
	m.xattr("attributes/acl directory", "system.posix_acl_default", acl.Bytes())
	m.file("attributes/acl directory/inherits", []byte("inherits"))
}

func words(w ...uint32) []byte {
	var b []byte
	for _, x := range w {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}

func (m *maker) owners() {
	m.dir("owners")
	for i, mode := range []uint32{0, 0o001, 0o400, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777} {
		rel := fmt.Sprintf("owners/mode-%04o", mode)
		m.file(rel, m.text(i*100))
		m.do(os.Lchown(m.path(rel), i*1000, 65534-i))
		m.sys("chmod", rel, unix.Chmod(m.path(rel), mode))
		m.dir(rel + ".d")
		m.do(os.Lchown(m.path(rel+".d"), 65534, i))
		m.sys("chmod", rel, unix.Chmod(m.path(rel+".d"), mode))
	}
	m.file("owners/highest id", nil)
	m.do(os.Lchown(m.path("owners/highest id"), 1<<32-2, 1<<32-2))
	m.do(os.Symlink("nowhere", m.path("owners/symlink")))
	m.do(os.Lchown(m.path("owners/symlink"), 1000, 1001))
}

// sparse makes a file of the given size with pieces of data at some places.
func (m *maker) sparse(rel string, size int64, at ...int64) {
	if m.err != nil {
		return
	}
	f, err := os.Create(m.path(rel))
	if err != nil {
		m.do(err)
		return
	}
	for _, offset := range at {
		_, err := f.WriteAt(m.noise(10000), offset)
		m.do(err)
	}
	m.do(f.Truncate(size))
	if len(at) == 0 && size > 0 {
		// Space that is reserved but not written.
		m.sys("fallocate", rel, unix.Fallocate(int(f.Fd()), 0, size/4, size/4))
	}
	m.do(f.Close())
}

func (m *maker) holes() {
	m.dir("holes")
	m.sparse("holes/middle", 8*MiB, 0, 8*MiB-10000)
	m.sparse("holes/around", 8*MiB, 4*MiB+77)
	m.sparse("holes/reserved", 4*MiB)
	m.sparse("holes/comb", 4*MiB, 0, 128*KiB, 256*KiB, 512*KiB, MiB, 2*MiB, 3*MiB)
	m.file("holes/punched", m.noise(MiB))
	if m.err != nil {
		return
	}
	f, err := os.OpenFile(m.path("holes/punched"), os.O_RDWR, 0)
	if err != nil {
		m.do(err)
		return
	}
	m.sys("fallocate", "holes/punched", unix.Fallocate(int(f.Fd()),
		unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 300*KiB+1, 400*KiB))
	m.do(f.Close())
	if m.btr {
		m.sparse("holes/huge", 64*GiB, 0, 64*GiB-10000)
	}
}

func (m *maker) times() {
	m.dir("times")
	for name, t := range map[string]unix.Timespec{
		"before the epoch": {Sec: -500_000_000, Nsec: 1},
		"the epoch":        {Sec: 0, Nsec: 0},
		"a nanosecond":     {Sec: 0, Nsec: 1},
		"last nanosecond":  {Sec: 1_700_000_000, Nsec: 999_999_999},
		"after 2038":       {Sec: 1<<31 + 5, Nsec: 123_456_789},
		"far future":       {Sec: 1<<32 + 7, Nsec: 987_654_321},
	} {
		m.file("times/"+name, []byte(name))
		m.time["times/"+name] = t
	}
}

func (m *maker) reflinks() {
	m.dir("reflinks")
	m.clone("bulk/mixed", "reflinks/whole", unix.FileCloneRange{})
	m.clone("bulk/noise", "reflinks/part", unix.FileCloneRange{Src_offset: 4 * MiB, Src_length: 64 * KiB, Dest_offset: 4 * KiB})
	m.clone("bulk/text", "reflinks/text", unix.FileCloneRange{})
	// A clone of which a part was written again shares the rest.
	if m.err == nil {
		m.do(writeAt(m.path("reflinks/text"), m.noise(5000), 3*MiB+17))
	}
}

func (m *maker) clone(from, to string, r unix.FileCloneRange) {
	if m.err != nil {
		return
	}
	src, err := os.Open(m.path(from))
	if err != nil {
		m.do(err)
		return
	}
	defer src.Close()
	dst, err := os.Create(m.path(to))
	if err != nil {
		m.do(err)
		return
	}
	r.Src_fd = int64(src.Fd())
	m.sys("clone", to, unix.IoctlFileCloneRange(int(dst.Fd()), &r))
	m.do(dst.Close())
}

func (m *maker) inodeFlags() {
	m.dir("flags/nocow directory")
	m.setFlags("flags/nocow directory", flagNoCow)
	m.file("flags/nocow directory/inherits", m.noise(MiB))
	for _, f := range []struct {
		name  string
		flags uint32
	}{
		{"nocow", flagNoCow}, {"compressed", flagCompress}, {"nodump", flagNoDump}, {"noatime", flagNoAtime},
		{"immutable", 0}, {"append only", 0}, // set at the very end
	} {
		// The flag for copy-on-write can only be set on an empty file.
		m.file("flags/"+f.name, nil)
		m.setFlags("flags/"+f.name, f.flags)
		m.file("flags/"+f.name, m.text(200*KiB))
	}
}

func (m *maker) setFlags(rel string, flags uint32) {
	if m.err == nil && flags != 0 {
		m.do(SetInodeFlags(m.path(rel), flags))
	}
}

// SetInodeFlags sets the inode flags of chattr(1) on a file or directory.
func SetInodeFlags(path string, flags uint32) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
		err = &fs.PathError{Op: "set inode flags", Path: path, Err: err}
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

func (m *maker) btrfs(args ...string) {
	if m.err == nil {
		_, err := run(context.Background(), "btrfs", args...)
		m.do(err)
	}
}

func (m *maker) subvolumes() {
	for _, rel := range []string{"subvolume", "subvolume/nested"} {
		m.btrfs("-q", "subvolume", "create", m.path(rel))
		m.dir(rel + "/directory")
		m.file(rel+"/directory/noise", m.noise(300*KiB))
		m.file(rel+"/directory/text", m.text(300*KiB))
		m.file(rel+"/inline", []byte(rel))
		m.do(os.Link(m.path(rel+"/inline"), m.path(rel+"/directory/inline too")))
	}
}

// snapshots come after the times were set, or the snapshots would have others.
func (m *maker) snapshots() {
	m.dir("snapshots")
	m.btrfs("-q", "subvolume", "snapshot", "-r", m.path("subvolume"), m.path("snapshots/read-only"))
	m.btrfs("-q", "subvolume", "snapshot", m.path("subvolume"), m.path("snapshots/writable"))
	m.file("snapshots/writable/changed after", m.noise(10*KiB))
	m.file("snapshots/writable/inline", []byte("changed in the snapshot"))
	m.stamp(m.path("snapshots/writable"))
	m.setTime("snapshots")
	m.setTime("")
}

// lock makes files that nobody can change any more; nothing may come after.
func (m *maker) lock() {
	m.setFlags("flags/immutable", flagImmutable)
	m.setFlags("flags/append only", flagAppend)
}

// stamp gives everything below top a time of its own that depends on its name
// only, so that two trees of the same number are equal. Directories come after
// their entries, whose making changed them.
func (m *maker) stamp(top string) {
	var paths []string
	if m.err == nil {
		m.do(filepath.WalkDir(top, func(path string, _ fs.DirEntry, err error) error {
			paths = append(paths, path)
			return err
		}))
	}
	for _, path := range slices.Backward(paths) {
		m.setTime(strings.TrimPrefix(strings.TrimPrefix(path, m.root), "/"))
	}
}

func (m *maker) setTime(rel string) {
	if m.err != nil {
		return
	}
	t, ok := m.time[rel]
	if !ok {
		var sum uint64 = 14695981039346656037 // FNV-1a
		for _, c := range []byte(rel) {
			sum = (sum ^ uint64(c)) * 1099511628211
		}
		t = unix.Timespec{Sec: 1_500_000_000 + int64(sum%100_000_000), Nsec: int64(sum % 999_999_937)}
	}
	path := strings.TrimSuffix(m.path(rel), "/")
	m.sys("utimensat", rel, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW))
}
