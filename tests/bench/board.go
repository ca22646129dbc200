package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/seedtest"
)

// row is one tool with one source and one tree.
type row struct {
	Tool   string    `json:"tool"`
	Label  string    `json:"label"`
	Source string    `json:"source"`
	Tree   tree      `json:"tree"`
	Image  string    `json:"image"`
	Used   int64     `json:"used_bytes"` // of the image
	Runs   []outcome `json:"runs,omitempty"`
	// Skipped says why there are none.
	Skipped string `json:"skipped,omitempty"`
	failure error
	// Median of each column by itself.
	Median outcome `json:"median"`
	// OfLimit is the wall time as a multiple of the limit, and UnplugOfLimit
	// the time to unplug.
	OfLimit       float64 `json:"wall_of_limit"`
	UnplugOfLimit float64 `json:"unplug_of_limit"`
}

// set is what to compare with each other.
type set struct {
	kind    string
	gb      float64
	sources []source
	tools   []tool
	rounds  int
}

// options of the scoreboard, from the command line.
type options struct {
	rounds int
	level  int
	pack   int
	images string // a directory to keep the images in, "" for none
	full   bool
	kinds  []string
	sizes  []float64
	from   []source
	tools  []tool
}

// sets says what to compare. The full matrix varies one thing at a time.
func (o options) sets() []set {
	var list []set
	for _, kind := range o.kinds {
		for _, gb := range o.sizes {
			list = append(list, set{kind, gb, o.from, o.tools, o.rounds})
		}
	}
	if !o.full {
		return list
	}
	memory := []source{{Name: "memory"}}
	some := pick([]string{"flatten", "flatten-release", "release-*", "bare", "unsquashfs-ext4", "rsync-ext4", "dd"})
	sticks := func(rates ...string) (list []source) {
		for _, rate := range rates {
			s, _ := parseSource(rate) // these are well-formed
			list = append(list, s)
		}
		return list
	}
	geometry := append(pick([]string{"flatten-8m", "flatten-dup", "flatten-plain"}), some[0])
	return append(list,
		set{"mixed", 0.5, append(memory, o.from[len(o.from)-1]), o.tools, o.rounds},
		set{"mixed", 2, sticks("400", "150+1ms", "400+1ms"), some, o.rounds},
		// All that counts is the rate: one round differs from the next by a percent.
		set{"mixed", 2, sticks("40", "40+1ms"), some, 1},
		set{"mixed", 2, memory, geometry, o.rounds},
		set{"small", 2, memory, some, 2}, // half a million files
		set{"large", 2, memory, some, o.rounds},
		set{"mixed", 8, append(memory, o.from[len(o.from)-1]), pick([]string{"flatten", "flatten-release", "bare", "release-ram", "unsquashfs-ext4"}), 2},
	)
}

// pick gives the tools whose names match one of the patterns.
func pick(patterns []string) (list []tool) {
	for _, t := range tools() {
		if slices.ContainsFunc(patterns, func(p string) bool { ok, err := path.Match(p, t.name); return ok && err == nil }) {
			list = append(list, t)
		}
	}
	return list
}

// board runs all the sets.
func (b *bench) board(ctx context.Context, r *report) error {
	say("the scoreboard takes about %v", b.options.timing())
	var errs []error
	for _, s := range b.options.sets() {
		if err := cmp.Or(context.Cause(ctx), b.runSet(ctx, s, r)); err != nil {
			errs = append(errs, err)
			break
		}
	}
	r.Figures = append(r.Figures, goals(r.Board, r.Images)...)
	for _, row := range r.Board {
		if row.failure != nil {
			errs = append(errs, fmt.Errorf("%s, source %s: %w", row.Label, row.Source, row.failure))
		}
	}
	return errors.Join(errs...)
}

func (b *bench) runSet(ctx context.Context, s set, r *report) (err error) {
	bytes := int64(s.gb * 1e9)
	made := b.imagesOf(s.kind, s.gb)
	defer func() { err = errors.Join(err, made.drop()) }()
	var names []string
	for _, t := range s.tools {
		if !slices.Contains(names, t.image) {
			names = append(names, t.image)
		}
	}
	// The images that are not there yet, and the tree or a target with something to spare.
	if err := needMemory(bytes*5/4 + int64(len(made.missing(names)))*bytes/2); err != nil {
		return err
	}
	if err := made.prepare(ctx, names); err != nil {
		return err
	}
	for _, name := range names {
		im := made.made[name]
		if !slices.ContainsFunc(r.Images, func(o image) bool { return o.Name == im.Name && o.Tree == im.Tree }) {
			r.Images = append(r.Images, im)
		}
	}
	for _, from := range s.sources {
		rows := make([]row, len(s.tools))
		for i, t := range s.tools {
			im := made.made[t.image]
			rows[i] = row{Tool: t.name, Label: t.label, Source: from.Name, Tree: im.Tree, Image: im.Name, Used: im.Used}
		}
		for round := 0; round < s.rounds && err == nil; round++ {
			err = b.round(ctx, round, s, from, made, rows)
		}
		for i := range rows {
			rows[i].sum()
		}
		r.Board = append(r.Board, rows...)
		if err != nil {
			return err
		}
	}
	return nil
}

// round runs each tool once, every other round in the opposite order.
func (b *bench) round(ctx context.Context, round int, s set, from source, made *images, rows []row) error {
	readable, writable, err := b.rates(ctx, from, made)
	if err != nil {
		return err
	}
	say("round %d, source %s: it gives %.0f MB/s, and the target takes %.0f MB/s", round+1, from.Name, readable/1e6, writable/1e6)
	order := make([]int, len(rows))
	for i := range order {
		order[i] = i
	}
	if round%2 == 1 {
		slices.Reverse(order)
	}
	for _, i := range order {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		row, t := &rows[i], s.tools[i]
		if row.Skipped != "" {
			continue
		}
		o, err := b.once(ctx, t, from, made, round == 0)
		if errors.Is(err, errSkip) {
			row.Skipped = strings.TrimPrefix(err.Error(), errSkip.Error()+": ")
			say("  %-38s %v", t.label, err)
			continue
		}
		if err != nil { // the others may do
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			row.Skipped, row.failure, row.Runs = "failed: "+strings.Join(strings.Fields(err.Error()), " "), err, nil
			say("  %-38s %s", t.label, row.Skipped)
			continue
		}
		o.Limit = max(float64(row.Used)/readable, float64(row.Used)/writable)
		say("  %-38s unplug %6.2f s, end %6.2f s, processors %6.2f s, %.2f of the limit", t.label, o.Unplug, o.Wall, o.CPU, o.Wall/o.Limit)
		row.Runs = append(row.Runs, o)
	}
	return nil
}

// rates measures what source and target can do at most, in this round.
func (b *bench) rates(ctx context.Context, from source, made *images) (readable, writable float64, err error) {
	var image image
	for _, i := range made.made {
		if i.Used > image.Used {
			image = i
		}
	}
	s, err := b.plug(from, made.dir)
	if err != nil {
		return 0, 0, err
	}
	most := image.Used
	if from.Rate > 0 {
		most = min(most, 3*from.Rate)
	}
	readable, err = readRate(s.path(image), most)
	if err = errors.Join(err, s.unplug()); err != nil {
		return 0, 0, err
	}
	writable, err = b.writeRate(ctx, min(image.Used, seedtest.GiB))
	return readable, writable, err
}

// targetSize is that of all targets: files with holes.
const targetSize = 16 * seedtest.GiB

// once runs one tool on a source that is plugged in anew and an empty target.
func (b *bench) once(ctx context.Context, t tool, from source, made *images, check bool) (o outcome, err error) {
	s, err := b.plug(from, made.dir)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, s.unplug()) }()
	target, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: targetSize})
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	return t.run(ctx, bout{bench: b, source: from, stick: s, image: made.made[t.image], target: target, check: check})
}

// sum works out the medians.
func (r *row) sum() {
	if len(r.Runs) == 0 {
		return
	}
	column := func(value func(outcome) float64) float64 {
		var list []float64
		for _, o := range r.Runs {
			list = append(list, value(o))
		}
		return median(list)
	}
	r.Median = outcome{
		Unplug:  column(func(o outcome) float64 { return o.Unplug }),
		Wall:    column(func(o outcome) float64 { return o.Wall }),
		CPU:     column(func(o outcome) float64 { return o.CPU }),
		Read:    int64(column(func(o outcome) float64 { return float64(o.Read) })),
		Written: int64(column(func(o outcome) float64 { return float64(o.Written) })),
		Memory:  int64(column(func(o outcome) float64 { return float64(o.Memory) })),
		Limit:   column(func(o outcome) float64 { return o.Limit }),
		User:    column(func(o outcome) float64 { return o.User }),
		Polling: column(func(o outcome) float64 { return o.Polling }),
	}
	r.OfLimit = column(func(o outcome) float64 { return o.Wall / o.Limit })
	r.UnplugOfLimit = column(func(o outcome) float64 { return o.Unplug / o.Limit })
}

// needMemory refuses what would make the machine swap or worse.
func needMemory(bytes int64) error {
	free, err := status("/proc/meminfo", "MemAvailable")
	if err != nil {
		return err
	}
	if free<<10 < bytes {
		return fmt.Errorf("images and targets are in memory: that takes %.1f GB, and %.1f GB are free (see --sizes and --images): %w",
			float64(bytes)/1e9, float64(free<<10)/1e9, unix.ENOMEM)
	}
	return nil
}

// printBoard prints a table for each source and tree, in Markdown.
func printBoard(out io.Writer, rows []row) {
	for len(rows) > 0 {
		first := rows[0]
		n := slices.IndexFunc(rows, func(r row) bool { return r.Source != first.Source || r.Tree != first.Tree })
		if n < 0 {
			n = len(rows)
		}
		rounds := 0
		for _, r := range rows[:n] {
			rounds = max(rounds, len(r.Runs))
		}
		fmt.Fprintf(out, "\nSource: %s. Tree: %s, %d files, %.2f GB. Medians of %d.\n\n",
			sourceWords(first.Source), first.Tree.Kind, first.Tree.Files, float64(first.Tree.Bytes)/1e9, rounds)
		w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
		fmt.Fprintln(w, "| way\t| unplug s\t| end s\t| processors s\t| read MB\t| written MB\t| memory MB\t| end, of the limit\t|")
		fmt.Fprintln(w, "|---\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|")
		for _, r := range rows[:n] {
			if len(r.Runs) == 0 {
				fmt.Fprintf(w, "| %s\t| %s\t|\t|\t|\t|\t|\t|\t|\n", r.Label, r.Skipped)
				continue
			}
			m := r.Median
			fmt.Fprintf(w, "| %s\t| %.2f\t| %.2f\t| %.2f\t| %s\t| %s\t| %s\t| %.2f\t|\n",
				r.Label, m.Unplug, m.Wall, m.CPU, megabytes(m.Read), megabytes(m.Written), megabytes(m.Memory), r.OfLimit)
		}
		w.Flush()
		rows = rows[n:]
	}
}

func sourceWords(name string) string {
	if name == "memory" {
		return "memory"
	}
	rate, latency, _ := strings.Cut(name, "+")
	words := "a stick of " + rate + " MB/s"
	if latency != "" {
		words += " and " + latency
	}
	return words
}

func megabytes(n int64) string {
	if n < 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f", float64(n)/1e6)
}

// timing is said at the start, so that one knows when to come back.
func (o options) timing() time.Duration {
	var total float64
	for _, s := range o.sets() {
		total += 60 * s.gb // the images
		for _, from := range s.sources {
			for _, t := range s.tools {
				wall := 3 * s.gb
				if strings.HasPrefix(t.name, "rsync") || t.name == "send" {
					wall *= 2
				}
				if from.Rate > 0 {
					wall = max(wall, 0.45*s.gb*1e9/float64(from.Rate))
				}
				total += float64(s.rounds) * (wall + 2)
			}
		}
	}
	return time.Duration(total * float64(time.Second)).Round(time.Minute)
}
