package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of times in /proc: USER_HZ is 100 on every architecture Go
// runs on. Source: proc_pid_stat(5), sysconf(_SC_CLK_TCK).
const tick = 10 * time.Millisecond

// machineTime is how long the processors have worked since boot, all of them
// together. Source: the first line of proc_stat(5), without idle and iowait.
func machineTime() (time.Duration, error) {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	var busy int64
	for i, field := range strings.Fields(line) {
		const idle, iowait, guest = 4, 5, 9 // guest times are in user time already
		if i == 0 || i == idle || i == iowait || i >= guest {
			continue
		}
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("cannot read /proc/stat: %w", err)
		}
		busy += n
	}
	return time.Duration(busy) * tick, nil
}

// processTime is how long a process has worked, in user mode and in the kernel,
// with the children that it has waited for.
func processTime(pid int) (time.Duration, error) {
	fields, err := procStat(pid)
	if err != nil {
		return 0, err
	}
	var worked int64
	for _, field := range fields[utime : cstime+1] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("cannot read /proc/%d/stat: %w", pid, err)
		}
		worked += n
	}
	return time.Duration(worked) * tick, nil
}

// Places in what procStat gives, of times in ticks: in user mode first, and up to
// that in the kernel of children that were waited for. Source: proc_pid_stat(5).
const utime, cstime = 11, 14

// procStat gives what /proc/PID/stat has after the name of the program.
func procStat(pid int) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// The name is in parentheses and may hold anything.
	fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	if len(fields) <= cstime {
		return nil, fmt.Errorf("cannot read /proc/%d/stat", pid)
	}
	return fields, nil
}

// status sums up the values of some keys of a status file.
func status(path string, keys ...string) (sum int64, err error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		name, value, _ := strings.Cut(line, ":")
		for _, key := range keys {
			if strings.TrimSpace(name) != key {
				continue
			}
			n, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("cannot read %s: %w", path, err)
			}
			sum += n
		}
	}
	return sum, nil
}

// resident is the memory of a process, in MiB.
func resident(pid int) (float64, error) {
	kib, err := status(fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
	return float64(kib) / 1024, err
}

// switches counts how often the threads of a process were put on a processor.
func switches(pid int) (sum int64, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return 0, err
	}
	for _, task := range tasks {
		n, err := status(task, "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func loadAverages() string {
	raw, err := os.ReadFile("/proc/loadavg")
	fields := strings.Fields(string(raw))
	if err != nil || len(fields) < 3 {
		return "unknown"
	}
	return strings.Join(fields[:3], " ")
}

// userTime is how long a process has worked outside of the kernel.
func userTime(pid int) (time.Duration, error) {
	fields, err := procStat(pid)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(fields[utime], 10, 64)
	return time.Duration(n) * tick, err
}
