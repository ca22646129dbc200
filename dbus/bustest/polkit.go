package bustest

import (
	"maps"
	"slices"
	"sync"
	"testing"

	godbus "github.com/godbus/dbus/v5"
)

// Check is one question that [Polkit] was asked.
type Check struct {
	Kind    string // of subject
	Name    string // the subject's bus name
	Action  string
	Details map[string]string
	Flags   uint32
}

// Answer is what [Polkit] says to a question.
type Answer struct {
	Authorized, Challenge bool
	Details               map[string]string
	// Hold keeps the answer back until the question is cancelled.
	Hold bool
}

// Polkit is a stand-in for polkit's authority. It denies what nobody told it
// to allow.
type Polkit struct {
	mu        sync.Mutex
	answers   map[string]Answer
	checks    []Check
	held      map[string]chan struct{}
	asked     chan Check
	cancelled chan struct{}
}

// StartPolkit puts a stand-in for polkit on the bus.
func (b *Bus) StartPolkit(t testing.TB) *Polkit {
	t.Helper()
	p := &Polkit{
		answers: map[string]Answer{}, held: map[string]chan struct{}{},
		asked: make(chan Check, 100), cancelled: make(chan struct{}, 100),
	}
	conn := b.Conn(t)
	serve(t, conn, authority{p}, "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority", "org.freedesktop.PolicyKit1")
	return p
}

// Say sets the answer about an action.
func (p *Polkit) Say(action string, a Answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers[action] = a
}

// Checks gives all questions so far.
func (p *Polkit) Checks() []Check {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.checks)
}

// Asked receives each question when it comes, before it is answered.
func (p *Polkit) Asked() <-chan Check { return p.asked }

// Cancelled receives once for each question that was cancelled.
func (p *Polkit) Cancelled() <-chan struct{} { return p.cancelled }

// authority is what is exported: the methods of the interface and no others.
type authority struct{ p *Polkit }

type subject struct {
	Kind    string
	Details map[string]godbus.Variant
}

type verdict struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// CheckAuthorization answers as it was told to.
func (a authority) CheckAuthorization(s subject, action string, details map[string]string, flags uint32, id string) (verdict, *godbus.Error) {
	name, _ := s.Details["name"].Value().(string)
	check := Check{Kind: s.Kind, Name: name, Action: action, Details: maps.Clone(details), Flags: flags}
	a.p.mu.Lock()
	answer := a.p.answers[action]
	a.p.checks = append(a.p.checks, check)
	var cancelled chan struct{}
	if answer.Hold {
		cancelled = make(chan struct{})
		a.p.held[id] = cancelled
	}
	a.p.mu.Unlock()
	a.p.asked <- check
	if cancelled != nil {
		<-cancelled
		return verdict{}, godbus.NewError("org.freedesktop.PolicyKit1.Error.Cancelled", []any{"cancelled"})
	}
	if answer.Details == nil {
		answer.Details = map[string]string{}
	}
	return verdict{answer.Authorized, answer.Challenge, answer.Details}, nil
}

// CancelCheckAuthorization ends the question with the given id.
func (a authority) CancelCheckAuthorization(id string) *godbus.Error {
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	held, ok := a.p.held[id]
	if !ok {
		return godbus.NewError("org.freedesktop.PolicyKit1.Error.Failed", []any{"no such question"})
	}
	delete(a.p.held, id)
	close(held)
	a.p.cancelled <- struct{}{}
	return nil
}

// serve exports v and takes a name for it.
func serve(t testing.TB, conn *godbus.Conn, v any, path godbus.ObjectPath, iface, name string) {
	t.Helper()
	if err := conn.Export(v, path, iface); err != nil {
		t.Fatal(err)
	}
	reply, err := conn.RequestName(name, godbus.NameFlagDoNotQueue)
	if err != nil || reply != godbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("cannot take the name %s: %v %v", name, reply, err)
	}
}
