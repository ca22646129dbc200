package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/zram"
)

// zramRow is what files in the writable part of a volatile sprout cost.
type zramRow struct {
	Algorithm string `json:"algorithm"`
	Compress  string `json:"compress"`
	Discard   string `json:"discard"`
	Tree      tree   `json:"tree"`
	// Seconds to copy the tree and to write it out, and the processor time.
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"processor_seconds"`
	// ReadCPU is the processor time for reading it again.
	ReadCPU float64 `json:"read_processor_seconds"`
	// Memory taken by the zram device, in bytes: with the tree, and when it was
	// deleted, at once and after a while.
	Memory  int64 `json:"memory_bytes"`
	Deleted int64 `json:"deleted_bytes"`
	Later   int64 `json:"later_bytes"`
}

// giveBack is how long the kernel gets to give memory back after a delete.
const giveBack = 20 * time.Second

// zram compares ways to compress what a live session writes, and whether the
// memory comes back.
func (b *bench) zram(ctx context.Context, r *report) (err error) {
	base, err := b.makeSeed(ctx, 64)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(base.Path)) }()
	// Copied from memory, lest the disk be measured.
	top, err := os.MkdirTemp(b.dir, "tree-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(top)) }()
	t, err := makeTree(ctx, top, b.options.kinds[0], int64(b.options.sizes[0]*1e9)/4)
	if err != nil {
		return err
	}
	algorithms, err := zram.New().Algorithms()
	if err != nil {
		return err
	}
	var ways []zramRow
	for _, algorithm := range algorithms {
		for _, compress := range []string{"none", "lzo", "zstd:1", "zstd:3"} {
			ways = append(ways, zramRow{Algorithm: algorithm, Compress: compress, Discard: "discard=async"})
		}
	}
	ways = append(ways,
		zramRow{Algorithm: algorithms[0], Compress: "zstd:1", Discard: "discard=sync"},
		zramRow{Algorithm: algorithms[0], Compress: "zstd:1", Discard: "nodiscard"})
	for _, way := range ways {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		way.Tree = t
		o := client.CreateOptions{ZramSize: 4 * seedtest.GiB, ZramAlgorithm: way.Algorithm, Compress: way.Compress, MountOptions: way.Discard}
		if err := b.live(ctx, base.Path, o, func(l live) error { return way.fill(ctx, l, top) }); err != nil {
			return fmt.Errorf("%s, compress=%s, %s: %w", way.Algorithm, way.Compress, way.Discard, err)
		}
		say("zram %s, compress=%s, %s: %.2f s, processors %.2f s, %d MB of RAM; deleted %d MB, later %d MB", way.Algorithm, way.Compress,
			way.Discard, way.Seconds, way.CPU, way.Memory>>20, way.Deleted>>20, way.Later>>20)
		r.Zram = append(r.Zram, way)
	}
	return nil
}

func (w *zramRow) fill(ctx context.Context, l live, top string) error {
	sprout, err := l.bus.Sprout(ctx, l.sprout)
	if err != nil {
		return err
	}
	var name string
	for _, m := range sprout.Members {
		if m.Role == "zram" {
			name = filepath.Base(m.Path)
		}
	}
	used := func(value *int64) error {
		stat, err := zram.New().Stat(name)
		*value = int64(stat.MemUsed)
		return err
	}
	var before int64
	if err := used(&before); err != nil {
		return err
	}
	files := filepath.Join(l.mnt, "files")
	timed := func(seconds, processors *float64, work func() error) error {
		worked, err := machineTime()
		if err != nil {
			return err
		}
		begin := time.Now()
		if err := work(); err != nil {
			return err
		}
		*seconds = time.Since(begin).Seconds()
		now, err := machineTime()
		*processors = (now - worked).Seconds()
		return err
	}
	var reading float64
	if err := cmp.Or(
		timed(&w.Seconds, &w.CPU, func() error { return cmp.Or(command(ctx, "cp", "-a", top, files), syncfs(l.mnt)) }),
		used(&w.Memory),
		evict(files),
		timed(&reading, &w.ReadCPU, func() error { return readEverything(files) }),
		os.RemoveAll(files), syncfs(l.mnt), syncfs(l.mnt), used(&w.Deleted),
	); err != nil {
		return err
	}
	for begin := time.Now(); time.Since(begin) < giveBack; time.Sleep(time.Second) {
		if err := used(&w.Later); err != nil {
			return err
		}
		if w.Later < before+w.Memory/20 {
			break
		}
	}
	return nil
}

// evict drops the files of a tree from the page cache.
func evict(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		return dropCache(path)
	})
}

// printZram prints a table in Markdown.
func printZram(out io.Writer, rows []zramRow) {
	if len(rows) == 0 {
		return
	}
	t := rows[0].Tree
	fmt.Fprintf(out, "\nWritten to a volatile sprout: %s, %d files, %.2f GB.\n\n", t.Kind, t.Files, float64(t.Bytes)/1e9)
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| zram\t| compress\t| discard\t| write s\t| processors s\t| processors s to read\t| RAM for a MB\t| RAM MB\t| deleted\t| later\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %.2f\t| %.2f\t| %.2f\t| %.2f\t| %s\t| %s\t| %s\t|\n", r.Algorithm, r.Compress, r.Discard, r.Seconds, r.CPU, r.ReadCPU,
			float64(r.Memory)/float64(t.Bytes), megabytes(r.Memory), megabytes(r.Deleted), megabytes(r.Later))
	}
	w.Flush()
}
