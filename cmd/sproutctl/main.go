// Command sproutctl is the command line of sproutd. It talks to the service
// over D-Bus and does nothing itself, but for `seed mark`.
//
//   - main.go      start, signals, exit
//   - root.go      the command tree, global flags, the connection
//   - show.go      status, devices, plan, jobs
//   - move.go      persist, flatten, add, remove, resume, watch, cancel
//   - create.go    create, teardown, seed
//   - follow.go    a job's progress as a bar, as lines, as JSON
//   - confirm.go   showing a plan and asking
//   - complete.go  shell completion
//   - remedy.go    the one table of errors: exit codes and remedies
//   - text.go      tables and sizes for people
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run carries out one command line and gives the exit code. The first signal
// ends the command's context; a second one ends the process at once.
func run(args []string, in *os.File, out, errOut io.Writer) int {
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		select {
		case <-signals:
			interrupt()
		case <-finished:
			return
		}
		select {
		case <-signals:
			os.Exit(exitKilled)
		case <-finished:
		}
	}()
	a := &app{in: in, out: out, err: errOut}
	return a.finish(a.command().run(ctx, args))
}
