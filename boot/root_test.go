package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/mount"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
	"sproutd.org/sproutd/zram"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// machine is a computer with some disks plugged in, on which one session at a
// time runs. It sees no other devices than those.
type machine struct {
	t     *testing.T
	dir   string
	disks []string // kernel names
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "mkfs.btrfs", "btrfstune", "losetup", "mke2fs", "addpart", "delpart")
	return &machine{t: t, dir: t.TempDir()}
}

// seed builds a small seed that holds one file.
func (m *machine) seed(spec seedtest.Spec) seedtest.Seed {
	m.t.Helper()
	if spec.ImageSize == 0 {
		spec.ImageSize = 256 * seedtest.MiB
	}
	spec.Content = func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "from-the-seed"), []byte(strings.Repeat("seed ", 20000)), 0o600)
	}
	return seedtest.New(m.t, spec)
}

// stick makes a stick with the image and room for persistence, and plugs it in.
func (m *machine) stick(image string) *seedtest.Stick {
	m.t.Helper()
	stick := seedtest.OpenStick(m.t, seedtest.StickSpec{Seed: image, PersistSize: seedtest.GiB})
	if err := stick.Unmount(); err != nil {
		m.t.Fatal(err)
	}
	m.plug(stick.Path)
	return stick
}

func (m *machine) plug(path string) { m.disks = append(m.disks, filepath.Base(path)) }

func (m *machine) sees(id block.ID) bool {
	name := filepath.Base(id.Path)
	return slices.ContainsFunc(m.disks, func(disk string) bool { return name == disk || strings.HasPrefix(name, disk+"p") })
}

// session is a booted system.
type session struct {
	*machine
	note handover.Note
	root string
	said []string
	off  bool
}

// try boots with a kernel command line.
func (m *machine) try(commandLine string, change ...func(*Config)) (*session, error) {
	m.t.Helper()
	s := &session{machine: m, root: filepath.Join(m.dir, "sysroot")}
	c := Config{
		NewRoot: s.root, Dir: filepath.Join(m.dir, "run"), Only: m.sees, Late: 100 * time.Millisecond,
		Say: func(level Level, text string) {
			m.t.Logf("<%d>%s", level, text)
			s.said = append(s.said, text)
		},
		ModProbe: func(context.Context, ...string) error { return errors.New("no modules in a test") },
	}
	for _, f := range change {
		f(&c)
	}
	var err error
	s.note, err = Mount(m.t.Context(), commandLine, c)
	if err != nil {
		s.off = true
		m.clean()
		return s, err
	}
	m.t.Cleanup(s.shutdown)
	return s, nil
}

func (m *machine) boot(commandLine string, change ...func(*Config)) *session {
	m.t.Helper()
	s, err := m.try(commandLine, change...)
	if err != nil {
		m.t.Fatal(err)
	}
	written, err := handover.Read(filepath.Join(m.dir, "run", "boot.json"))
	if err != nil || written.FSID != s.note.FSID {
		m.t.Errorf("the note says %+v (%v)", written, err)
	}
	return s
}

// clean fails when a boot that failed left something mounted.
func (m *machine) clean() {
	m.t.Helper()
	entries, err := mount.New().List()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.MountPoint, m.dir) {
			m.t.Errorf("%s is still mounted", e.MountPoint)
		}
	}
}

// shutdown ends the session as a power-off does: the zram is gone, the disks stay.
func (s *session) shutdown() {
	s.t.Helper()
	if s.off {
		return
	}
	s.off = true
	ctx := context.Background()
	errs := []error{unmount(ctx, s.root)}
	if s.note.MediaMount != "" {
		errs = append(errs, unmount(ctx, s.note.MediaMount))
	}
	if !s.note.Zram.Num.IsZero() {
		manager := zram.New()
		if _, err := manager.Adopt(s.note.Zram); err == nil {
			errs = append(errs, manager.Remove(ctx, s.note.Zram))
		}
	}
	if !s.note.MemoryLoop.Num.IsZero() {
		errs = append(errs, block.New().DetachLoop(ctx, s.note.MemoryLoop))
	}
	if err := errors.Join(errs...); err != nil {
		s.t.Error(err)
	}
	for _, name := range s.disks {
		for _, path := range append(glob(s.t, "/dev/"+name+"p*"), "/dev/"+name) {
			_ = btrfs.Forget(path)
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// write writes a file into the session, for good.
func (s *session) write(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.with(func(f *btrfs.FS) error { return f.Sync() })
}

// has wants a file with a content in the session, none for "".
func (s *session) has(name, text string) {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.root, name))
	if text == "" && !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("there is a file %s (%v)", name, err)
	} else if text != "" && (err != nil || string(data) != text) {
		s.t.Errorf("%s holds %q (%v), wanted %q", name, data, err, text)
	}
}

func (s *session) with(do func(*btrfs.FS) error) {
	s.t.Helper()
	f, err := btrfs.Open(s.root)
	if err == nil {
		err = errors.Join(do(f), f.Close())
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// persist moves what is in memory onto a device, as the daemon does.
func (s *session) persist(to string) {
	s.t.Helper()
	s.add(to)
	s.with(func(f *btrfs.FS) error { return f.Remove(2) })
}

func (s *session) add(to string) {
	s.t.Helper()
	s.with(func(f *btrfs.FS) error { return f.Add(to) })
}

// is wants a session of a mode, with as many warnings as given, each of which
// says these words.
func (s *session) is(mode handover.Mode, warnings ...string) {
	s.t.Helper()
	if s.note.Mode != mode {
		s.t.Errorf("the session is %s, wanted %s", s.note.Mode, mode)
	}
	wantWarnings(s.t, s.note.Warnings, warnings...)
	// It is one, too.
	s.has("from-the-seed", strings.Repeat("seed ", 20000))
	s.write("written-at", time.Now().String())
	s.with(func(f *btrfs.FS) error {
		info, err := f.Info()
		if err == nil && info.FSID.String() != s.note.FSID {
			err = fmt.Errorf("the note says %s, the file system is %s", s.note.FSID, info.FSID)
		}
		return err
	})
}

func wantWarnings(t *testing.T, got []string, want ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("there are %d warnings, wanted %d: %q", len(got), len(want), got)
		return
	}
	for i := range want {
		if !strings.Contains(got[i], want[i]) {
			t.Errorf("the warning %q does not say %q", got[i], want[i])
		}
	}
}

const live = "quiet root=sprout:LABEL=LIVE "

func TestAFirstBootIsVolatileAndLaterOnesKeepWhatWasMadePersistent(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)

	s := m.boot(live)
	s.is(handover.Volatile)
	if s.note.Media.Path != stick.Media || s.note.Image != "/LiveOS/root.img" || !s.note.Seed.Num.IsLoop() ||
		s.note.Zram.Size < btrfs.MinZram || s.note.BeganMS == 0 || s.note.MediaMS < s.note.BeganMS || s.note.MountedMS < s.note.MediaMS {
		t.Errorf("the note says %+v", s.note)
	}
	loop, err := block.New().LoopStatus(s.note.Seed.Num)
	if err != nil || !loop.ReadOnly || loop.SizeLimit != 256*seedtest.MiB {
		t.Errorf("the seed is %+v (%v)", loop, err)
	}
	s.write("home/of/mine", "first")
	fsid := s.note.FSID
	s.persist(stick.Persist)
	s.shutdown()

	for _, word := range []string{"second", "third"} {
		s = m.boot(live)
		s.is(handover.Persistent)
		if s.note.FSID != fsid || !s.note.Zram.Num.IsZero() {
			t.Errorf("the note says %+v", s.note)
		}
		s.write("home/of/mine", word)
		s.shutdown()
	}

	s = m.boot(live + "rd.sprout.persist=no")
	s.is(handover.Volatile)
	s.has("home/of/mine", "")
	s.shutdown()

	s = m.boot(live)
	s.is(handover.Persistent)
	s.has("home/of/mine", "third")
}
