package dbus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus/names"
)

// Backend is what the service layer needs of the engine. Its methods may be
// called from any goroutine. Errors that a caller is to see are faults.
type Backend interface {
	// View gives what is there now, or at most about 100 ms ago. It is never
	// nil, never older than what was published last, and cheap.
	View(ctx context.Context) *daemon.View
	// InspectSeed says what an image or a device is.
	InspectSeed(ctx context.Context, path string) (daemon.SeedReport, error)
	// CreateSprout mounts a seed and makes it writable.
	CreateSprout(ctx context.Context, caller daemon.Caller, seed, mountpoint string, o daemon.CreateOptions) (fsid string, err error)
	// Plan says what Start would do. It changes nothing.
	Plan(ctx context.Context, fsid string, r daemon.RequestArgs) (plan.Plan, error)
	// Start checks a request and starts a job. ctx ends the checks only.
	Start(ctx context.Context, caller daemon.Caller, fsid string, r daemon.RequestArgs) (job uint32, err error)
	// Cancel tells a job to stop.
	Cancel(ctx context.Context, job uint32) error
	// Wait returns when the job is over and its last view was published. ctx
	// ends the wait only.
	Wait(ctx context.Context, job uint32) (daemon.JobView, error)
	// Teardown unmounts a sprout that CreateSprout made.
	Teardown(ctx context.Context, fsid string) error
	// Reset makes the next boot drop what the booted stick keeps, or takes that
	// back.
	Reset(ctx context.Context, fsid string, undo bool) error
	// Devices looks at the block devices now.
	Devices(ctx context.Context) ([]daemon.DeviceView, error)
}

// Server shows a [Backend] on the bus.
type Server struct {
	address   string
	backend   Backend
	log       *slog.Logger
	version   string
	specs     map[string]spec
	functions map[string]function
	options   map[string][]option

	tree    atomic.Pointer[tree] // of the view that was seen last
	signals *signals
}

// New makes a server for the bus at the given address. "" is the system bus,
// which the environment variable DBUS_SYSTEM_BUS_ADDRESS can say.
func New(address string, b Backend, log *slog.Logger, version string) (*Server, error) {
	specs, err := loadSpecs()
	if err != nil {
		return nil, err
	}
	if address == "" {
		address = systemBusAddress()
	}
	functions := standardFunctions()
	maps.Copy(functions, ownFunctions())
	return &Server{
		address: address, backend: b, log: log, version: version,
		specs: specs, functions: functions, options: optionTable(), signals: newSignals(),
	}, nil
}

// Publish makes v what clients see, and then tells them what changed. It does
// not wait for the bus. Views must be published in order.
func (s *Server) Publish(v *daemon.View) {
	t := newTree(v, s.version)
	s.tree.Store(t)
	s.signals.publish(t)
}

// current gives the tree of the backend's present view. Making it is left out
// when the view has not changed since.
func (s *Server) current(ctx context.Context) *tree {
	v := s.backend.View(ctx)
	if t := s.tree.Load(); t != nil && t.view == v {
		return t
	}
	t := newTree(v, s.version)
	s.tree.Store(t)
	return t
}

// session is one connection to the bus.
type session struct {
	server  *Server
	log     *slog.Logger
	ctx     context.Context // ends the calls
	conn    *godbus.Conn
	callers *callers
	lost    context.CancelCauseFunc
	ready   chan struct{} // closed when conn is set; unique names can be guessed before

	cancellations atomic.Uint64
}

// errBusGone says that the connection was closed by the other side.
var errBusGone = errors.New("the bus has closed the connection")

// grace is how long calls in flight may go on when the server is to end.
const grace = time.Second

// Run serves until ctx ends; that is no error. It calls ready once the name is
// taken and the service answers. It fails when the name belongs to somebody
// else, or when name or bus are lost. It can be called once.
//
// When ctx ends, no new calls are taken, and those in flight have a second to
// reply: who waits for a job that ended just before hears how.
func (s *Server) Run(ctx context.Context, ready func()) error {
	life, lost := context.WithCancelCause(context.WithoutCancel(ctx))
	calls, endCalls := context.WithCancel(life)
	c := &session{server: s, log: s.log, ctx: calls, lost: lost, ready: make(chan struct{})}
	c.callers = newCallers(func() godbus.BusObject { return c.conn.BusObject() })

	var work sync.WaitGroup
	defer work.Wait()
	defer endCalls()
	defer lost(nil)
	starting := context.AfterFunc(ctx, func() { lost(context.Cause(ctx)) })
	first := s.signals.start(s.current(ctx))
	conn, err := connect(life, s.address, s.log, godbus.WithHandler(c), godbus.WithSignalHandler(c))
	if err != nil {
		return err
	}
	c.conn = conn
	close(c.ready)
	defer c.callers.close()
	defer func() { _ = conn.Close() }()
	defer lost(nil)

	work.Go(func() {
		s.signals.run(life, s.specs, first, func(sig signal) {
			if err := conn.Emit(sig.path, sig.name, sig.args...); err != nil {
				s.log.Debug("cannot send a signal", slog.String("signal", sig.name), slog.Any("error", err))
			}
		})
	})
	work.Go(func() {
		select {
		case <-conn.Context().Done():
			lost(errBusGone)
		case <-life.Done():
		}
	})

	// DoNotQueue: a second daemon must end instead of waiting for the first.
	reply, err := conn.RequestName(names.Bus, godbus.NameFlagDoNotQueue)
	if err != nil {
		return fmt.Errorf("cannot take the name %s: %w", names.Bus, err)
	}
	if reply != godbus.RequestNameReplyPrimaryOwner {
		return fmt.Errorf("cannot take the name %s: another sproutd is running", names.Bus)
	}
	if starting() && ready != nil {
		ready()
	}
	select {
	case <-ctx.Done():
		c.drain(life, endCalls)
		return nil
	case <-life.Done():
		return fmt.Errorf("cannot serve any longer: %w", context.Cause(life))
	}
}

// drain ends the calls in flight, gently at first.
func (c *session) drain(life context.Context, endCalls func()) {
	var work sync.WaitGroup
	over := make(chan struct{})
	work.Go(func() {
		defer close(over)
		c.callers.close()
	})
	patience := time.NewTimer(grace)
	defer patience.Stop()
	select {
	case <-over:
	case <-life.Done():
	case <-patience.C:
	}
	endCalls()
	work.Wait()
	limited, cancel := context.WithTimeout(life, grace)
	defer cancel()
	c.server.signals.flush(limited)
	_ = c.conn.BusObject().CallWithContext(limited, "org.freedesktop.DBus.ReleaseName", 0, names.Bus).Err
}

// DeliverSignal takes the signals of the bus daemon. It is called in order,
// between messages, and must not wait.
func (c *session) DeliverSignal(iface, name string, sig *godbus.Signal) {
	if iface != "org.freedesktop.DBus" || sig.Sender != "org.freedesktop.DBus" || len(sig.Body) == 0 {
		return
	}
	subject, _ := sig.Body[0].(string)
	switch name {
	case "NameLost":
		if subject == names.Bus && c.callers.open() {
			c.lost(errors.New("the name " + names.Bus + " was taken away"))
		}
	case "NameOwnerChanged":
		if len(sig.Body) == 3 && sig.Body[2] == "" {
			c.callers.left(subject)
		}
	}
}
