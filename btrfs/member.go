package btrfs

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
)

// Member is one device of a filesystem.
type Member struct {
	DevID uint64 // unique in the filesystem; 0 for the target of a replace only
	UUID  UUID   // of the device
	FSID  UUID   // of the filesystem the device was made for: of the seed, for a seed's device
	// Path is the name the kernel remembers, "" for a missing device. It can
	// be out of date: Num says which device it is.
	Path string
	// Num is the device itself, zero when it is missing.
	Num block.DevNum
	// Size in bytes of what the filesystem uses of the device.
	Size uint64
	// Used is what is allocated to block groups, in bytes. While the member
	// leaves it falls by one block group at a time.
	Used uint64
	// Seed: the device belongs to the read-only filesystem below a sprout. A
	// seed that is mounted by itself is not marked: it has one filesystem id.
	Seed bool
	// Writable: the kernel may write to it.
	Writable bool
	// Missing: the filesystem is mounted without it.
	Missing bool
	// Gone: the device was unplugged since the filesystem was mounted. The
	// kernel's own flag, Missing, does not tell that.
	Gone bool
	// Leaving: it is being removed. The kernel then says 0 for its size, and
	// Size is the whole device's.
	Leaving bool
}

// maxProbe bounds how many devids are asked for one by one.
const maxProbe = 4096

// replaceDevID is the devid of the target of a replace that is not over.
// Source: BTRFS_DEV_REPLACE_DEVID.
const replaceDevID = 0

// Members lists the devices, the seeds among them, by devid. The target of a
// replace that is not over is not among them, see [FS.ReplaceTarget].
// While [FS.Add] makes a sprout of a seed there is no consistent answer for a
// moment: the error wraps EAGAIN then.
func (f *FS) Members() ([]Member, error) {
	list, err := f.devices()
	if len(list) > 0 && list[0].DevID == replaceDevID {
		list = list[1:]
	}
	return list, err
}

// devices lists the members and, before them, the target of a replace.
func (f *FS) devices() ([]Member, error) {
	info, dir, err := f.state()
	if err != nil {
		return nil, f.fail("list the devices", err)
	}
	list, err := entries(filepath.Join(dir, "devinfo"))
	if err != nil {
		return nil, f.fail("list the devices", err)
	}
	// MaxDevID knows nothing of the seeds, sysfs has them all.
	ids := map[uint64]bool{replaceDevID: true}
	for _, entry := range list {
		if id, err := strconv.ParseUint(entry.Name(), 10, 64); err == nil {
			ids[id] = true
		}
	}
	for id := uint64(1); id <= min(info.MaxDevID, maxProbe); id++ {
		ids[id] = true
	}
	var members []Member
	for id := range ids {
		m, err := f.member(info.FSID, dir, id)
		if errors.Is(err, unix.ENODEV) {
			continue // no such device, or it has left since
		}
		if err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.DevID, b.DevID) })
	if err := f.identify(dir, members); err != nil {
		return nil, f.fail("identify the devices", err)
	}
	for i := range members {
		if m := &members[i]; m.Size == 0 && !m.Missing {
			m.Leaving = true
			m.Size = f.deviceSize(m.Num)
		}
	}
	if again, err := f.Info(); err != nil {
		return nil, err
	} else if again.FSID != info.FSID {
		return nil, f.fail("list the devices", errRenamed)
	}
	return members, nil
}

// member reads what the kernel says of one device, without Num.
func (f *FS) member(fsid UUID, dir string, devid uint64) (Member, error) {
	args := devInfoArgs{devid: devid}
	if err := f.call(iocDevInfo, unsafe.Pointer(&args)); err != nil {
		return Member{}, opError("ask about a device", f.path, devid, err)
	}
	m := Member{
		DevID: devid, UUID: args.uuid, FSID: args.fsid, Path: getString(args.path[:]),
		Size: args.totalBytes, Used: args.bytesUsed,
	}
	dir = filepath.Join(dir, "devinfo", strconv.FormatUint(devid, 10))
	flag := func(name string) bool {
		text, err := readAttr(filepath.Join(dir, name))
		return err == nil && text == "1"
	}
	m.Writable, m.Missing = flag("writeable"), flag("missing")
	if text, err := readAttr(filepath.Join(dir, "fsid")); err == nil { // Linux 5.17
		if id, err := ParseUUID(text); err == nil {
			m.FSID = id
		}
	}
	if m.FSID.IsZero() {
		m.FSID = fsid
	}
	m.Seed = m.FSID != fsid
	return m, nil
}

// identify finds out which block devices the members are. The names in sysfs
// cannot go out of date, the kernel's path can: it is what somebody once
// called the device.
func (f *FS) identify(dir string, members []Member) error {
	list, err := entries(filepath.Join(dir, "devices"))
	if err != nil {
		return err
	}
	free := make(map[string]block.DevNum)
	for _, entry := range list {
		link := filepath.Join(dir, "devices", entry.Name())
		text, err := readAttr(filepath.Join(link, "dev"))
		if err != nil {
			// The link goes when the member leaves the filesystem, and stays
			// when the device it points to is unplugged.
			if _, err := os.Lstat(link); err == nil {
				free[entry.Name()] = block.DevNum{}
			}
			continue
		}
		num, err := parseDevNum(text)
		if err != nil {
			return err
		}
		free[entry.Name()] = num
	}
	open := func(m *Member) bool { return m.Num.IsZero() && !m.Missing && !m.Gone }
	assign := func(m *Member, match func(name string, num block.DevNum) bool) {
		for name, num := range free {
			if open(m) && match(name, num) {
				m.Num, m.Gone = num, num.IsZero()
				delete(free, name)
			}
		}
	}
	for i := range members {
		m := &members[i]
		assign(m, func(name string, _ block.DevNum) bool {
			return m.Path == "/dev/"+strings.ReplaceAll(name, "!", "/")
		})
	}
	for i := range members {
		m := &members[i]
		var st unix.Stat_t
		if open(m) && unix.Stat(m.Path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			at := block.DevNumOf(uint64(st.Rdev)) //nolint:unconvert // not 64 bits everywhere
			assign(m, func(_ string, num block.DevNum) bool { return num == at })
		}
	}
	// One member and one device left over belong together.
	var rest []*Member
	for i := range members {
		if m := &members[i]; open(m) {
			rest = append(rest, m)
		}
	}
	if len(rest) == 1 && len(free) == 1 {
		assign(rest[0], func(string, block.DevNum) bool { return true })
	}
	return nil
}

func parseDevNum(text string) (block.DevNum, error) {
	major, minor, ok := strings.Cut(text, ":")
	maj, err1 := strconv.ParseUint(major, 10, 32)
	mnr, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return block.DevNum{}, fmt.Errorf("%q is not a device number", text)
	}
	return block.DevNum{Major: uint32(maj), Minor: uint32(mnr)}, nil
}

// deviceSize is the size of a block device in bytes, 0 when it is gone.
func (f *FS) deviceSize(num block.DevNum) uint64 {
	text, err := readAttr(filepath.Join(f.sys, "dev/block", num.String(), "size"))
	if err != nil {
		return 0
	}
	sectors, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return sectors * 512
}
