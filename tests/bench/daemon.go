package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/harness"
)

// daemonLog is what the daemons log.
type daemonLog struct {
	file *os.File // nil for none

	mu   sync.Mutex
	said []byte
}

func (l *daemonLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.said = append(l.said, p...)
	if l.file == nil {
		return len(p), nil
	}
	return l.file.Write(p)
}

// polling gives what the last job took of a processor to see how far it was, as
// the daemon said at its end.
func (l *daemonLog) polling() (time.Duration, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := bytes.LastIndex(l.said, []byte(" polling="))
	if at < 0 {
		return 0, errors.New("the daemon did not say what it cost to see how far the job was")
	}
	text, _, _ := strings.Cut(string(l.said[at+len(" polling="):]), "\n")
	l.said = nil
	return time.ParseDuration(text)
}

// launch starts the daemon and gives the time until it was on the bus.
func (b *bench) launch(ctx context.Context) (*harness.Daemon, time.Duration, error) {
	spec := harness.Spec{Binary: b.sproutd, Address: b.address, Dir: b.dir, Log: b.log}
	begin := time.Now()
	d, err := harness.StartDaemon(ctx, spec)
	return d, time.Since(begin), err
}

// start measures the time from fork to the name on the bus.
func (b *bench) start(ctx context.Context, r *report) error {
	var times []float64
	for range 11 {
		d, took, err := b.launch(ctx)
		if err != nil {
			return err
		}
		d.Stop()
		times = append(times, float64(took.Microseconds())/1000)
	}
	times = times[1:] // the first one reads the program from the disk
	say("start: %.0f ms", times)
	r.Figures = append(r.Figures, atMost(figure{
		Name: "start to name on the bus", Value: median(times), Unit: "ms", Note: "median of 10, until it says that it is ready",
	}, 100))
	return nil
}

// idleFor is how long an idle daemon is watched.
const idleFor = 5 * time.Second

// idle measures the memory and the wake-ups of a daemon that has nothing to do.
// Each mount and each new device on the machine wakes it, as it should; so of
// some spans of time the quietest counts.
func (b *bench) idle(ctx context.Context, r *report) error {
	d, _, err := b.launch(ctx)
	if err != nil {
		return err
	}
	defer d.Stop()
	const spans = 6
	least, memory := int64(math.MaxInt64), 0.0
	watched := 0
	for watched < spans && least > 0 {
		watched++
		before, err := switches(d.PID)
		if err != nil {
			return err
		}
		select {
		case <-time.After(idleFor):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		after, err := switches(d.PID)
		if err != nil {
			return err
		}
		if memory, err = resident(d.PID); err != nil {
			return err
		}
		say("idle: %d context switches in %v, %.1f MiB", after-before, idleFor, memory)
		least = min(least, after-before)
	}
	r.Figures = append(r.Figures,
		atMost(figure{Name: "memory of the idle daemon", Value: memory, Unit: "MiB", Note: "VmRSS"}, 25),
		atMost(figure{
			Name: "context switches of the idle daemon", Value: float64(least), Unit: "in 5 s",
			Note: fmt.Sprintf("the quietest of %d spans, all threads", watched),
		}, 0))
	return nil
}

// reads measures how fast properties can be read of a live sprout.
func (b *bench) reads(ctx context.Context, r *report) (err error) {
	seed, err := b.makeSeed(ctx, 64)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(seed.Path)) }()
	return b.live(ctx, seed.Path, client.CreateOptions{}, func(l live) error { return l.reads(ctx, r) })
}

func (l live) reads(ctx context.Context, r *report) error {
	conn, err := godbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer conn.Close()
	object := conn.Object(names.Bus, godbus.ObjectPath(l.sprout))
	for _, way := range []struct {
		name   string
		window int
		note   string
	}{
		{"property reads, many at once", 32, "one client, 32 calls unanswered"},
		{"property reads, one by one", 1, "one client that waits for each answer"},
	} {
		var rates, costs []float64
		for range 4 { // the first warms up
			rate, cost, err := readFor(ctx, object, way.window, 2*time.Second, l.daemon.PID)
			if err != nil {
				return err
			}
			rates, costs = append(rates, rate), append(costs, cost)
		}
		say("reads, %d at once: %.0f a second, %.0f us of the daemon each", way.window, rates, costs)
		f := figure{
			Name: way.name, Value: median(rates[1:]), Unit: "/s",
			Note: fmt.Sprintf("%s; %.0f us of processor time of the daemon each", way.note, median(costs[1:])),
		}
		if way.window > 1 {
			f = atLeast(f, 5000)
		}
		r.Figures = append(r.Figures, f)
	}
	memory, err := resident(l.daemon.PID)
	r.Figures = append(r.Figures, figure{Name: "memory after all the reads", Value: memory, Unit: "MiB", Note: "VmRSS"})
	return err
}

// readFor reads State with that many calls under way, and gives the reads a
// second and the processor time of the daemon for one, in µs.
func readFor(ctx context.Context, object godbus.BusObject, window int, span time.Duration, pid int) (rate, cost float64, err error) {
	answers := make(chan *godbus.Call, window)
	ask := func() { object.GoWithContext(ctx, names.Properties+".Get", 0, answers, names.Sprout, "State") }
	worked, err := processTime(pid)
	if err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	for range window {
		ask()
	}
	count, open := 0, window
	for open > 0 {
		call := <-answers
		open--
		var state string
		if err := call.Store(&state); err != nil {
			return 0, 0, err
		}
		if state != "volatile" {
			return 0, 0, fmt.Errorf("the state is %q", state)
		}
		count++
		if time.Since(begin) < span {
			ask()
			open++
		}
	}
	took := time.Since(begin)
	now, err := processTime(pid)
	return float64(count) / took.Seconds(), float64((now - worked).Microseconds()) / float64(count), err
}

// sprout makes a sprout of the seed at mnt.
func (b *bench) sprout(ctx context.Context, c *client.Client, seed, mnt string, o client.CreateOptions) (string, error) {
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return "", err
	}
	// Not cut short: what was made half is hard to undo.
	path, err := c.CreateSprout(context.WithoutCancel(ctx), seed, mnt, o)
	if err != nil {
		return "", errors.Join(err, os.Remove(mnt))
	}
	return path, nil
}

func unsprout(c *client.Client, sprout, mnt string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := c.Teardown(ctx, sprout)
	for client.CodeOf(err) == "DeviceBusy" && ctx.Err() == nil {
		time.Sleep(100 * time.Millisecond) // somebody looks around in it
		err = c.Teardown(ctx, sprout)
	}
	return errors.Join(err, os.Remove(mnt))
}
