package dbus_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"go.uber.org/goleak"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus"
	"sproutd.org/sproutd/dbus/bustest"
	"sproutd.org/sproutd/dbus/names"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	rootFSID  = "11111111-2222-3333-4444-555555555555"
	otherFSID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
)

// exampleView is a machine with two sprouts, two jobs and two devices.
func exampleView() *daemon.View {
	stick := block.Device{
		ID:   block.ID{Path: "/dev/sdb1", Size: 8 << 30, Serial: "S123"},
		Name: "sdb1", Model: "USB Stick", Removable: true,
		Signatures: []block.Signature{{Type: "ext4", Label: "data"}},
		Holders:    []block.Holder{{Kind: "mount", Name: "/mnt"}},
	}
	zram := block.Device{ID: block.ID{Path: "/dev/zram7", Size: 2 << 30}, Name: "zram7"}
	return &daemon.View{
		Sprouts: []daemon.SproutView{
			{
				FSID: rootFSID, SeedFSID: "99999999-2222-3333-4444-555555555555", Label: "live", MountPoint: "/",
				State: plan.Partial, Size: 2 << 30, Free: 1 << 30, CurrentJob: 2,
				Members: []daemon.MemberView{
					{DevID: 1, Path: "/dev/loop9", Size: 1 << 30, Used: 900 << 20, Role: plan.RoleSeed},
					{DevID: 2, Path: "/dev/zram7", Size: 2 << 30, Used: 1 << 30, Role: plan.RoleZram, Writable: true},
				},
				Intent:       &daemon.Intent{Job: 1, Operation: plan.Persist, Target: "/dev/sdb1", State: daemon.JobCancelled},
				MediaHolders: []string{"loop /dev/loop9", "mount /run/media"},
				Warnings:     []string{"no persistence was used"},
			},
			{FSID: otherFSID, MountPoint: "/srv/a\xffb", State: plan.Installed, SafeToUnplug: true},
		},
		Jobs: []daemon.JobView{
			{
				Number: 1, Operation: plan.Persist, Sprout: rootFSID, StartedByUID: 65534, StartTime: time.UnixMicro(1_700_000_000_000_000),
				State: daemon.JobCancelled, StepNumber: 1, StepCount: 2, Err: fault.New(fault.Cancelled, "the job was cancelled"),
			},
			{
				Number: 2, Operation: plan.Flatten, Sprout: rootFSID, StartTime: time.UnixMicro(1_700_000_001_000_000), State: daemon.JobRunning,
				Step: "move everything off /dev/zram7", StepNumber: 2, StepCount: 3, Progress: 0.25, BytesDone: 100, BytesTotal: 400,
				Rate: 50, ExpectedEnd: time.UnixMicro(1_700_000_007_000_000), Cancelable: true,
			},
		},
		Devices: []daemon.DeviceView{
			{Device: stick, EligibleFor: []string{"persist"}, Reasons: map[string]string{"flatten": "mounted at /mnt"}},
			{Device: zram, Role: "zram"},
		},
	}
}

// engine is a backend that shows what it was told and keeps what it was asked.
type engine struct {
	view   atomic.Pointer[daemon.View]
	server *dbus.Server

	mu       sync.Mutex
	requests []any // of the types below, in order
	err      error // what the methods fail with
	panics   bool
	block    chan struct{} // InspectSeed and Plan wait until it is closed, if not nil
	entered  chan struct{} // receives when they begin to
	waits    map[uint32]chan daemon.JobView
	waiting  chan error // receives nil when a Wait begins, the cause when it is given up
}

type (
	created struct {
		caller           daemon.Caller
		seed, mountpoint string
		options          daemon.CreateOptions
	}
	planned struct {
		fsid string
		args daemon.RequestArgs
	}
	started struct {
		caller daemon.Caller
		fsid   string
		args   daemon.RequestArgs
	}
	cancelled uint32
	tornDown  string
	reset     struct {
		fsid string
		undo bool
	}
	inspected string
)

func newEngine(v *daemon.View) *engine {
	e := &engine{waits: map[uint32]chan daemon.JobView{}, entered: make(chan struct{}, 1000), waiting: make(chan error, 1000)}
	e.view.Store(v)
	return e
}

// show publishes a view, as the engine does.
func (e *engine) show(v *daemon.View) {
	e.view.Store(v)
	e.server.Publish(v)
}

// change publishes a copy of the present view after f has changed it.
func (e *engine) change(f func(*daemon.View)) {
	v := *e.view.Load()
	v.Sprouts, v.Jobs, v.Devices = slices.Clone(v.Sprouts), slices.Clone(v.Jobs), slices.Clone(v.Devices)
	f(&v)
	e.show(&v)
}

func (e *engine) did() []any {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.requests)
}

func (e *engine) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = err
}

func (e *engine) note(request any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.panics {
		panic("a defect")
	}
	e.requests = append(e.requests, request)
	return e.err
}

func (e *engine) pause(ctx context.Context) {
	e.mu.Lock()
	block := e.block
	e.mu.Unlock()
	if block != nil {
		e.entered <- struct{}{}
		select {
		case <-block:
		case <-ctx.Done():
		}
	}
}

func (e *engine) View(context.Context) *daemon.View { return e.view.Load() }

func (e *engine) InspectSeed(ctx context.Context, path string) (daemon.SeedReport, error) {
	e.pause(ctx)
	return daemon.SeedReport{
		Seeding: true, FSID: rootFSID, Label: "live", Size: 5, Used: 4, CsumType: "crc32c", MetadataProfile: "single",
		Supported: false, Reasons: []string{"feature x"},
	}, e.note(inspected(path))
}

func (e *engine) CreateSprout(_ context.Context, caller daemon.Caller, seed, mountpoint string, o daemon.CreateOptions) (string, error) {
	return otherFSID, e.note(created{caller, seed, mountpoint, o})
}

func (e *engine) Plan(ctx context.Context, fsid string, r daemon.RequestArgs) (plan.Plan, error) {
	e.pause(ctx)
	return plan.Plan{
		Operation: r.Operation, BytesToMove: 7, TargetSize: 8, MinTargetSize: 6, Resumes: true,
		Steps:    []plan.Step{{Kind: plan.StepAdd, Device: block.ID{Path: "/dev/sdb1"}, Bytes: 7, Text: "add /dev/sdb1"}},
		Destroys: []string{"ext4 on /dev/sdb1"},
		Problems: []*fault.Error{fault.New(fault.TargetTooSmall, "too small"), fault.New(fault.InvalidArgs, "odd")},
	}, e.note(planned{fsid, r})
}

func (e *engine) Start(_ context.Context, caller daemon.Caller, fsid string, r daemon.RequestArgs) (uint32, error) {
	return 2, e.note(started{caller, fsid, r})
}

func (e *engine) Cancel(_ context.Context, job uint32) error { return e.note(cancelled(job)) }

func (e *engine) Teardown(_ context.Context, fsid string) error { return e.note(tornDown(fsid)) }

func (e *engine) Reset(_ context.Context, fsid string, undo bool) error {
	return e.note(reset{fsid, undo})
}

func (e *engine) Devices(context.Context) ([]daemon.DeviceView, error) {
	return e.view.Load().Devices, nil
}

// over gives the channel through which a job ends.
func (e *engine) over(job uint32) chan daemon.JobView {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.waits[job] == nil {
		e.waits[job] = make(chan daemon.JobView)
	}
	return e.waits[job]
}

func (e *engine) Wait(ctx context.Context, job uint32) (daemon.JobView, error) {
	for _, j := range e.view.Load().Jobs {
		if j.Number == job && j.State.Finished() {
			return j, nil
		}
	}
	e.waiting <- nil
	select {
	case j := <-e.over(job):
		return j, nil
	case <-ctx.Done():
		e.waiting <- context.Cause(ctx)
		return daemon.JobView{}, ctx.Err()
	}
}

// service is a running server with its bus and engine.
type service struct {
	bus    *bustest.Bus
	engine *engine
	conn   *godbus.Conn // of a client, as root if the test is
	stop   func() error // ends the server and gives what Run returned
	ended  func() error // the same without ending it
}

// serve starts a server for the example on a bus of its own.
func serve(t testing.TB, policyFiles ...string) *service {
	t.Helper()
	bus := bustest.Start(t, policyFiles...)
	e := newEngine(exampleView())
	stop, ended := run(t, bus, e)
	return &service{bus: bus, engine: e, conn: bus.Conn(t), stop: stop, ended: ended}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// run starts a server and waits until it is ready.
func run(t testing.TB, bus *bustest.Bus, e *engine) (stop, ended func() error) {
	t.Helper()
	server, err := dbus.New(bus.Address, e, discard(), "1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	e.server = server
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- server.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("the server ended: %v", err)
	}
	ended = sync.OnceValue(func() error { return <-done })
	stop = func() error {
		cancel()
		return ended()
	}
	t.Cleanup(func() { _ = stop() })
	return stop, ended
}

var rootSprout = names.SproutPath(rootFSID)

// call calls a method of ours as the test's own user.
func (s *service) call(path godbus.ObjectPath, method string, args ...any) *godbus.Call {
	return callOn(s.conn, path, method, args...)
}

func callOn(conn *godbus.Conn, path godbus.ObjectPath, method string, args ...any) *godbus.Call {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return conn.Object(names.Bus, path).CallWithContext(ctx, method, 0, args...)
}

// errorOf gives name and message of a D-Bus error.
func errorOf(err error) (name, message string) {
	var e godbus.Error
	if !errors.As(err, &e) {
		return "", ""
	}
	if len(e.Body) > 0 {
		message, _ = e.Body[0].(string)
	}
	return e.Name, message
}

type dict = map[string]godbus.Variant

func with(pairs ...any) dict {
	d := dict{}
	for i := 0; i < len(pairs); i += 2 {
		d[pairs[i].(string)] = godbus.MakeVariant(pairs[i+1])
	}
	return d
}
