// Package boot does what has to be done between the kernel and the system:
// from the kernel command line to a writable root and the note for the daemon.
// It runs in an initramfs, so it starts no program but modprobe and needs no
// udev; it formats nothing and waits for nothing for ever.
//
//   - cmdline.go  what is asked for (pure)
//   - boot.go     the order in which things are done, and what is tried next
//   - scan.go     what is on each block device
//   - media.go    which devices are the media; the seed on them
//   - choose.go   which sprout is mounted (pure)
//   - mend.go     what a power cut at the end of a replace leaves
//   - sprout.go   mounting and dropping a sprout that was kept
//   - volatile.go making a new one in memory
//   - check.go    comparing the seed with its checksums
//
// Whatever is not done as it was asked for is said on the console and is a
// warning in the note. See sprout(7).
package boot
