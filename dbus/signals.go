package dbus

import (
	"context"
	"reflect"
	"slices"
	"sync"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// signal is one signal to send.
type signal struct {
	path godbus.ObjectPath
	name string
	args []any
}

// signals sends the signals for trees as they are published. Publishing never
// waits for the bus: while the bus is slow, trees in between are left out.
type signals struct {
	mu      sync.Mutex
	newest  *tree
	number  uint64        // counts the published trees
	sent    uint64        // the number up to which all signals were sent
	changed chan struct{} // closed, and made anew, when number or sent changes
}

func newSignals() *signals { return &signals{changed: make(chan struct{})} }

func (q *signals) publish(t *tree) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.newest = t
	q.number++
	q.wakeLocked()
}

func (q *signals) wakeLocked() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// start gives the tree from which on changes are signalled: the one published
// last, or else present.
func (q *signals) start(present *tree) *tree {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sent = q.number
	if q.newest != nil {
		return q.newest
	}
	return present
}

// run sends signals for what changes after the tree last, until ctx ends.
func (q *signals) run(ctx context.Context, specs map[string]spec, last *tree, send func(signal)) {
	for {
		q.mu.Lock()
		newest, number, changed := q.newest, q.number, q.changed
		pending := number != q.sent
		q.mu.Unlock()
		if !pending {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			continue
		}
		for _, s := range diff(specs, last, newest) {
			if ctx.Err() != nil {
				return
			}
			send(s)
		}
		last = newest
		q.mu.Lock()
		q.sent = number
		q.wakeLocked()
		q.mu.Unlock()
	}
}

// flush waits until the signals of everything published before were sent.
func (q *signals) flush(ctx context.Context) {
	q.mu.Lock()
	target := q.number
	q.mu.Unlock()
	for {
		q.mu.Lock()
		sent, changed := q.sent, q.changed
		q.mu.Unlock()
		if sent >= target {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// diff gives the signals that lead from one tree to the next: first what is
// new, then what changed, then what is over, then what has gone.
func diff(specs map[string]spec, from, to *tree) []signal {
	if from == to {
		return nil
	}
	before := make(map[godbus.ObjectPath]*object, len(from.managed))
	for _, o := range from.managed {
		before[o.path] = o
	}
	var added, changed, over, removed []signal
	for _, o := range to.managed {
		old := before[o.path]
		if old != nil && !sameConstants(specs[o.iface], old, o) {
			// The name was given to another thing, as kernel names are.
			added = append(added, interfacesRemoved(old))
			old = nil
		}
		if old == nil {
			added = append(added, signal{names.Root, names.ObjectManager + ".InterfacesAdded", []any{o.path, o.interfaces()}})
			if o.job != nil {
				added = append(added, signal{names.Root, names.Manager + ".JobNew", []any{o.path}})
			}
		} else {
			changed = append(changed, propertiesChanged(specs, old, o)...)
		}
		if finished(o) && !finished(old) {
			over = append(over, jobRemoved(o))
		}
		delete(before, o.path)
	}
	for _, o := range from.managed {
		if before[o.path] == nil {
			continue
		}
		if o.job != nil && !finished(o) {
			over = append(over, jobRemoved(o))
		}
		removed = append(removed, interfacesRemoved(o))
	}
	for _, path := range []godbus.ObjectPath{names.Root, names.RootSprout} {
		if old, o := from.objects[path], to.objects[path]; old != nil && o != nil {
			changed = append(changed, propertiesChanged(specs, old, o)...)
		}
	}
	return slices.Concat(added, changed, over, removed)
}

func finished(o *object) bool { return o != nil && o.job != nil && o.job.State.Finished() }

func jobRemoved(o *object) signal {
	return signal{names.Root, names.Manager + ".JobRemoved", []any{o.path, string(o.job.State)}}
}

func interfacesRemoved(o *object) signal {
	return signal{names.Root, names.ObjectManager + ".InterfacesRemoved", []any{o.path, []string{o.iface}}}
}

func sameConstants(s spec, a, b *object) bool {
	for name, p := range s.properties {
		if p.emits == "const" && !same(a.props[name], b.props[name]) {
			return false
		}
	}
	return true
}

// propertiesChanged gives one signal with all that changed, or none.
func propertiesChanged(specs map[string]spec, old, o *object) []signal {
	values, invalidated := variants{}, []string{}
	for name, p := range specs[o.iface].properties {
		if same(old.props[name], o.props[name]) {
			continue
		}
		switch p.emits {
		case "true":
			values[name] = o.props[name]
		case "invalidates":
			invalidated = append(invalidated, name)
		}
	}
	if len(values)+len(invalidated) == 0 {
		return nil
	}
	return []signal{{o.path, names.Properties + ".PropertiesChanged", []any{o.iface, values, invalidated}}}
}

func same(a, b godbus.Variant) bool { return reflect.DeepEqual(a.Value(), b.Value()) }
