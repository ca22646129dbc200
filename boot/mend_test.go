package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/handover"
	"sproutd.org/sproutd/btrfs"
	"sproutd.org/sproutd/tests/seedtest"
)

func TestWhichReplacesWereCutOff(t *testing.T) {
	wiped := func(f found) found {
		f.FS.Type, f.Scratched = "", true
		return f
	}
	member, target := wiped(part(0, 4, 'a', 3, 20)), part(1, 2, 'a', 0, 20)
	for _, c := range []struct {
		name  string
		found []found
		want  string
	}{
		{"the member is wiped, the target is none yet", []found{member, target}, "/dev/sda4 to /dev/sdb2"},
		{"another member is there as well", []found{member, target, part(2, 1, 'a', 4, 20)}, "/dev/sda4 to /dev/sdb2"},
		{"two of them", []found{member, target, wiped(part(2, 1, 'b', 3, 7)), part(3, 1, 'b', 0, 7)}, "/dev/sda4 to /dev/sdb2, /dev/sdc1 to /dev/sdd1"},
		{"the replace came to its end", []found{member, part(1, 2, 'a', 3, 21)}, ""},
		{"and something was left on a third disk", []found{member, target, part(2, 1, 'a', 3, 21)}, ""},
		{"the kernel had not got there", []found{part(0, 4, 'a', 3, 20), target}, ""},
		{"the target is of another time", []found{member, part(1, 2, 'a', 0, 19)}, ""},
		{"the target is of another filesystem", []found{member, part(1, 2, 'b', 0, 20)}, ""},
		{"the target is not there", []found{member}, ""},
		{"the target was given up", []found{part(0, 4, 'a', 3, 21), wiped(target)}, ""},
		{"the stick was copied", []found{member, target, wiped(part(2, 4, 'a', 3, 20))}, ""},
		{"the disk was copied", []found{member, target, part(2, 2, 'a', 0, 20)}, ""},
	} {
		for _, list := range [][]found{c.found, reversed(c.found)} {
			var got []string
			for _, cut := range cutOffs(list) {
				got = append(got, cut.member.Path+" to "+cut.target.Path)
			}
			slices.Sort(got)
			if text := strings.Join(got, ", "); text != c.want {
				t.Errorf("%s: found %q, wanted %q", c.name, text, c.want)
			}
		}
	}
}

// superAt reads what is at the places of superblocks on a device.
func superAt(t *testing.T, path string) (blocks [2][4096]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range blocks {
		if _, err := f.ReadAt(blocks[i][:], int64(block.BtrfsSuperblocks()[i])); err != nil {
			t.Fatal(err)
		}
	}
	return blocks
}

// setSuper writes a superblock with the right checksum to all its places.
func setSuper(t *testing.T, path string, super [4096]byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range 2 {
		at := block.BtrfsSuperblocks()[i]
		binary.LittleEndian.PutUint64(super[48:], at)
		copy(super[:32], btrfs.CsumCRC32C.Sum(super[32:]))
		if _, err := f.WriteAt(super[:], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// Where a superblock has what; struct btrfs_super_block.
const (
	magicAt, generationAt, logRootAt, devItemAt, labelAt = 64, 72, 96, 201, 299
)

// cutOffDisks are a stick and a disk as they are when the power is cut at the end
// of a replace.
type cutOffDisks struct {
	*machine
	media, persist, target string
	// before and after are the superblocks of the target without and with the
	// commit that ends the replace.
	before, after [4096]byte
	// during is the last one seen of it as a target; flushed one of an fsync right
	// after that, if there was any, and letters how much it had promised by then.
	during, flushed [4096]byte
	letters         int64
	// stick and disk are those of the session, in which the replace came to its end.
	stick  *seedtest.Stick
	inside *seedtest.Disk
	big    []byte
}

// cutOffReplace has the kernel copy what was kept on a stick to a disk, to the end,
// and takes copies of both at once. All that is not as at the cut is the
// superblock of the target, which the last commit wrote: the one before is what the
// kernel had on the member, with the device item of a target.
func cutOffReplace(t *testing.T) cutOffDisks {
	t.Helper()
	m := newMachine(t)
	stick := m.stick(m.seed(seedtest.Spec{}).Path)
	s := m.boot(live)
	s.persist(stick.Persist)
	big := make([]byte, 64<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(big)
	s.write("big", string(big))
	s.write("home/of/mine", "mine")
	s.shutdown()

	s = m.boot(live)
	s.is(handover.Persistent)
	inside := seedtest.OpenDisk(t, seedtest.DiskSpec{Size: 2 * seedtest.GiB})
	c := cutOffDisks{machine: m, stick: stick, inside: inside, big: big}
	start := sysfs(t, filepath.Base(stick.Persist), "start")
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		c.watch(stop, start)
	}()
	s.with(func(f *btrfs.FS) error { return f.Replace(3, inside.Path) })
	close(stop)
	<-ended
	c.media, c.persist = m.copyOf(stick)
	c.target = m.twin(inside).Path
	s.shutdown()

	c.before, c.after = superAt(t, c.persist)[0], superAt(t, c.target)[0]
	copy(c.before[magicAt:], "_BHRfS_M")
	copy(c.before[devItemAt:labelAt], c.during[devItemAt:labelAt])
	switch {
	case generation(c.during) == 0:
		t.Fatal("the target was never seen as one")
	case generation(c.during) != generation(c.before) || !bytes.Equal(c.during[logRootAt:][:8], c.before[logRootAt:][:8]):
		t.Log("the last superblock of the target was there too shortly to be seen")
	case !bytes.Equal(c.during[32:], c.before[32:]):
		t.Error("the last superblock of the target differs from the member's in more than the device")
	}
	return c
}

func generation(super [4096]byte) uint64 { return binary.LittleEndian.Uint64(super[generationAt:]) }

// watch notes the superblocks of the target as they come, while one letter after
// the other is written to a file and flushed, until that has given the target its devid.
func (c *cutOffDisks) watch(stop <-chan struct{}, start int64) {
	f, err := os.Create(filepath.Join(c.dir, "sysroot", "letters"))
	if err != nil {
		c.t.Error(err)
		return
	}
	defer func() { _ = f.Close() }()
	stick, err := os.Open(c.stick.Image)
	if err != nil {
		c.t.Error(err)
		return
	}
	defer func() { _ = stick.Close() }()
	var promised atomic.Int64
	var writer sync.WaitGroup
	enough := make(chan struct{})
	writer.Go(func() {
		for n := range int64(10000) {
			select {
			case <-stop:
				return
			case <-enough:
				return
			default:
			}
			_, err := f.WriteString("x")
			if err = errors.Join(err, f.Sync()); err != nil {
				c.t.Error(err)
				return
			}
			promised.Store(n + 1)
		}
	})
	defer writer.Wait()
	for {
		select {
		case <-stop:
			return
		default:
		}
		letters := promised.Load()
		var member [4096]byte
		if _, err := stick.ReadAt(member[:], start+int64(block.BtrfsSuperblocks()[0])); err != nil {
			c.t.Error(err)
			return
		}
		target := superAt(c.t, c.inside.Image)[0]
		switch devid := binary.LittleEndian.Uint64(target[devItemAt:]); {
		case string(target[magicAt:][:8]) != "_BHRfS_M":
		case devid == 0:
			c.during = target
		case string(member[magicAt:][:8]) != "_BHRfS_M" && generation(target) == generation(member):
			c.flushed, c.letters = target, letters
			close(enough)
			return
		}
	}
}

// has wants a session with all that was kept.
func (c cutOffDisks) has(s *session) {
	c.t.Helper()
	s.has("home/of/mine", "mine")
	if got, err := os.ReadFile(filepath.Join(s.root, "big")); err != nil || !bytes.Equal(got, c.big) {
		c.t.Errorf("the file is not what it was (%v)", err)
	}
}

func TestAPowerCutAtTheEndOfAReplaceLosesNothing(t *testing.T) {
	c := cutOffReplace(t)
	m, copies := c.machine, c.disks[1:]
	wiped := superAt(t, c.persist)
	unchanged := func(path string) {
		t.Helper()
		if superAt(t, path) != wiped {
			t.Errorf("the superblocks of %s were changed", path)
		}
	}

	// This is how it ends without a power cut.
	m.disks = []string{filepath.Base(c.stick.Path), filepath.Base(c.inside.Path)}
	s := m.boot(live)
	s.is(handover.Persistent)
	c.has(s)
	s.shutdown()
	unchanged(c.stick.Persist)
	// And so if the wipe of the member has not reached its medium.
	member := wiped[0]
	copy(member[magicAt:], "_BHRfS_M")
	setSuper(t, c.stick.Persist, member)
	left := superAt(t, c.stick.Persist)
	s = m.boot(live)
	s.is(handover.Persistent)
	c.has(s)
	s.shutdown()
	if superAt(t, c.stick.Persist) != left {
		t.Error("the superblocks of the member were changed")
	}
	m.disks = copies

	setSuper(t, c.target, c.before)
	change := func(super [4096]byte, at int, value byte) [4096]byte {
		super[at] ^= value
		return super
	}
	for name, target := range map[string][4096]byte{
		"another filesystem": change(c.before, 32, 1),
		"another time":       change(c.before, generationAt, 1),
		"another root":       change(c.before, 80, 1<<4),
		"another label":      change(c.before, labelAt, 1),
	} {
		setSuper(t, c.target, target)
		s = m.boot(live)
		if s.note.Mode != handover.Volatile {
			t.Errorf("with a target of %s the session is %s", name, s.note.Mode)
		}
		s.shutdown()
		unchanged(c.persist)
	}
	setSuper(t, c.target, c.before)

	// One bit of the member, in its label.
	wipe(t, c.persist, [2][4096]byte{change(wiped[0], labelAt+100, 1), wiped[1]})
	s = m.boot(live)
	s.is(handover.Volatile)
	s.shutdown()
	wipe(t, c.persist, wiped)

	// Nor does a stick with another seed, or who wants nothing that was kept.
	other := newMachine(t)
	otherStick := other.stick(other.seed(seedtest.Spec{Label: "other"}).Path)
	other.disks = append(other.disks, copies...)
	s = other.boot("root=sprout:" + otherStick.Media)
	s.is(handover.Volatile)
	s.shutdown()
	s = m.boot(live + "rd.sprout.persist=no")
	s.is(handover.Volatile)
	s.shutdown()
	unchanged(c.persist)

	s = m.boot(live)
	s.is(handover.Persistent, "The power was cut when "+c.persist+" had just been copied to "+c.target+": its superblocks, which the kernel had wiped, were put back")
	c.has(s)
	var ended btrfs.ReplaceStatus
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		s.with(func(f *btrfs.FS) (err error) {
			ended, err = f.ReplaceStatus()
			return err
		})
		if ended.Over() {
			break
		}
	}
	if ended.State != btrfs.ReplaceFinished {
		t.Errorf("the replace is %+v", ended)
	}
	c.has(s)
	s.shutdown()
	if super := superOf(t, c.target); super.DevID != 3 {
		t.Errorf("the target has devid %d", super.DevID)
	}
	for i := range wiped {
		if block := superAt(t, c.persist)[i]; string(block[magicAt:][:8]) != "\x00\x00\x00\x00\x00\x00\x00\x00" {
			t.Errorf("copy %d of the member's superblock has a magic", i)
		}
	}

	s = m.boot(live)
	s.is(handover.Persistent)
	c.has(s)
}

// A program's fsync has written the superblock of the target in the middle of that.
func TestAnFsyncAtTheEndOfAReplaceLosesNothing(t *testing.T) {
	c := cutOffReplace(t)
	m := c.machine
	m.disks = m.disks[1:]
	wiped := superAt(t, c.persist)
	member := wiped[0]
	copy(member[magicAt:], "_BHRfS_M")

	// The member is there and the target is not: that has to come back.
	all := m.disks
	m.disks = all[:1]
	setSuper(t, c.persist, member)
	s := m.boot(live)
	s.is(handover.Volatile, "Cannot use the sprout on "+c.persist)
	s.shutdown()
	m.disks = all
	flushed := member
	if generation(c.flushed) != 0 {
		t.Log("the superblock that an fsync wrote was seen")
		flushed = c.flushed
	}
	setSuper(t, c.target, flushed)
	wipe(t, c.persist, wiped)

	s = m.boot(live)
	s.is(handover.Persistent, "The power was cut when "+c.persist+" had just been copied to "+c.target+", which takes its place.")
	c.has(s)
	if letters, err := os.ReadFile(filepath.Join(s.root, "letters")); err != nil || int64(len(letters)) < c.letters {
		t.Errorf("of %d letters there are %d (%v)", c.letters, len(letters), err)
	}
	s.with(func(f *btrfs.FS) error {
		status, err := f.ReplaceStatus()
		if !status.Over() {
			t.Errorf("the replace is %+v", status)
		}
		return err
	})
	s.shutdown()
	if superAt(t, c.persist) != wiped {
		t.Error("the superblocks of the member were changed")
	}
	s = m.boot(live)
	s.is(handover.Persistent)
	c.has(s)
}

// wipe puts what was left of superblocks in their places.
func wipe(t *testing.T, path string, blocks [2][4096]byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range blocks {
		if _, err := f.WriteAt(blocks[i][:], int64(block.BtrfsSuperblocks()[i])); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}
