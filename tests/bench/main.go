// Command bench measures how much slower a flatten is through the daemon than by
// the bare ioctls, what the daemon costs, and how all that compares with the
// tools that people use instead.
//
//   - main.go     flags, the order of things, the report
//   - flatten.go  the daemon against the bare ioctls
//   - daemon.go   memory, wake-ups, start, property reads
//   - board.go    the scoreboard: what runs with what, and its table
//   - tools.go    each tool of the scoreboard
//   - goals.go    what the scoreboard is to say
//   - persist.go  a persistence partition moves to a disk
//   - cold.go     reading a seed from a stick when nothing is in memory
//   - zram.go     what the writable part costs in memory
//   - neighbour.go  how programs feel a move
//   - tree.go     the files that are moved
//   - images.go   what the tools move them from: seeds, squashfs
//   - source.go   where the images are, and how fast that is
//   - gauge.go    measuring one run
//   - plot.go     the picture
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
	"strconv"
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
	Kernel     string         `json:"kernel"`
	Processors int            `json:"processors"`
	Load       string         `json:"load"` // averages when the run began
	Figures    []figure       `json:"figures"`
	Pairs      []pair         `json:"pairs"`
	Images     []image        `json:"images"`
	Board      []row          `json:"board"`
	Cold       []coldRow      `json:"cold"`
	Zram       []zramRow      `json:"zram"`
	Neighbour  []neighbourRow `json:"neighbour"`
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
	log     *daemonLog
	mib     int64
	pairs   int
	options options
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	b := &bench{log: &daemonLog{}}
	file := flag.String("json", "", "write the figures to `FILE` as well")
	plot := flag.String("svg", "", "draw the scoreboard to `FILE` as well")
	only := flag.String("only", "", "some of `"+strings.Join(partNames(), ",")+"`, with commas between; without it those that are quick to say much")
	replay := flag.String("replay", "", "measure nothing: print and draw what --json wrote to `FILE`")
	log := flag.String("log", "", "write what the daemons log to `FILE`")
	flag.Int64Var(&b.mib, "size", 1536, "`MiB` to move in a flatten")
	flag.IntVar(&b.pairs, "pairs", 5, "how many `pairs` of flattens to compare")
	flag.IntVar(&b.options.rounds, "rounds", 3, "how often each tool of the scoreboard runs")
	flag.IntVar(&b.options.level, "level", 9, "`LEVEL` of zstd for all images")
	flag.IntVar(&b.options.pack, "pack", 0, "build the seed with extents of so many `TIMES` the size of a small file; 0: all of 128 KiB")
	flag.BoolVar(&b.options.full, "full", false, "the whole matrix: sizes, sources, kinds of trees, geometries; takes hours")
	flag.StringVar(&b.options.images, "images", "", "keep the images in `DIR`, and use those that are there")
	sizes := flag.String("sizes", "2", "`GB` of files in the tree, several with commas between")
	sources := flag.String("sources", "memory,150", "where the images lie: memory, or `MB/s` of a stick, or 150+1ms")
	kinds := flag.String("kinds", "mixed", "`KINDS` of files: mixed, small, large")
	names := flag.String("tools", "[^f]*,flatten,flatten-release,flatten-plain", "`NAMES` of tools, with * for any")
	flag.Parse()
	chosen := strings.Split(*only, ",")
	for _, name := range chosen {
		if *only != "" && !slices.Contains(partNames(), name) {
			return fmt.Errorf("there is no part %q: there are %s", name, strings.Join(partNames(), ", "))
		}
	}
	if err := b.options.parse(*sizes, *sources, *kinds, *names); err != nil {
		return err
	}
	if *replay != "" {
		var r report
		raw, err := os.ReadFile(*replay)
		if err == nil {
			err = json.Unmarshal(raw, &r)
		}
		if err != nil {
			return err
		}
		return r.show(*plot)
	}
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
		if b.log.file, err = os.Create(*log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.log.file.Close()) }()
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
	for _, part := range b.parts() {
		if !slices.Contains(chosen, part.name) && (*only != "" || !part.usual) {
			continue
		}
		if e := cmp.Or(context.Cause(ctx), part.measure(ctx, &r)); e != nil {
			err = fmt.Errorf("cannot measure %s: %w", part.name, e)
			break // what was measured until here is shown all the same
		}
	}
	return errors.Join(r.show(*plot), r.save(*file), err)
}

// save writes the report to a file, if one is named.
func (r report) save(file string) error {
	if file == "" {
		return nil
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}

// show prints the report, and draws it into a file if one is named.
func (r report) show(plot string) error {
	r.print(os.Stdout)
	if plot == "" {
		return nil
	}
	return os.WriteFile(plot, draw(r), 0o644)
}

func (r report) print(out io.Writer) {
	fmt.Fprintf(out, "\nLinux %s, %d processors, load averages at the start %s\n\n", r.Kernel, r.Processors, r.Load)
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| what\t| measured\t| goal\t| \t| how\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|")
	for _, f := range r.Figures {
		verdict := map[bool]string{true: "met", false: "MISSED"}[f.Met]
		if f.Goal == "" {
			verdict = ""
		}
		fmt.Fprintf(w, "| %s\t| %s %s\t| %s\t| %s\t| %s\t|\n", f.Name, number(f.Value), f.Unit, f.Goal, verdict, f.Note)
	}
	w.Flush()
	printBoard(out, r.Board)
	printCold(out, r.Cold)
	printZram(out, r.Zram)
	printNeighbour(out, r.Neighbour)
}

// part is one of the things that are measured.
type part struct {
	name    string
	usual   bool // also when it is not asked for
	measure func(context.Context, *report) error
}

func (b *bench) parts() []part {
	return []part{
		{"start", true, b.start}, {"idle", true, b.idle}, {"reads", true, b.reads}, {"flatten", true, b.flatten},
		{"board", true, b.board}, {"persistence", true, b.persistence}, {"cold", false, b.cold}, {"zram", false, b.zram}, {"neighbour", false, b.neighbour},
	}
}

func partNames() (list []string) {
	for _, part := range (&bench{}).parts() {
		list = append(list, part.name)
	}
	return list
}

func (o *options) parse(sizes, sources, kindNames, toolNames string) error {
	for text := range strings.SplitSeq(sizes, ",") {
		gb, err := strconv.ParseFloat(text, 64)
		if err != nil || gb <= 0 || gb > 20 {
			return fmt.Errorf("%q is no size in GB", text)
		}
		o.sizes = append(o.sizes, gb)
	}
	for text := range strings.SplitSeq(sources, ",") {
		s, err := parseSource(text)
		if err != nil {
			return err
		}
		o.from = append(o.from, s)
	}
	o.kinds = strings.Split(kindNames, ",")
	for _, kind := range o.kinds {
		if kinds()[kind] == nil {
			return fmt.Errorf("%q is no kind of tree", kind)
		}
	}
	if o.tools = pick(strings.Split(toolNames, ",")); len(o.tools) == 0 {
		return fmt.Errorf("no tool has one of the names %q", toolNames)
	}
	return nil
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
