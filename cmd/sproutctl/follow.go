package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"sproutd.org/sproutd/dbus/client"
)

// followFlags say how long a command stays with its job.
type followFlags struct {
	wait, noWait, cancel bool
}

func (f *followFlags) register(cmd *cobra.Command) {
	f.registerWait(cmd)
	cmd.Flags().BoolVar(&f.cancel, "cancel-on-interrupt", false, "cancel the job on Ctrl-C, not only stop watching")
}

func (f *followFlags) registerWait(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.wait, "wait", true, "stay until the job has ended")
	cmd.Flags().BoolVar(&f.noWait, "no-wait", false, "return when the job was started")
}

func (f *followFlags) waits() bool { return f.wait && !f.noWait }

// linesApart is the least time between two progress lines of one step where
// there is no terminal.
const linesApart = 5 * time.Second

// view shows a job to somebody.
type view interface {
	update(client.Job)
	close(client.Job)
}

// follow stays with a job until it has ended and tells how. When ctx ends, that
// is on Ctrl-C, it leaves the job alone or, if so wanted, cancels it and stays.
func (a *app) follow(ctx context.Context, c *client.Client, path string, flags followFlags) error {
	// What is still to be said and done after Ctrl-C must not fail because of it.
	after := context.WithoutCancel(ctx)
	number := client.JobNumber(path)
	if !flags.waits() {
		job, err := c.Job(after, path)
		if err != nil {
			return err
		}
		if a.json {
			a.printJSON(job)
		} else {
			fmt.Fprintf(a.out, "Job %d was started.\n", number)
			howToComeBack(a.out, number)
		}
		return nil
	}
	watch, err := c.WatchJob(after, path)
	if err != nil {
		return err
	}
	defer watch.Close()
	view := a.view()
	var job client.Job
	interrupted := ctx.Done()
	for open := true; open; {
		select {
		case <-interrupted:
			interrupted = nil
			if !flags.cancel {
				view.close(job)
				fmt.Fprintf(a.err, "Detached. Job %d goes on.\n", number)
				howToComeBack(a.err, number)
				return errDetached
			}
			// The end shows in the job itself, also when it was too late.
			if err := c.Cancel(after, path); err != nil {
				view.close(job)
				return cannot(err, "cancel job %d", number)
			}
		case next, ok := <-watch.Updates():
			if open = ok; ok {
				job = next
				view.update(job)
			}
		}
	}
	view.close(job)
	if err := watch.Err(); err != nil {
		return err
	}
	return a.ended(after, c, job)
}

func howToComeBack(out io.Writer, number uint64) {
	fmt.Fprintf(out, "  Watch it:  sproutctl watch %d\n  Stop it:   sproutctl cancel %d\n", number, number)
}

// ended tells how a job ended and whether the stick can go.
func (a *app) ended(ctx context.Context, c *client.Client, job client.Job) error {
	if err := job.Err(); err != nil {
		return err
	}
	sprout, err := c.Sprout(ctx, job.Sprout)
	if err != nil {
		return err
	}
	if a.json {
		a.printJSON(struct {
			client.Job
			SproutState  string   `json:"sprout_state"`
			SafeToUnplug bool     `json:"safe_to_unplug"`
			MediaHolders []string `json:"media_holders"`
		}{job, sprout.State, sprout.SafeToUnplug, list(sprout.MediaHolders)})
		return nil
	}
	if notes, ok := job.Result["notes"].([]string); ok {
		for _, note := range notes {
			fmt.Fprintf(a.out, "Note: %s\n", note)
		}
	}
	fmt.Fprintf(a.out, "Done: %s is %s.\n", sprout.MountPoint, sprout.State)
	if sprout.State != "installed" && job.Operation != "release" {
		return nil
	}
	if sprout.SafeToUnplug {
		fmt.Fprintln(a.out, "The stick can be unplugged now.")
		return nil
	}
	holders := strings.Join(sprout.MediaHolders, "; ")
	if holders == "" {
		holders = "unknown"
	}
	fmt.Fprintf(a.out, "Do not unplug the stick yet, it is in use: %s.\n", holders)
	return nil
}

// leastColumns is the width of the narrowest terminal that gets a bar.
const leastColumns = 40

// view picks the way progress is shown.
func (a *app) view() view {
	switch {
	case a.json:
		return jsonView{a}
	case columns(a.out) >= leastColumns:
		return newBarView(a.out)
	}
	return &lineView{out: a.out, now: time.Now}
}

// stepWords is "step 2 of 4: moving the seed", "" between steps.
func stepWords(job client.Job) string {
	if job.Step == "" {
		return ""
	}
	return fmt.Sprintf("step %d of %d: %s", job.StepNumber, job.StepCount, job.Step)
}

// progressWords are percent, bytes, rate and time left, as far as known.
func progressWords(job client.Job, now time.Time) []string {
	words := []string{percent(job.Progress)}
	if job.BytesTotal > 0 {
		words = append(words, size(job.BytesDone)+" of "+size(job.BytesTotal))
	}
	if job.Rate > 0 {
		words = append(words, size(job.Rate)+"/s")
	}
	if left := timeLeft(job.ExpectedEndTime, now); left != "" {
		words = append(words, left)
	}
	return words
}

// jsonView prints each state of the job as a line. The end is printed by
// [app.ended], or as the error it is.
type jsonView struct{ a *app }

func (v jsonView) update(job client.Job) {
	if job.State != client.Done {
		v.a.printJSON(job)
	}
}

func (v jsonView) close(client.Job) {}

// lineView prints a line at each step and now and then between.
type lineView struct {
	out         io.Writer
	now         func() time.Time
	step, state string
	last        time.Time
}

func (v *lineView) update(job client.Job) {
	now := v.now()
	if v.last.IsZero() {
		v.last = now
	}
	if step := stepWords(job); step != "" && step != v.step {
		v.step = step
		v.last = now
		fmt.Fprintln(v.out, strings.ToUpper(step[:1])+step[1:])
	}
	if job.State == "cancelling" && v.state != job.State {
		fmt.Fprintln(v.out, "Cancelling")
	}
	v.state = job.State
	if !job.Finished() && now.Sub(v.last) >= linesApart {
		v.last = now
		fmt.Fprintln(v.out, "  "+strings.Join(progressWords(job, now), ", "))
	}
}

func (v *lineView) close(client.Job) {}

// barView draws a bar on a terminal.
type barView struct {
	bars *mpb.Progress
	bar  *mpb.Bar
	job  atomic.Pointer[client.Job]
}

// barParts is the number of parts a bar is divided into; it is far more than
// any terminal has columns.
const barParts = 10000

func newBarView(out io.Writer) *barView {
	v := &barView{bars: mpb.New(mpb.WithOutput(out))}
	v.job.Store(&client.Job{})
	words := func(decor.Statistics) string {
		return " " + strings.Join(progressWords(*v.job.Load(), time.Now()), "  ")
	}
	step := mpb.BarFillerFunc(func(out io.Writer, stat decor.Statistics) error {
		job := v.job.Load()
		text := stepWords(*job)
		if job.State == "cancelling" {
			text = "cancelling, " + text
		}
		runes := []rune(text)
		_, err := fmt.Fprintln(out, string(runes[:min(len(runes), max(stat.AvailableWidth-1, 0))]))
		return err
	})
	v.bar = v.bars.New(barParts, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
		mpb.BarExtender(step, true), mpb.AppendDecorators(decor.Any(words)))
	return v
}

func (v *barView) update(job client.Job) {
	v.job.Store(&job)
	// The bar's own end is reached by close only: done is a state, not a number.
	v.bar.SetCurrent(min(int64(job.Progress*barParts), barParts-1))
}

func (v *barView) close(job client.Job) {
	if job.State == client.Done {
		v.bar.SetCurrent(barParts)
	} else {
		v.bar.Abort(false)
	}
	v.bars.Wait()
}
