package systemd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// entry is what the journal was sent.
type entry struct {
	message  string
	priority journal.Priority
	fields   map[string]string
}

// fakeJournal gives a logger and the place where its last entry lands.
func fakeJournal(level slog.Level) (*slog.Logger, *entry) {
	last := new(entry)
	return slog.New(&journalHandler{level: level, send: func(message string, priority journal.Priority, fields map[string]string) error {
		*last = entry{message, priority, fields}
		return nil
	}}), last
}

func TestJournalFields(t *testing.T) {
	ioError := fmt.Errorf("cannot remove the member: %w", &fs.PathError{Op: "ioctl", Path: "/dev/sdb1", Err: syscall.EIO})
	for _, test := range []struct {
		name string
		log  func(*slog.Logger)
		want entry
	}{{
		name: "every fixed key becomes a field",
		log: func(log *slog.Logger) {
			log.Info("step done", "job", 3, "step", "remove", "operation", "flatten", "sprout", "f00",
				"device", "/dev/sdb1", "dev_t", "8:17", "errno", 5)
		},
		want: entry{"step done job=3 step=remove operation=flatten sprout=f00 device=/dev/sdb1 dev_t=8:17 errno=5", journal.PriInfo, map[string]string{
			"SPROUTD_JOB": "3", "SPROUTD_STEP": "remove", "SPROUTD_OPERATION": "flatten", "SPROUTD_SPROUT": "f00",
			"SPROUTD_DEVICE": "/dev/sdb1", "SPROUTD_DEV_T": "8:17", "ERRNO": "5",
		}},
	}, {
		name: "an errno attribute may be the errno itself",
		log:  func(log *slog.Logger) { log.Error("failed", "errno", syscall.ENOSPC) },
		want: entry{`failed errno="no space left on device"`, journal.PriErr, map[string]string{"ERRNO": "28"}},
	}, {
		name: "the errno deep in an error is found",
		log:  func(log *slog.Logger) { log.Warn("step failed", "error", ioError) },
		want: entry{
			`step failed error="cannot remove the member: ioctl /dev/sdb1: input/output error"`,
			journal.PriWarning, map[string]string{"ERRNO": "5"},
		},
	}, {
		name: "attributes given before count too",
		log:  func(log *slog.Logger) { log.With("job", 7).Debug("plan") },
		want: entry{"plan job=7", journal.PriDebug, map[string]string{"SPROUTD_JOB": "7"}},
	}, {
		name: "an attribute in a group is not the fixed one",
		log: func(log *slog.Logger) {
			log.WithGroup("caller").With("job", 1).Info("call", slog.Group("bus", "device", "x"), slog.Group("empty"), slog.Attr{})
		},
		want: entry{"call caller.job=1 caller.bus.device=x", journal.PriInfo, map[string]string{}},
	}, {
		name: "a hostile value stays one value",
		log:  func(log *slog.Logger) { log.Info("probe", "device", "a\nPRIORITY=0", "label", "") },
		want: entry{`probe device="a\nPRIORITY=0" label=""`, journal.PriInfo, map[string]string{"SPROUTD_DEVICE": "a\nPRIORITY=0"}},
	}} {
		t.Run(test.name, func(t *testing.T) {
			log, got := fakeJournal(slog.LevelDebug)
			test.log(log)
			if got.message != test.want.message || got.priority != test.want.priority || !maps.Equal(got.fields, test.want.fields) {
				t.Errorf("the journal got\n%q %d %v, want\n%q %d %v", got.message, got.priority, got.fields,
					test.want.message, test.want.priority, test.want.fields)
			}
		})
	}
}

func TestJournalLevel(t *testing.T) {
	log, got := fakeJournal(slog.LevelWarn)
	log.Info("not worth a line")
	if got.message != "" {
		t.Errorf("logged %q below the level", got.message)
	}
}

func TestJournalHandlersDoNotShareAttributes(t *testing.T) {
	log, got := fakeJournal(slog.LevelInfo)
	parent := log.With("a", 1, "b", 2, "c", 3)
	first, second := parent.With("job", 1), parent.With("job", 2)
	second.Info("second")
	first.Info("first")
	if got.fields["SPROUTD_JOB"] != "1" || got.message != "first a=1 b=2 c=3 job=1" {
		t.Errorf("the journal got %q", got.message)
	}
}

func TestNewLoggerFallsBackToText(t *testing.T) {
	for _, stream := range []string{"", "1:1", "nonsense"} {
		t.Setenv("JOURNAL_STREAM", stream)
		if _, ok := NewLogger(slog.LevelInfo).Handler().(*slog.TextHandler); !ok {
			t.Errorf("JOURNAL_STREAM=%q: not the text handler", stream)
		}
	}
}

func TestAJournalThatTakesNothingStopsNobody(t *testing.T) {
	full, taken := make(chan struct{}), make(chan string, 8)
	o := newOutlet(func(message string, _ journal.Priority, _ map[string]string) error {
		<-full
		taken <- message
		return nil
	})
	o.patient = 10 * time.Millisecond
	for _, message := range []string{"first", "second", "third"} { // the second does not even wait
		if err := o.send(message, journal.PriInfo, nil); !errors.Is(err, errJournalStuck) {
			t.Errorf("%s: %v", message, err)
		}
	}
	close(full) // somebody has started the journal again
	if got := <-taken; got != "first" {
		t.Errorf("%q was sent first", got)
	}
	o.patient = time.Minute
	for o.stuck.Load() {
		runtime.Gosched()
	}
	if err := o.send("fourth", journal.PriInfo, nil); err != nil || <-taken != "fourth" {
		t.Errorf("the journal takes messages again, but: %v", err)
	}
}
