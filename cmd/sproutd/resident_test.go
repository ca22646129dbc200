package main

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

func TestOnlyWhatIsMappedFromFilesIsLocked(t *testing.T) {
	const maps = `00400000-0066d000 r-xp 00000000 00:1f 257   /usr/libexec/sproutd
0066d000-008ff000 r--p 0026d000 00:1f 257   /usr/libexec/sproutd
00923000-0295a000 rw-p 00000000 00:00 0 
c000000000-c000400000 rw-p 00000000 00:00 0   [anon: Go: heap]
7f0000000000-7f0000001000 ---p 00000000 00:1f 258   /usr/lib/guard
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0   [stack]
`
	areas, err := fileAreas(strings.NewReader(maps))
	want := []area{{0x400000, 0x66d000}, {0x66d000, 0x8ff000}}
	if err != nil || !slices.Equal(areas, want) {
		t.Errorf("the areas are %x (%v), wanted %x", areas, err, want)
	}
}

func TestTheProgramStaysInMemory(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur < 64<<20 && os.Geteuid() != 0 {
		testenv.Skip(t, "may not lock enough memory: run `ulimit -l 65536` before, or be root")
	}
	if err := stayInMemory(); err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmLck:")
	locked, err := strconv.Atoi(strings.Fields(rest)[0])
	if program, statErr := os.Stat("/proc/self/exe"); err != nil || statErr != nil || int64(locked)<<10 < program.Size()/4 {
		t.Errorf("only %d KiB are locked: %v, %v", locked, err, statErr)
	}
	if err := unix.Munlockall(); err != nil {
		t.Error(err)
	}
}
