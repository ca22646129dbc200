package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// stayInMemory makes the kernel keep this program in memory. It usually lies on
// the very stick that its user may pull: a page that the kernel had dropped could
// then not be read again, and the process would die instead of saying what
// happened. Locked is what is mapped from files, some MiB, and not the memory of
// Go's runtime, which no disk is needed for.
func stayInMemory() error {
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("cannot read what is mapped: %w", err)
	}
	areas, err := fileAreas(maps)
	if err := errors.Join(err, maps.Close()); err != nil {
		return fmt.Errorf("cannot read what is mapped: %w", err)
	}
	for _, a := range areas {
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, a.from, a.to-a.from, 0); errno != 0 {
			return fmt.Errorf("cannot lock the program in memory: %w", errno)
		}
	}
	return nil
}

// area is a stretch of this process' memory.
type area struct{ from, to uintptr }

// fileAreas gives what is mapped from files of a table in the form of
// proc_pid_maps(5).
func fileAreas(maps io.Reader) ([]area, error) {
	var areas []area
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || !strings.HasPrefix(fields[5], "/") || !strings.HasPrefix(fields[1], "r") {
			continue
		}
		var a area
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &a.from, &a.to); err != nil {
			return nil, fmt.Errorf("%q is no range of addresses: %w", fields[0], err)
		}
		areas = append(areas, a)
	}
	return areas, lines.Err()
}
