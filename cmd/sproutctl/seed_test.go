package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/dbus/client/clienttest"
	"sproutd.org/sproutd/seed"
)

func fakeGeometry() seed.Geometry {
	return seed.Geometry{
		DataGroups: 2, DataLength: 2 * gib, DataExtents: 11804, DataUsed: 500 * mib, TreeNodes: 5260, NodeSize: 16384, MetadataUsed: 5260 * 16384,
		Histogram: []seed.Bucket{{Limit: 65536, Extents: 11000, Bytes: 300 * mib}, {Extents: 804, Bytes: 200 * mib}},
	}
}

func fakeInspect(_ context.Context, path string) (seed.Inspection, error) {
	switch path {
	case "/images/mounted.img":
		return seed.Inspection{}, fmt.Errorf("cannot inspect %s: %w", path, seed.ErrMounted)
	case "/images/secret.img":
		return seed.Inspection{}, &os.PathError{Op: "open", Path: path, Err: unix.EACCES}
	}
	super := btrfs.Super{Seeding: true, Label: "live", Size: gib, Used: gib / 2, MetadataProfile: "single"}
	return seed.Inspection{Super: super, Geometry: fakeGeometry()}, nil
}

// fakeBuild does what package seed would, by the names it is given.
func fakeBuild(ctx context.Context, o seed.Options) (seed.Report, error) {
	fail := func(err error) (seed.Report, error) {
		return seed.Report{}, fmt.Errorf("cannot build a seed: %w", err)
	}
	switch {
	case o.Source == "/trees/denied":
		return fail(fmt.Errorf("only root can: it takes a mount and a loop device: %w", unix.EPERM))
	case o.Source == "/trees/none":
		return fail(fmt.Errorf("%w: stat /trees/none: no such file or directory", seed.ErrBadSource))
	case o.Source == "/trees/no-tool":
		return fail(fmt.Errorf("%w: mkfs.btrfs", seed.ErrNoTool))
	case o.Image == "exists.img" && !o.Overwrite:
		return fail(fmt.Errorf("%w: /images/exists.img", seed.ErrExists))
	}
	o.Progress(seed.Progress{Phase: seed.PhaseScan})
	o.Progress(seed.Progress{Phase: seed.PhaseSample})
	if strings.HasPrefix(o.Image, "/full/") {
		return fail(&seed.NoSpaceError{Dir: "/full", Need: 5e8, Free: 1e8})
	}
	report := seed.Report{
		BytesIn: 1338 * mib, ImageSize: 768 * mib, UsedBytes: 575 * mib, Entries: 66500, Files: 56700, Packed: 15567, Subvolumes: 1,
		Stored: 900, Mounts: 3, SameFiles: 586, SameBytes: 43 * mib, Geometry: fakeGeometry(), Time: 26 * time.Second,
	}
	if o.Source == "/trees/empty" {
		return seed.Report{ImageSize: 256 * mib, UsedBytes: mib, Entries: 1, Time: time.Second}, nil
	}
	for _, done := range []uint64{0, 600 * mib, 1338 * mib} {
		o.Progress(seed.Progress{Phase: seed.PhaseWrite, Done: done, Total: 1338 * mib})
	}
	switch o.Source {
	case "/trees/busy":
		return fail(fmt.Errorf("cannot read %q: %w: /trees/busy/log", "log", seed.ErrChanged))
	case "/trees/bad-disk":
		return fail(fmt.Errorf("cannot write %q: %w", "usr/bin/true", unix.EIO))
	case "/trees/large":
		<-ctx.Done()
		// It tidies up until the test has seen enough.
		_, _ = io.Copy(io.Discard, os.Stdin)
		return fail(ctx.Err())
	}
	o.Progress(seed.Progress{Phase: seed.PhaseFinish, Done: 1338 * mib, Total: 1338 * mib})
	return report, nil
}

func TestASecondCtrlCDoesNotKeepABuildFromTidyingUp(t *testing.T) {
	cmd := program(t, "seed", "build", "/trees/large", "root.img")
	busy, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	f := follow(t, cmd)
	f.out.until(t, "Step 3 of 4: write root.img")
	for range 3 {
		f.interrupt(t)
		time.Sleep(time.Millisecond) // signals that come at once are one
	}
	f.errOut.until(t, "Tidying up")
	if err := busy.Close(); err != nil {
		t.Fatal(err)
	}
	if code, said := f.end(t); code != exitKilled || !strings.Contains(said, "interrupted") {
		t.Errorf("it exits with %d and says %q", code, said)
	}
}

func TestInspectWithoutTheServiceShowsWhatItCan(t *testing.T) {
	clienttest.StartBus(t)
	for _, c := range []struct {
		image, says string
		exit        int
	}{
		{"/images/root.img", "not known without the service", exitOK},
		{"/images/secret.img", "systemctl start sproutd", exitUnavailable},
	} {
		cmd := program(t, "seed", "inspect", c.image)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if code := exit(t, cmd); code != c.exit || !strings.Contains(said.String(), c.says) {
			t.Errorf("%s: it exits with %d and says %q", c.image, code, &said)
		}
	}
}

func TestABuildOnATerminalHasABar(t *testing.T) {
	cmd, keyboard, screen := onTerminal(t, "seed", "build", "/trees/large", "root.img")
	screen.until(t, "step 3 of 4: write root.img")
	screen.until(t, "1.3 GiB of 1.3 GiB")
	fmt.Fprint(keyboard, "\x03\x04")
	screen.rest()
	if code := exit(t, cmd); code != exitKilled {
		t.Errorf("it exits with %d", code)
	}
}

func TestTimeLeftOfABuildIsThatOfTheWriting(t *testing.T) {
	now := time.Unix(1000, 0)
	p := buildProgress{now: func() time.Time { return now }, options: seed.Options{Source: "tree", Image: "root.img"}}
	p.job(seed.Progress{Phase: seed.PhaseScan})
	now = now.Add(time.Minute)
	p.job(seed.Progress{Phase: seed.PhaseWrite, Total: 100 * mib})
	now = now.Add(10 * time.Second)
	job := p.job(seed.Progress{Phase: seed.PhaseWrite, Done: 25 * mib, Total: 100 * mib})
	if job.Rate != 25*mib/10 || timeLeft(job.ExpectedEndTime, now) != "31 s left" {
		t.Errorf("the rate is %d, and %q", job.Rate, timeLeft(job.ExpectedEndTime, now))
	}
}
