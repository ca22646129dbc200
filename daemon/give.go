package daemon

import (
	"context"
	"log/slog"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// giving is a device that is given back while the job goes on. A nil one is none.
type giving struct {
	step  plan.Step
	ended chan struct{}
	err   error // once it has ended
}

// has reports whether id is what is being given back.
func (g *giving) has(id block.ID) bool { return g != nil && g.step.Device.Same(id) }

// beginGiving begins the first of steps where it is to free a zram device and
// others follow, which do not need it: the kernel goes through a table of all
// pages that the device could have, and that takes a tenth of a second.
func (s *Service) beginGiving(ctx context.Context, j *job, steps []plan.Step) bool {
	if steps[0].Kind != plan.StepFreeZram || len(steps) == 1 || j.giving != nil {
		return false
	}
	g := &giving{step: steps[0], ended: make(chan struct{})}
	j.giving = g
	go func() {
		defer close(g.ended)
		g.err = s.kernel.FreeZram(ctx, g.step.Device)
	}()
	return true
}

// awaitGiving waits for what is being given back.
func (s *Service) awaitGiving(j *job) error {
	g := j.giving
	if g == nil {
		return nil
	}
	<-g.ended
	j.giving = nil
	return s.given(j, g.step, g.err)
}

// give frees a device that is no member any more, or unmounts the media.
func (s *Service) give(ctx context.Context, j *job, step plan.Step) error {
	var err error
	switch step.Kind {
	case plan.StepFreeZram:
		err = s.kernel.FreeZram(ctx, step.Device)
	case plan.StepDetach:
		err = s.kernel.DetachLoop(ctx, step.Device)
	default:
		err = s.kernel.Unmount(ctx, step.Value)
	}
	return s.given(j, step, err)
}

// given notes what is not ours, or what somebody else still has open, and leaves
// it alone: the move itself succeeded.
func (s *Service) given(j *job, step plan.Step, err error) error {
	switch fault.CodeOf(err) {
	case fault.NotSupported, fault.DeviceBusy:
		j.skipped = append(j.skipped, step.Device)
		j.mounted = j.mounted || step.Kind == plan.StepUnmount
		j.record.Result.Notes = append(j.record.Result.Notes, err.Error())
		s.log.Warn("device left as it is", append(j.attrs(step), slog.Any("error", err))...)
		return nil
	}
	return err
}
