package daemon

import (
	"context"
	"log/slog"

	"sproutd.org/sproutd/daemon/plan"
)

// aheadSoon is how many bytes other steps may move before the removal of a seed
// that is read ahead meanwhile. With more of them, what was read could be gone
// from memory again when it is needed.
const aheadSoon = 256 << 20

// readAhead reads a seed before its removal comes to it: the stick has nothing to
// do while the kernel is busy with other things. The removal does not need it,
// so a failure is only told. A nil one does nothing.
type readAhead struct {
	stop  context.CancelFunc
	begun chan struct{} // closed when the removal begins
	ended chan struct{}

	// What it did, once it has ended.
	bytes uint64
	err   error
}

// beginReadAhead begins to read the seed ahead where the steps remove it soon.
func (s *Service) beginReadAhead(ctx context.Context, j *job, steps []plan.Step) {
	if j.ahead != nil {
		return
	}
	var before uint64
	for _, step := range steps {
		switch {
		case before > aheadSoon, step.Kind == plan.StepRelease: // from then on it is read from the copy
			return
		case step.Kind == plan.StepRemove && step.Device.Same(j.seed):
			j.ahead = s.startReadAhead(ctx, j.mountpoint, step)
			return
		}
		before += step.Bytes
	}
}

func (s *Service) startReadAhead(ctx context.Context, mountpoint string, step plan.Step) *readAhead {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx)) // as the kernel goes on until it has stopped
	r := &readAhead{stop: stop, begun: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.bytes, r.err = s.kernel.ReadAhead(ctx, mountpoint, step.DevID, step.Device, r.begun)
	}()
	return r
}

// follow tells that the removal begins.
func (r *readAhead) follow() {
	if r != nil {
		close(r.begun)
	}
}

// endReadAhead ends what was begun, and notes what it did.
func (s *Service) endReadAhead(j *job) {
	r := j.ahead
	if r == nil {
		return
	}
	r.stop()
	<-r.ended
	j.ahead = nil
	j.record.Result.ReadAhead = "on"
	if r.err != nil {
		j.record.Result.ReadAhead = "off: " + asFault(r.err).Text()
		s.log.Info("no read-ahead", slog.Any("job", j.record.Number), slog.Any("error", r.err))
	}
	j.record.Result.ReadAheadBytes += r.bytes
}
