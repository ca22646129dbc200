package daemon

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// errShutdown is the cause with which jobs are cancelled when the daemon ends.
var errShutdown = errors.New("the daemon is ending")

// job is one operation on one sprout. Its run method belongs to one goroutine;
// what others see is the view, which the service guards.
type job struct {
	record     jobRecord    // changed by the job's goroutine only
	asked      plan.Request // as it was asked; never changed
	mountpoint string
	cancel     context.CancelCauseFunc
	done       chan struct{} // closed after the final view was published

	view    JobView // guarded by Service.mu
	meter   meter
	seed    block.ID        // the seed member, while there is one
	landing block.ID        // the device that takes what is moved, as far as is known
	skipped []block.ID      // leftovers that are not ours to free
	mounted bool            // the media is in use and stays mounted
	foreign []plan.Leftover // zrams this job removed that we did not make
	ahead   *readAhead      // what reads the seed ahead of its removal, meanwhile
	giving  *giving         // what is given back meanwhile
	polling time.Duration   // what it cost of a processor to see how far moves are
}

// run brings the sprout to what the job wants: look, plan, do the first step,
// and again until no step is left. There is no other way to go on after a
// crash than this, so it is tested all the time.
func (s *Service) run(ctx context.Context, j *job) (err error) {
	defer s.endReadAhead(j)
	defer func() { err = cmp.Or(err, s.awaitGiving(j)) }()
	var last plan.Step
	for {
		if ctx.Err() != nil {
			return fault.New(fault.Cancelled, "the job was cancelled")
		}
		p, err := s.planNext(ctx, j)
		if err != nil {
			return err
		}
		if len(p.Steps) == 0 {
			if j.giving != nil {
				if err := s.awaitGiving(j); err != nil {
					return err
				}
				continue
			}
			return fault.Wrap(s.kernel.Sync(ctx, j.mountpoint), fault.IOError, "cannot write everything out")
		}
		step := p.Steps[0]
		if step.Kind == last.Kind && step.DevID == last.DevID && step.Device == last.Device {
			return fault.New(fault.Internal, "the step %q was done but has no effect", step.Text)
		}
		last = step
		if err := s.begin(j, p); err != nil {
			return err
		}
		s.log.Info("step begins", j.attrs(step)...)
		s.beginReadAhead(ctx, j, p.Steps)
		if s.beginGiving(ctx, j, p.Steps) {
			j.meter.end(s.now())
			continue
		}
		if err := s.do(ctx, j, step); err != nil {
			s.log.Warn("step failed", append(j.attrs(step), slog.Any("error", err))...)
			return err
		}
		j.meter.end(s.now())
		s.showAgain(ctx)
	}
}

// showAgain shows what a step has changed. That it cannot is no reason to stop
// the job: the next step looks for itself.
func (s *Service) showAgain(ctx context.Context) {
	if err := s.Refresh(ctx); err != nil && ctx.Err() == nil {
		s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
	}
}

// planNext looks at the sprout and plans what is left of the job.
func (s *Service) planNext(ctx context.Context, j *job) (plan.Plan, error) {
	sprout, err := s.detail(ctx, j.mountpoint)
	if err != nil {
		return plan.Plan{}, err
	}
	if sprout.FSID != j.record.FSID {
		return plan.Plan{}, fault.New(fault.WrongState, "another file system is mounted at %s now", j.mountpoint)
	}
	sprout.Intent, sprout.Rough = &j.record.Request, true
	// To free them is tried all the same: that is how the user is told.
	sprout.Leftovers = slices.DeleteFunc(append(sprout.Leftovers, j.foreign...), func(l plan.Leftover) bool {
		return slices.ContainsFunc(j.skipped, l.ID.Same) || j.giving.has(l.ID)
	})
	if j.mounted {
		sprout.MediaMount = ""
	}
	target, err := s.recall(ctx, sprout, &j.record.Request)
	if err != nil {
		return plan.Plan{}, err
	}
	if seed, ok := plan.SeedOf(sprout.Members); ok {
		j.seed = seed.ID
	}
	j.landing = landing(sprout.Members, j.record.Request)
	p, err := s.decide(ctx, sprout, j.record.Request, target)
	if err != nil {
		return p, err
	}
	return p, p.Err()
}

// landing gives the member that takes what r moves: the target, or where r
// removes the target, the last of the writable members that stay.
func landing(members []plan.Member, r plan.Request) block.ID {
	if r.Operation != plan.RemoveDevice {
		return r.Target.ID
	}
	var id block.ID
	for _, m := range members {
		if m.Writable && !m.ID.Same(r.Target.ID) {
			id = m.ID
		}
	}
	return id
}

// begin records and shows the first step of p, before it is done.
func (s *Service) begin(j *job, p plan.Plan) error {
	step := p.Steps[0]
	j.record.Steps++
	if err := s.journal.saveJob(j.record); err != nil {
		return fault.Wrap(err, fault.Internal, "cannot record the step before doing it")
	}
	j.meter.begin(step.Bytes, p.BytesToMove-step.Bytes, s.now())
	s.update(j, func(v *JobView) {
		v.Step = step.Text
		v.StepNumber = j.record.Steps
		v.StepCount = j.record.Steps + uint32(len(p.Steps)) - 1 //nolint:gosec // a plan has a handful of steps
	})
	return nil
}

// do does one step.
func (s *Service) do(ctx context.Context, j *job, step plan.Step) error {
	r, k := &j.record.Request, s.kernel
	switch step.Kind {
	case plan.StepWipe:
		return k.Wipe(ctx, step.Device)
	case plan.StepPartition:
		return s.partition(ctx, j, step)
	case plan.StepWritable:
		return k.MakeWritable(ctx, j.mountpoint)
	case plan.StepAdd:
		return k.Add(ctx, j.mountpoint, step.Device)
	case plan.StepAddZram:
		return s.addZram(ctx, j)
	case plan.StepReplace:
		return s.replace(ctx, j, step)
	case plan.StepCheck:
		return s.check(ctx, j, step)
	case plan.StepResize:
		return k.Resize(ctx, j.mountpoint, step.DevID)
	case plan.StepRemove:
		return s.remove(ctx, j, step)
	case plan.StepRelease:
		return s.releaseSeed(ctx, j, step)
	case plan.StepFreeZram, plan.StepDetach, plan.StepUnmount:
		return s.give(ctx, j, step)
	case plan.StepCompress:
		return k.SetCompress(ctx, j.mountpoint, step.Value)
	case plan.StepConvert:
		return k.ConvertMetadata(ctx, j.mountpoint, step.Value)
	case plan.StepLabel:
		return k.SetLabel(ctx, j.mountpoint, step.Value)
	}
	return fault.New(fault.Internal, "there is no step %q for %s", step.Kind, r.Operation)
}

// partition makes the target. Were it cut off before the journal knows of it, the
// partition would be found by its type.
func (s *Service) partition(ctx context.Context, j *job, step plan.Step) error {
	id, err := s.kernel.MakePartition(ctx, step.Device)
	if err != nil {
		return err
	}
	j.record.Request.Target = plan.TargetRef{ID: id, BootID: s.kernel.BootID()}
	return s.journal.saveJob(j.record)
}

// addZram makes a zram device and adds it.
func (s *Service) addZram(ctx context.Context, j *job) error {
	r := &j.record.Request
	id, err := s.kernel.CreateZram(ctx, r.Options.Size, r.Options.Algorithm, func(id block.ID) error {
		r.Target.ID = id
		return errors.Join(s.recordZram(j.record.FSID, id), s.journal.saveJob(j.record))
	})
	if err != nil {
		return err
	}
	if err := s.kernel.Add(ctx, j.mountpoint, id); err != nil {
		return errors.Join(err, s.kernel.FreeZram(context.WithoutCancel(ctx), id))
	}
	return nil
}

// remove moves everything off a member, watching how far it is.
func (s *Service) remove(ctx context.Context, j *job, step plan.Step) error {
	s.sampleMove(ctx, j, step) // the counters before anything has moved
	if step.Device.Same(j.seed) {
		j.ahead.follow()
		defer s.endReadAhead(j)
	}
	err := beside(ctx, func() error { return s.kernel.Remove(ctx, j.mountpoint, step.DevID) },
		func(ctx context.Context) { s.watchMove(ctx, j, step) })
	if err == nil && !step.Device.Same(j.seed) {
		j.record.Result.Way = cmp.Or(j.record.Result.Way, wayRemove)
	}
	if err == nil && s.zramOfOthers(j.record.FSID, step.Device) {
		j.foreign = append(j.foreign, plan.Leftover{Zram: true, ID: step.Device})
	}
	return err
}

// beside does the other until work is done, and waits for it. That goes on when
// ctx ends, as work does until the kernel has stopped.
func beside(ctx context.Context, work func() error, other func(context.Context)) error {
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	group.Go(func() { other(watching) })
	err := work()
	stop()
	group.Wait()
	return err
}

// The ways in which a job brings what is on a partition to the target, as its
// Result names them.
const (
	wayReplace = "replace"
	wayRemove  = "remove"
)

// replace copies a member to the target, watching how far it is. What the kernel
// cannot copy is moved instead: the copy leaves things as they were.
func (s *Service) replace(ctx context.Context, j *job, step plan.Step) error {
	r := &j.record.Request
	// Whoever goes on after a crash must know that nobody has read the copy.
	r.Target.Copy = step.Copy
	if err := s.journal.saveJob(j.record); err != nil {
		return fault.Wrap(err, fault.Internal, "cannot record the copy before starting it")
	}
	s.sampleMove(ctx, j, step)
	err := beside(ctx, func() error { return s.kernel.Replace(ctx, j.mountpoint, step.DevID, r.Target.ID) },
		func(ctx context.Context) { s.watchMove(ctx, j, step) })
	if err == nil {
		j.record.Result.Way = wayReplace
		return nil
	}
	if ctx.Err() != nil && fault.CodeOf(err) == fault.Cancelled {
		return err
	}
	s.log.Warn("moving instead of copying", append(j.attrs(step), slog.Any("error", err))...)
	r.NoReplace = true
	j.record.Result.Notes = append(j.record.Result.Notes, "it was moved, and not copied as a whole: "+asFault(err).Text())
	return nil
}

// check reads what was copied, which the kernel has not done.
func (s *Service) check(ctx context.Context, j *job, step plan.Step) error {
	if err := s.kernel.Check(ctx, j.mountpoint, step.DevID); err != nil {
		return err
	}
	j.record.Request.Target.Copy = ""
	return s.journal.saveJob(j.record)
}

// zramOfOthers reports whether id is a zram device that was not made for the
// sprout by us.
func (s *Service) zramOfOthers(fsid string, id block.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.HasPrefix(id.Path, "/dev/zram") && !slices.ContainsFunc(s.records[fsid].Zrams, id.Same)
}

// sampleEvery is how often progress is read and shown. Design §4 allows four
// signals a second; from a slow stick four take more than a hundredth of the
// processor time of a move.
const sampleEvery = time.Second / 3

// membersEvery is how many samples go by between two looks at the members,
// whose used bytes fall while one of them leaves. It is seldom, because it means to
// look for what holds the media as well, at every open file of every process.
const membersEvery = 15

func (s *Service) sampleMove(ctx context.Context, j *job, step plan.Step) {
	from := step.Device
	if step.Kind == plan.StepReplace {
		from = step.From
	}
	counters, err := s.kernel.Moved(ctx, j.mountpoint, step.DevID, from, j.landing)
	if err != nil {
		// The member may be gone this very moment; the removal itself tells.
		return
	}
	j.meter.sample(counters, s.now())
	s.update(j, func(*JobView) {})
}

func (s *Service) watchMove(ctx context.Context, j *job, step plan.Step) {
	// What it costs can be told of a thread only.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadTime()
	defer func() { j.polling += threadTime() - began }()
	ticker := time.NewTicker(sampleEvery)
	defer ticker.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s.sampleMove(ctx, j, step)
		if n%membersEvery == 0 {
			s.showAgain(ctx)
		}
	}
}

// finish records and shows how the job ended.
func (s *Service) finish(ctx context.Context, j *job, err error) {
	state := JobDone
	code := fault.CodeOf(err)
	switch {
	case err == nil:
	case code == fault.Cancelled && errors.Is(context.Cause(ctx), errShutdown):
		state, err = JobInterrupted, fault.New(fault.Interrupted, "the daemon ended while the job ran")
		code = fault.Interrupted
	case code == fault.Cancelled:
		state, err = JobCancelled, fault.New(fault.Cancelled, "the job was cancelled")
	default:
		state = JobFailed
	}
	j.record.State, j.record.End, j.record.BytesDone = state, s.now(), j.meter.bytes()
	if err != nil {
		j.record.ErrorCode, j.record.Error = code, err.Error()
		var f *fault.Error
		if errors.As(err, &f) {
			j.record.Result.Files = f.Files
		}
	} else if sprout, ok := s.look(context.WithoutCancel(ctx), j.record.FSID); ok {
		j.record.Result.SafeToUnplug, j.record.Result.MediaHolders = sprout.SafeToUnplug, sprout.MediaHolders
	}
	if saveErr := s.journal.saveJob(j.record); saveErr != nil {
		s.log.Error("cannot record the end of a job", slog.Any("error", saveErr), slog.Any("job", j.record.Number))
	}
	s.log.Info("job ends", slog.Any("job", j.record.Number), slog.String("state", string(state)), slog.Any("error", err),
		slog.Duration("polling", j.polling))
}

// threadTime is the processor time of the calling thread so far.
func threadTime() time.Duration {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &used); err != nil {
		return 0 // it cannot fail, and is only told
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// attrs are the fixed log fields of a step.
func (j *job) attrs(step plan.Step) []any {
	return []any{
		slog.Any("job", j.record.Number), slog.String("sprout", j.record.FSID),
		slog.String("operation", string(j.record.Request.Operation)), slog.String("step", string(step.Kind)),
		slog.String("device", step.Device.Path), slog.String("dev_t", step.Device.Num.String()),
	}
}

// shown makes the view of a record.
func (r jobRecord) shown() JobView {
	v := JobView{
		Number: r.Number, Operation: r.Request.Operation, Sprout: r.FSID, StartedByUID: r.UID, StartTime: r.Start,
		State: r.State, StepNumber: r.Steps, StepCount: r.Steps, BytesDone: r.BytesDone, BytesTotal: r.BytesDone,
	}
	if r.ErrorCode != "" {
		v.Err = &fault.Error{Code: r.ErrorCode, Message: r.Error}
	}
	if r.State.Finished() {
		v.Result = map[string]any{
			"bytes_moved":   r.BytesDone,
			"duration_usec": uint64(max(0, r.End.Sub(r.Start).Microseconds())),
		}
		if r.State == JobDone {
			v.Progress = 1
			v.Result["safe_to_unplug"] = r.Result.SafeToUnplug
			v.Result["media_holders"] = append([]string{}, r.Result.MediaHolders...)
		}
		if r.Result.Copy != "" {
			v.Result["copy"], v.Result["copy_bytes"] = r.Result.Copy, r.Result.CopyBytes
		}
		if r.Result.ReadAhead != "" {
			v.Result["read_ahead"], v.Result["read_ahead_bytes"] = r.Result.ReadAhead, r.Result.ReadAheadBytes
		}
		if r.Result.Way != "" {
			v.Result["way"] = r.Result.Way
		}
		if len(r.Result.Notes) > 0 {
			v.Result["notes"] = r.Result.Notes
		}
		if len(r.Result.Files) > 0 {
			v.Result["files"] = r.Result.Files
		}
	}
	return v
}
