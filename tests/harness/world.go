package harness

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/testenv"
)

// World is what a root test has: a bus, the daemon on it and a client of it.
// All of it ends with the test; sprouts that are left are torn down first.
type World struct {
	*client.Client
	Daemon *Daemon
	Bus    *Bus
	// Dir is a temporary directory for images and mount points.
	Dir string
	t   testing.TB
	ctx context.Context
	spec
}

type spec struct {
	Spec
	log *lines
}

// Programs gives the directory of the programs under test, built once for all
// tests of a package. Call it from TestMain and remove the directory after.
func Programs(ctx context.Context) (dir string, err error) {
	dir, err = os.MkdirTemp("", "sproutd-bin-")
	if err != nil {
		return "", err
	}
	return dir, Build(ctx, dir, raceEnabled, "sproutd", "sproutctl")
}

// New starts a bus and the daemon from the directory of [Programs].
func New(t testing.TB, programs string) *World {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "dbus-daemon")
	testenv.NoLeftovers(t)
	short, err := os.MkdirTemp("", "sw-") // the name of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	bus, err := StartBus(short)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bus.Stop)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.Address)
	log := &lines{}
	w := &World{
		Bus: bus, Dir: t.TempDir(), t: t, ctx: t.Context(),
		spec: spec{Spec: Spec{Binary: filepath.Join(programs, "sproutd"), Address: bus.Address, Dir: short, Log: log}, log: log},
	}
	w.Restart()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", log)
		}
		if strings.Contains(log.String(), "DATA RACE") {
			t.Errorf("the daemon has a data race:\n%s", log)
		}
	})
	t.Cleanup(w.TearDown)
	return w
}

// TearDown tears every sprout down and ends the daemon.
func (w *World) TearDown() {
	// The test's own context has ended by now.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if objects, err := w.Objects(ctx); err == nil {
		for _, job := range objects.Jobs {
			if !job.Finished() {
				_ = w.Cancel(ctx, job.Path) // it may end by itself meanwhile
				_, _ = w.Wait(ctx, job.Path)
			}
		}
		for _, sprout := range objects.Sprouts {
			if strings.HasPrefix(sprout.MountPoint, w.Dir) {
				if err := w.Teardown(ctx, sprout.Path); err != nil {
					w.t.Errorf("cannot tear %s down: %v", sprout.MountPoint, err)
				}
			}
		}
	}
	_ = w.Close() // the connection ends with the process anyway
	w.Daemon.Stop()
}

// Restart starts a daemon with the same journal. The one before must have ended.
func (w *World) Restart() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	if w.Daemon, err = StartDaemon(ctx, w.Spec); err != nil {
		w.t.Fatalf("%v\n%s", err, w.log)
	}
	if w.Client == nil {
		if w.Client, err = client.Connect(ctx, client.Options{NoAutoStart: true}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// Log gives what the daemon logged so far.
func (w *World) Log() string { return w.log.String() }

// Create makes a sprout of the seed at a new mount point and gives it as shown.
func (w *World) Create(seed string, o client.CreateOptions) client.Sprout {
	w.t.Helper()
	mnt, err := os.MkdirTemp(w.Dir, "mnt-")
	if err != nil {
		w.t.Fatal(err)
	}
	path, err := w.CreateSprout(w.ctx, seed, mnt, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.Show(path)
}

// Show gives a sprout as the daemon shows it now.
func (w *World) Show(path string) client.Sprout {
	w.t.Helper()
	s, err := w.Sprout(w.ctx, path)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// Done waits for a job and fails the test unless it ends well. It takes what
// Persist and its like return.
func (w *World) Done(job string, err error) map[string]any {
	w.t.Helper()
	if err == nil {
		var result map[string]any
		if result, err = w.Wait(w.ctx, job); err == nil {
			return result
		}
	}
	w.t.Fatal(err)
	return nil
}
