// Package root has the tests of the whole: the real daemon, on a private bus, on
// the real kernel with loop and zram devices.
package root

import (
	"context"
	"fmt"
	"os"
	"testing"

	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/testenv"
)

// programs is the directory of the programs under test; TestMain sets it.
var programs string

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 { // every test skips itself, with the reason
		os.Exit(m.Run())
	}
	var err error
	if programs, err = harness.Programs(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := testenv.Main(m)
	_ = os.RemoveAll(programs)
	os.Exit(code)
}
