// Command bench measures how much slower a flatten
// is through the daemon than by the bare ioctls, and what the daemon costs.
//
//   - main.go     flags, the order of things, the report
//   - flatten.go  the daemon against the bare ioctls
//   - daemon.go   memory, wake-ups, start, property reads
//   - proc.go     what /proc says
//
// Run it with `sudo make bench`, on a quiet machine. docs/performance.md says
// how to read what it prints.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// figure is one line of the report.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Goal is "" for what is measured for information.
	Goal string `json:"goal,omitempty"`
	Met  bool   `json:"met"`
	// Note says how the value came about.
	Note string `json:"note,omitempty"`
}

// report is what --json writes.
type report struct {
	Kernel     string   `json:"kernel"`
	Processors int      `json:"processors"`
	Load       string   `json:"load"` // averages when the run began
	Figures    []figure `json:"figures"`
	Pairs      []pair   `json:"pairs"`
}

func atMost(f figure, goal float64) figure {
	f.Goal, f.Met = fmt.Sprintf("<= %g", goal), f.Value <= goal
	return f
}

func atLeast(f figure, goal float64) figure {
	f.Goal, f.Met = fmt.Sprintf(">= %g", goal), f.Value >= goal
	return f
}

// bench is what all measurements need.
type bench struct {
	dir     string // for images, in memory
	mounts  string // for mount points
	sproutd string
	address string
	log     *os.File // nil for none
	mib     int64
	pairs   int
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	b := &bench{}
	file := flag.String("json", "", "write the figures to `FILE` as well")
	only := flag.String("only", "", "one of `flatten, idle, start, reads`")
	log := flag.String("log", "", "write what the daemons log to `FILE`")
	flag.Int64Var(&b.mib, "size", 1536, "`MiB` to move in a flatten")
	flag.IntVar(&b.pairs, "pairs", 5, "how many `pairs` of flattens to compare")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("works on real block devices: run `sudo make bench`")
	}
	// What is under way is ended in good order: nothing is left behind.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	if b.sproutd, err = exec.LookPath("sproutd"); err != nil {
		return fmt.Errorf("cannot find what was built: %w", err)
	}
	if *log != "" {
		if b.log, err = os.Create(*log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.log.Close()) }()
	}
	if b.dir, err = os.MkdirTemp("/dev/shm", "sproutd-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.mounts, err = os.MkdirTemp("", "sproutd-bench-"); err != nil {
		return err
	}
	// Never more than the empty directory: something may still be mounted below.
	defer func() { err = errors.Join(err, os.Remove(b.mounts)) }()
	bus, err := harness.StartBus(b.dir)
	if err != nil {
		return err
	}
	defer bus.Stop()
	b.address = bus.Address
	if err := os.Setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.Address); err != nil {
		return err
	}

	r := report{Kernel: kernelRelease(), Processors: runtime.NumCPU(), Load: loadAverages()}
	say("load averages %s; the figures want a quiet machine", r.Load)
	for _, part := range []struct {
		name    string
		measure func(context.Context, *report) error
	}{
		{"start", b.start}, {"idle", b.idle}, {"reads", b.reads}, {"flatten", b.flatten},
	} {
		if *only != "" && *only != part.name {
			continue
		}
		if err := cmp.Or(context.Cause(ctx), part.measure(ctx, &r)); err != nil {
			return fmt.Errorf("cannot measure %s: %w", part.name, err)
		}
	}
	r.print(os.Stdout)
	if *file == "" {
		return nil
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*file, append(raw, '\n'), 0o644)
}

func (r report) print(out io.Writer) {
	fmt.Fprintf(out, "\nLinux %s, %d processors, load averages at the start %s\n\n", r.Kernel, r.Processors, r.Load)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tMEASURED\tGOAL\t\tHOW")
	for _, f := range r.Figures {
		verdict := map[bool]string{true: "met", false: "MISSED"}[f.Met]
		if f.Goal == "" {
			verdict = ""
		}
		fmt.Fprintf(w, "%s\t%s %s\t%s\t%s\t%s\n", f.Name, number(f.Value), f.Unit, f.Goal, verdict, f.Note)
	}
	w.Flush()
}

// number gives three significant digits, and all of a large number.
func number(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.3g", v), ".0")
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// makeSeed builds a seed on tmpfs, of this machine's own files.
func (b *bench) makeSeed(ctx context.Context, mib int64) (seedtest.Seed, error) {
	return seedtest.Build(ctx, seedtest.Spec{
		Dir: b.dir, ImageSize: (mib*5/4 + 512) * seedtest.MiB, Label: "sproutd-bench",
		Content: func(dir string) error {
			left := mib * seedtest.MiB
			for _, src := range []string{"/usr/lib", "/usr/share", "/usr/bin", "/usr/local", "/opt"} {
				info, err := os.Lstat(src)
				if err != nil || !info.IsDir() {
					continue
				}
				to := filepath.Join(dir, src)
				if err := os.MkdirAll(to, 0o755); err != nil {
					return err
				}
				n, err := seedtest.CopyTree(to, src, left)
				if left -= n; err != nil || left <= 0 {
					return cmp.Or(err, context.Cause(ctx))
				}
			}
			return write(filepath.Join(dir, "rest"), left) // a small system
		},
	})
}
