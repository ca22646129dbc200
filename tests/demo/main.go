// Command demo shows the whole story on devices of its own: a live system on a
// "stick" moves to an "internal disk" while a program goes on writing to it, and
// the stick is unplugged. Each step is a D-Bus call that one could make by hand.
//
//   - main.go   signals, exit code, tidying up
//   - story.go  the stages
//   - show.go   what is printed, and how busctl is called
//
// Run it with `sudo make demo`. It needs root, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/term"

	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

func main() { os.Exit(run()) }

// interrupted is the cause with which the story ends when somebody stops it.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.signal.String() }

func run() int {
	tree := flag.Int64("size", 320, "`MiB` of this machine's own files to put into the seed")
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: works on real block devices: run `sudo make demo`")
		return 1
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	// SIGPIPE: `make demo | head` must tidy up as well. Only the first signal
	// counts; nothing stops the tidying up.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	go func() {
		first, _ := (<-signals).(syscall.Signal) // all of them are
		cancel(interrupted{first})
	}()

	s := &story{tree: *tree * seedtest.MiB, show: printer{out: os.Stdout, color: term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""}}
	err := s.tell(ctx)
	var stopped interrupted
	if errors.As(context.Cause(ctx), &stopped) {
		s.show.text("")
		s.show.text("%v; tidying up", stopped)
		err = nil
	} else if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n%s", err, s.daemonLog())
	}
	if tidy := s.tidy(); tidy != nil {
		fmt.Fprintf(os.Stderr, "demo: cannot tidy up: %v\n", tidy)
		return 1
	}
	switch {
	case stopped != interrupted{}:
		return 128 + int(stopped.signal)
	case err != nil:
		return 1
	}
	return 0
}

// later puts off what has to be undone at the end, the last first.
func (s *story) later(undo func() error) { s.undo = append(s.undo, undo) }

// tidy undoes everything. The directory goes only when nothing is mounted in it
// any more: to remove it could reach into a mount.
func (s *story) tidy() error {
	var errs []error
	for _, undo := range slices.Backward(s.undo) {
		errs = append(errs, undo())
	}
	s.undo = nil
	if s.dir == "" {
		return nil
	}
	left, err := s.leftovers()
	if err == nil && len(left) == 0 {
		return errors.Join(append(errs, os.RemoveAll(s.dir))...)
	}
	for _, line := range left {
		errs = append(errs, errors.New("left behind: "+line))
	}
	return errors.Join(append(errs, err)...)
}

// leftovers lists what is left. Whoever looks at a device in passing keeps it for
// a moment.
func (s *story) leftovers() ([]string, error) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		now, err := testenv.Leftovers()
		left := now.Under(s.dir).List()
		if err != nil || len(left) == 0 || time.Now().After(deadline) {
			return left, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// daemonLog gives the end of what the daemon logged, for when something failed.
func (s *story) daemonLog() string {
	const enough = 4000
	log, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil || s.dir == "" {
		return ""
	}
	return "the end of the daemon's log:\n" + string(log[max(0, len(log)-enough):])
}
