package client

import (
	"context"
	"fmt"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// JobWatch follows one job. Read Updates until it is closed, then ask Err.
type JobWatch struct {
	updates chan Job
	cancel  context.CancelFunc
	done    chan struct{}
	err     error
}

// Updates gives the job as it is now and after each change, in order. It is
// closed after the job has ended (the last update is the end), when the context
// ends, and when the service leaves the bus.
func (w *JobWatch) Updates() <-chan Job { return w.updates }

// Err says why Updates was closed before the job's end, nil if it was not. It
// waits for the close.
func (w *JobWatch) Err() error {
	<-w.done
	return w.err
}

// Close stops following and waits until nothing of it is left running.
func (w *JobWatch) Close() {
	w.cancel()
	<-w.done
}

// WatchJob follows a job to its end. The caller calls Close.
//
// The signals are subscribed to before the properties are read, so no change
// falls between. A signal that came before the properties is taken as well: it
// may be older than they are, but it may be newer too, for the service reads
// what it replies before it sends it, and losing the end would be worse than
// seeing a change twice.
func (c *Client) WatchJob(ctx context.Context, path string) (*JobWatch, error) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan *godbus.Signal, 16)
	c.conn.Signal(signals)
	matches := [][]godbus.MatchOption{{
		godbus.WithMatchSender(names.Bus),
		godbus.WithMatchObjectPath(godbus.ObjectPath(path)),
		godbus.WithMatchInterface(names.Properties),
		godbus.WithMatchMember("PropertiesChanged"),
		godbus.WithMatchArg(0, names.Job),
	}, {
		godbus.WithMatchSender("org.freedesktop.DBus"),
		godbus.WithMatchInterface("org.freedesktop.DBus"),
		godbus.WithMatchMember("NameOwnerChanged"),
		godbus.WithMatchArg(0, names.Bus),
	}}
	unsubscribe := func() {
		cancel()
		c.conn.RemoveSignal(signals)
		for _, match := range matches {
			// An error means that the connection has ended, and the match with it.
			_ = c.conn.RemoveMatchSignalContext(c.conn.Context(), match...)
		}
	}
	job := Job{Path: path}
	for _, match := range matches {
		if err := c.conn.AddMatchSignalContext(ctx, match...); err != nil {
			unsubscribe()
			return nil, fromBus(ctx, err, path)
		}
	}
	if err := c.properties(ctx, path, names.Job, &job); err != nil {
		unsubscribe()
		return nil, err
	}
	watch := &JobWatch{updates: make(chan Job), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(watch.done)
		defer close(watch.updates)
		defer unsubscribe()
		watch.err = follow(ctx, job, signals, watch.updates)
	}()
	return watch, nil
}

// follow sends job and each of its changes until it has ended.
func follow(ctx context.Context, job Job, signals <-chan *godbus.Signal, updates chan<- Job) error {
	for {
		select {
		case updates <- job:
		case <-ctx.Done():
			return fmt.Errorf("cannot follow the job any longer: %w", ctx.Err())
		}
		if job.Finished() {
			return nil
		}
		for changed := false; !changed; {
			select {
			case <-ctx.Done():
				return fmt.Errorf("cannot follow the job any longer: %w", ctx.Err())
			case signal, ok := <-signals:
				if !ok {
					return &Error{Code: Unavailable, Message: fmt.Sprintf("the connection to the system bus was lost while job %d ran", job.Number())}
				}
				var err error
				if changed, err = apply(&job, signal); err != nil {
					return err
				}
			}
		}
	}
}

// apply changes job as the signal says and reports whether it was about it.
func apply(job *Job, signal *godbus.Signal) (bool, error) {
	switch signal.Name {
	case names.Properties + ".PropertiesChanged":
		var iface string
		var entries map[string]godbus.Variant
		var invalidated []string
		if string(signal.Path) != job.Path {
			return false, nil
		}
		if err := godbus.Store(signal.Body, &iface, &entries, &invalidated); err != nil {
			return false, understood(err)
		}
		if iface != names.Job {
			return false, nil
		}
		return true, understood(decode(entries, job))
	case "org.freedesktop.DBus.NameOwnerChanged":
		var name, before, now string
		if err := godbus.Store(signal.Body, &name, &before, &now); err != nil {
			return false, understood(err)
		}
		if name == names.Bus && before != "" {
			return false, &Error{Code: Unavailable, Message: fmt.Sprintf("the service went away while job %d ran", job.Number())}
		}
	}
	return false, nil
}
