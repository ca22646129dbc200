package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/seedtest"
)

// neighbourRow is what a program feels that works on the sprout meanwhile.
type neighbourRow struct {
	Source  string  `json:"source"`
	During  string  `json:"during"`
	Seconds float64 `json:"seconds"`
	// Latencies of a write of 4 KiB with fsync, and of a read of 4 KiB that the
	// page cache does not have.
	Fsync latency `json:"fsync"`
	Read  latency `json:"read"`
}

// latency in ms.
type latency struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50_ms"`
	P99   float64 `json:"p99_ms"`
	Max   float64 `json:"max_ms"`
}

func latencyOf(times []time.Duration) (l latency) {
	if l.Count = len(times); l.Count == 0 {
		return l
	}
	slices.Sort(times)
	at := func(q float64) float64 { return float64(times[int(q*float64(len(times)-1))].Microseconds()) / 1000 }
	return latency{len(times), at(0.5), at(0.99), at(1)}
}

// idleWork is how long the programs are watched when nothing else goes on.
const idleWork = 10 * time.Second

// neighbour measures how a program feels persist and flatten.
func (b *bench) neighbour(ctx context.Context, r *report) (err error) {
	made := b.imagesOf(b.options.kinds[0], b.options.sizes[0])
	defer func() { err = errors.Join(err, made.drop()) }()
	if err := made.prepare(ctx, []string{built}); err != nil {
		return err
	}
	for _, from := range b.options.from {
		if err := b.neighbourOn(ctx, from, made, r); err != nil {
			return fmt.Errorf("source %s: %w", from.Name, err)
		}
	}
	return nil
}

func (b *bench) neighbourOn(ctx context.Context, from source, made *images, r *report) (err error) {
	s, err := b.plug(from, made.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.unplug()) }()
	partition, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: targetSize})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, partition.Close()) }()
	target, err := seedtest.NewDisk(ctx, seedtest.DiskSpec{Dir: b.dir, Size: targetSize})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	whole := context.WithoutCancel(ctx)
	return b.live(ctx, s.path(made.made[built]), client.CreateOptions{}, func(l live) error {
		if err := write(filepath.Join(l.mnt, "overlay"), 4*overlay); err != nil {
			return err
		}
		wait := func(job string, err error) error {
			if err == nil {
				_, err = l.bus.Wait(whole, job)
			}
			return err
		}
		for _, phase := range []struct {
			name string
			work func() error
		}{
			{"idle", func() error { time.Sleep(idleWork); return nil }},
			{"persist", func() error { return wait(l.bus.Persist(whole, l.sprout, partition.Path, client.MoveOptions{})) }},
			{"idle, persistent", func() error { time.Sleep(idleWork); return nil }},
			{"flatten", func() error {
				return wait(l.bus.Flatten(whole, l.sprout, target.Path, client.MoveOptions{Bootloader: "none"}))
			}},
		} {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			row, err := feel(l.mnt, phase.work)
			if err != nil {
				return fmt.Errorf("%s: %w", phase.name, err)
			}
			row.Source, row.During = from.Name, phase.name
			say("neighbour, %s, %s (%.1f s): fsync p50 %.1f p99 %.1f max %.1f ms (%d), read p50 %.1f p99 %.1f max %.1f ms (%d)", from.Name, phase.name, row.Seconds,
				row.Fsync.P50, row.Fsync.P99, row.Fsync.Max, row.Fsync.Count, row.Read.P50, row.Read.P99, row.Read.Max, row.Read.Count)
			r.Neighbour = append(r.Neighbour, row)
		}
		return nil
	})
}

// thinkTime is between two operations of a program: it does not keep the devices
// busy.
const thinkTime = 10 * time.Millisecond

// feel runs work, and two programs on the sprout for as long as that takes.
func feel(mnt string, work func() error) (row neighbourRow, err error) {
	victims, err := someFiles(filepath.Join(mnt, "usr"), 2000)
	if err != nil {
		return row, err
	}
	f, err := os.Create(filepath.Join(mnt, "neighbour"))
	if err != nil {
		return row, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var (
		programs      errgroup.Group
		end           = make(chan struct{})
		fsyncs, reads []time.Duration
	)
	again := func(times *[]time.Duration, once func(i int) error) {
		programs.Go(func() error {
			for i := 0; ; i++ {
				begin := time.Now()
				if err := once(i); err != nil {
					return err
				}
				*times = append(*times, time.Since(begin))
				select {
				case <-time.After(thinkTime):
				case <-end:
					return nil
				}
			}
		})
	}
	block := make([]byte, 4096)
	_, _ = rand.NewChaCha8([32]byte{5}).Read(block)
	again(&fsyncs, func(i int) error {
		_, err := f.WriteAt(block, int64(i%1024)*4096)
		return cmp.Or(err, f.Sync())
	})
	picked := rand.New(rand.NewPCG(1, 2))
	got := make([]byte, 4096)
	again(&reads, func(int) error {
		return readCold4K(victims[picked.IntN(len(victims))], got)
	})
	begin := time.Now()
	err = work()
	row.Seconds = time.Since(begin).Seconds()
	close(end)
	err = errors.Join(err, programs.Wait())
	row.Fsync, row.Read = latencyOf(fsyncs), latencyOf(reads)
	return row, err
}

// readCold4K reads the beginning of a file after the page cache has dropped it.
func readCold4K(path string, buf []byte) error {
	if err := dropCache(path); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(f, buf)
	return errors.Join(err, f.Close())
}

func dropCache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}

// someFiles gives files of more than 4 KiB.
func someFiles(dir string, most int) (list []string, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Size() >= 4096 {
			list = append(list, path)
		}
		return err
	})
	rand.New(rand.NewPCG(3, 4)).Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	if len(list) == 0 && err == nil {
		err = fmt.Errorf("there are no files in %s", dir)
	}
	return list[:min(len(list), most)], err
}

// printNeighbour prints a table in Markdown.
func printNeighbour(out io.Writer, rows []neighbourRow) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprint(out, "\nA program that writes 4 KiB with fsync, and one that reads 4 KiB, every 10 ms. Times in ms.\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| source\t| meanwhile\t| for s\t| fsync p50\t| p99\t| longest\t| read p50\t| p99\t| longest\t|")
	fmt.Fprintln(w, "|---\t|---\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|--:\t|")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s\t| %s\t| %.1f\t| %.1f\t| %.1f\t| %.0f\t| %.1f\t| %.1f\t| %.0f\t|\n", sourceWords(r.Source), r.During, r.Seconds,
			r.Fsync.P50, r.Fsync.P99, r.Fsync.Max, r.Read.P50, r.Read.P99, r.Read.Max)
	}
	w.Flush()
}
