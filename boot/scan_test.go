package boot

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sproutd.org/sproutd/block"
)

func paths(list []found) string {
	var names []string
	for _, f := range list {
		names = append(names, f.Path)
	}
	return strings.Join(names, " ")
}

// One disk hangs, another gives errors at first: the rest is there at once, and
// they are when they answer.
func TestNobodyWaitsForADiskThatHangs(t *testing.T) { synctest.Test(t, testHangingDisk) }

func testHangingDisk(t *testing.T) {
	var warnings []string
	s := newScanner(block.New(), nil, func(text string) { warnings = append(warnings, text) })
	var ids []block.ID
	for i, path := range []string{"good", "hangs", "errors", "last"} {
		ids = append(ids, block.ID{Num: block.DevNum{Major: 8, Minor: uint32(i)}, Path: path})
	}
	s.ids = func() ([]block.ID, error) { return ids, nil }
	answer, reads := make(chan struct{}), make(chan string, 100)
	failing := true
	s.read = func(_ context.Context, id block.ID) found {
		reads <- id.Path
		f := found{ID: id}
		switch id.Path {
		case "hangs":
			<-answer
		case "errors":
			if failing {
				f.Err = errors.New("input/output error")
			}
		}
		return f
	}
	look := func(want string) {
		t.Helper()
		list, err := s.list(t.Context())
		if err != nil || paths(list) != want {
			t.Errorf("found %q (%v), wanted %q", paths(list), err, want)
		}
	}
	began := time.Now()
	look("good last")
	if took := time.Since(began); took != patience {
		t.Errorf("it took %s", took)
	}
	failing = false
	look("good errors last")
	wantWarnings(t, warnings, "hangs does not answer")

	close(answer)
	synctest.Wait()
	look("good hangs errors last")
	ids = ids[1:]
	look("hangs errors last")
	close(reads)
	n := map[string]int{}
	for path := range reads {
		n[path]++
	}
	if n["good"] != 1 || n["hangs"] != 1 || n["last"] != 1 || n["errors"] != 2 {
		t.Errorf("they were read so often: %v", n)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.ids = func() ([]block.ID, error) { return []block.ID{{Path: "new"}}, nil }
	never := make(chan struct{})
	defer close(never)
	s.read = func(context.Context, block.ID) found { <-never; return found{} }
	if _, err := s.list(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
