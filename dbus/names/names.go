// Package names holds the names of the D-Bus contract: the bus name, object
// paths, interfaces, error names and polkit actions. The service, its client
// and everything that talks about either take them from here.
package names

import (
	"fmt"
	"strconv"
	"strings"

	godbus "github.com/godbus/dbus/v5"
)

// The well-known name, the root object and the parents of the other objects.
const (
	Bus           = "org.sproutd.Sprout1"
	Root          = "/org/sproutd/Sprout1"
	SproutsParent = Root + "/sprout"
	JobsParent    = Root + "/job"
	DevicesParent = Root + "/device"
	// RootSprout is the alias of the sprout mounted at "/".
	RootSprout = SproutsParent + "/root"
)

// The interfaces.
const (
	Manager = Bus + ".Manager"
	Sprout  = Bus + ".Sprout"
	Job     = Bus + ".Job"
	Device  = Bus + ".Device"
)

// The standard interfaces the service implements.
const (
	Introspectable = "org.freedesktop.DBus.Introspectable"
	ObjectManager  = "org.freedesktop.DBus.ObjectManager"
	Peer           = "org.freedesktop.DBus.Peer"
	Properties     = "org.freedesktop.DBus.Properties"
)

// ErrorPrefix with a fault code appended is the name of an error of ours.
const ErrorPrefix = Bus + ".Error."

// The standard errors the service replies with.
const (
	ErrorAccessDenied      = "org.freedesktop.DBus.Error.AccessDenied"
	ErrorDisconnected      = "org.freedesktop.DBus.Error.Disconnected"
	ErrorInteractionNeeded = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
	ErrorInvalidArgs       = "org.freedesktop.DBus.Error.InvalidArgs"
	ErrorLimitsExceeded    = "org.freedesktop.DBus.Error.LimitsExceeded"
	ErrorPropertyReadOnly  = "org.freedesktop.DBus.Error.PropertyReadOnly"
	ErrorUnknownInterface  = "org.freedesktop.DBus.Error.UnknownInterface"
	ErrorUnknownMethod     = "org.freedesktop.DBus.Error.UnknownMethod"
	ErrorUnknownObject     = "org.freedesktop.DBus.Error.UnknownObject"
	ErrorUnknownProperty   = "org.freedesktop.DBus.Error.UnknownProperty"
)

// The polkit actions.
const (
	ActionPrefix        = "org.sproutd.sprout1."
	ActionCreate        = ActionPrefix + "create"
	ActionPersist       = ActionPrefix + "persist"
	ActionFlatten       = ActionPrefix + "flatten"
	ActionManageDevices = ActionPrefix + "manage-devices"
	ActionRelease       = ActionPrefix + "release"
	// ActionWipe is asked for in addition to the action of the method.
	ActionWipe = ActionPrefix + "wipe"
	// ActionCancel is for the jobs the caller started, ActionCancelOther for the rest.
	ActionCancel      = ActionPrefix + "cancel"
	ActionCancelOther = ActionPrefix + "cancel-other"
)

// PolkitAnnotation is the introspection annotation that says which polkit
// actions a method may ask for: "none", or actions separated by spaces.
const PolkitAnnotation = "org.sproutd.PolkitAction"

// SproutPath gives the object of the sprout with the given fsid.
func SproutPath(fsid string) godbus.ObjectPath {
	return godbus.ObjectPath(SproutsParent + "/" + strings.ReplaceAll(fsid, "-", "_"))
}

// SproutOf gives the fsid of the sprout object at path, false if path is none.
// The alias of the root sprout stands for no fsid.
func SproutOf(path godbus.ObjectPath) (fsid string, ok bool) {
	label, ok := labelBelow(path, SproutsParent)
	if !ok || path == RootSprout {
		return "", false
	}
	return strings.ReplaceAll(label, "_", "-"), true
}

// JobPath gives the object of the job with the given number.
func JobPath(number uint32) godbus.ObjectPath {
	return godbus.ObjectPath(JobsParent + "/" + strconv.FormatUint(uint64(number), 10))
}

// JobOf gives the number of the job object at path, false if path is none.
func JobOf(path godbus.ObjectPath) (number uint32, ok bool) {
	label, ok := labelBelow(path, JobsParent)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(label, 10, 32)
	if err != nil || JobPath(uint32(n)) != path {
		return 0, false
	}
	return uint32(n), true
}

// DevicePath gives the object of the block device with the given kernel name,
// for example "sda4" or "cciss!c0d0".
func DevicePath(kernelName string) godbus.ObjectPath {
	return godbus.ObjectPath(DevicesParent + "/" + Escape(kernelName))
}

// DeviceOf gives the kernel name of the device object at path, false if path
// is none.
func DeviceOf(path godbus.ObjectPath) (kernelName string, ok bool) {
	label, ok := labelBelow(path, DevicesParent)
	if !ok {
		return "", false
	}
	return Unescape(label)
}

// Escape makes any string into one element of an object path, in the way of
// sd_bus_path_encode(3): what is no letter and no digit, and a leading digit,
// becomes "_" and two hexadecimal digits; the empty string becomes "_".
func Escape(s string) string {
	if s == "" {
		return "_"
	}
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return b.String()
}

// Unescape undoes [Escape]. It reports false for what Escape never gives.
func Unescape(label string) (s string, ok bool) {
	if label == "_" {
		return "", true
	}
	var b strings.Builder
	for i := 0; i < len(label); i++ {
		if label[i] != '_' {
			b.WriteByte(label[i])
			continue
		}
		if i+2 >= len(label) {
			return "", false
		}
		c, err := strconv.ParseUint(label[i+1:i+3], 16, 8)
		if err != nil {
			return "", false
		}
		b.WriteByte(byte(c))
		i += 2
	}
	s = b.String()
	return s, s != "" && Escape(s) == label
}

func labelBelow(path godbus.ObjectPath, parent string) (label string, ok bool) {
	label, ok = strings.CutPrefix(string(path), parent+"/")
	return label, ok && label != "" && !strings.Contains(label, "/")
}
