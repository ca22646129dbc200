package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// Config is what a [Service] needs. Kernel, StateDir and Logger are required.
type Config struct {
	Kernel Kernel
	// StateDir is where the journal is kept; it is made if it is not there.
	StateDir string
	Logger   *slog.Logger
	// Now is the clock, nil for time.Now.
	Now func() time.Time
	// Inhibit keeps the machine from going to sleep or off while a job runs;
	// nil for nothing. release may be nil when err is not.
	Inhibit func(ctx context.Context, why string) (release func(), err error)
	// Watch calls changed after every change of mounts and block devices until
	// ctx ends; nil for nothing.
	Watch func(ctx context.Context, changed func()) error
	// Alarm tells whoever sits at the machine that something needs to be done at
	// once; nil for nothing. It must need neither the bus nor a disk.
	Alarm func(text string)
}

// Service shows the sprouts of this machine and runs jobs on them. Its methods
// may be called from any goroutine.
type Service struct {
	kernel  Kernel
	boot    handover.Note // of the early boot, zero if it was not ours
	journal *journal
	log     *slog.Logger
	now     func() time.Time
	inhibit func(ctx context.Context, why string) (func(), error)
	watch   func(ctx context.Context, changed func()) error
	alarm   func(text string)

	// life is the context of all jobs; end ends it.
	life context.Context
	end  context.CancelCauseFunc
	work sync.WaitGroup

	creating sync.Mutex // one CreateSprout at a time: its steps must not mix

	mu      sync.Mutex
	jobs    map[uint32]*job
	next    uint32                  // number of the next job
	claims  map[string]uint32       // fsid -> job; 0 while a job is being started
	records map[string]sproutRecord // by fsid
	refused string                  // why the wish of the early boot is not fulfilled, "" if it is

	looking    chan struct{} // holds one token while the kernel is being read
	lookout    lookout       // belongs to the holder of the token
	publishing sync.Mutex    // keeps views in order
	view       atomic.Pointer[View]
	viewed     atomic.Int64 // when the view's sprouts were read, µs
	observers  []func(*View)
	media      mediaCache
	wake       chan struct{} // tells Run to look again
}

// New makes a service from its journal. Jobs that the journal says were running
// are interrupted now. [Service.Run] must be called for changes to be noticed.
func New(ctx context.Context, c Config) (*Service, error) {
	j, err := openJournal(c.StateDir)
	if err != nil {
		return nil, err
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Alarm == nil {
		c.Alarm = func(string) {}
	}
	s := &Service{
		kernel: c.Kernel, journal: j, log: c.Logger, now: c.Now, inhibit: c.Inhibit, watch: c.Watch, alarm: c.Alarm,
		jobs: map[uint32]*job{}, next: 1, claims: map[string]uint32{}, records: map[string]sproutRecord{},
		looking: make(chan struct{}, 1), lookout: lookout{writable: map[string]bool{}, told: map[string][]string{}},
		wake: make(chan struct{}, 1),
	}
	s.life, s.end = context.WithCancelCause(context.WithoutCancel(ctx))
	s.view.Store(&View{})
	if s.boot, err = c.Kernel.BootNote(); err != nil {
		s.log.Warn("the note of the early boot is ignored", slog.Any("error", err))
		s.boot = handover.Note{}
	}
	if err := errors.Join(s.recover(ctx), s.Refresh(ctx)); err != nil {
		return nil, errors.Join(err, j.close())
	}
	return s, nil
}

// Observe makes the service call f with every new view, one call at a time and
// in order. It must be called before Run and before any job.
func (s *Service) Observe(f func(*View)) { s.observers = append(s.observers, f) }

// lowSpaceEvery is how often free space is looked at while a volatile sprout
// may fill up. Nothing wakes up when there is none.
const lowSpaceEvery = 10 * time.Second

// settleFor is how long the service waits after a change for those that come
// with it. Where changes never end, looking takes at most a tenth of the time:
// it waits lookShare times as long as the last look took. A job makes changes all
// the time and needs the processors: settleInJob is the least while one runs.
const (
	settleFor    = 50 * time.Millisecond
	settleInJob  = 500 * time.Millisecond
	settleAtMost = 2 * time.Second
	lookShare    = 9
)

// Run notices changes until ctx ends; then it stops the jobs that run, waits
// for them, and returns. Such jobs are interrupted: the file system stays as
// far as they came.
func (s *Service) Run(ctx context.Context) error {
	watching := make(chan error, 1)
	go func() {
		if s.watch == nil {
			<-ctx.Done()
			watching <- nil
			return
		}
		watching <- s.watch(ctx, s.poke)
	}()
	s.fulfil(ctx)
	err := s.loop(ctx, watching)
	s.end(errShutdown)
	s.work.Wait()
	return errors.Join(err, s.journal.close())
}

func (s *Service) loop(ctx context.Context, watching <-chan error) error {
	lowSpace := time.NewTimer(lowSpaceEvery)
	defer lowSpace.Stop()
	settle := settleFor
	for {
		lowSpace.Stop()
		if slices.ContainsFunc(s.view.Load().Sprouts, func(v SproutView) bool { return v.State == plan.Volatile }) {
			lowSpace.Reset(lowSpaceEvery)
		}
		changed := false
		select {
		case err := <-watching:
			if ctx.Err() == nil && err != nil {
				return fmt.Errorf("cannot watch for changes: %w", err)
			}
			return nil
		case <-lowSpace.C:
		case <-s.wake:
			// Changes come in swarms: a disk with its partitions, a tree of
			// mounts. One look serves them all.
			changed = true
			if slices.ContainsFunc(s.view.Load().Jobs, func(v JobView) bool { return !v.State.Finished() }) {
				settle = max(settle, settleInJob)
			}
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
			s.media.forget()
		}
		began := time.Now()
		if err := s.Refresh(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
		}
		if !changed {
			continue
		}
		if _, err := s.devices(ctx, false); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot look at the devices", slog.Any("error", err))
		}
		settle = min(max(settleFor, lookShare*time.Since(began)), settleAtMost)
	}
}

// poke makes the loop look again soon.
func (s *Service) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Alive answers when the service can still do its work: the lock that all of it
// needs can be taken. It is what feeds the watchdog.
func (s *Service) Alive(ctx context.Context) error {
	alive := make(chan struct{})
	go func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		close(alive)
	}()
	select {
	case <-alive:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the engine does not answer: %w", ctx.Err())
	}
}

// recover takes in what the journal remembers.
func (s *Service) recover(ctx context.Context) error {
	jobs, sprouts, bad := s.journal.load()
	for _, err := range bad {
		s.log.Warn("journal record ignored", slog.Any("error", err))
	}
	for _, r := range jobs {
		if !r.State.Finished() {
			r.State, r.End = JobInterrupted, s.now()
			r.ErrorCode, r.Error = fault.Interrupted, "the daemon ended while the job ran"
			if err := s.journal.saveJob(r); err != nil {
				return err
			}
		}
		done := make(chan struct{})
		close(done)
		s.jobs[r.Number] = &job{record: r, done: done, view: r.shown()}
		s.next = max(s.next, r.Number+1)
	}
	s.settleCopies(ctx, jobs)
	for _, r := range sprouts {
		if r.BootID != s.kernel.BootID() {
			// Devices and mounts of another boot say nothing about this one.
			r.Created, r.Loop, r.Zrams, r.Seed, r.MountPoint, r.Media = false, false, nil, block.ID{}, "", Media{}
			r.Asked = false
			if r.Creating {
				if err := s.journal.removeSprout(r.Key); err != nil {
					return err
				}
				continue
			}
		}
		adopted := s.kernel.Adopt(ctx, r.Zrams)
		expected := slices.ContainsFunc(r.Zrams, func(id block.ID) bool { return id.Num.IsZero() })
		r.Zrams = adopted
		if r.Creating {
			s.takeDown(ctx, r)
			continue
		}
		if expected { // once is enough: the name may serve others later
			if err := s.journal.saveSprout(r); err != nil {
				return err
			}
		}
		s.records[r.FSID] = r
	}
	return nil
}

// Start begins the operation on the sprout and gives the number of its job.
// Everything that can be refused is refused here, before anything is changed.
func (s *Service) Start(ctx context.Context, caller Caller, fsid string, args RequestArgs) (uint32, error) {
	if err := s.claim(fsid); err != nil {
		return 0, err
	}
	j, p, err := s.prepare(ctx, caller, fsid, args)
	if err != nil {
		s.release(fsid)
		return 0, err
	}
	// The job outlives the call that starts it.
	life, cancel := context.WithCancelCause(s.life)
	j.cancel = cancel
	s.mu.Lock()
	if s.life.Err() != nil {
		s.mu.Unlock()
		cancel(nil)
		s.release(fsid)
		return 0, fault.New(fault.WrongState, "the daemon is ending")
	}
	j.record.Number = s.next
	s.next++
	if err := s.journal.saveJob(j.record); err != nil {
		s.mu.Unlock()
		cancel(nil)
		s.release(fsid)
		return 0, fault.Wrap(err, fault.Internal, "cannot record the job before starting it")
	}
	j.view = j.record.shown()
	j.view.StepCount = uint32(len(p.Steps)) //nolint:gosec // a plan has a handful of steps
	j.view.BytesTotal, j.view.Cancelable = p.BytesToMove, true
	s.jobs[j.record.Number] = j
	s.claims[fsid] = j.record.Number
	s.work.Add(1)
	s.mu.Unlock()
	s.publish()

	go func() {
		defer s.work.Done()
		defer cancel(nil)
		s.lead(life, j)
	}()
	return j.record.Number, nil
}

// Ending is closed once the service has begun to end and takes no more jobs.
func (s *Service) Ending() <-chan struct{} { return s.life.Done() }

// lead runs a job from its first step to its final view.
func (s *Service) lead(ctx context.Context, j *job) {
	release := s.holdAwake(ctx, j)
	err := s.run(ctx, j)
	release()
	s.finish(ctx, j, err)
	s.mu.Lock()
	final := j.record.shown()
	final.StepCount = max(final.StepCount, j.view.StepCount)
	final.BytesTotal = max(final.BytesTotal, j.meter.total)
	if final.State != JobDone {
		final.Progress = j.view.Progress
	}
	j.view = final
	delete(s.claims, j.record.FSID)
	s.mu.Unlock()
	// Truth first: whoever waited for the job finds the new state shown.
	if err := s.Refresh(context.WithoutCancel(ctx)); err != nil {
		s.log.Warn("cannot look at the sprouts", slog.Any("error", err))
	}
	if _, err := s.devices(context.WithoutCancel(ctx), false); err != nil {
		s.log.Warn("cannot look at the devices", slog.Any("error", err))
	}
	close(j.done)
}

// holdAwake takes the inhibitor lock for a job.
func (s *Service) holdAwake(ctx context.Context, j *job) (release func()) {
	if s.inhibit == nil {
		return func() {}
	}
	release, err := s.inhibit(ctx, fmt.Sprintf("Moving the file system (%s)", j.record.Request.Operation))
	if err != nil {
		// The move survives a power cut, so the lock is only a kindness.
		s.log.Info("no inhibitor lock", slog.Any("error", err))
		return func() {}
	}
	return release
}

// claim reserves the sprout for one job.
func (s *Service) claim(fsid string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if busy := s.busy(fsid); busy != nil {
		return busy
	}
	s.claims[fsid] = 0
	return nil
}

// busy says which job runs on the sprout, nil if there is none. s.mu must be held.
func (s *Service) busy(fsid string) *fault.Error {
	n, taken := s.claims[fsid]
	switch {
	case !taken:
		return nil
	case n == 0:
		return fault.New(fault.Busy, "another job is being started on this sprout")
	}
	return fault.New(fault.Busy, "job %d (%s) runs on this sprout", n, s.jobs[n].record.Request.Operation)
}

func (s *Service) release(fsid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.claims, fsid)
}

// prepare checks a request and makes the job for it.
func (s *Service) prepare(ctx context.Context, caller Caller, fsid string, args RequestArgs) (*job, plan.Plan, error) {
	sprout, r, p, err := s.consider(ctx, fsid, args, true)
	if err == nil {
		err = p.Err()
	}
	if err != nil {
		return nil, p, err
	}
	if len(p.Steps) == 0 && !p.Resumes {
		return nil, p, fault.New(fault.WrongState, "there is nothing to do: the sprout is as wanted already")
	}
	return &job{
		mountpoint: sprout.MountPoint,
		asked:      r,
		done:       make(chan struct{}),
		record: jobRecord{
			FSID: fsid, Request: r, UID: caller.UID, Start: s.now(), State: JobRunning,
		},
	}, p, nil
}

// Plan says what Start would do, and changes nothing.
func (s *Service) Plan(ctx context.Context, fsid string, args RequestArgs) (plan.Plan, error) {
	s.mu.Lock()
	busy := s.busy(fsid)
	s.mu.Unlock()
	if busy != nil { // what a plan would be made for changes all the time
		return plan.Plan{Operation: args.Operation, Problems: []*fault.Error{busy}}, nil //nolint:nilerr // a reason against it is a part of the plan
	}
	_, _, p, err := s.consider(ctx, fsid, args, false)
	return p, err
}

// consider looks at the sprout and the target and plans. Reasons against it are
// in the plan, which is a rough one where nobody is shown it; the error is for a
// sprout that is not there.
func (s *Service) consider(ctx context.Context, fsid string, args RequestArgs, rough bool) (plan.Sprout, plan.Request, plan.Plan, error) {
	shown, ok := s.look(ctx, fsid)
	if !ok {
		return plan.Sprout{}, plan.Request{}, plan.Plan{}, fault.New(fault.NoSuchSprout, "there is no sprout %s", fsid)
	}
	sprout, err := s.detail(ctx, shown.MountPoint)
	if err != nil {
		return plan.Sprout{}, plan.Request{}, plan.Plan{}, err
	}
	sprout.Rough = rough
	r := plan.Request{Operation: args.Operation, Options: args.Options}
	refused := func(problem *fault.Error) (plan.Sprout, plan.Request, plan.Plan, error) {
		return sprout, r, plan.Plan{Operation: r.Operation, Problems: []*fault.Error{problem}}, nil
	}
	var target *plan.Target
	switch {
	case r.Operation == plan.Resume:
		if sprout.Intent == nil {
			return refused(fault.New(fault.NothingToResume, "no earlier job left anything undone"))
		}
		r = *sprout.Intent
		target, err = s.recall(ctx, sprout, &r)
	case r.Operation == plan.AddDevice && args.Target == "zram":
		r.Target = plan.TargetRef{Zram: true, BootID: s.kernel.BootID()}
		if r.Options.Size == 0 {
			r.Options.Size = s.defaultZram()
		}
	case r.Operation == plan.Release:
		target, err = s.aim(ctx, sprout, &r, args.Target)
	case r.Operation == plan.Persist && args.Target == "free":
		r.Target = plan.TargetRef{Free: true, BootID: s.kernel.BootID()}
		target, err = s.free(ctx, sprout, &r)
	default:
		target, err = s.resolve(ctx, sprout, args.Target)
		if target != nil {
			r.Target = plan.TargetRef{ID: target.ID, BootID: s.kernel.BootID()}
			// What an earlier job copied there is not read yet, whoever asks.
			if earlier := sprout.Intent; earlier != nil && earlier.Target.ID.Same(target.ID) {
				r.Target.Copy = earlier.Target.Copy
			}
		}
	}
	if err != nil {
		return refused(asFault(err))
	}
	if (r.Operation == plan.Persist || r.Operation == plan.Flatten) && r.Options.Compress == "" {
		r.Options.Compress = "zstd" // the documented default
	}
	for _, m := range sprout.Members {
		if r.Target.UUID == "" && r.Target.ID.Same(m.ID) {
			r.Target.UUID = m.UUID
		}
	}
	p, err := s.decide(ctx, sprout, r, target)
	return sprout, r, p, err
}

// decide measures what has to move and makes the plan.
func (s *Service) decide(ctx context.Context, sprout plan.Sprout, r plan.Request, target *plan.Target) (plan.Plan, error) {
	if err := s.kernel.Measure(ctx, &sprout, plan.Measured(sprout, r)); err != nil {
		return plan.Plan{}, err
	}
	return plan.Make(sprout, r, target), nil
}

// Cancel tells a running job to stop. It returns at once; Wait tells when the
// job has stopped. Cancelling twice is no error.
func (s *Service) Cancel(_ context.Context, number uint32) error {
	s.mu.Lock()
	j, ok := s.jobs[number]
	switch {
	case !ok:
		s.mu.Unlock()
		return fault.New(fault.NoSuchJob, "there is no job %d", number)
	case j.view.State.Finished():
		s.mu.Unlock()
		return fault.New(fault.WrongState, "job %d has ended already: %s", number, j.view.State)
	}
	j.view.State, j.view.Cancelable = JobCancelling, false
	s.mu.Unlock()
	s.publish()
	j.cancel(nil)
	return nil
}

// Wait waits until the job has ended, or ctx.
func (s *Service) Wait(ctx context.Context, number uint32) (JobView, error) {
	s.mu.Lock()
	j, ok := s.jobs[number]
	s.mu.Unlock()
	if !ok {
		return JobView{}, fault.New(fault.NoSuchJob, "there is no job %d", number)
	}
	select {
	case <-j.done:
	case <-ctx.Done():
		return JobView{}, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return j.view, nil
}

// update changes the view of a job and publishes it. Progress comes from the
// meter, which the caller owns.
func (s *Service) update(j *job, change func(*JobView)) {
	s.mu.Lock()
	v := j.view
	v.BytesDone, v.BytesTotal = j.meter.bytes(), max(v.BytesTotal, j.meter.total)
	v.Progress, v.Rate = j.meter.fraction(), uint64(j.meter.rate)
	v.ExpectedEnd = j.meter.expected(s.now())
	if v.State == JobPending {
		v.State = JobRunning
	}
	change(&v)
	j.view = v
	s.mu.Unlock()
	s.publish()
}

// publish shows the jobs as they are now, with the sprouts and devices as they
// were last seen.
func (s *Service) publish() {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	s.replaceView(func(*View) {})
}

// replaceView makes a new view from the last one. s.publishing must be held.
func (s *Service) replaceView(change func(*View)) {
	v := *s.view.Load()
	change(&v)
	s.mu.Lock()
	s.dropOld()
	v.Jobs = make([]JobView, 0, len(s.jobs))
	for _, n := range slices.Sorted(maps.Keys(s.jobs)) {
		v.Jobs = append(v.Jobs, s.jobs[n].view)
	}
	v.Sprouts = slices.Clone(v.Sprouts)
	for i := range v.Sprouts {
		v.Sprouts[i].CurrentJob = s.claims[v.Sprouts[i].FSID]
		v.Sprouts[i].Intent = s.intentView(v.Sprouts[i].FSID)
	}
	s.mu.Unlock()
	s.view.Store(&v)
	for _, f := range s.observers {
		f(&v)
	}
}

// keepJobs is how long a finished job is shown: "at least ten minutes".
const keepJobs = 15 * time.Minute

// dropOld forgets jobs that ended long ago and whose intent nobody needs.
func (s *Service) dropOld() {
	for n, j := range s.jobs {
		if !j.view.State.Finished() || s.now().Sub(j.record.End) < keepJobs {
			continue
		}
		if intent := s.intent(j.record.FSID); intent != nil && intent.record.Number == n {
			continue
		}
		if err := s.journal.removeJob(n); err != nil {
			s.log.Warn("cannot forget a job", slog.Any("error", err))
		}
		delete(s.jobs, n)
	}
}

// intent gives the job whose request was begun and left undone: the newest that
// did a step, unless a later move was done. s.mu must be held.
func (s *Service) intent(fsid string) *job {
	var newest *job
	for _, n := range slices.Sorted(maps.Keys(s.jobs)) {
		j := s.jobs[n]
		switch {
		case j.record.FSID != fsid:
		case j.view.State == JobDone:
			if !besides(j) || newest != nil && newest.record.Request.Operation == j.record.Request.Operation {
				newest = nil
			}
		case j.record.Request.Operation == plan.Release && newest != nil && !besides(newest):
			// What moves the file system is what is to be resumed.
		case j.view.State.Finished() && j.record.Steps > 0:
			newest = j
		}
	}
	return newest
}

// besides reports whether a job leaves undone what an earlier one left undone.
func besides(j *job) bool {
	return j.record.Request.Operation == plan.AddDevice || j.record.Request.Operation == plan.Release
}

func (s *Service) intentView(fsid string) *Intent {
	j := s.intent(fsid)
	if j == nil || s.claims[fsid] != 0 {
		return nil
	}
	target := j.record.Request.Target.ID.Path
	switch {
	case j.record.Request.Target.Zram:
		target = "zram"
	case j.record.Request.Target.Free:
		target = "free"
	case j.record.Request.Target.ReleaseTo != "":
		target = j.record.Request.Target.ReleaseTo
	}
	return &Intent{Job: j.record.Number, Operation: j.record.Request.Operation, Target: target, State: j.view.State}
}
