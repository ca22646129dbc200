package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/seedtest"
)

// outcome is what one run of one tool took.
type outcome struct {
	// Unplug is when the source could go, Wall when all was on the target, in
	// seconds.
	Unplug float64 `json:"unplug_seconds"`
	Wall   float64 `json:"wall_seconds"`
	// CPU is the processor time of the whole machine, in seconds.
	CPU float64 `json:"processor_seconds"`
	// Read from the source, -1 where nothing counts it: a program that reads a
	// file in memory. Written to the target. In bytes.
	Read    int64 `json:"read_bytes"`
	Written int64 `json:"written_bytes"`
	// Memory is the most that was in use more than before, of programs, kernel
	// and RAM disks, but for the page cache and the target.
	Memory int64 `json:"memory_bytes"`
	// Limit is how long the larger of reading and writing what is used takes,
	// at the rates of this round.
	Limit float64 `json:"limit_seconds"`
	// User is the time that the daemon spent outside of the kernel.
	User float64 `json:"daemon_user_seconds,omitempty"`
	// Polling is what it took of a processor, in the kernel as well, to see how far
	// the job was.
	Polling float64 `json:"polling_seconds,omitempty"`
}

// gauge measures a run.
type gauge struct {
	stick  stick
	loops  []string // where the source is in memory: devices that are read
	target *seedtest.Disk
	pid    int // of the daemon, 0 for none
}

// run measures work, which gives the time when the source was free, and then
// settle, which writes out what is still in the page cache.
func (g *gauge) run(work func() (unplugged time.Time, err error), settle func() error) (o outcome, err error) {
	read, err := g.read()
	if err != nil {
		return o, err
	}
	written, err := g.target.Written()
	if err != nil {
		return o, err
	}
	var user time.Duration
	if g.pid != 0 {
		if user, err = userTime(g.pid); err != nil {
			return o, err
		}
	}
	memory := watchMemory(g.target.Image)
	worked, err := machineTime()
	if err != nil {
		return o, errors.Join(err, ignore(memory()))
	}
	begin := time.Now()
	unplugged, err := work()
	if err == nil {
		err = settle()
	}
	end := time.Now()
	now, e := machineTime()
	peak, e2 := memory()
	if err = errors.Join(err, e, e2); err != nil {
		return o, err
	}
	o = outcome{
		Unplug: unplugged.Sub(begin).Seconds(), Wall: end.Sub(begin).Seconds(), CPU: (now - worked).Seconds(), Memory: peak, Read: -1,
	}
	if g.pid != 0 {
		after, err := userTime(g.pid)
		if err != nil {
			return o, err
		}
		o.User = (after - user).Seconds()
	}
	readNow, err := g.read()
	if err != nil {
		return o, err
	}
	if read >= 0 {
		o.Read = readNow - read
	}
	writtenNow, err := g.target.Written()
	o.Written = writtenNow - written
	return o, err
}

func ignore(_ int64, err error) error { return err }

// read counts what was read from the source so far, -1 where that is unknown.
func (g *gauge) read() (sum int64, err error) {
	if g.stick.fs != nil {
		return g.stick.fs.BytesRead(), nil
	}
	if len(g.loops) == 0 {
		return -1, nil
	}
	for _, loop := range g.loops {
		raw, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/stat")
		if err != nil {
			return 0, err
		}
		const sectorsRead = 2 // Documentation/block/stat.rst
		fields := strings.Fields(string(raw))
		if len(fields) <= sectorsRead {
			return 0, fmt.Errorf("cannot read the counters of %s: %q", loop, raw)
		}
		n, err := strconv.ParseInt(fields[sectorsRead], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += 512 * n
	}
	return sum, nil
}

// loopsOn gives the loop devices that have a file as their backing.
func loopsOn(path string) (loops []string, err error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if backing, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(backing)) == path {
			loops = append(loops, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(file))))
		}
	}
	return loops, err
}

// backed says whether a loop device still has that file as its backing.
func backed(loop, path string) bool {
	backing, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	return err == nil && strings.TrimSpace(string(backing)) == path
}

// watchMemory samples the memory in use until it is stopped, and gives then how
// much more there was at most than at the beginning. What the file target takes
// is left out.
func watchMemory(target string) (stop func() (int64, error)) {
	const apart = 50 * time.Millisecond
	var (
		end   = make(chan struct{})
		all   sync.WaitGroup
		peak  int64
		first error
	)
	base, first := memoryInUse(target)
	sample := func() {
		now, err := memoryInUse(target)
		if err != nil && first == nil {
			first = err
		}
		peak = max(peak, now-base)
	}
	all.Go(func() {
		tick := time.NewTicker(apart)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				sample()
			case <-end:
				return
			}
		}
	})
	return func() (int64, error) {
		close(end)
		all.Wait()
		sample()
		return peak, first
	}
}

// memoryInUse is what programs, the kernel and RAM disks have: all that is not
// free and not page cache. Files in memory count as a RAM disk, but for target.
func memoryInUse(target string) (int64, error) {
	const plus, minus = 1, -1
	kib := int64(0)
	for key, sign := range map[string]int64{
		"MemTotal": plus, "MemFree": minus, "Buffers": minus, "Cached": minus, "SReclaimable": minus, "Shmem": plus,
	} {
		n, err := status("/proc/meminfo", key)
		if err != nil {
			return 0, err
		}
		kib += sign * n
	}
	// Free as well, and up to an eighth of all memory: the pages that a processor
	// keeps for itself. Source: mm/page_alloc.c, zone_highsize.
	kept, err := status("/proc/zoneinfo", "count")
	if err != nil {
		return 0, err
	}
	kib -= kept * int64(os.Getpagesize()>>10)
	var st unix.Stat_t
	if err := unix.Stat(target, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: target, Err: err}
	}
	return kib<<10 - 512*st.Blocks, nil
}
