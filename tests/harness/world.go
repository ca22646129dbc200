package harness

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/seedtest"
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

	disks    []*seedtest.Disk // to let go before anything is torn down
	tornDown bool
}

// patience is how long a test of a world may take: what takes longer hangs.
const patience = 2 * time.Minute

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
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	w := &World{
		Bus: bus, Dir: t.TempDir(), t: t, ctx: ctx,
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

// TearDown tears every sprout down and ends the daemon. The end of the test
// does so anyway, and before it closes a disk of [World.OpenDisk].
func (w *World) TearDown() {
	if w.tornDown {
		return
	}
	w.tornDown = true
	for _, disk := range w.disks {
		if err := disk.Fast(); err != nil {
			w.t.Errorf("cannot let %s go: %v", disk.Path, err)
		}
	}
	// The test's own context has ended by now.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	select {
	case <-w.Daemon.Ended(): // killed by the test
		var err error
		if w.Daemon, err = StartDaemon(ctx, w.Spec); err != nil {
			w.t.Error(err)
			return
		}
	default:
	}
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

// Context ends with the test, or when the test takes so long that it must hang.
func (w *World) Context() context.Context { return w.ctx }

// OpenDisk is [seedtest.OpenDisk] for a disk that sprouts of this world use:
// they are torn down before it is closed.
func (w *World) OpenDisk(s seedtest.DiskSpec) *seedtest.Disk {
	w.t.Helper()
	disk := seedtest.OpenDisk(w.t, s)
	w.disks = append(w.disks, disk)
	w.t.Cleanup(w.TearDown)
	return disk
}

// OpenStick is [seedtest.OpenStick] for a stick that sprouts of this world use.
func (w *World) OpenStick(s seedtest.StickSpec) *seedtest.Stick {
	w.t.Helper()
	stick := seedtest.OpenStick(w.t, s)
	w.disks = append(w.disks, stick.Disk)
	w.t.Cleanup(w.TearDown)
	return stick
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

// Ends waits for the end of a job that must not end well, and gives the job as
// it is then, with its error in Err.
func (w *World) Ends(job string, err error) client.Job {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err = w.Wait(w.ctx, job); err == nil {
		w.t.Fatalf("job %s ended well, and should not", job)
	}
	shown, showErr := w.Job(w.ctx, job)
	if showErr != nil {
		w.t.Fatal(showErr)
	}
	if client.CodeOf(err) != client.CodeOf(shown.Err()) {
		w.t.Errorf("waiting for job %s gave %v, and it shows %v", job, err, shown.Err())
	}
	return shown
}

// AwaitJob follows a job until it is as wanted, and gives it as it was then. A
// job that ends before fails the test.
func (w *World) AwaitJob(path string, want func(client.Job) bool) client.Job {
	w.t.Helper()
	watch, err := w.WatchJob(w.ctx, path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer watch.Close()
	var last client.Job
	for last = range watch.Updates() {
		if want(last) {
			return last
		}
	}
	w.t.Fatalf("job %s did not come to be as wanted (%v); it was last seen as %+v", path, watch.Err(), last)
	return last
}

// Await follows the PropertiesChanged signals of a sprout until it is as
// wanted, and gives it as it was then.
func (w *World) Await(path string, want func(client.Sprout) bool) client.Sprout {
	w.t.Helper()
	signals := w.Signals(names.Properties, "PropertiesChanged", path)
	defer signals.Close()
	for {
		s := w.Show(path)
		if want(s) {
			return s
		}
		select {
		case <-signals.C:
		case <-w.ctx.Done():
			w.t.Fatalf("the sprout did not come to be as wanted; it is shown as %+v", s)
		}
	}
}

// AwaitSproutAt waits until the sprout mounted at a directory is shown.
func (w *World) AwaitSproutAt(mountpoint string) client.Sprout {
	w.t.Helper()
	added := w.Signals(names.ObjectManager, "InterfacesAdded", names.Root)
	defer added.Close()
	for {
		objects, err := w.Objects(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, s := range objects.Sprouts {
			if s.MountPoint == mountpoint {
				return s
			}
		}
		select {
		case <-added.C:
		case <-w.ctx.Done():
			w.t.Fatalf("no sprout at %s is shown, only %+v", mountpoint, objects.Sprouts)
		}
	}
}

// Signals is a subscription to signals, on a connection of its own.
type Signals struct {
	// C has the signals in the order in which they came.
	C    <-chan *godbus.Signal
	conn *godbus.Conn
}

// Signals subscribes to a signal of the service's objects, or of one object if
// path is not "".
func (w *World) Signals(iface, member, path string) *Signals {
	w.t.Helper()
	conn, err := godbus.Connect(w.Bus.Address, godbus.WithSignalHandler(godbus.NewSequentialSignalHandler()))
	if err != nil {
		w.t.Fatal(err)
	}
	match := []godbus.MatchOption{godbus.WithMatchInterface(iface), godbus.WithMatchMember(member)}
	if path != "" {
		match = append(match, godbus.WithMatchObjectPath(godbus.ObjectPath(path)))
	}
	c := make(chan *godbus.Signal, 64)
	conn.Signal(c)
	if err := conn.AddMatchSignal(match...); err != nil {
		_ = conn.Close() // the error that matters is the first
		w.t.Fatal(err)
	}
	return &Signals{C: c, conn: conn}
}

// Close ends the subscription.
func (s *Signals) Close() { _ = s.conn.Close() } // there is nothing to lose
