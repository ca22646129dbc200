package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// Event is one change of a block device that the kernel announced. The zero
// Event stands for changes that are not known one by one: list again.
type Event struct {
	// Action: "add", "remove", "change" ...
	Action string
	// Name is the kernel's name of the device, DevType "disk" or "partition".
	Name, DevType string
	Num           DevNum
	// DiskSeq of the whole disk, 0 before 5.15.
	DiskSeq uint64
}

// kernelGroup is the multicast group of the kernel's own messages; those of
// udev come in group 2 (lib/kobject_uevent.c).
const kernelGroup = 1

// Watch calls changed for every event of a block device until ctx ends, and
// then returns nil. It calls changed with the zero Event once the socket is
// open, so that a listing made from there on misses nothing, and again when the
// kernel had to drop events. changed runs on the caller's goroutine.
func (s *System) Watch(ctx context.Context, changed func(Event)) error {
	conn, err := socket.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT, "uevent", nil)
	if err != nil {
		return fmt.Errorf("cannot watch for block devices: %w", err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.Bind(&unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return fmt.Errorf("cannot watch for block devices: %w", err)
	}
	changed(Event{})
	buf := make([]byte, 64<<10) // the kernel's own limit is 2 KiB
	for {
		n, from, err := conn.Recvfrom(ctx, buf, 0)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed(Event{})
			continue
		case err != nil:
			return fmt.Errorf("cannot watch for block devices: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 { // not from the kernel
			continue
		}
		if e, ok := parseUevent(buf[:n]); ok {
			changed(e)
		}
	}
}

// parseUevent reads a kernel message: "action@devpath", then KEY=value, each
// ended by a zero byte. It says no to whatever is not about a block device.
func parseUevent(msg []byte) (Event, bool) {
	head, rest, ok := bytes.Cut(msg, []byte{0})
	if !ok || !bytes.Contains(head, []byte("@")) {
		return Event{}, false
	}
	var e Event
	var subsystem, major, minor string
	for field := range strings.SplitSeq(string(rest), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "ACTION":
			e.Action = value
		case "SUBSYSTEM":
			subsystem = value
		case "DEVNAME":
			e.Name = strings.TrimPrefix(value, "/dev/")
		case "DEVTYPE":
			e.DevType = value
		case "MAJOR":
			major = value
		case "MINOR":
			minor = value
		case "DISKSEQ":
			e.DiskSeq, _ = strconv.ParseUint(value, 10, 64)
		}
	}
	var err error
	e.Num, err = parseDevNum(major + ":" + minor)
	return e, subsystem == "block" && e.Action != "" && e.Name != "" && err == nil
}
