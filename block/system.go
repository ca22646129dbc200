package block

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sectorSize is the unit of size and stat in sysfs, whatever the device's own
// sector size is (Documentation/ABI/stable/sysfs-block).
const sectorSize = 512

// System reads the block devices of one machine. It keeps no state: every
// call asks the kernel again. It is safe for concurrent use.
type System struct {
	root string
	// openNode opens the kernel's device node of a device for reading.
	openNode func(path string, num DevNum) (*os.File, error)
	// signatures says what is on an opened device.
	signatures func(ctx context.Context, f *os.File) ([]Signature, error)
	// loopBacking says which file is behind a loop.
	loopBacking func(node string) (backing, error)
}

// New returns the System of the running kernel.
func New() *System { return NewAt("/") }

// NewAt returns a System that reads /sys, /proc, /run and /dev below root.
func NewAt(root string) *System {
	s := &System{root: root, signatures: runWipefs, loopBacking: loopBacking}
	s.openNode = s.openKernelNode
	return s
}

// Device is what could be found out about a block device at one moment.
type Device struct {
	ID
	// Name is the kernel's name, "sda4".
	Name string
	// Disk is the kernel's name of the whole disk, "sda"; equal to Name for a
	// whole disk.
	Disk string
	// Partition number, 0 for a whole disk.
	Partition int
	// Model as the drive gives it, "" where it gives none.
	Model string
	// Removable is what the kernel says about the medium. Many USB drives
	// say no here.
	Removable, ReadOnly, Rotational bool
	// SectorSize is the logical sector size in bytes.
	SectorSize uint32
	// Partitions are the kernel names of the partitions of a whole disk.
	Partitions []string
	// BackingFile is the file behind a loop device, "" for all others. The
	// kernel appends " (deleted)" when the file has no name any more.
	BackingFile string
	// Signatures on the device. They say nothing when ProbeError is set.
	Signatures []Signature
	// ProbeError is why List could not read the signatures, for example an I/O
	// error of the medium. Such a device must not be taken for an empty one.
	ProbeError error
	// Holders are the users of the device; see [Holder].
	Holders []Holder
}

// IOStat is how much a device was read and written since it appeared.
type IOStat struct {
	// ReadBytes and WrittenBytes count what reached the device, in bytes.
	ReadBytes, WrittenBytes uint64
	// InFlight is the number of requests under way.
	InFlight uint64
}

func (s *System) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// sysName turns a kernel name into its file name in sysfs, where a name with a
// slash ("cciss/c0d0") carries an exclamation mark.
func sysName(name string) string { return strings.ReplaceAll(name, "/", "!") }

func kernelName(sysName string) string { return strings.ReplaceAll(sysName, "!", "/") }

func (s *System) classDir(name string) string { return s.path("sys/class/block", sysName(name)) }

// attr reads one sysfs attribute, "" where the device has none.
func attr(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func attrUint(dir, name string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

func parseDevNum(text string) (DevNum, error) {
	major, minor, ok := strings.Cut(strings.TrimSpace(text), ":")
	a, errA := strconv.ParseUint(major, 10, 32)
	b, errB := strconv.ParseUint(minor, 10, 32)
	if !ok || errA != nil || errB != nil {
		return DevNum{}, fmt.Errorf("cannot read %q as a device number", text)
	}
	return DevNum{Major: uint32(a), Minor: uint32(b)}, nil
}

// dirs of a device in sysfs: its own and that of its whole disk, both without
// symbolic links.
func (s *System) dirs(num DevNum) (dir, disk string, err error) {
	dir, err = filepath.EvalSymlinks(s.path("sys/dev/block", num.String()))
	if err != nil {
		return "", "", fmt.Errorf("cannot find block device %s: %w", num, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		return dir, filepath.Dir(dir), nil
	}
	return dir, dir, nil
}

// Identify gives the identity of a device by its number, without opening it.
// The error wraps [os.ErrNotExist] when there is no such device.
func (s *System) Identify(num DevNum) (ID, error) {
	dir, disk, err := s.dirs(num)
	if err != nil {
		return ID{}, err
	}
	sectors, err := attrUint(dir, "size")
	if err != nil {
		return ID{}, fmt.Errorf("cannot read the size of block device %s: %w", num, err)
	}
	id := ID{
		Num:    num,
		Path:   "/dev/" + kernelName(filepath.Base(dir)),
		Size:   sectors * sectorSize,
		Serial: serial(disk),
	}
	id.DiskSeq, _ = attrUint(disk, "diskseq") // missing before 5.15: stays 0
	if dir != disk {
		id.PartUUID = s.partUUID(num, dir)
	}
	return id, nil
}

// serial looks where the different kinds of drives keep it. A USB stick has it
// in the USB device some levels above the SCSI one.
func serial(disk string) string {
	for _, name := range []string{"serial", "device/serial", "wwid", "device/wwid"} {
		if text := attr(disk, name); text != "" {
			return text
		}
	}
	for dir := filepath.Dir(disk); filepath.Base(dir) != "devices" && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if attr(dir, "idVendor") != "" {
			return attr(dir, "serial")
		}
	}
	return ""
}

// partUUID asks the kernel, which tells since 6.10, and then udev's database.
func (s *System) partUUID(num DevNum, dir string) string {
	for line := range strings.Lines(attr(dir, "uevent")) {
		if uuid, ok := strings.CutPrefix(strings.TrimSpace(line), "PARTUUID="); ok {
			return uuid
		}
	}
	udev, _ := os.ReadFile(s.path("run/udev/data", "b"+num.String()))
	for line := range strings.Lines(string(udev)) {
		if uuid, ok := strings.CutPrefix(strings.TrimSpace(line), "E:ID_PART_ENTRY_UUID="); ok {
			return uuid
		}
	}
	return ""
}

// numOf gives the number of a device by its kernel name.
func (s *System) numOf(name string) (DevNum, error) {
	b, err := os.ReadFile(filepath.Join(s.classDir(name), "dev"))
	if err != nil {
		return DevNum{}, fmt.Errorf("cannot find block device %s: %w", name, err)
	}
	return parseDevNum(string(b))
}

// describe reads everything but the signatures.
func (s *System) describe(num DevNum, use usage) (Device, error) {
	id, err := s.Identify(num)
	if err != nil {
		return Device{}, err
	}
	dir, disk, err := s.dirs(num)
	if err != nil {
		return Device{}, err
	}
	d := Device{
		ID:          id,
		Name:        kernelName(filepath.Base(dir)),
		Disk:        kernelName(filepath.Base(disk)),
		Model:       attr(disk, "device/model"),
		Removable:   attr(disk, "removable") == "1",
		ReadOnly:    attr(dir, "ro") == "1",
		Rotational:  attr(disk, "queue/rotational") == "1",
		BackingFile: attr(dir, "loop/backing_file"),
	}
	size, _ := strconv.ParseUint(attr(disk, "queue/logical_block_size"), 10, 32)
	d.SectorSize = uint32(size)
	if dir != disk {
		if d.Partition, err = strconv.Atoi(attr(dir, "partition")); err != nil {
			return Device{}, fmt.Errorf("cannot read the partition number of %s: %w", id.Path, err)
		}
	} else if d.Partitions, err = partitions(dir); err != nil {
		return Device{}, fmt.Errorf("cannot list the partitions of %s: %w", id.Path, err)
	}
	if d.Holders, err = s.holders(d, use); err != nil {
		return Device{}, err
	}
	return d, nil
}

// partitions gives the kernel names of the partitions of a whole disk.
func partitions(disk string) ([]string, error) {
	entries, err := os.ReadDir(disk)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(disk, e.Name(), "partition")); err == nil {
			names = append(names, kernelName(e.Name()))
		}
	}
	return names, nil
}

// names gives the kernel names of all whole disks, those left out that hold
// nothing of the user's or have no device node.
func (s *System) names() ([]string, error) {
	entries, err := os.ReadDir(s.path("sys/block"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the block devices: %w", err)
	}
	var names []string
	for _, e := range entries {
		name := kernelName(e.Name())
		if strings.HasPrefix(name, "ram") || strings.HasPrefix(name, "zram") {
			continue
		}
		if attr(s.classDir(name), "hidden") == "1" { // a path of a multipath NVMe disk: has no device node
			continue
		}
		names = append(names, name)
	}
	return names, nil
}

// IDs gives what [System.List] lists by identity alone. No device is opened and
// no program started, so it also works where there is no util-linux.
func (s *System) IDs() ([]ID, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	var ids []ID
	for _, disk := range names {
		if attr(s.classDir(disk), "size") == "0" { // most are loops without a file
			continue
		}
		parts, err := partitions(s.classDir(disk))
		if err != nil && !gone(err) {
			return nil, fmt.Errorf("cannot list the partitions of %s: %w", disk, err)
		}
		for _, name := range append([]string{disk}, parts...) {
			num, err := s.numOf(name)
			var id ID
			if err == nil {
				id, err = s.Identify(num)
			}
			if gone(err) || err == nil && id.Size == 0 {
				continue
			}
			if err != nil {
				return nil, err
			}
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// PartLabel gives the name of a partition in the partition table, "" where it
// has none.
func (s *System) PartLabel(num DevNum) string {
	for line := range strings.Lines(attr(s.path("sys/dev/block", num.String()), "uevent")) {
		if name, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "PARTNAME="); ok {
			return name
		}
	}
	return ""
}

// List gives every block device with a medium in it, whole disks and
// partitions, sorted by kernel name with the partitions after their disk. RAM
// disks, zram devices and loops without a file are left out, and so is what
// vanishes while it is read. Open the event socket ([System.Watch]) before the
// first List and no change is lost.
//
// known, if not nil, gives the signatures of devices that need not be opened to
// learn what is on them.
func (s *System) List(ctx context.Context, known func(ID) ([]Signature, bool)) ([]Device, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	use, err := s.usage()
	if err != nil {
		return nil, err
	}
	var list []Device
	for _, name := range names {
		disk, err := s.listed(ctx, name, use, known)
		if gone(err) || err == nil && disk.Size == 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, disk)
		for _, name := range disk.Partitions {
			part, err := s.listed(ctx, name, use, known)
			if gone(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			list = append(list, part)
		}
	}
	return list, nil
}

func (s *System) listed(ctx context.Context, name string, use usage, known func(ID) ([]Signature, bool)) (Device, error) {
	num, err := s.numOf(name)
	if err != nil {
		return Device{}, err
	}
	d, err := s.describe(num, use)
	if err != nil || d.Size == 0 {
		return d, err
	}
	if known != nil {
		var ok bool
		if d.Signatures, ok = known(d.ID); ok {
			return d, nil
		}
	}
	f, err := s.openNode(d.Path, num)
	if gone(err) {
		return Device{}, err
	}
	if err != nil {
		d.ProbeError = err
		return d, nil
	}
	defer func() { _ = f.Close() }()
	d.Signatures, err = s.signatures(ctx, f)
	switch {
	case ctx.Err() != nil:
		return Device{}, fmt.Errorf("cannot list the block devices: %w", ctx.Err())
	case isNoTool(err):
		return Device{}, err // otherwise every disk would look unreadable
	}
	d.ProbeError = err
	return d, nil
}

// openKernelNode opens the kernel's own device node and makes sure that it is the device with the given number.
func (s *System) openKernelNode(path string, num DevNum) (*os.File, error) {
	f, err := os.OpenFile(s.path(path), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the device: %w", err)
	}
	got, err := rdevOf(f)
	if err == nil && got != num {
		err = fmt.Errorf("cannot use %s: %w", path, ErrChanged)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func rdevOf(f *os.File) (DevNum, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return DevNum{}, fmt.Errorf("cannot stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return DevNum{}, &NotBlockDeviceError{Path: f.Name(), Kind: kindOf(st.Mode)}
	}
	return DevNumOf(st.Rdev), nil
}

// Lookup describes the device with the given number as it is now. The error
// wraps [os.ErrNotExist] when there is none.
func (s *System) Lookup(ctx context.Context, num DevNum) (Device, error) {
	id, err := s.Identify(num)
	if err != nil {
		return Device{}, err
	}
	f, err := s.openNode(id.Path, num)
	if err != nil {
		return Device{}, err
	}
	h := &Handle{s: s, f: f, id: id}
	defer func() { _ = h.Close() }()
	return h.Probe(ctx)
}

// ByPath describes the device that path names, a symbolic link being followed
// once. Errors: [NotBlockDeviceError], [os.ErrNotExist], [ErrNoProbeTool].
func (s *System) ByPath(ctx context.Context, path string) (Device, error) {
	h, err := s.Open(ctx, path)
	if err != nil {
		return Device{}, err
	}
	defer func() { _ = h.Close() }()
	return h.Probe(ctx)
}

// WholeDisk gives the disk that a partition lies on. A whole disk, a loop and
// a device-mapper device are their own whole disk.
func (s *System) WholeDisk(num DevNum) (ID, error) {
	dir, disk, err := s.dirs(num)
	if err != nil {
		return ID{}, err
	}
	if dir == disk {
		return s.Identify(num)
	}
	text, err := os.ReadFile(filepath.Join(disk, "dev"))
	if err != nil {
		return ID{}, fmt.Errorf("cannot find the disk of block device %s: %w", num, err)
	}
	if num, err = parseDevNum(string(text)); err != nil {
		return ID{}, err
	}
	return s.Identify(num)
}

// IOStat reads the transfer counters of a device or partition
// (Documentation/block/stat.rst; its sectors are 512 bytes always).
func (s *System) IOStat(num DevNum) (IOStat, error) {
	b, err := os.ReadFile(s.path("sys/dev/block", num.String(), "stat"))
	if err != nil {
		return IOStat{}, fmt.Errorf("cannot read the transfer counters of block device %s: %w", num, err)
	}
	st, err := parseIOStat(string(b))
	if err != nil {
		return IOStat{}, fmt.Errorf("cannot read the transfer counters of block device %s: %w", num, err)
	}
	return st, nil
}

func parseIOStat(text string) (IOStat, error) {
	const read, written, inFlight = 2, 6, 8
	fields := strings.Fields(text)
	if len(fields) <= inFlight {
		return IOStat{}, fmt.Errorf("%d fields where 11 or more were expected", len(fields))
	}
	var n [3]uint64
	for i, field := range []int{read, written, inFlight} {
		var err error
		if n[i], err = strconv.ParseUint(fields[field], 10, 64); err != nil {
			return IOStat{}, err
		}
	}
	return IOStat{ReadBytes: n[0] * sectorSize, WrittenBytes: n[1] * sectorSize, InFlight: n[2]}, nil
}
