package systemd

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// journalField maps an attribute key to the journal field that scripts may
// match, as in `journalctl SPROUTD_JOB=3`. ERRNO is the standard field of
// systemd.journal-fields(7) and holds a number.
func journalField(key string) (field string, ok bool) {
	switch key {
	case "job":
		return "SPROUTD_JOB", true
	case "step":
		return "SPROUTD_STEP", true
	case "operation":
		return "SPROUTD_OPERATION", true
	case "sprout":
		return "SPROUTD_SPROUT", true
	case "device":
		return "SPROUTD_DEVICE", true
	case "dev_t":
		return "SPROUTD_DEV_T", true
	case "errno":
		return "ERRNO", true
	}
	return "", false
}

// NewLogger makes the daemon's logger. It logs to the journal with fields when
// standard error is connected to the journal (JOURNAL_STREAM), and as text to
// standard error everywhere else.
//
// These attribute keys, outside any group, become journal fields: job, step,
// operation, sprout, device, dev_t (SPROUTD_ and the key in upper case) and
// errno (ERRNO). An attribute that is an error with an errno in its chain sets
// ERRNO as well. All attributes are also in the text of the message.
func NewLogger(level slog.Leveler) *slog.Logger {
	// A JOURNAL_STREAM that cannot be parsed is no reason to run without a log.
	if ok, err := journal.StderrIsJournalStream(); err == nil && ok {
		return slog.New(&journalHandler{level: level, send: newOutlet(journal.Send).send})
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// sender sends one message to the journal.
type sender func(message string, priority journal.Priority, fields map[string]string) error

// outletPatience is how long a message waits for the journal to take it.
const outletPatience = time.Second

// errJournalStuck says that a message was dropped.
var errJournalStuck = errors.New("the journal takes no messages")

// outlet keeps a journal that takes no messages any more from stopping those who
// log: where the system lies on a stick that was pulled, the journal's own
// process may be gone for good, and its socket full.
type outlet struct {
	deliver sender
	patient time.Duration
	turn    chan struct{} // holds a token while a message is being sent
	stuck   atomic.Bool   // the one that is being sent has lost patience
}

func newOutlet(deliver sender) *outlet {
	return &outlet{deliver: deliver, patient: outletPatience, turn: make(chan struct{}, 1)}
}

// send sends a message, or drops it if that takes too long.
func (o *outlet) send(message string, priority journal.Priority, fields map[string]string) error {
	if o.stuck.Load() {
		return errJournalStuck
	}
	patience := time.NewTimer(o.patient)
	defer patience.Stop()
	select {
	case o.turn <- struct{}{}:
	case <-patience.C:
		return errJournalStuck
	}
	sent := make(chan error, 1)
	go func() { // ends when the journal takes the message, or with the process
		sent <- o.deliver(message, priority, fields)
		o.stuck.Store(false)
		<-o.turn
	}()
	select {
	case err := <-sent:
		return err
	case <-patience.C:
	}
	o.stuck.Store(true)
	select {
	case err := <-sent: // it was taken at the last moment
		o.stuck.Store(false)
		return err
	default:
		return errJournalStuck
	}
}

// journalHandler is a [slog.Handler] that sends records to the journal. It never
// changes after it was made.
type journalHandler struct {
	level  slog.Leveler
	send   sender
	prefix string      // open groups, each with a dot behind it
	attrs  []slog.Attr // flat, keys with their groups
}

func (h *journalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.attrs = flatten(slices.Clip(h.attrs), h.prefix, attrs)
	return &with
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.prefix += name + "."
	return &with
}

func (h *journalHandler) Handle(_ context.Context, record slog.Record) error {
	own := make([]slog.Attr, 0, record.NumAttrs())
	record.Attrs(func(attr slog.Attr) bool {
		own = append(own, attr)
		return true
	})
	message := []byte(record.Message)
	fields := make(map[string]string)
	for _, attr := range flatten(slices.Clip(h.attrs), h.prefix, own) {
		text := attr.Value.String()
		message = append(message, ' ')
		message = append(message, attr.Key...)
		message = append(message, '=')
		message = appendText(message, text)

		errno, hasErrno := errnoOf(attr.Value)
		if hasErrno {
			fields["ERRNO"] = strconv.Itoa(errno)
		}
		if field, ok := journalField(attr.Key); ok && (attr.Key != "errno" || !hasErrno) {
			fields[field] = text
		}
	}
	return h.send(string(message), priority(record.Level), fields)
}

// flatten appends attrs to flat with their values resolved and the names of
// their groups before the keys. Empty attributes and empty groups vanish, as
// [slog.Handler] asks.
func flatten(flat []slog.Attr, prefix string, attrs []slog.Attr) []slog.Attr {
	for _, attr := range attrs {
		attr.Value = attr.Value.Resolve()
		switch {
		case attr.Equal(slog.Attr{}):
		case attr.Value.Kind() == slog.KindGroup && attr.Key == "":
			flat = flatten(flat, prefix, attr.Value.Group())
		case attr.Value.Kind() == slog.KindGroup:
			flat = flatten(flat, prefix+attr.Key+".", attr.Value.Group())
		default:
			flat = append(flat, slog.Attr{Key: prefix + attr.Key, Value: attr.Value})
		}
	}
	return flat
}

// appendText appends a value, in quotes where a reader could not tell where it
// ends.
func appendText(to []byte, text string) []byte {
	if text == "" || strings.ContainsFunc(text, func(r rune) bool {
		return r <= ' ' || r == '"' || r == '=' || r == '\uFFFD' || !strconv.IsPrint(r)
	}) {
		return strconv.AppendQuote(to, text)
	}
	return append(to, text...)
}

// errnoOf gives the errno in the chain of an error value.
func errnoOf(value slog.Value) (errno int, ok bool) {
	err, isError := value.Any().(error)
	if !isError {
		return 0, false
	}
	var number syscall.Errno
	if !errors.As(err, &number) {
		return 0, false
	}
	return int(number), true
}

// priority gives the syslog priority of a level.
func priority(level slog.Level) journal.Priority {
	switch {
	case level >= slog.LevelError:
		return journal.PriErr
	case level >= slog.LevelWarn:
		return journal.PriWarning
	case level >= slog.LevelInfo:
		return journal.PriInfo
	default:
		return journal.PriDebug
	}
}
