package block

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// DevNum is a kernel device number. The zero value names no device.
type DevNum struct {
	Major, Minor uint32
}

// DevNumOf splits a dev_t as stat(2) reports it in st_rdev or st_dev.
func DevNumOf(dev uint64) DevNum {
	return DevNum{Major: unix.Major(dev), Minor: unix.Minor(dev)}
}

// IsZero reports whether n names no device.
func (n DevNum) IsZero() bool { return n == DevNum{} }

// loopMajor is the major number of loop devices.
// Source: Documentation/admin-guide/devices.txt.
const loopMajor = 7

// IsLoop reports whether n is a loop device. A partition of one is not.
func (n DevNum) IsLoop() bool { return n.Major == loopMajor }

// String gives the form that sysfs and mountinfo use, for example "8:17".
func (n DevNum) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// ID says which block device is meant. A path alone is never enough: names are
// given out again and symbolic links change, so what is compared is the device
// number together with the disk sequence number of the kernel.
type ID struct {
	// Num is the kernel device number.
	Num DevNum
	// Path is the kernel's own name below /dev, for example "/dev/sda4". It is
	// never a symbolic link. It is for messages and for ioctls that take a name.
	Path string
	// DiskSeq is the sequence number of the whole disk, new each time a disk
	// (or a loop's backing file) is attached; 0 where the kernel has none
	// (before 5.15). Source: Documentation/ABI/stable/sysfs-block, diskseq.
	DiskSeq uint64
	// Serial is the whole disk's serial number or WWID, "" where it has none.
	Serial string
	// PartUUID is the UUID of the partition entry, "" for whole disks and
	// where the partition table has none.
	PartUUID string
	// Size in bytes.
	Size uint64
}

// Same reports whether a and b are the same device in the same boot: equal
// device number, equal disk sequence number and equal size. Two zero IDs are
// not the same device.
func (a ID) Same(b ID) bool {
	return !a.Num.IsZero() && a.Num == b.Num && a.DiskSeq == b.DiskSeq && a.Size == b.Size
}
