// Command sproutd is the daemon: it serves org.sproutd.Sprout1 on the system
// bus. See sproutd(8).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sync/errgroup"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/machine"
	"sproutd.org/sproutd/dbus"
	"sproutd.org/sproutd/systemd"
)

// version is set by the build.
var version = "dev"

func main() {
	work := run
	if len(os.Args) == 2 && os.Args[1] == machine.GuardArgument {
		work = machine.Guard
	}
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, "sproutd:", err)
		os.Exit(1)
	}
}

// defaultStateDir is used when neither the flag nor systemd names one.
const defaultStateDir = "/var/lib/sproutd"

func run() error {
	stateDir := os.Getenv("STATE_DIRECTORY")
	if stateDir == "" {
		stateDir = defaultStateDir
	}
	flag.StringVar(&stateDir, "state-dir", stateDir, "keep the journal in `directory`")
	var level slog.Level
	flag.TextVar(&level, "log-level", slog.LevelInfo, "log messages of this `level` and above: debug, info, warn, error")
	show := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("cannot understand the argument %q", flag.Arg(0))
	}
	if *show {
		fmt.Println("sproutd", version)
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("cannot work without root: mounts and devices are changed")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	log := systemd.NewLogger(level)
	if err := stayInMemory(); err != nil {
		log.Warn("a stick that is pulled may take the daemon with it", slog.Any("error", err))
	}
	return serve(ctx, stateDir, log)
}

// serve wires the layers together and runs them until ctx ends.
func serve(ctx context.Context, stateDir string, log *slog.Logger) error {
	kernel, err := machine.New()
	if err != nil {
		return err
	}
	service, err := daemon.New(ctx, daemon.Config{
		Kernel: kernel, StateDir: stateDir, Logger: log, Watch: kernel.Watch,
		Alarm: func(text string) {
			if err := tellConsole("/dev/console", text); err != nil {
				log.Warn("cannot write to the console", slog.Any("error", err))
			}
		},
		Inhibit: func(ctx context.Context, why string) (func(), error) { return inhibit(ctx, why, log) },
	})
	if err != nil {
		return err
	}
	server, err := dbus.New("", service, log, version)
	if err != nil {
		return err
	}
	service.Observe(server.Publish)
	watchdog, err := systemd.NewWatchdog()
	if err != nil {
		return err
	}
	watchdog.Missed = func(err error) { log.Error("the watchdog is not fed", slog.Any("error", err)) }
	var notify systemd.Notifier

	// The engine ends first, so that whoever waits for a job still hears how
	// it ended.
	working, endWork := context.WithCancel(ctx)
	defer endWork()
	serving, endServing := context.WithCancel(context.WithoutCancel(ctx))
	defer endServing()
	var group errgroup.Group
	group.Go(func() error {
		defer endServing()
		return service.Run(working)
	})
	group.Go(func() error {
		<-service.Ending() // the jobs are told to stop; that may take a while
		if err := notify.Stopping(); err != nil {
			log.Warn("cannot tell systemd that the daemon ends", slog.Any("error", err))
		}
		return nil
	})
	group.Go(func() error {
		defer endWork()
		return server.Run(serving, func() {
			if err := notify.Ready(); err != nil {
				log.Warn("cannot tell systemd that the daemon is ready", slog.Any("error", err))
			}
			log.Info("ready", slog.String("version", version))
		})
	})
	group.Go(func() error {
		watchdog.Run(working, service.Alive)
		return nil
	})
	return group.Wait()
}

// inhibit takes a lock on a bus connection of its own, which lives as long as
// the lock.
func inhibit(ctx context.Context, why string, log *slog.Logger) (func(), error) {
	conn, err := godbus.ConnectSystemBus(godbus.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the bus: %w", err)
	}
	release, err := systemd.NewInhibitor(conn).Take(ctx, why)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return func() {
		if err := errors.Join(release(), conn.Close()); err != nil {
			log.Warn("cannot give the inhibitor lock back", slog.Any("error", err))
		}
	}, nil
}
