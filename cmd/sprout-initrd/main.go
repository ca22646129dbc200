// Command sprout-initrd mounts the root of a live session: it runs in the
// initramfs and is told what to do by the kernel command line. See sprout(7).
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/boot"
)

// version is set by the build.
var version = "dev"

const usage = `usage: sprout-initrd mount NEWROOT
       sprout-initrd --version
`

func main() {
	args := os.Args[1:]
	switch {
	case len(args) == 1 && args[0] == "--version":
		fmt.Println("sprout-initrd", version)
	case len(args) == 2 && args[0] == "mount":
		if !mount(args[1]) {
			os.Exit(1)
		}
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
}

// mount boots and reports whether there is a root.
func mount(newRoot string) bool {
	console := openConsole()
	commandLine, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		console.say(boot.Error, fmt.Sprintf("cannot read the kernel command line: %v", err))
		return false
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if _, err := boot.Mount(ctx, string(commandLine), boot.Real(newRoot, console.say)); err != nil {
		console.say(boot.Error, err.Error())
		return false
	}
	return true
}

// console is where messages go: to whoever started the program, and to the
// kernel's log, which is on the screen and is kept.
type console struct{ kmsg *os.File }

func openConsole() console {
	kmsg, err := os.OpenFile("/dev/kmsg", unix.O_WRONLY, 0)
	if err != nil {
		return console{}
	}
	return console{kmsg: kmsg}
}

func (c console) say(level boot.Level, text string) {
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		fmt.Fprintf(os.Stderr, "sprout: %s\n", line)
		if c.kmsg != nil {
			// One write is one message, and a long one is refused.
			const most = 900
			_, _ = fmt.Fprintf(c.kmsg, "<%d>sprout: %.*s\n", level, most, line) // nobody is left to tell
		}
	}
}
