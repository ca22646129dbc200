package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"sproutd.org/sproutd/dbus/client"
)

// The exit codes, one for each class of errors. They are documented in
// sproutctl(1) and never change their meaning.
const (
	exitOK          = 0
	exitInternal    = 1
	exitUsage       = 2
	exitUnavailable = 3
	exitDenied      = 4
	exitNotFound    = 5
	exitSeed        = 6
	exitTarget      = 7
	exitNoRoom      = 8
	exitBusy        = 9
	exitState       = 10
	exitUnsupported = 11
	exitIO          = 12
	exitCancelled   = 13
	exitInterrupted = 14
	exitUnconfirmed = 15
	exitDetached    = 16
	exitKilled      = 130
)

// The codes of errors that arise in sproutctl itself.
const (
	usage       = "Usage"       // the command line makes no sense
	unconfirmed = "Unconfirmed" // the user did not say yes
	missingTool = "MissingTool" // a program is not installed
	whichSprout = "WhichSprout" // there are several, and --sprout was not given
	notMarked   = "NotMarked"   // btrfstune failed
	badSource   = "BadSource"   // no seed can be made of it
	imageExists = "ImageExists" // the seed to be built is there already
	noRoom      = "NoRoom"      // the seed to be built does not fit
	changed     = "Changed"     // the source of a seed did, meanwhile
	notBuilt    = "NotBuilt"    // something else went wrong with a seed
)

// advice is what sproutctl knows about a class of errors.
type advice struct {
	exit   int
	remedy string // what the user can do, "" where there is nothing to do
}

// adviceFor is the one table of exit codes and remedies. The service says what
// happened; what to do about it is said here and in sproutctl(1) only.
func adviceFor(code string) advice {
	switch code {
	case "NotSeed":
		return advice{exitSeed, "Make it a seed: unmount it, then run 'sproutctl seed mark IMAGE'."}
	case "SeedUnsupported":
		return advice{exitSeed, "Boot a newer kernel, or build the seed without the feature that is named."}
	case "SeedDamaged":
		return advice{exitSeed, "Copy the image again and compare its checksum; a truncated download is the usual cause."}
	case "NoSuchDevice":
		return advice{exitNotFound, "See what there is: 'sproutctl devices'."}
	case "DeviceBusy":
		return advice{exitTarget, "Unmount it, switch its swap off or close what is named, then try again."}
	case "DeviceReadOnly":
		return advice{exitTarget, "Flip the write-protect switch, or choose another device: 'sproutctl devices'."}
	case "DeviceIsMember":
		return advice{exitTarget, "Choose a device that is not yet part of a sprout: 'sproutctl devices'."}
	case "DeviceIsMedia":
		return advice{exitTarget, "The seed is never written. Choose another device: 'sproutctl devices'."}
	case "TargetTooSmall":
		return advice{exitTarget, "Choose a larger device, or delete files first: 'sproutctl plan' says how much is needed."}
	case "TargetNotEmpty":
		return advice{exitTarget, "To destroy what is on it, give --wipe. Otherwise choose another device: 'sproutctl devices'."}
	case "NoSpace":
		return advice{exitNoRoom, "Delete files, or add room with 'sproutctl add zram --size 4G', then 'sproutctl resume'. A release can go to another directory."}
	case "NoMemory":
		return advice{exitNoRoom, "Close programs, or ask for less with --size. A release can go to a directory of another disk, or to a partition."}
	case "Busy":
		return advice{exitBusy, "Wait for it with 'sproutctl watch', or stop it with 'sproutctl cancel JOB'."}
	case "WrongState":
		return advice{exitState, "See the state and what can be resumed: 'sproutctl status'."}
	case "NothingToResume":
		return advice{exitState, "Nothing is left to do; 'sproutctl status' shows the state."}
	case "NotSupported":
		return advice{exitUnsupported, "Update the kernel or sproutd. If it is about the boot loader: give --bootloader none and install one yourself."}
	case "IOError":
		return advice{exitIO, "Look at 'journalctl -k' and at the cable. The file system stays mounted: save what matters, then 'sproutctl resume'."}
	case "Cancelled":
		return advice{exitCancelled, "Nothing is lost. Go on with 'sproutctl resume'."}
	case "Interrupted":
		return advice{exitInterrupted, "Nothing is lost. Go on with 'sproutctl resume'."}
	case "NoSuchJob":
		return advice{exitNotFound, "See the jobs there are: 'sproutctl jobs'."}
	case "NoSuchSprout":
		return advice{exitNotFound, "See the sprouts there are: 'sproutctl status'. Make one: 'sproutctl create SEED MOUNTPOINT'."}
	case "InvalidArgs":
		return advice{exitUsage, "See 'sproutctl help', or sproutctl(1)."}
	case "AccessDenied":
		return advice{exitDenied, "Run it as root ('sudo sproutctl ...'), or as an administrator in a local session."}
	case "InteractiveAuthorizationRequired":
		return advice{exitDenied, "Leave out --no-ask-password, or run it as root ('sudo sproutctl ...')."}
	case "Internal":
		return advice{exitInternal, "This is a defect of sproutd. Please report it with the output of 'journalctl -u sproutd'."}

	case client.Unavailable:
		return advice{exitUnavailable, "Start the service: 'systemctl start sproutd'. If that fails, see 'journalctl -u sproutd'."}
	case usage:
		return advice{exitUsage, "See 'sproutctl help', or sproutctl(1)."}
	case unconfirmed:
		return advice{exitUnconfirmed, "Nothing was changed. To go on without a question, give --yes."}
	case missingTool:
		return advice{exitUnsupported, "Install it: 'apt install btrfs-progs' or 'dnf install btrfs-progs'."}
	case whichSprout:
		return advice{exitUsage, "Name one with --sprout and its mount point."}
	case notMarked:
		return advice{exitSeed, "It must be an unmounted Btrfs file system, and you must be allowed to write it."}
	case badSource:
		return advice{exitUsage, "Give a directory, or a tar archive that is not compressed or compressed with gzip."}
	case imageExists:
		return advice{exitTarget, "Give another name, or --overwrite to replace it."}
	case noRoom:
		return advice{exitNoRoom, "Make room there, or let the image lie on another file system."}
	case changed:
		return advice{exitBusy, "Build it of something that nobody writes to, such as a snapshot."}
	case notBuilt:
		return advice{exitInternal, "Look at 'journalctl -k' for what the kernel says about it. Nothing was left behind."}
	}
	return advice{exit: exitInternal}
}

// exitMeanings says what each exit code means; the man page has the same list.
func exitMeanings() map[int]string {
	return map[int]string{
		exitOK:          "done",
		exitInternal:    "a defect, or an error of no other class",
		exitUsage:       "the command line or an argument makes no sense",
		exitUnavailable: "no bus, no service, or it went away",
		exitDenied:      "not allowed",
		exitNotFound:    "no such device, job or sprout",
		exitSeed:        "the seed is not usable",
		exitTarget:      "the target was refused",
		exitNoRoom:      "no space or no memory",
		exitBusy:        "something else is under way",
		exitState:       "the sprout's state does not allow it, or nothing to resume",
		exitUnsupported: "not supported here",
		exitIO:          "a device failed",
		exitCancelled:   "the job was cancelled",
		exitInterrupted: "the service ended while the job ran",
		exitUnconfirmed: "not confirmed, nothing was changed",
		exitDetached:    "detached by Ctrl-C, the job goes on",
		exitKilled:      "ended by Ctrl-C before the answer came, or by a second Ctrl-C",
	}
}

// doing is an error with what was being done: "persist to /dev/sdb2".
type doing struct {
	what string
	err  error
}

func (d *doing) Error() string {
	message := d.err.Error()
	if strings.HasPrefix(message, "cannot ") {
		return message
	}
	return "cannot " + d.what + ": " + message
}

func (d *doing) Unwrap() error { return d.err }

// cannot says what was being done when err came up. It gives nil for nil.
func cannot(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &doing{what: fmt.Sprintf(format, args...), err: err}
}

// fail makes an error of sproutctl's own.
func fail(code, format string, args ...any) error {
	return &client.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// errDetached ends a command whose job goes on; all was said already.
var errDetached = errors.New("detached")

// finish tells the user about err and gives the exit code.
func (a *app) finish(err error) int {
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errDetached):
		return exitDetached
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(a.err, "sproutctl: interrupted")
		return exitKilled
	}
	code := client.CodeOf(err)
	if code == "" {
		code = "Internal"
		if !a.started { // cobra's own complaints about the command line
			code = usage
			err = cannot(err, "understand the command line")
		}
	}
	advice := adviceFor(code)
	if a.json {
		var e *client.Error
		errors.As(err, &e)
		name := ""
		if e != nil {
			name = e.Name
		}
		a.printJSON(map[string]any{"error": map[string]any{
			"code": code, "name": name, "message": err.Error(), "remedy": advice.remedy, "exit": advice.exit,
		}})
	}
	fmt.Fprintln(a.err, "sproutctl: "+oneLine(err.Error()))
	if advice.remedy != "" {
		fmt.Fprintln(a.err, "  "+advice.remedy)
	}
	return advice.exit
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// printJSON writes one line; a value that cannot become JSON is a defect.
func (a *app) printJSON(value any) {
	line, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(a.out, string(line))
}
