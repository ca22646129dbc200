package block

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Holder is one user of a device.
type Holder struct {
	// Kind and Name:
	//
	//	mount      the mount point; for a Btrfs mount this counts for every member
	//	swap       the swap device or file
	//	device     the kernel name of a device-mapper or RAID device on top
	//	loop       the kernel name of a loop over the device, or over a file on a mount of it
	//	partition  a partition of this disk is used, "sda1: mount /x"
	//	disk-open  the disk of this partition is used as a whole, "sda: mount /x"
	//	process    a process with the device open, "dd (pid 42)"; found by Unused only
	//	claim      the kernel refuses exclusive use and nobody above explains it:
	//	           most often a mount in another mount namespace; found by Unused only
	Kind, Name string
}

// String is for messages: "mount /mnt".
func (h Holder) String() string { return h.Kind + " " + h.Name }

// usage says who uses which device, from one reading of the kernel's tables.
type usage map[DevNum][]Holder

func (u usage) add(num DevNum, h Holder) {
	if !num.IsZero() && !slices.Contains(u[num], h) {
		u[num] = append(u[num], h)
	}
}

func (s *System) usage() (usage, error) {
	mounts, err := s.mounts()
	if err != nil {
		return nil, err
	}
	btrfs, err := s.btrfsMembers()
	if err != nil {
		return nil, err
	}
	u := usage{}
	seen := map[string]bool{}
	// devices of a mount: for a Btrfs all its members.
	devices := func(m *mountinfo.Info) []DevNum {
		nums := s.devicesOf(m)
		if m.FSType != "btrfs" || len(nums) == 0 {
			return nums
		}
		for fsid, members := range btrfs {
			if slices.Contains(members, nums[0]) {
				seen[fsid] = true
				return members
			}
		}
		return nums
	}
	for _, m := range mounts {
		for _, num := range devices(m) {
			u.add(num, Holder{Kind: "mount", Name: m.Mountpoint})
		}
	}
	for fsid, members := range btrfs {
		if !seen[fsid] { // sysfs knows mounted file systems only
			for _, member := range members {
				u.add(member, Holder{Kind: "mount", Name: "of Btrfs filesystem " + fsid + ", out of sight"})
			}
		}
	}
	if err := s.addSwaps(u); err != nil {
		return nil, err
	}
	if err := s.addLoops(u, mounts, devices); err != nil {
		return nil, err
	}
	return u, nil
}

func (s *System) mounts() ([]*mountinfo.Info, error) {
	f, err := os.Open(s.path("proc/self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("cannot read the mount table: %w", err)
	}
	defer func() { _ = f.Close() }()
	list, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot read the mount table: %w", err)
	}
	return list, nil
}

// devicesOf gives the devices that the mount table names for m. File systems
// with an anonymous number (Btrfs, bcachefs) name them in the source, bcachefs
// all of them with colons between.
func (s *System) devicesOf(m *mountinfo.Info) []DevNum {
	if m.Major != 0 {
		return []DevNum{{Major: uint32(m.Major), Minor: uint32(m.Minor)}}
	}
	if num := s.resolve(m.Source); !num.IsZero() {
		return []DevNum{num}
	}
	var list []DevNum
	for part := range strings.SplitSeq(m.Source, ":") {
		if num := s.resolve(part); !num.IsZero() {
			list = append(list, num)
		}
	}
	return list
}

// resolve gives the number of the block device a path names, zero if none.
func (s *System) resolve(path string) DevNum {
	if !filepath.IsAbs(path) {
		return DevNum{}
	}
	if name, ok := strings.CutPrefix(path, "/dev/"); ok {
		if num, err := s.numOf(name); err == nil {
			return num
		}
	}
	var st unix.Stat_t
	if unix.Stat(s.path(path), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return DevNum{}
	}
	return DevNumOf(st.Rdev)
}

// btrfsMembers gives the devices of every mounted Btrfs by fsid, seeds
// included. The mount table shows only one of them.
func (s *System) btrfsMembers() (map[string][]DevNum, error) {
	dirs, err := filepath.Glob(s.path("sys/fs/btrfs/*/devices"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the Btrfs file systems: %w", err)
	}
	members := map[string][]DevNum{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot list the devices of a Btrfs: %w", err)
		}
		fsid := filepath.Base(filepath.Dir(dir))
		for _, e := range entries {
			if num, err := s.numOf(kernelName(e.Name())); err == nil {
				members[fsid] = append(members[fsid], num)
			}
		}
	}
	return members, nil
}

func (s *System) addSwaps(u usage) error {
	b, err := os.ReadFile(s.path("proc/swaps"))
	if errors.Is(err, fs.ErrNotExist) { // a kernel without swap
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the swap table: %w", err)
	}
	for _, path := range parseSwaps(string(b)) {
		h := Holder{Kind: "swap", Name: path}
		if num := s.resolve(path); !num.IsZero() {
			u.add(num, h)
			continue
		}
		var st unix.Stat_t
		if unix.Stat(s.path(path), &st) == nil {
			u.add(DevNumOf(st.Dev), h)
		}
	}
	return nil
}

// parseSwaps gives the file names in /proc/swaps, whose blanks are escaped as
// in the mount table.
func parseSwaps(text string) []string {
	var paths []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "/") { // the heading
			continue
		}
		name, _, _ := strings.Cut(line, " ")
		name, _, _ = strings.Cut(name, "\t")
		paths = append(paths, unescape(strings.TrimSuffix(name, "\n")))
	}
	return paths
}

// unescape turns the kernel's \ooo back into bytes.
func unescape(text string) string {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+3 < len(text) {
			if n, err := strconv.ParseUint(text[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

// addLoops counts a loop for the device it lies on. The number that the loop
// driver remembers is right also when the file's mount has gone out of sight;
// the path is what finds a file on Btrfs.
func (s *System) addLoops(u usage, mounts []*mountinfo.Info, devices func(*mountinfo.Info) []DevNum) error {
	files, err := filepath.Glob(s.path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return fmt.Errorf("cannot list the loop devices: %w", err)
	}
	for _, file := range files {
		loop := filepath.Base(filepath.Dir(filepath.Dir(file)))
		backing := attr(filepath.Dir(file), "backing_file")
		if backing == "" {
			continue
		}
		h := Holder{Kind: "loop", Name: loop}
		if file, err := s.loopBacking(s.path("dev", loop)); err == nil {
			if unnamed, err := unnamedMemory(); err == nil && file.dev == unnamed {
				continue // on no device, and the name it has is no path
			}
			u.add(file.rdev, h)
			if file.dev.Major != 0 && file.rdev.IsZero() {
				u.add(file.dev, h)
			}
		}
		if num := s.resolve(backing); !num.IsZero() {
			u.add(num, h)
		} else if m := mountOf(mounts, backing); m != nil {
			for _, num := range devices(m) {
				u.add(num, h)
			}
		}
	}
	return nil
}

// mountOf gives the mount that path lies on: the last one of those with the
// longest mount point, nil if none.
func mountOf(mounts []*mountinfo.Info, path string) *mountinfo.Info {
	var found *mountinfo.Info
	for _, m := range mounts {
		prefix := strings.TrimSuffix(m.Mountpoint, "/")
		if path != prefix && !strings.HasPrefix(path, prefix+"/") {
			continue
		}
		if found == nil || len(m.Mountpoint) >= len(found.Mountpoint) {
			found = m
		}
	}
	return found
}

// holders gives the users of d. Those of a disk include those of its
// partitions, those of a partition include those of the disk as a whole, but
// not those of its siblings.
func (s *System) holders(d Device, use usage) ([]Holder, error) {
	list, err := s.direct(d.Num, d.Name, use)
	if err != nil {
		return nil, err
	}
	others, kind := d.Partitions, "partition"
	if d.Name != d.Disk {
		others, kind = []string{d.Disk}, "disk-open"
	}
	for _, name := range others {
		num, err := s.numOf(name)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		its, err := s.direct(num, name, use)
		if err != nil {
			return nil, err
		}
		for _, h := range its {
			list = append(list, Holder{Kind: kind, Name: name + ": " + h.String()})
		}
	}
	return list, nil
}

func (s *System) direct(num DevNum, name string, use usage) ([]Holder, error) {
	list := slices.Clone(use[num])
	entries, err := os.ReadDir(filepath.Join(s.classDir(name), "holders"))
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("cannot list the holders of %s: %w", name, err)
	}
	for _, e := range entries {
		list = append(list, Holder{Kind: "device", Name: kernelName(e.Name())})
	}
	return list, nil
}

// Unused proves that a disk can be unplugged: no mount, swap, loop, device or
// process uses it or one of its partitions, and the kernel grants exclusive
// use, which it does not while any mount namespace has it mounted. Everything
// that stands in the way is listed. A descriptor that this process holds on
// the device counts as well, a List or Probe at the same time among them, and
// so does udev's passing look at it.
//
// A partition stands for its disk. The error wraps [os.ErrNotExist] when the
// disk is gone already.
func (s *System) Unused(ctx context.Context, num DevNum) (bool, []Holder, error) {
	disk, err := s.WholeDisk(num)
	if err != nil {
		return false, nil, err
	}
	use, err := s.usage()
	if err != nil {
		return false, nil, err
	}
	d, err := s.describe(disk.Num, use)
	if err != nil {
		return false, nil, err
	}
	nums := []DevNum{d.Num}
	for _, name := range d.Partitions {
		if n, err := s.numOf(name); err == nil {
			nums = append(nums, n)
		}
	}
	processes, err := s.processes(ctx, nums)
	if err != nil {
		return false, nil, err
	}
	list := slices.Concat(d.Holders, processes)
	if len(list) > 0 {
		return false, list, nil
	}
	f, err := os.OpenFile(s.path(d.Path), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EBUSY) {
		return false, []Holder{{Kind: "claim", Name: "of " + d.Path + " by a mount elsewhere or by the kernel"}}, nil
	}
	if errors.Is(err, unix.ENOMEDIUM) { // an ejected drive holds nothing
		return true, nil, nil
	}
	if err != nil {
		return false, nil, fmt.Errorf("cannot open the device: %w", err)
	}
	defer func() { _ = f.Close() }()
	got, err := rdevOf(f)
	if err == nil && got != d.Num {
		err = fmt.Errorf("cannot use %s: %w", d.Path, ErrChanged)
	}
	return err == nil, nil, err
}

// processes lists who has one of the devices open.
func (s *System) processes(ctx context.Context, nums []DevNum) ([]Holder, error) {
	entries, err := os.ReadDir(s.path("proc"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes: %w", err)
	}
	var list []Holder
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("cannot list the processes: %w", ctx.Err())
		}
		dir := s.path("proc", e.Name())
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil { // it ended, or is a kernel thread's
			continue
		}
		for _, fd := range fds {
			// DONT_SYNC: never wait for a network or FUSE server.
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, filepath.Join(dir, "fd", fd.Name()), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
			if err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
				continue
			}
			if slices.Contains(nums, DevNum{Major: st.Rdev_major, Minor: st.Rdev_minor}) {
				list = append(list, Holder{Kind: "process", Name: fmt.Sprintf("%s (pid %s)", attr(dir, "comm"), e.Name())})
				break
			}
		}
	}
	return list, nil
}

// Of gives the block device that holds the file system on which path lies. For
// a Btrfs of several devices it is the one in the mount table. The error wraps
// [ErrNoDevice] for a file system that is on none (tmpfs, overlay, NFS).
func (s *System) Of(path string) (ID, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, s.path(path), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_MNT_ID, &st); err != nil {
		return ID{}, fmt.Errorf("cannot stat %s: %w", path, err)
	}
	if st.Dev_major != 0 {
		return s.Identify(DevNum{Major: st.Dev_major, Minor: st.Dev_minor})
	}
	mounts, err := s.mounts()
	if err != nil {
		return ID{}, err
	}
	for _, m := range mounts {
		if uint64(m.ID) != st.Mnt_id {
			continue
		}
		if num := s.resolve(m.Source); !num.IsZero() {
			return s.Identify(num)
		}
		return ID{}, fmt.Errorf("cannot find the device below %s: %s is %w", path, m.FSType, ErrNoDevice)
	}
	return ID{}, fmt.Errorf("cannot find the device below %s: it is %w that is mounted here", path, ErrNoDevice)
}
