package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func some(tool, source string, gb float64, walls ...float64) row {
	r := row{Tool: tool, Label: "tool <" + tool + ">", Source: source, Used: 1e9, Tree: tree{Kind: "mixed", Bytes: int64(gb * 1e9), Files: 10}}
	for _, wall := range walls {
		r.Runs = append(r.Runs, outcome{Unplug: wall / 2, Wall: wall, CPU: 2 * wall, Read: 1e9, Limit: 2, User: 0.01})
	}
	r.sum()
	return r
}

func board() []row {
	return []row{
		some("flatten", "memory", 1, 3, 2, 100), some("bare", "memory", 1, 3), some("unsquashfs-ext4", "memory", 1, 6), some("release-ram", "memory", 1),
		some("flatten", "150", 1, 4, 6, 9), some("bare", "150", 1, 4, 5, 10), some("flatten", "memory", 10, 33),
	}
}

func TestGoalsAreRatiosOfMediansOfTheSameSourceAndTree(t *testing.T) {
	values := map[string]figure{}
	for _, f := range goals(board(), []image{{Name: built, Used: 115}, {Name: squash, Used: 100}}) {
		values[f.Name+", "+f.Note] = f
	}
	for name, want := range map[string]float64{
		"flatten: end, against unsquashfs to ext4, memory, mixed, 1.0 GB":                             0.5,
		"flatten: end, against the bare ioctls, memory, mixed, 1.0 GB":                                1,
		"flatten: end, 150, mixed, 1.0 GB":                                                            3,
		"flatten: end, against the bare ioctls, 150, mixed, 1.0 GB; pair by pair 1.00 (0.90 to 1.20)": 1.2,
		"flatten: time for a GB, memory, mixed, 10.0 GB against 1.0 GB":                               1.1,
		"built seed: size, against squashfs, , 0.0 GB; 0 and 0 MB":                                    1.15,
		"tool <flatten>: read from the source, 150, mixed, 1.0 GB":                                    1,
		"flatten: processors, against unsquashfs to ext4, memory, mixed, 1.0 GB":                      0.5,
	} {
		f, ok := values[name]
		if !ok || f.Value < want-1e-9 || f.Value > want+1e-9 {
			t.Errorf("%s is %v (%v)", name, f.Value, ok)
		}
	}
	if f := values["flatten: end, 150, mixed, 1.0 GB"]; f.Met {
		t.Errorf("three times the limit is enough: %+v", f)
	}
}

func TestTheTableIsMarkdownAndSaysWhatWasLeftOut(t *testing.T) {
	rows := board()
	rows[3].Skipped = "this sproutd has no Release"
	var out bytes.Buffer
	printBoard(&out, rows)
	if tables := strings.Count(out.String(), "|---"); tables != 3 {
		t.Errorf("there are %d tables:\n%s", tables, &out)
	}
	for _, line := range []string{"Source: a stick of 150 MB/s.", "Medians of 3.", "has no Release", "| 1.50 "} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("the table lacks %q:\n%s", line, &out)
		}
	}
	columns := 0
	for line := range strings.Lines(out.String()) {
		if !strings.HasPrefix(line, "|") {
			continue
		}
		if n := strings.Count(line, "|"); columns != 0 && n != columns {
			t.Errorf("a line has %d columns, others %d: %s", n, columns, line)
		} else {
			columns = n
		}
	}
}

func TestThePictureIsWellFormedAndShowsEveryTool(t *testing.T) {
	picture := draw(report{Kernel: "6.18", Processors: 2, Board: board()})
	decoder := xml.NewDecoder(bytes.NewReader(picture))
	for {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v:\n%s", err, picture)
		}
	}
	for _, text := range []string{"tool &lt;flatten&gt;", "tool &lt;unsquashfs-ext4&gt;", "By size: memory", "10.0 GB"} {
		if !bytes.Contains(picture, []byte(text)) {
			t.Errorf("the picture lacks %q", text)
		}
	}
	if path := os.Getenv("SPROUTD_BENCH_PICTURE"); path != "" {
		if err := os.WriteFile(path, picture, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOptionsAreUnderstood(t *testing.T) {
	var o options
	if err := o.parse("0.5,2", "memory,150+1ms", "mixed", "flatten,rsync-*"); err != nil {
		t.Fatal(err)
	}
	if len(o.sizes) != 2 || len(o.from) != 2 || o.from[1].Rate != 150e6 || o.from[1].Latency != time.Millisecond || len(o.tools) != 3 {
		t.Errorf("they are %+v", o)
	}
	o.rounds = 3
	if got := len(o.sets()); got != 2 {
		t.Errorf("%d sets for two sizes", got)
	}
	o.full = true
	if got := len(o.sets()); got < 6 {
		t.Errorf("%d sets in full", got)
	}
	for _, bad := range [][4]string{
		{"0", "memory", "mixed", "*"}, {"2", "disk", "mixed", "*"}, {"2", "150+1", "mixed", "*"}, {"2", "memory", "odd", "*"}, {"2", "memory", "mixed", "fly"},
	} {
		var o options
		if err := o.parse(bad[0], bad[1], bad[2], bad[3]); err == nil {
			t.Errorf("%q are taken", bad)
		}
	}
}

func TestATreeIsMadeInTheSameWayEachTime(t *testing.T) {
	var first tree
	for range 2 {
		dir := filepath.Join(t.TempDir(), "tree")
		made, err := makeTree(t.Context(), dir, "mixed", 4e6)
		if err != nil {
			t.Fatal(err)
		}
		n, err := countFiles(dir)
		if err != nil || n != made.Files || made.Bytes < 4e6 {
			t.Errorf("%d files are there of %+v, %v", n, made, err)
		}
		if first.Files == 0 {
			first = made
		}
		if made != first {
			t.Errorf("first %+v, then %+v", first, made)
		}
	}
}
