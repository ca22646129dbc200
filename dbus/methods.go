package dbus

import (
	"context"
	"errors"
	"log/slog"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus/names"
)

// ownFunctions answer the interfaces of design §4.
func ownFunctions() map[string]function {
	return map[string]function{
		names.Manager + ".CreateSprout": createSprout,
		names.Manager + ".InspectSeed":  inspectSeed,
		names.Manager + ".ListDevices":  listDevices,
		names.Manager + ".ListJobs":     listJobs,
		names.Sprout + ".Plan":          planOperation,
		names.Sprout + ".Persist":       start(plan.Persist, names.ActionPersist),
		names.Sprout + ".Flatten":       start(plan.Flatten, names.ActionFlatten),
		names.Sprout + ".Release":       start(plan.Release, names.ActionRelease),
		names.Sprout + ".AddDevice":     start(plan.AddDevice, names.ActionManageDevices),
		names.Sprout + ".RemoveDevice":  start(plan.RemoveDevice, names.ActionManageDevices),
		names.Sprout + ".Resume":        resume,
		names.Sprout + ".Reset":         reset,
		names.Sprout + ".Teardown":      teardown,
		names.Job + ".Cancel":           cancelJob,
		names.Job + ".Wait":             waitForJob,
	}
}

// options reads the n-th argument as the options of the method.
func (call *call) options(c *session, method string, n int) (options, error) {
	return readOptions(c.server.options, method, argument[variants](call, n))
}

// withWipe adds the action for destroying what is on the target.
func withWipe(action string, o options) []string {
	if o.is("wipe") {
		return []string{action, names.ActionWipe}
	}
	return []string{action}
}

func createSprout(ctx context.Context, c *session, call *call) ([]any, error) {
	seed, mountpoint := argument[string](call, 0), argument[string](call, 1)
	o, err := call.options(c, "CreateSprout", 2)
	if err != nil {
		return nil, err
	}
	auth := authorizationFor(call, call.tree.view, o, "create", o.str("device"))
	auth.details["seed"] = text(seed)
	caller, err := c.authorize(call, auth, withWipe(names.ActionCreate, o)...)
	if err != nil {
		return nil, err
	}
	fsid, err := c.server.backend.CreateSprout(ctx, caller, seed, mountpoint, createOptions(o))
	if err != nil {
		return nil, err
	}
	return []any{names.SproutPath(fsid)}, nil
}

func inspectSeed(ctx context.Context, c *session, call *call) ([]any, error) {
	report, err := c.server.backend.InspectSeed(ctx, argument[string](call, 0))
	if err != nil {
		return nil, err
	}
	return []any{seedDict(report)}, nil
}

// listedDevice is one element of the reply of ListDevices.
type listedDevice struct {
	Object godbus.ObjectPath
	Path   string
	Size   uint64
	Facts  variants
}

func listDevices(ctx context.Context, c *session, call *call) ([]any, error) {
	if _, err := call.options(c, "ListDevices", 0); err != nil {
		return nil, err
	}
	devices, err := c.server.backend.Devices(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]listedDevice, len(devices))
	for i := range devices {
		d := &devices[i]
		out[i] = listedDevice{Object: names.DevicePath(d.Name), Path: text(d.Path), Size: d.Size, Facts: deviceFacts(d)}
	}
	return []any{out}, nil
}

// listedJob is one element of the reply of ListJobs.
type listedJob struct {
	Object                 godbus.ObjectPath
	Operation, State, Step string
}

func listJobs(_ context.Context, _ *session, call *call) ([]any, error) {
	out := []listedJob{}
	for _, j := range call.tree.view.Jobs {
		out = append(out, listedJob{
			Object: names.JobPath(j.Number), Operation: text(string(j.Operation)),
			State: text(string(j.State)), Step: text(j.Step),
		})
	}
	return []any{out}, nil
}

func planOperation(ctx context.Context, c *session, call *call) ([]any, error) {
	operation, target := plan.Operation(argument[string](call, 0)), argument[string](call, 1)
	method, ok := methodOf(operation)
	if !ok {
		return nil, fault.New(fault.InvalidArgs, "there is no operation %q, only persist, flatten, release, add-device, remove-device and resume", string(operation))
	}
	o, err := call.options(c, method, 2)
	if err != nil {
		return nil, err
	}
	p, err := c.server.backend.Plan(ctx, call.object.sprout.FSID, requestArgs(operation, target, o))
	if err != nil {
		return nil, err
	}
	return []any{planDict(p)}, nil
}

// start answers the methods that take a target and start a job.
func start(operation plan.Operation, action string) function {
	return func(ctx context.Context, c *session, call *call) ([]any, error) {
		target := argument[string](call, 0)
		o, err := call.options(c, call.member, 1)
		if err != nil {
			return nil, err
		}
		auth := authorizationFor(call, call.tree.view, o, string(operation), target)
		caller, err := c.authorize(call, auth, withWipe(action, o)...)
		if err != nil {
			return nil, err
		}
		return c.start(ctx, call, caller, requestArgs(operation, target, o))
	}
}

func (c *session) start(ctx context.Context, call *call, caller daemon.Caller, r daemon.RequestArgs) ([]any, error) {
	job, err := c.server.backend.Start(ctx, caller, call.object.sprout.FSID, r)
	if err != nil {
		return nil, err
	}
	c.log.Info("a job was asked for", slog.Any("job", job), slog.String("operation", string(r.Operation)),
		slog.Any("uid", caller.UID), slog.String("sender", caller.Name))
	return []any{names.JobPath(job)}, nil
}

// resume needs the authorisation of what is resumed. That may change while the
// user is asked, by a job of somebody else; then it is asked for again.
func resume(ctx context.Context, c *session, call *call) ([]any, error) {
	o, err := call.options(c, "Resume", 0)
	if err != nil {
		return nil, err
	}
	fsid := call.object.sprout.FSID
	view := call.tree.view
	for range 3 {
		action, target := resumed(view, fsid)
		auth := authorizationFor(call, view, o, string(plan.Resume), target)
		caller, err := c.authorize(call, auth, action)
		if err != nil {
			return nil, err
		}
		view = c.server.backend.View(ctx)
		if now, _ := resumed(view, fsid); now == action {
			return c.start(ctx, call, caller, requestArgs(plan.Resume, "", o))
		}
	}
	return nil, fault.New(fault.Busy, "what is to be resumed changes all the time")
}

// resumed gives the action that resuming needs. Where no intent is shown it is
// the strictest: the engine knows better what there is to resume, if anything.
func resumed(v *daemon.View, fsid string) (action, target string) {
	for _, s := range v.Sprouts {
		if s.FSID != fsid || s.Intent == nil {
			continue
		}
		switch s.Intent.Operation {
		case plan.Persist:
			return names.ActionPersist, s.Intent.Target
		case plan.Release:
			return names.ActionRelease, s.Intent.Target
		case plan.AddDevice, plan.RemoveDevice:
			return names.ActionManageDevices, s.Intent.Target
		}
		return names.ActionFlatten, s.Intent.Target
	}
	return names.ActionFlatten, ""
}

// reset destroys, if only at the next boot.
func reset(ctx context.Context, c *session, call *call) ([]any, error) {
	o, err := call.options(c, "Reset", 0)
	if err != nil {
		return nil, err
	}
	device := ""
	for _, m := range call.object.sprout.Members {
		if m.Role == plan.RolePersistent {
			device = m.Path
		}
	}
	auth := authorizationFor(call, call.tree.view, o, "reset", device)
	if _, err := c.authorize(call, auth, names.ActionWipe); err != nil {
		return nil, err
	}
	return nil, c.server.backend.Reset(ctx, call.object.sprout.FSID, o.is("undo"))
}

func teardown(ctx context.Context, c *session, call *call) ([]any, error) {
	o, err := call.options(c, "Teardown", 0)
	if err != nil {
		return nil, err
	}
	auth := authorizationFor(call, call.tree.view, o, "teardown", "")
	auth.details["mountpoint"] = text(call.object.sprout.MountPoint)
	if _, err := c.authorize(call, auth, names.ActionCreate); err != nil {
		return nil, err
	}
	return nil, c.server.backend.Teardown(ctx, call.object.sprout.FSID)
}

func cancelJob(ctx context.Context, c *session, call *call) ([]any, error) {
	o, err := call.options(c, "Cancel", 0)
	if err != nil {
		return nil, err
	}
	job := call.object.job
	uid, err := c.callers.uid(ctx, call.sender)
	if err != nil {
		return nil, fault.Wrap(err, fault.AccessDenied, "cannot find out who is asking")
	}
	action := names.ActionCancelOther
	if uid == job.StartedByUID {
		action = names.ActionCancel
	}
	auth := authorizationFor(call, call.tree.view, o, "cancel", "")
	auth.details["job"] = string(call.path)
	if _, err := c.authorize(call, auth, action); err != nil {
		return nil, err
	}
	return nil, c.server.backend.Cancel(ctx, job.Number)
}

// waitForJob replies when the job is over. It gives up when the caller leaves.
func waitForJob(_ context.Context, c *session, call *call) ([]any, error) {
	ctx, _, stop, err := c.callers.watch(c.ctx, call.sender)
	if err != nil {
		return nil, err
	}
	defer stop()
	job, err := c.server.backend.Wait(ctx, call.object.job.Number)
	switch {
	case errors.Is(context.Cause(ctx), errGone):
		return nil, busError(names.ErrorDisconnected, "the caller has left the bus")
	case err != nil:
		return nil, err
	case job.State == daemon.JobDone:
		return []any{result(job.Result)}, nil
	case job.Err != nil:
		return nil, job.Err
	}
	return nil, fault.New(fault.Internal, "the job ended as %s and did not say why", string(job.State))
}
