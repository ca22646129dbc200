package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/zram"
)

// Level of a message, by the numbers that the kernel's log has for them.
type Level int

// The levels.
const (
	Error   Level = 3
	Warning Level = 4
	Info    Level = 6
)

// Config says where and how to boot; [Real] is for a real one.
type Config struct {
	// NewRoot is where the root is mounted.
	NewRoot string
	// Dir is where the note and the mount of the media are.
	Dir string
	// Say tells the user.
	Say func(level Level, text string)
	// Only, if not nil, is asked which block devices may be looked at.
	Only func(block.ID) bool
	// Late is how long a device is waited for that comes after the media: the
	// other half of a sprout, or other media where those found are no good.
	Late time.Duration
	// ModProbe loads a module of the kernel.
	ModProbe func(ctx context.Context, args ...string) error
	// NoZram lets the kernel have no zram, for tests.
	NoZram bool
}

// lateDevices is how long slow sticks and disks take to appear after others.
const lateDevices = 5 * time.Second

// Real is the configuration of a real boot.
func Real(newRoot string, say func(Level, string)) Config {
	return Config{NewRoot: newRoot, Dir: handover.Dir, Say: say, Late: lateDevices, ModProbe: modProbe}
}

// modProbe runs modprobe(8).
func modProbe(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "modprobe", append([]string{"-q", "--"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// boot is one boot under way.
type boot struct {
	Config
	request Request
	note    handover.Note
	blocks  *block.System
	zrams   *zram.Manager
	scan    *scanner
}

// Mount does everything: when it returns without an error, a writable root is
// mounted at c.NewRoot, and the note is written. With an error nothing is
// mounted there.
func Mount(ctx context.Context, commandLine string, c Config) (handover.Note, error) {
	b := &boot{Config: c, blocks: block.New(), zrams: zram.New()}
	b.note.BeganMS = sinceStart()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return b.note, fmt.Errorf("cannot read the boot id: %w", err)
	}
	b.note.BootID = strings.TrimSpace(string(id))
	request, warnings := ParseCommandLine(commandLine)
	b.request = request
	for _, w := range warnings {
		b.warn(w)
	}
	if request.Media.IsZero() {
		return b.note, errors.New("cannot boot: the kernel command line names no media, as root=sprout:LABEL=NAME does")
	}
	if err := os.MkdirAll(c.NewRoot, 0o755); err != nil {
		return b.note, fmt.Errorf("cannot make the mount point of the root: %w", err)
	}
	b.scan = newScanner(b.blocks, c.Only, b.warn)
	b.modules(ctx)
	if err := b.findAndMount(ctx); err != nil {
		return b.note, err
	}
	b.note.MountedMS = sinceStart()
	// Without the note the daemon knows less; that is no reason not to boot.
	if err := b.note.Write(filepath.Join(c.Dir, filepath.Base(handover.File))); err != nil {
		b.Say(Warning, sentence(err.Error()))
	}
	return b.note, nil
}

// sinceStart gives the milliseconds since the kernel started.
func sinceStart() uint64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return uint64(t.Nano() / int64(time.Millisecond)) //nolint:gosec // no time before the start
}

// warn tells the user, now on the console and later through the note.
func (b *boot) warn(text string) {
	b.note.Warnings = append(b.note.Warnings, text)
	b.Say(Warning, text)
}

// modules loads what is not there yet. A module that is built in has nothing to
// load, and what is really missing is noticed where it is used.
func (b *boot) modules(ctx context.Context) {
	for _, m := range []struct {
		there string
		args  []string
	}{
		{"/dev/loop-control", []string{"loop"}},
		{"/sys/fs/btrfs", []string{"btrfs"}},
		// The zram0 that it makes unasked would stay unused.
		{"/sys/class/zram-control", []string{"zram", "num_devices=0"}},
	} {
		if _, err := os.Stat(m.there); err == nil || b.NoZram && m.args[0] == "zram" {
			continue
		}
		if err := b.ModProbe(ctx, m.args...); err != nil {
			b.Say(Info, fmt.Sprintf("Cannot load the module %s: %v", m.args[0], err))
		}
	}
}

// findAndMount waits for the media and boots from the first that works. Where the
// media do not come, a copy of the seed stands in for them; see [boot.candidates].
func (b *boot) findAndMount(ctx context.Context) error {
	deadline := time.Now().Add(b.request.Timeout)
	changes, stop := b.watch(ctx)
	defer stop()
	tried, several := map[block.DevNum]bool{}, false
	var failures []error
	try := func(c found, standIn bool) (done bool, err error) {
		tried[c.Num] = true
		if err = b.from(ctx, c, standIn, changes); err == nil {
			return true, nil
		}
		if ctx.Err() != nil {
			return true, err
		}
		if !standIn {
			failures = append(failures, err)
		}
		b.warn(sentence(err.Error()))
		return false, nil
	}
	var copiesSince time.Time
	for {
		named, copies, standIns, err := b.candidates(ctx)
		if err != nil {
			return err
		}
		meant := named
		if len(meant) == 0 {
			meant = copies
		}
		if len(meant) > 1 && !several {
			several = true
			b.warn(fmt.Sprintf("root=sprout:%s is on more than one device: %s. The first of them is used.", b.request.Media, pathsOf(meant)))
		}
		for _, c := range named {
			if tried[c.Num] {
				continue
			}
			if done, err := try(c, false); done {
				return err
			}
			// Better ones may be on their way, but not for long.
			if late := time.Now().Add(b.Late); late.Before(deadline) {
				deadline = late
			}
		}
		wait := time.Until(deadline)
		all := slices.Concat(copies, standIns)
		i := slices.IndexFunc(all, func(f found) bool { return !tried[f.Num] })
		if i >= 0 {
			if copiesSince.IsZero() {
				copiesSince = time.Now()
			}
			if wait = min(wait, time.Until(copiesSince.Add(b.Late))); wait <= 0 {
				if done, err := try(all[i], i >= len(copies)); done {
					return err
				}
				continue
			}
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
			if i >= 0 {
				continue // it has its turn
			}
			if len(failures) > 0 {
				return fmt.Errorf("cannot boot from the media: %w", failures[len(failures)-1])
			}
			return fmt.Errorf("cannot boot: root=sprout:%s did not appear within %d seconds", b.request.Media, b.request.Timeout/time.Second)
		}
	}
}

// pollEvery is how often is looked again without an event: device nodes and
// udev's links come after the kernel's event.
const pollEvery = 250 * time.Millisecond

// watch gives a channel on which something is received when devices may have
// changed, until stop is called.
func (b *boot) watch(ctx context.Context) (changes <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ch, ended := make(chan struct{}, 1), make(chan struct{})
	signal := func() {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
	go func() {
		defer close(ended)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			// Without events there is the clock.
			_ = b.blocks.Watch(ctx, func(block.Event) { signal() })
		}()
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				signal()
			case <-ctx.Done():
				<-watched
				return
			}
		}
	}()
	return ch, func() { cancel(); <-ended }
}

// from boots from one of the media. From what only stands in for the media nothing
// new is begun, and nothing is dropped.
func (b *boot) from(ctx context.Context, device found, standIn bool, changes <-chan struct{}) error {
	m, err := b.open(ctx, device)
	if err != nil {
		return err
	}
	m.standIn = standIn
	defer m.release()                                                          // what is mounted holds it by then
	b.note.MediaMS, b.note.Checked, b.note.BadFiles = sinceStart(), false, nil // not those of media that were no good
	b.Say(Info, fmt.Sprintf("The seed is %s.", m.name()))
	if b.request.Check {
		if err := b.check(ctx, m); err != nil {
			return errors.Join(err, m.close(ctx))
		}
	}
	err = b.kept(ctx, m, changes)
	switch {
	case standIn && err == nil:
		b.warn(fmt.Sprintf("root=sprout:%s is not there: what was kept is used with the copy of its seed on %s.", b.request.Media, m.name()))
	case !standIn && errors.Is(err, errNothingKept):
		err = b.volatile(ctx, m)
	}
	if err != nil {
		return errors.Join(err, m.close(ctx))
	}
	b.note.Media, b.note.MediaMount, b.note.Image, b.note.Seed = m.device.ID, m.mountPoint, m.image, m.seed
	b.note.ToRAM = b.request.RAM
	return nil
}

// sentence makes one of an error.
func sentence(text string) string {
	if text == "" {
		return text
	}
	return strings.ToUpper(text[:1]) + text[1:] + "."
}
