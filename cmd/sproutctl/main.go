// Command sproutctl is the command line of sproutd. It talks to the service
// over D-Bus and does nothing itself, but for what makes seeds and looks into
// them: a seed is built where it is to be, by whoever runs the command.
//
//   - main.go      start, signals, exit
//   - root.go      the command tree, global flags, the connection
//   - show.go      status, devices, plan, jobs
//   - move.go      persist, flatten, add, remove, resume, watch, cancel
//   - create.go    create, teardown
//   - seed.go      seed inspect, build, mark
//   - follow.go    a job's progress as a bar, as lines, as JSON
//   - confirm.go   showing a plan and asking
//   - complete.go  shell completion
//   - remedy.go    the one table of errors: exit codes and remedies
//   - text.go      tables and sizes for people
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"sproutd.org/sproutd/seed"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, seeds{build: seed.Build, inspect: seed.Inspect}))
}

// run carries out one command line and gives the exit code. The first signal
// ends the command's context; a second one ends the process at once, unless the
// command has to tidy up.
func run(args []string, in *os.File, out, errOut io.Writer, seeds seeds) int {
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	finished := make(chan struct{})
	defer close(finished)
	a := &app{in: in, out: out, err: errOut, seeds: seeds}
	go func() {
		select {
		case <-signals:
			interrupt()
		case <-finished:
			return
		}
		for {
			select {
			case <-signals:
				if !a.tidies.Load() {
					os.Exit(exitKilled)
				}
				fmt.Fprintln(errOut, "Tidying up; this can take a moment.")
			case <-finished:
				return
			}
		}
	}()
	return a.finish(a.command().run(ctx, args))
}
