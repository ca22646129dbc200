package block

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// plant makes the directory tree that a file in testdata describes.
func plant(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		file, target, link := strings.Cut(line, " -> ")
		var content string
		if !link {
			file, content, _ = strings.Cut(line, " = ")
		}
		path := filepath.Join(root, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if link {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(strings.NewReplacer(`\n`, "\n", `\t`, "\t").Replace(content)), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// onPaper is a System that reads a planted tree; its devices open as empty
// files and carry the signatures given by kernel name.
func onPaper(t *testing.T, signatures map[string][]Signature) *System {
	t.Helper()
	s := NewAt(plant(t, "live-stick.tree"))
	s.openNode = func(path string, _ DevNum) (*os.File, error) {
		return os.Create(filepath.Join(t.TempDir(), filepath.Base(path)))
	}
	s.signatures = func(_ context.Context, f *os.File) ([]Signature, error) {
		name := filepath.Base(f.Name())
		if name == "sda2" {
			return nil, unix.EIO
		}
		return signatures[name], nil
	}
	s.loopBacking = func(string) (backing, error) { return backing{}, unix.EPERM }
	return s
}

func TestListOfALiveMedium(t *testing.T) {
	gpt := []Signature{{Type: "gpt", Usage: "partition-table", Offset: 512}}
	list, err := onPaper(t, map[string][]Signature{"sda": gpt}).List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]Device{}
	var names []string
	for _, d := range list {
		names = append(names, d.Name)
		byName[d.Name] = d
	}
	if want := []string{"loop0", "loop1", "sda", "sda1", "sda2", "sdb", "sdb1", "vda", "vda1", "vda2", "vda3"}; !slices.Equal(names, want) {
		t.Fatalf("listed %v, want %v", names, want)
	}

	ids, err := NewAt(onPaper(t, nil).root).IDs()
	if err != nil || len(ids) != len(list) {
		t.Fatalf("by identity alone there are %+v (%v)", ids, err)
	}
	for i := range ids {
		if ids[i] != list[i].ID {
			t.Errorf("by identity alone %s is %+v", names[i], ids[i])
		}
	}

	if label := NewAt(onPaper(t, nil).root).PartLabel(byName["vda1"].Num); label != "my root" {
		t.Errorf("the partition's name is %q", label)
	}

	stick := byName["sda"]
	wantID := ID{Num: DevNum{8, 0}, Path: "/dev/sda", DiskSeq: 21, Serial: "4C530001234", Size: 30031872 * 512}
	if stick.ID != wantID {
		t.Errorf("the stick is %+v, want %+v", stick.ID, wantID)
	}
	if stick.Model != "Ultra Fit" || !stick.Removable || !stick.Rotational || stick.ReadOnly || stick.SectorSize != 512 || stick.Disk != "sda" || stick.Partition != 0 {
		t.Errorf("the stick reads %+v", stick)
	}
	if !slices.Equal(stick.Partitions, []string{"sda1", "sda2"}) || !slices.Equal(stick.Signatures, gpt) {
		t.Errorf("the stick carries %v and %v", stick.Partitions, stick.Signatures)
	}
	if p := byName["sda1"]; p.Disk != "sda" || p.Partition != 1 || p.DiskSeq != 21 || p.PartUUID != "6c5a2d57-01" || p.Model != "Ultra Fit" {
		t.Errorf("sda1 reads %+v", p)
	}
	if p := byName["sda2"]; p.PartUUID != "6c5a2d57-02" || !errors.Is(p.ProbeError, unix.EIO) {
		t.Errorf("the unreadable sda2 reads %+v", p)
	}
	if l := byName["loop0"]; l.BackingFile != "/run/live medium/LiveOS/root.img" || !l.ReadOnly {
		t.Errorf("loop0 reads %+v", l)
	}

	for name, want := range map[string][]Holder{
		"sda":   {{"partition", "sda1: mount /run/live medium"}, {"partition", "sda1: loop loop0"}},
		"sda1":  {{"mount", "/run/live medium"}, {"loop", "loop0"}},
		"sda2":  nil,
		"sdb":   {{"mount", "/whole"}},
		"sdb1":  {{"disk-open", "sdb: mount /whole"}},
		"vda1":  {{"mount", "/home"}},
		"loop1": {{"mount", "/home"}},
		"vda2":  {{"swap", "/dev/vda2"}},
		"vda3":  {{"device", "dm-0"}},
		"vda":   {{"partition", "vda1: mount /home"}, {"partition", "vda2: swap /dev/vda2"}, {"partition", "vda3: device dm-0"}},
	} {
		if got := byName[name].Holders; !slices.Equal(got, want) {
			t.Errorf("%s is held by %v, want %v", name, got, want)
		}
	}
}

func TestBtrfsMountedOutOfSightHoldsItsMembers(t *testing.T) {
	s := onPaper(t, nil)
	if err := os.WriteFile(s.path("proc/self/mountinfo"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	use, err := s.usage()
	if err != nil {
		t.Fatal(err)
	}
	for _, num := range []DevNum{{254, 1}, {7, 1}} {
		if len(use[num]) != 1 || use[num][0].Kind != "mount" {
			t.Errorf("%s is held by %v, want one mount", num, use[num])
		}
	}
}

func TestListWithoutTheProbeToolIsRefused(t *testing.T) {
	s := onPaper(t, nil)
	s.signatures = func(context.Context, *os.File) ([]Signature, error) { return nil, ErrNoProbeTool }
	if _, err := s.List(t.Context(), nil); !errors.Is(err, ErrNoProbeTool) {
		t.Fatalf("List gave %v, want ErrNoProbeTool", err)
	}
}

func TestWholeDiskAndCounters(t *testing.T) {
	s := onPaper(t, nil)
	for num, want := range map[DevNum]string{{8, 1}: "/dev/sda", {8, 0}: "/dev/sda", {7, 0}: "/dev/loop0"} {
		if id, err := s.WholeDisk(num); err != nil || id.Path != want {
			t.Errorf("the disk of %s is %s, %v, want %s", num, id.Path, err, want)
		}
	}
	if _, err := s.WholeDisk(DevNum{99, 99}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the disk of nothing gave %v", err)
	}
	got, err := s.IOStat(DevNum{8, 1})
	if want := (IOStat{ReadBytes: 1 << 20, WrittenBytes: 8192, InFlight: 3}); err != nil || got != want {
		t.Errorf("counters %+v, %v, want %+v", got, err, want)
	}
}

func TestLoopsOnPaper(t *testing.T) {
	loops, err := onPaper(t, nil).Loops(t.Context())
	if err != nil || len(loops) != 2 {
		t.Fatalf("loops %+v, %v, want two", loops, err)
	}
	if l := loops[0]; l.SizeLimit != 1<<30 || !l.ReadOnly || !l.DirectIO || l.Autoclear || l.DiskSeq != 30 {
		t.Errorf("loop0 reads %+v", l)
	}
	if l := loops[1]; l.BackingFile != "/var/img (deleted)" || !l.Autoclear || l.ReadOnly {
		t.Errorf("loop1 reads %+v", l)
	}
}
