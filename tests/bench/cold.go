package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
)

// coldRow is how long a live system that was just booted waits for its stick.
type coldRow struct {
	Image  string `json:"image"`
	Source string `json:"source"`
	Work   string `json:"work"`
	Tree   tree   `json:"tree"`
	// Seconds and Read are medians.
	Seconds float64 `json:"seconds"`
	Read    int64   `json:"read_bytes"`
	CPU     float64 `json:"processor_seconds"`
}

// work is what is done with a mounted image when nothing of it is in memory.
type work struct {
	name string
	do   func(dir string) error
}

// cold compares seeds and squashfs as they are read from a stick.
func (b *bench) cold(ctx context.Context, r *report) (err error) {
	made := b.imagesOf(b.options.kinds[0], b.options.sizes[0])
	defer func() { err = errors.Join(err, made.drop()) }()
	names := []string{built, plain, squash}
	if err := made.prepare(ctx, names); err != nil {
		return err
	}
	seen, err := b.attach(ctx, made.made[plain].path, "btrfs", false)
	if err != nil {
		return err
	}
	boot, err := bootFiles(seen.dir)
	if err = errors.Join(err, seen.detach()); err != nil {
		return err
	}
	works := []work{
		{"find", find}, {"boot-like reads", func(dir string) error { return readSome(dir, boot) }}, {"read everything", readEverything},
	}
	for _, from := range b.options.from {
		if from.Rate == 0 {
			continue // nothing is cold in memory
		}
		type sample struct{ seconds, read, cpu []float64 }
		samples := map[[2]string]*sample{}
		for round := range b.options.rounds {
			order := slices.Clone(names)
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for _, name := range order {
				for _, work := range works {
					if err := context.Cause(ctx); err != nil {
						return err
					}
					row, err := b.readCold(ctx, from, made, name, work.do)
					if err != nil {
						return fmt.Errorf("%s of %s: %w", work.name, name, err)
					}
					say("cold, %s, %s: %s took %.2f s, %.0f MB read, processors %.2f s", from.Name, name, work.name, row.Seconds, float64(row.Read)/1e6, row.CPU)
					key := [2]string{name, work.name}
					if samples[key] == nil {
						samples[key] = &sample{}
					}
					s := samples[key]
					s.seconds, s.read, s.cpu = append(s.seconds, row.Seconds), append(s.read, float64(row.Read)), append(s.cpu, row.CPU)
				}
			}
		}
		for _, work := range works {
			for _, name := range names {
				s := samples[[2]string{name, work.name}]
				r.Cold = append(r.Cold, coldRow{
					Image: name, Source: from.Name, Work: work.name, Tree: made.made[name].Tree,
					Seconds: median(s.seconds), Read: int64(median(s.read)), CPU: median(s.cpu),
				})
			}
			f := figure{
				Name: "cold, " + work.name + ": built seed against the plain one", Unit: "times", Note: sourceWords(from.Name),
				Value: median(samples[[2]string{built, work.name}].seconds) / median(samples[[2]string{plain, work.name}].seconds),
			}
			if work.name == "read everything" {
				f = atMost(f, 1)
			}
			r.Figures = append(r.Figures, f)
		}
	}
	return nil
}

// readCold measures one work on an image that was just plugged in.
func (b *bench) readCold(ctx context.Context, from source, made *images, name string, do func(string) error) (row coldRow, err error) {
	s, err := b.plug(from, made.dir)
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, s.unplug()) }()
	fstype := "btrfs"
	if name == squash {
		fstype = "squashfs"
	}
	seen, err := b.attach(ctx, s.path(made.made[name]), fstype, false)
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, seen.detach()) }()
	before := s.fs.BytesRead()
	worked, err := machineTime()
	if err != nil {
		return row, err
	}
	begin := time.Now()
	if err := do(seen.dir); err != nil {
		return row, err
	}
	row.Seconds = time.Since(begin).Seconds()
	now, err := machineTime()
	row.CPU, row.Read = (now - worked).Seconds(), s.fs.BytesRead()-before
	return row, err
}

// find looks at every name and its attributes, as find -ls does.
func find(dir string) error {
	return filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil {
			_, err = entry.Info()
		}
		return err
	})
}

// readEverything reads all files one after the other, in the order of their
// directories.
func readEverything(dir string) error {
	buf := make([]byte, 1<<18)
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		return readFile(path, buf)
	})
}

func readFile(path string, buf []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
	return errors.Join(err, f.Close())
}

const (
	bootDirs    = 150 // a system reads many files of some places, such as units, modules and fonts
	bootPerDir  = 10
	bootReaders = 3 // services start at the same time
)

// bootFiles picks some files of each of many directories, by a hash of their
// names. They are below dir.
func bootFiles(dir string) (list []string, err error) {
	files, hashes := map[string][]string{}, map[string]uint64{}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		parent := filepath.Dir(rel)
		if len(files[parent]) < bootPerDir {
			files[parent] = append(files[parent], rel)
		}
		h := fnv.New64a()
		_, _ = io.WriteString(h, "boot "+parent) // a hash takes everything
		hashes[parent] = h.Sum64()
		return err
	})
	dirs := slices.SortedFunc(maps.Keys(files), func(a, b string) int { return cmp.Compare(hashes[a], hashes[b]) })
	for _, parent := range dirs[:min(len(dirs), bootDirs)] {
		list = append(list, files[parent]...)
	}
	return list, err
}

// readSome reads files below dir, by several programs at once.
func readSome(dir string, files []string) error {
	next := make(chan string)
	var readers errgroup.Group
	for range bootReaders {
		readers.Go(func() (err error) {
			buf := make([]byte, 1<<18)
			for path := range next { // all of them, or the sender would wait
				err = cmp.Or(err, readFile(filepath.Join(dir, path), buf))
			}
			return err
		})
	}
	for _, path := range files {
		next <- path
	}
	close(next)
	return readers.Wait()
}

// printCold prints a table in Markdown.
func printCold(out io.Writer, rows []coldRow) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(out, "\nCold reads. Tree: %s, %d files, %.2f GB.\n\n", rows[0].Tree.Kind, rows[0].Tree.Files, float64(rows[0].Tree.Bytes)/1e9)
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| source\t| work\t| image\t| s\t| read MB\t| processors s\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|--:\t|--:\t|--:\t|")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %.2f\t| %s\t| %.2f\t|\n", sourceWords(r.Source), r.Work, r.Image, r.Seconds, megabytes(r.Read), r.CPU)
	}
	w.Flush()
}
