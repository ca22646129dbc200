// Package block reads and prepares block devices: what exists, what is on
// it, who uses it, and the few things that are done to it (lock, wipe,
// discard, attach and detach a loop, put another file behind one).
//
// Topics by file: identity (id.go), listing (system.go), signatures
// (signature.go), users of a device and the proof that a disk can be unplugged
// (usage.go), an opened device and everything destructive (handle.go), loop
// devices (loop.go), what is behind them (backing.go) and how that is changed
// (change.go), partition tables (gpt.go), kernel events (uevent.go), failures in the
// kernel's log (failure.go).
//
// The kernel interfaces are described in Documentation/ABI/stable/sysfs-block,
// Documentation/admin-guide/iostats.rst and loop(4).
package block
