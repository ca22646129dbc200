package boot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	if err != nil || !loop.ReadOnly || loop.DirectIO || loop.SizeLimit != 256*seedtest.MiB {
		t.Errorf("the seed is %+v (%v)", loop, err)
	}
	s.write("home/of/mine", "first")
	fsid := s.note.FSID
	s.persist(stick.Persist)
	s.shutdown()

	for _, c := range [][2]string{{"second", ""}, {"third", "rd.sprout.check"}} {
		word, parameter := c[0], c[1]
		s = m.boot(live + parameter)
		s.is(handover.Persistent)
		if s.note.FSID != fsid || !s.note.Zram.Num.IsZero() || s.note.Checked != (parameter != "") {
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

func TestAPersistThatWasCutOffIsSaidAndNotUsed(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live)
	s.add(stick.Persist)
	s.write("lost", "in memory")
	s.shutdown() // the zram is gone

	s = m.boot(live)
	s.is(handover.Volatile, "The sprout on "+stick.Persist+" lacks a device")
	s.has("lost", "")
	s.shutdown()

	// It is what a reset drops.
	s = m.boot(live + "rd.sprout.reset")
	s.is(handover.Volatile, "lacks a device", "What was kept on "+stick.Persist+" was dropped (rd.sprout.reset).")
	s.shutdown()
	s = m.boot(live)
	s.is(handover.Volatile)
}

func TestResetDropsWhatWasKept(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	for _, c := range []struct {
		name, parameter, mark, why string
	}{
		{"asked for on the command line", "rd.sprout.reset", "other", "rd.sprout.reset"},
		{"asked for in the session", "", resetFile, "asked for in the last session"},
	} {
		s := m.boot(live)
		s.is(handover.Volatile)
		s.persist(stick.Persist)
		s.write(c.mark, "")
		s.write("old", "old")
		s.shutdown()

		s = m.boot(live + c.parameter)
		s.is(handover.Volatile, "What was kept on "+stick.Persist+" was dropped ("+c.why+").")
		s.has("old", "")
		s.shutdown()
	}
	s := m.boot(live + "rd.sprout.reset")
	s.is(handover.Volatile, "There was nothing to reset")

	// What is on another disk is not dropped.
	extra := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	m.plug(extra.Path)
	s.persist(extra.Path)
	s.write(resetFile, "")
	s.shutdown()
	s = m.boot(live)
	s.is(handover.Persistent, "The last session asked for a reset, but the sprout on "+extra.Path+" is not on the disk of the media")
	s.shutdown()
	s = m.boot(live + "rd.sprout.reset")
	s.is(handover.Volatile, "There was nothing to reset")
	s.shutdown()
	s = m.boot(live)
	s.is(handover.Persistent, "asked for a reset")
}

// A stick with another image, and the persistence of this one's.
func TestSproutsOfOtherSeedsAreNamedAndLeftAlone(t *testing.T) {
	m := newMachine(t)
	seed := m.seed(seedtest.Spec{})
	first := m.stick(seed.Path)
	s := m.boot(live)
	s.persist(first.Persist)
	s.write("mine", "mine")
	s.shutdown()

	other := newMachine(t)
	otherStick := other.stick(other.seed(seedtest.Spec{Label: "other"}).Path)
	other.plug(first.Path)
	s = other.boot("root=sprout:" + otherStick.Media)
	s.is(handover.Volatile, "The sprout on "+first.Persist+" belongs to another seed")
	s.shutdown()
	s = other.boot("root=sprout:" + otherStick.Media + " rd.sprout.reset")
	s.is(handover.Volatile, "belongs to another seed", "There was nothing to reset")
	s.shutdown()

	// The image was changed, if only by setting the flag again.
	for _, value := range []string{"0", "1"} {
		tool(t, "btrfstune", "-S", value, "-f", seed.Path)
	}
	newer := newMachine(t)
	newerStick := newer.stick(seed.Path)
	newer.plug(first.Path)
	s = newer.boot("root=sprout:" + newerStick.Media)
	s.is(handover.Volatile, "The sprout on "+first.Persist+" was made with another version of this seed")
	s.shutdown()

	s = m.boot(live)
	s.is(handover.Persistent)
	s.has("mine", "mine")
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// copyOf plugs in a disk that is a copy of a stick, byte by byte.
func (m *machine) copyOf(stick *seedtest.Stick) (media, persist string) {
	m.t.Helper()
	twin := m.twin(stick.Disk)
	var parts []string
	for number := 1; number <= 2; number++ {
		part := filepath.Base(stick.Path) + "p" + strconv.Itoa(number)
		path, err := twin.AddPartition(m.t.Context(), number, sysfs(m.t, part, "start"), sysfs(m.t, part, "size"))
		if err != nil {
			m.t.Fatal(err)
		}
		parts = append(parts, path)
	}
	return parts[0], parts[1]
}

// twin plugs in a disk with the same content, without its partitions.
func (m *machine) twin(disk *seedtest.Disk) *seedtest.Disk {
	m.t.Helper()
	in, err := os.Open(disk.Image)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	info, err := in.Stat()
	if err != nil {
		m.t.Fatal(err)
	}
	twin := seedtest.OpenDisk(m.t, seedtest.DiskSpec{Size: info.Size()})
	out, err := os.OpenFile(twin.Path, os.O_WRONLY, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	for at := int64(0); ; {
		from, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			break // no more data
		}
		if at, err = unix.Seek(int(in.Fd()), from, unix.SEEK_HOLE); err != nil {
			m.t.Fatal(err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, from), io.NewSectionReader(in, from, at-from)); err != nil {
			m.t.Fatal(err)
		}
	}
	if err := out.Sync(); err != nil {
		m.t.Fatal(err)
	}
	m.plug(twin.Path)
	return twin
}

// sysfs reads a number of sectors, in bytes.
func sysfs(t *testing.T, name, attribute string) int64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/class/block", name, attribute))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return 512 * n
}

func TestACopiedStickIsNeverMixedWithTheOther(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live)
	s.persist(stick.Persist)
	s.write("which", "both")
	s.shutdown()
	media, persist := m.copyOf(stick)

	// Each of the two is booted from in turn, and each time the kernel knows of
	// the wrong one already, as after udev's scan.
	for _, c := range []struct{ media, persist, wrong, word string }{
		{stick.Media, stick.Persist, persist, "first"},
		{media, persist, stick.Persist, "second"},
	} {
		if err := btrfs.Scan(c.wrong); err != nil {
			t.Fatal(err)
		}
		s := m.boot("root=sprout:" + c.media)
		s.is(handover.Persistent, "There are copies of the sprout on "+c.persist+": "+c.wrong+".")
		s.has("which", "both")
		s.write("which", c.word)
		s.shutdown()
	}
	for _, c := range []struct{ media, word string }{{stick.Media, "first"}, {media, "second"}} {
		s := m.boot("root=sprout:" + c.media)
		s.has("which", c.word)
		s.shutdown()
	}

	// By the label both are meant.
	s = m.boot(live)
	s.is(handover.Persistent, "root=sprout:LABEL=LIVE is on more than one device: ", "There are copies")
	s.shutdown()

	// And if only the second has something that was kept, it is the second.
	s = m.boot("root=sprout:" + stick.Media + " rd.sprout.reset")
	s.is(handover.Volatile, "There are copies", "What was kept on "+stick.Persist+" was dropped")
	s.shutdown()
	s = m.boot(live)
	s.is(handover.Persistent, "is on more than one device: "+media+" and "+stick.Media+". The first")
	s.has("which", "second")
}

func TestASproutOnTwoDisks(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	inside := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	s := m.boot(live)
	s.persist(stick.Persist)
	s.write("mine", "mine")
	s.add(inside.Path) // a flatten has begun
	s.shutdown()

	s = m.boot(live)
	s.is(handover.Volatile, "The sprout on "+stick.Persist+" lacks 1 of 2 devices")
	s.shutdown()

	// The disk comes late: it is not there when the kernel is asked first.
	looks := 0
	s = m.boot(live, func(c *Config) {
		c.Late = 30 * time.Second
		c.Only = func(id block.ID) bool {
			if id.Path == inside.Path {
				looks++
				return looks > 3
			}
			return m.sees(id)
		}
	})
	s.is(handover.Persistent)
	s.has("mine", "mine")
	s.with(func(f *btrfs.FS) error { return f.Remove(3) }) // the stick's
	s.shutdown()

	m.plug(inside.Path)
	s = m.boot(live)
	s.is(handover.Persistent)
	s.has("mine", "mine")
	s.with(func(f *btrfs.FS) error { return f.Remove(1) }) // the seed
	s.shutdown()

	// It is an installed system now, and nobody's business here.
	s = m.boot(live + "rd.sprout.reset")
	s.is(handover.Volatile, "There was nothing to reset")
	s.shutdown()
}

func TestPersistenceOnANamedDevice(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	extra := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	m.plug(extra.Path)
	for _, c := range []struct{ device, word string }{{stick.Persist, "stick"}, {extra.Path, "extra"}} {
		s := m.boot(live + "rd.sprout.persist=no")
		s.persist(c.device)
		s.write("which", c.word)
		s.shutdown()
	}
	s := m.boot(live)
	s.is(handover.Persistent, "There is more than one sprout of this seed: the one on "+stick.Persist+" is used")
	s.has("which", "stick")
	s.shutdown()
	s = m.boot(live + "rd.sprout.persist=" + extra.Path)
	s.is(handover.Persistent, "The sprout on "+stick.Persist+" is not used: rd.sprout.persist= names "+extra.Path)
	s.has("which", "extra")
	s.shutdown()
	s = m.boot(live + "rd.sprout.persist=LABEL=sproutd-test")
	s.is(handover.Persistent, "There is more than one sprout")
	s.shutdown()
	s = m.boot(live + "rd.sprout.persist=LABEL=nothing")
	s.is(handover.Volatile, "rd.sprout.persist=LABEL=nothing is not there")
	s.has("which", "")
}

func TestWhatCannotBeBooted(t *testing.T) {
	m := newMachine(t)
	plain := m.seed(seedtest.Spec{Plain: true, Label: "plain"})
	stick := m.stick(plain.Path)
	empty := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	m.plug(empty.Path)
	for _, c := range []struct{ name, line, want string }{
		{"no media named", "root=/dev/sda1", "the kernel command line names no media"},
		{"media missing", "root=sprout:LABEL=GONE rd.sprout.timeout=1", "root=sprout:LABEL=GONE did not appear within 1 seconds"},
		{"image missing", live + "rd.sprout.image=/none.img", "there is no rd.sprout.image=/none.img on " + stick.Media},
		{"image is a directory", live + "rd.sprout.image=/LiveOS", "cannot use rd.sprout.image=/LiveOS on " + stick.Media + ": it is no file"},
		{"image is no seed", live, "/LiveOS/root.img on " + stick.Media + " is no seed"},
		{"nothing on it", "root=sprout:" + empty.Path, empty.Path + " holds no file system that is known"},
	} {
		t.Run(c.name, func(t *testing.T) {
			began := time.Now()
			s, err := m.try(c.line)
			if err == nil {
				s.shutdown()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error is %v, wanted %q", err, c.want)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

// Of two media with the label, the first has no image.
func TestTheNextMediaAreTried(t *testing.T) {
	m := newMachine(t)
	seed := m.seed(seedtest.Spec{})
	without := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "LIVE", without.Path)
	m.plug(without.Path)
	stick := m.stick(seed.Path)
	s := m.boot(live)
	if s.note.Media.Path != stick.Media {
		t.Errorf("booted from %s", s.note.Media.Path)
	}
	s.is(handover.Volatile, "root=sprout:LABEL=LIVE is on more than one device: "+without.Path+" and "+stick.Media,
		"There is no rd.sprout.image=/LiveOS/root.img on "+without.Path+".")
}

// The media are the seed itself, as after `dd if=root.img of=/dev/sdX1`.
func TestTheSeedIsADevice(t *testing.T) {
	m := newMachine(t)
	seed := m.seed(seedtest.Spec{Label: "bare"})
	bare := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seed.Size})
	data, err := os.ReadFile(seed.Path)
	if err == nil {
		err = os.WriteFile(bare.Path, data, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.plug(bare.Path)
	extra := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: seedtest.GiB})
	m.plug(extra.Path)
	s := m.boot("root=sprout:LABEL=bare rd.sprout.check")
	s.is(handover.Volatile)
	if s.note.Seed.Path != bare.Path || s.note.MediaMount != "" || s.note.Image != "" || !s.note.Checked || s.note.BadFiles != nil {
		t.Errorf("the note says %+v", s.note)
	}
	s.persist(extra.Path)
	s.shutdown()
	s = m.boot("root=sprout:LABEL=bare")
	s.is(handover.Persistent)
}

// A seed was released to a partition, and its session was kept beside it.
func TestAReleasedSeedIsFoundWithoutTheStick(t *testing.T) {
	for _, label := range []string{"seed", "LIVE"} { // the label of the media is LIVE
		t.Run(label, func(t *testing.T) {
			m := newMachine(t)
			seed := m.seed(seedtest.Spec{Label: label})
			stick := m.stick(seed.Path)
			inside := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: 2 * seedtest.GiB})
			copied, err := inside.AddPartition(t.Context(), 1, seedtest.MiB, seed.Size+64*seedtest.MiB)
			if err != nil {
				t.Fatal(err)
			}
			kept, err := inside.AddPartition(t.Context(), 2, 512*seedtest.MiB, seedtest.GiB)
			if err != nil {
				t.Fatal(err)
			}
			m.plug(inside.Path)
			s := m.boot(live)
			s.persist(kept)
			s.write("mine", "first")
			s.shutdown()
			tool(t, "dd", "if="+seed.Path, "of="+copied, "bs=4M", "conv=fsync", "status=none")
			fsid := superOf(t, copied).FSID
			// from is a session that reads its seed from there.
			from := func(s *session, media string, warnings ...string) {
				t.Helper()
				s.is(handover.Persistent, warnings...)
				if s.note.Media.Path != media || (s.note.Seed.Path == media) != (media == copied) || (s.note.MediaMount == "") != (media == copied) {
					t.Errorf("the note says %+v", s.note)
				}
			}

			_ = btrfs.Scan(copied) // as udev does
			s = m.boot(live)
			from(s, stick.Media)
			s.has("mine", "first")
			s.shutdown()

			_ = btrfs.Scan(copied)
			s = m.boot(live + "rd.sprout.persist=no rd.sprout.check")
			s.is(handover.Volatile)
			if !s.note.Seed.Num.IsLoop() || !s.note.Checked {
				t.Errorf("the note says %+v", s.note)
			}
			s.shutdown()

			both := m.disks
			m.disks = []string{filepath.Base(inside.Path)} // the stick is pulled
			warnings := []string{"root=sprout:LABEL=LIVE is not there: what was kept is used with the copy of its seed on " + copied}
			if label == "LIVE" { // then it is what was named
				warnings = nil
			}
			s = m.boot(live)
			from(s, copied, warnings...)
			s.has("mine", "first")
			s.write("mine", "second")
			s.shutdown()

			// A stick that comes late is not too late.
			m.disks = both
			looks := 0
			s = m.boot(live, func(c *Config) {
				c.Late = 30 * time.Second
				c.Only = func(id block.ID) bool {
					if strings.HasPrefix(id.Path, stick.Path) {
						looks++
						return looks > 8
					}
					return m.sees(id)
				}
			})
			from(s, stick.Media)
			s.has("mine", "second")
			if label == "seed" {
				s.write(resetFile, "")
			}
			s.shutdown()

			m.disks = []string{filepath.Base(inside.Path)}
			if label == "seed" {
				// Nothing is dropped that could not be begun again.
				s = m.boot(live)
				from(s, copied, "asked for a reset", "is not there")
				s.has("mine", "second")
				s.shutdown()
				for _, parameter := range []string{"rd.sprout.persist=no", "rd.sprout.reset"} {
					if _, err := m.try(live + parameter + " rd.sprout.timeout=1"); err == nil || !strings.Contains(err.Error(), "did not appear within 1 seconds") {
						t.Errorf("with %s: %v", parameter, err)
					}
				}
			}
			// Without what was kept there is nothing to go on with, unless it is named.
			tool(t, "wipefs", "--quiet", "--all", kept)
			if label == "seed" {
				if _, err := m.try(live + "rd.sprout.timeout=1"); err == nil || !strings.Contains(err.Error(), "did not appear within 1 seconds") {
					t.Errorf("from the copy alone: %v", err)
				}
			}
			s = m.boot("root=sprout:UUID=" + fsid.String())
			s.is(handover.Volatile)
			s.has("mine", "")
		})
	}
}

func TestWithoutZramASessionIsInAFile(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live, func(c *Config) { c.NoZram = true })
	s.is(handover.Volatile, "The kernel has no zram: a file in memory is used instead")
	if !s.note.MemoryLoop.Num.IsLoop() || s.note.MemoryLoop.Size < btrfs.MinZram || !s.note.Zram.Num.IsZero() {
		t.Errorf("the note says %+v", s.note)
	}
	if left := glob(t, filepath.Join(m.dir, "run", "memory*")); len(left) > 0 {
		t.Errorf("%q is in sight", left)
	}
	s.persist(stick.Persist)
	s.shutdown()
	s = m.boot(live)
	s.is(handover.Persistent)
}

func TestTheWishForACopyInMemoryIsPassedOn(t *testing.T) {
	m := newMachine(t)
	m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live + "rd.sprout.ram")
	s.is(handover.Volatile)
	if !s.note.ToRAM {
		t.Errorf("the note is %+v", s.note)
	}
}

func TestNonsenseOnTheCommandLineIsNoReasonNotToBoot(t *testing.T) {
	m := newMachine(t)
	m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live + "rd.sprout.zram=1M rd.sprout.persist=perhaps rd.sprout.ram=2 rd.sprout.colour=red")
	s.is(handover.Volatile, "rd.sprout.persist=perhaps is none of", "rd.sprout.ram=2 is neither yes nor no", "rd.sprout.colour=red is no parameter",
		"rd.sprout.zram=1048576 is too small for this seed: 1024 MiB are used")
}

// flip damages one byte, where a text begins.
func flip(t *testing.T, path, text string) {
	t.Helper()
	flipped := false
	damage(t, path, func(data []byte, _ int64) int {
		at := bytes.Index(data, []byte(text))
		if flipped {
			at = -1
		}
		flipped = flipped || at >= 0
		return at
	})
	if !flipped {
		t.Fatalf("%s does not hold the text", path)
	}
}

// flipTree damages every block of a tree.
func flipTree(t *testing.T, path string, tree uint64) {
	t.Helper()
	const node, header, owner = 16 << 10, 101, 88
	super := superOf(t, path)
	n := damage(t, path, func(data []byte, at int64) int {
		for from := int(-at & (node - 1)); from+node <= len(data); from += node {
			block := data[from : from+node]
			if binary.LittleEndian.Uint64(block[owner:]) == tree && bytes.Equal(super.CsumType.Sum(block[32:]), block[:super.CsumType.Size()]) {
				return from + header
			}
		}
		return -1
	})
	if n == 0 {
		t.Fatalf("%s has no block of tree %d", path, tree)
	}
}

func superOf(t *testing.T, path string) btrfs.Super {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	super, err := btrfs.ReadSuper(f, 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	return super
}

// damage flips the bytes that find gives in each MiB, until it says -1, and
// counts them.
func damage(t *testing.T, path string, find func(data []byte, at int64) int) int {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	data, count := make([]byte, 1<<20), 0
	for at := int64(0); ; at += int64(len(data)) {
		n, err := f.ReadAt(data, at)
		for i := find(data[:n], at); i >= 0; i = find(data[:n], at) {
			data[i] ^= 0x10
			if _, err := f.WriteAt(data[i:i+1], at+int64(i)); err != nil {
				t.Fatal(err)
			}
			count++
		}
		if err != nil {
			break
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return count
}

func TestAFlippedByteIsFoundAndTheFileIsNamed(t *testing.T) {
	m := newMachine(t)
	seed := m.seed(seedtest.Spec{})
	flip(t, seed.Path, strings.Repeat("seed ", 5000))
	m.stick(seed.Path)
	s := m.boot(live + "rd.sprout.check")
	wantWarnings(t, s.note.Warnings, "The seed is damaged: these files cannot be read: from-the-seed.")
	if s.note.Mode != handover.Volatile || !s.note.Checked || !slices.Equal(s.note.BadFiles, []string{"from-the-seed"}) {
		t.Errorf("the note says %+v", s.note)
	}
	s.shutdown()

	s = m.boot(live) // nobody looked
	if s.note.Checked || s.note.BadFiles != nil || s.note.Warnings != nil {
		t.Errorf("the note says %+v", s.note)
	}
}

func TestASeedWithADamagedTreeIsNotMounted(t *testing.T) {
	m := newMachine(t)
	seed := m.seed(seedtest.Spec{})
	flipTree(t, seed.Path, 5) // files and directories
	stick := m.stick(seed.Path)
	for _, parameter := range []string{"", "rd.sprout.check"} {
		_, err := m.try(live + parameter)
		if err == nil || !strings.Contains(err.Error(), "the seed /LiveOS/root.img on "+stick.Media+" is damaged") {
			t.Errorf("with %q the error is %v", parameter, err)
		}
	}
}

func TestASproutWithADamagedTreeIsNotUsed(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	for _, c := range []struct {
		tree    uint64
		warning string
	}{
		{5, "Cannot use the sprout on " + stick.Persist},                                           // files and directories
		{3, "The filesystem on " + stick.Persist + " is damaged and is not used: cannot read the"}, // chunks
	} {
		s := m.boot(live + "rd.sprout.persist=no")
		s.persist(stick.Persist)
		s.write("home/of/mine", "mine")
		s.shutdown()
		flipTree(t, stick.Persist, c.tree)
		s = m.boot(live)
		s.is(handover.Volatile, c.warning)
		s.shutdown()
		s = m.boot(live + "rd.sprout.reset")
		s.shutdown()
		s = m.boot(live)
		s.is(handover.Volatile)
		s.shutdown()
	}
}

// The power fails right after a program was told that its file is on the stick.
func TestWhatWasFsyncedIsThereAfterAPowerCut(t *testing.T) {
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live)
	s.persist(stick.Persist)
	s.write("letter", "dear")
	f, err := os.OpenFile(filepath.Join(s.root, "letter"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	// An fsync that comes with much else to write is a commit. One of the next
	// goes to the log alone.
	want := "dear"
	for len(want) < 100 && superOf(t, stick.Persist).LogRoot == 0 {
		if _, err := f.WriteString("!"); err != nil {
			t.Fatal(err)
		}
		want += "!"
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	media, persist := m.copyOf(stick) // as it is now
	s.shutdown()
	if superOf(t, persist).LogRoot == 0 {
		t.Error("there is no log to replay")
	}

	m.disks = []string{strings.TrimSuffix(filepath.Base(media), "p1")}
	s = m.boot(live)
	s.is(handover.Persistent)
	s.has("letter", want)
}

// An image as dd puts it onto a stick: the disk and its first partition show the
// same file system. It is only looked at: not every kernel that runs tests has
// ISO 9660.
func TestOfAnIsohybridStickThePartitionIsMeant(t *testing.T) {
	m := newMachine(t)
	testenv.NeedTool(t, "xorriso")
	iso := filepath.Join(t.TempDir(), "iso")
	tool(t, "xorriso", "-as", "mkisofs", "-quiet", "-V", "MY LIVE", "-R", "-partition_offset", "16", "-o", iso, t.TempDir())
	data, err := os.ReadFile(iso)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(data))
	stick := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: size + seedtest.MiB})
	if err := os.WriteFile(stick.Path, data, 0); err != nil {
		t.Fatal(err)
	}
	m.plug(stick.Path)
	request, _ := ParseCommandLine(`root=sprout:LABEL=MY\x20LIVE`)
	blocks := block.New()
	b := &boot{request: request, blocks: blocks, scan: newScanner(blocks, m.sees, func(text string) { t.Error(text) })}
	wantCandidates := func(want string) {
		t.Helper()
		list, _, _, err := b.candidates(t.Context())
		if err != nil || len(list) != 1 || list[0].Path != want || list[0].FS.Type != "iso9660" {
			t.Errorf("the media are %+v (%v), wanted %s", list, err, want)
		}
	}
	wantCandidates(stick.Path) // as on a CD
	const start = 16 * 2048
	media, err := stick.AddPartition(t.Context(), 1, start, size-start)
	if err != nil {
		t.Fatal(err)
	}
	wantCandidates(media)
}
