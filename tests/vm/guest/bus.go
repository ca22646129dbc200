package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
)

// bus is the connection to the guest's system bus, made once and kept.
type bus struct {
	mu sync.Mutex
	c  *client.Client
}

func (b *bus) client() (*client.Client, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		c, err := client.Connect(context.Background(), client.Options{})
		if err != nil {
			return nil, err
		}
		b.c = c
	}
	return b.c, nil
}

// Connect connects to D-Bus, for the time when nothing can be started any more.
func (g *Guest) Connect(_ None, _ *None) error {
	_, err := g.bus.client()
	return err
}

// look gives a call to the service the time it may take.
const look = time.Minute

// Objects gives all that the service shows, as JSON.
func (g *Guest) Objects(_ None, text *[]byte) error {
	c, err := g.bus.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), look)
	defer cancel()
	objects, err := c.Objects(ctx)
	if err != nil {
		return err
	}
	*text, err = json.Marshal(objects)
	return err
}

// Point is a place in the course of a job.
type Point struct {
	Job string
	// Step that is to have begun, and Progress that is to be reached, 0 to 1.
	Step     uint32
	Progress float64
	// Timeout is how long that may take.
	Timeout time.Duration
}

// AwaitPoint waits until a job has come to a point, or has ended, and gives the
// job as it is then, as JSON.
func (g *Guest) AwaitPoint(p Point, text *[]byte) error {
	c, err := g.bus.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.Timeout)
	defer cancel()
	watch, err := c.WatchJob(ctx, p.Job)
	if err != nil {
		return err
	}
	defer watch.Close()
	for job := range watch.Updates() {
		if job.Finished() || job.StepNumber >= p.Step && job.Progress >= p.Progress {
			*text, err = json.Marshal(job)
			return err
		}
	}
	return fmt.Errorf("the job did not get to step %d, %.0f%%: %w", p.Step, p.Progress*100, watch.Err())
}

// Condition is something that the service is to show of the sprout at /.
type Condition struct {
	Safe    bool   // to unplug
	State   string // "" for any
	Warning string // a part of a warning, "" for none
	Free    uint64 // bytes, at least
	Timeout time.Duration
}

func (c Condition) holds(s client.Sprout) bool {
	warned := slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, c.Warning) })
	return (!c.Safe || s.SafeToUnplug) && (c.State == "" || s.State == c.State) && s.Free >= c.Free && (c.Warning == "" || warned)
}

// AwaitSprout waits until the service shows something, and gives the sprout as
// it is then, as JSON.
func (g *Guest) AwaitSprout(want Condition, text *[]byte) error {
	c, err := g.bus.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), want.Timeout)
	defer cancel()
	conn, err := godbus.ConnectSystemBus(godbus.WithContext(ctx))
	if err != nil {
		return err
	}
	defer conn.Close()
	changes := make(chan *godbus.Signal, 64)
	conn.Signal(changes)
	err = conn.AddMatchSignalContext(ctx, godbus.WithMatchSender(names.Bus), godbus.WithMatchMember("PropertiesChanged"),
		godbus.WithMatchInterface(names.Properties), godbus.WithMatchArg(0, names.Sprout))
	if err != nil {
		return err
	}
	for {
		objects, err := c.Objects(ctx)
		if err != nil {
			return err
		}
		var sprout client.Sprout
		for _, s := range objects.Sprouts {
			if s.MountPoint == "/" {
				sprout = s
			}
		}
		if *text, err = json.Marshal(sprout); err != nil {
			return err
		}
		if want.holds(sprout) {
			return nil
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return fmt.Errorf("the sprout did not get to %+v: %s", want, *text)
		}
	}
}
