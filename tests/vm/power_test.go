package vm

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sproutd.org/sproutd/tests/vm/guest"
)

// moment is when the power is cut.
type moment struct {
	move     string // persist, install, or "install what was persisted"
	step     uint32 // that has begun
	progress float64
	after    time.Duration
}

func (c moment) String() string {
	return fmt.Sprintf("%s, step %d, %.0f%%, %d ms later", c.move, c.step, c.progress*100, c.after.Milliseconds())
}

// moments draws when the power is cut: every other time soon after the begin of a
// step, to meet the short ones, else at a part of the way.
func moments(rnd *rand.Rand, n int) (list []moment) {
	moves := []string{"persist", "install", "install what was persisted"}
	for i := range n {
		c := moment{move: moves[i%len(moves)], after: time.Duration(rnd.IntN(500)) * time.Millisecond}
		if (i/len(moves))%2 == 0 {
			c.progress = 0.05 + 0.9*rnd.Float64()
		} else {
			c.step, c.after = uint32(2+rnd.IntN(5)), 2*c.after
		}
		list = append(list, c)
	}
	return list
}

// TestPowerCuts cuts the power SPROUTD_VM_CUTS times, at moments drawn with
// SPROUTD_VM_DRAW. The results are also a table in a file.
func TestPowerCuts(t *testing.T) {
	needVM(t)
	count, err := strconv.Atoi(os.Getenv("SPROUTD_VM_CUTS"))
	if err != nil {
		count = 6
	}
	table := []string{"| the power was cut at | next boot | said | then |", "|---|---|---|---|"}
	for i, c := range moments(draw(t), count) {
		t.Run(fmt.Sprint(i+1), func(t *testing.T) {
			row := cutAndGoOn(t, c)
			t.Log(row)
			table = append(table, row)
		})
	}
	must(t, os.WriteFile(filepath.Join(artefacts, "cuts.md"), []byte(strings.Join(table, "\n")+"\n"), 0o644))
}

// draw gives a source of numbers that can be had again.
func draw(t *testing.T) *rand.Rand {
	t.Helper()
	number, err := strconv.ParseUint(os.Getenv("SPROUTD_VM_DRAW"), 10, 64)
	if err != nil {
		number = rand.Uint64N(1_000_000)
	}
	t.Logf("to have the same again: SPROUTD_VM_DRAW=%d", number)
	return rand.New(rand.NewPCG(number, 0))
}

func cutAndGoOn(t *testing.T, c moment) (row string) {
	m := newMachine(t)
	stick, disk := m.stick(), m.disk("virtio", 3*gib)
	stick.limit, disk.limit = 16*mib, 16*mib
	m.session()
	m.call("StartWriter", "/work", &guest.None{}, callTime)
	if c.move == "install what was persisted" {
		m.run("sproutctl", "persist", "free")
	}
	job := m.begin(c.move, disk)
	last := m.at(job, c.step, c.progress)
	time.Sleep(c.after) // in the middle of something
	m.cut()

	stick.limit, disk.limit = 0, 0
	m.bootWith()
	s := m.sprout()
	row = fmt.Sprintf("| %s (%s, %.0f %%) | %s | %s |", c.move, cmpOr(last.Step, "not begun"), last.Progress*100, s.State, strings.Join(s.Warnings, " "))
	if s.State == "volatile" {
		// The stick does not boot what has left it. Else what was in memory is gone,
		// and only that may be.
		if c.move != "persist" && m.sh("mount -o ro "+disk.path()+" /mnt").Code == 0 {
			m.verify("/mnt/work")
			return row + " whole on the disk |"
		}
		if c.move == "install what was persisted" {
			t.Errorf("what was persisted is gone: %s", row)
		}
		return row + " asked again |"
	}
	m.verify("/work")
	if s.State == "partial" {
		m.wantSays("resume", "sproutctl", "status")
		if s.CurrentJob == "" {
			m.finish(m.job("resume"))
		} else {
			m.finish(s.CurrentJob)
		}
	}
	want := "installed"
	if c.move == "persist" || s.State == "persistent" { // an installation that had not begun
		want = "persistent"
	}
	got := m.sprout().State
	if got != want {
		t.Errorf("in the end the sprout is %s, not %s", got, want)
	}
	m.verify("/work")
	m.wantNoComplaints()
	return row + " " + got + " |"
}

func cmpOr(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

// begin starts a move and gives the path of its job.
func (m *machine) begin(move string, disk *disk) string {
	m.t.Helper()
	if move == "persist" {
		return m.job("persist", "free")
	}
	return m.job("flatten", "--yes", "--bootloader=none", disk.path())
}

// verify compares what the writer promised in the last boot with what is there.
func (m *machine) verify(dir string) {
	m.t.Helper()
	m.call("Verify", guest.Promises{Dir: dir, Told: promised(m.told, nil)}, &guest.None{}, readTime)
}

func TestWritesThatWereFlushedAreEnoughToPersist(t *testing.T) {
	replayed(t, "persist", func(m *machine) *disk { return m.disks[0] })
}

func TestWritesThatWereFlushedAreEnoughToInstall(t *testing.T) {
	replayed(t, "install", func(m *machine) *disk { return m.disks[1] })
}

// replayed has everything recorded that a move writes to one disk. Then the disk
// is made as it would be had the power failed right after a flush, with some of
// the writes that came after it in any order, and the early boot has to find a
// root on it, with all that was promised by then.
func replayed(t *testing.T, move string, on func(*machine) *disk) {
	m := newMachine(t)
	m.stick()
	m.disk("virtio", 3*gib)
	recorded := on(m)
	recorded.record = filepath.Join(m.dir, "writes.log")
	m.session()
	m.call("StartWriter", "/work", &guest.None{}, callTime)
	m.finish(m.begin(move, m.disks[1]))
	m.call("AwaitFsyncs", 20, &guest.None{}, moveTime)
	m.cut()
	told := m.told

	rnd := draw(t)
	log, err := os.Open(recorded.record)
	must(t, err)
	defer log.Close()
	entries, err := readWriteLog(log)
	must(t, err)
	points := flushPoints(rnd, entries, replays())
	target := m.replayTarget(recorded)
	recorded.record = ""
	place := slices.Index(m.disks, recorded)
	for at, i := range points {
		must(t, target.replay(log, entries[target.applied:i+1]))
		target.applied = i + 1
		m.disks[place] = target.with(m, recorded, log, rnd, entries[i+1:])
		m.startEarlyBoot()
		m.awaitAgent()
		out := m.runFor(bootTime, "sprout-initrd", "mount", "/root")
		if out.Code != 0 {
			m.fail("after flush %d nothing can be booted: %s", at, out.Text)
		}
		if strings.Contains(out.Text, "Going on with the sprout") {
			may := func(p promise) bool { return p.logs[recorded] <= entries[i].end }
			m.call("Verify", guest.Promises{Dir: "/root/work", Told: promised(told, may)}, &guest.None{}, readTime)
		}
		t.Logf("flush %d of %d (%d MiB of the log): %s", i, len(entries), entries[i].end/mib, strings.ReplaceAll(out.Text, "\n", " "))
		m.cut()
	}
	_ = os.Remove(log.Name())
}

// replays is how many points of a log are looked at.
func replays() int {
	if n, err := strconv.Atoi(os.Getenv("SPROUTD_VM_REPLAYS")); err == nil {
		return n
	}
	return 6
}

// flushPoints draws some of the entries after which everything is on the disk.
// The last one is always among them.
func flushPoints(rnd *rand.Rand, entries []logEntry, n int) []int {
	var all []int
	for i, e := range entries {
		if e.flags&logFlush != 0 && i > 0 {
			all = append(all, i)
		}
	}
	last := all[len(all)-1]
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = append(all[:min(n-1, len(all)-1)], last)
	slices.Sort(all)
	return slices.Compact(all)
}

// replay is the disk that is written to as a log says.
type replay struct {
	path    string
	disk    *os.File
	applied int // entries
}

// replayTarget makes a disk as the recorded one was at first.
func (m *machine) replayTarget(recorded *disk) *replay {
	m.t.Helper()
	r := &replay{path: filepath.Join(m.dir, "replayed.img")}
	size := int64(3 * gib)
	if recorded.bus == "usb" {
		host(m.t, "cp", "--sparse=always", "--reflink=auto", live.path, r.path)
		info, err := os.Stat(live.path)
		must(m.t, err)
		size = info.Size()
	}
	var err error
	r.disk, err = os.OpenFile(r.path, os.O_CREATE|os.O_RDWR, 0o644)
	must(m.t, err)
	must(m.t, r.disk.Truncate(size))
	m.t.Cleanup(func() { _ = r.disk.Close(); _ = os.Remove(r.path) })
	return r
}

func (r *replay) replay(log *os.File, entries []logEntry) error {
	for _, e := range entries {
		if err := e.apply(log, r.disk); err != nil {
			return err
		}
	}
	return nil
}

// with gives a copy of the disk with some of the writes that came after the
// flush: a disk may do them in any order, and be cut off anywhere.
func (r *replay) with(m *machine, as *disk, log *os.File, rnd *rand.Rand, next []logEntry) *disk {
	m.t.Helper()
	if flush := slices.IndexFunc(next, func(e logEntry) bool { return e.flags&logFlush != 0 }); flush >= 0 {
		next = next[:flush]
	}
	d := m.overlay(as.bus, as.name, r.path)
	for _, e := range next {
		// A discard may be done or not, but what it leaves is not known: left out.
		if e.size == 0 || e.flags&logDiscard != 0 || rnd.IntN(2) == 0 {
			continue
		}
		piece := filepath.Join(m.dir, "piece")
		data := make([]byte, e.size)
		_, err := log.ReadAt(data, e.data)
		must(m.t, err)
		must(m.t, os.WriteFile(piece, data, 0o644))
		host(m.t, "qemu-io", "-c", fmt.Sprintf("write -q -s %s %d %d", piece, e.offset, e.size), d.file)
		_ = os.Remove(piece)
	}
	return d
}
