package zram

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/tests/testenv"
)

const gib = 1 << 30

func TestParseAlgorithms(t *testing.T) {
	if got, want := parseAlgorithms("lzo [lzo-rle] zstd \n"), []string{"lzo", "lzo-rle", "zstd"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestParseStats(t *testing.T) {
	got, err := parseStats("  4096 74 12288 104857600 16384 5 1 2 0\n")
	want := Stats{OrigDataSize: 4096, ComprDataSize: 74, MemUsed: 12288, MemLimit: 104857600, MemUsedMax: 16384, SamePages: 5, HugePages: 2}
	if err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "1 2 3", "a b c d e f g"} {
		if _, err := parseStats(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func FuzzParseStats(f *testing.F) {
	f.Add("4096 74 12288 0 12288 0 0 0 0")
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := parseStats(text); err != nil && s != (Stats{}) {
			t.Errorf("%q gave both %+v and %v", text, s, err)
		}
	})
}

// A kernel on paper, where everything works but the size.
func TestFailedCreateRemovesTheDevice(t *testing.T) {
	root := t.TempDir()
	for path, content := range map[string]string{
		"sys/class/zram-control/hot_add":    "7\n",
		"sys/class/zram-control/hot_remove": "",
		"sys/block/zram7/comp_algorithm":    "[lzo]\n",
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := NewAt(root)
	if _, err := m.Create(t.Context(), Config{Size: gib}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want the missing disksize", err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "sys/class/zram-control/hot_remove")); err != nil || string(b) != "7" {
		t.Errorf("asked to remove %q, %v, want 7", b, err)
	}
	if len(m.Owned()) != 0 {
		t.Errorf("owns %v", m.Owned())
	}
}

func create(t *testing.T, m *Manager, c Config) Device {
	t.Helper()
	d, err := m.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := m.Remove(context.Background(), d.ID)
		if err != nil && !errors.Is(err, ErrNotOurs) {
			t.Errorf("left behind: %v", err)
		}
	})
	return d
}

// devices are the zram devices of the machine.
func devices(t *testing.T) []string {
	t.Helper()
	list, err := filepath.Glob("/sys/block/zram*")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestCreateUseRemove(t *testing.T) {
	testenv.NeedRoot(t)
	m := New()
	algorithms, err := m.Algorithms()
	if err != nil || len(algorithms) == 0 {
		t.Fatalf("algorithms %v, %v", algorithms, err)
	}
	d := create(t, m, Config{Size: gib, Algorithm: algorithms[len(algorithms)-1], MemLimit: 64 << 20})
	if d.Size != gib || d.Path != "/dev/"+d.Name || d.Num.IsZero() || !slices.Contains(m.Owned(), d.ID) {
		t.Errorf("made %+v", d)
	}
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := []byte(strings.Repeat("sprout ", 1<<20/7+1))[:1<<20]
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	st, err := m.Stat(d.Name)
	if err != nil || st.OrigDataSize != 1<<20 || st.MemUsed == 0 || st.MemUsed > 1<<20 || st.MemLimit != 64<<20 {
		t.Errorf("after writing 1 MiB: %+v, %v", st, err)
	}
	// While it is open it stays, and is still ours.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Remove(ctx, d.ID); !errors.Is(err, unix.EBUSY) {
		t.Errorf("removing an open device gave %v, want EBUSY", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(t.Context(), d.ID); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(devices(t), "/sys/block/"+d.Name) || len(m.Owned()) != 0 {
		t.Errorf("%s is still there", d.Name)
	}
	if _, err := m.Stat(d.Name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("reading what is gone gave %v", err)
	}
}

func TestUnknownAlgorithm(t *testing.T) {
	testenv.NeedRoot(t)
	m := New()
	_, err := m.Create(t.Context(), Config{Size: gib, Algorithm: "nonsense"})
	var unknown *UnknownAlgorithmError
	if !errors.As(err, &unknown) || unknown.Name != "nonsense" || len(unknown.Known) == 0 {
		t.Errorf("got %v, want the algorithms that there are", err)
	}
	if len(m.Owned()) != 0 {
		t.Errorf("still owns %v", m.Owned())
	}
	if _, err := m.Create(t.Context(), Config{}); err == nil {
		t.Error("a device of no size was made")
	}
}

func TestOthersAreNotTouched(t *testing.T) {
	testenv.NeedRoot(t)
	mine, other := New(), New()
	d := create(t, mine, Config{Size: gib})
	if err := other.Remove(t.Context(), d.ID); !errors.Is(err, ErrNotOurs) {
		t.Errorf("removing another's device gave %v, want ErrNotOurs", err)
	}
	for name, change := range map[string]func(*block.ID){
		"size":     func(id *block.ID) { id.Size += 4096 },
		"sequence": func(id *block.ID) { id.DiskSeq++ },
	} {
		stale := d.ID
		change(&stale)
		if _, err := other.Adopt(stale); !errors.Is(err, ErrNotOurs) {
			t.Errorf("taking over with another %s gave %v, want ErrNotOurs", name, err)
		}
		if err := mine.Remove(t.Context(), stale); !errors.Is(err, ErrNotOurs) {
			t.Errorf("removing with another %s gave %v, want ErrNotOurs", name, err)
		}
	}
	// The daemon's next life takes over, and may remove it. For the first one
	// that is then no error, but no licence to remove what comes after.
	if _, err := other.Adopt(d.ID); err != nil {
		t.Fatal(err)
	}
	if err := other.Remove(t.Context(), d.ID); err != nil {
		t.Fatal(err)
	}
	next := create(t, other, Config{Size: gib})
	err := mine.Remove(t.Context(), d.ID)
	if next.Num == d.Num && !errors.Is(err, ErrNotOurs) || next.Num != d.Num && err != nil {
		t.Errorf("removing %s where %s is now gave %v", d.Name, next.Name, err)
	}
	if !slices.Contains(devices(t), "/sys/block/"+next.Name) {
		t.Errorf("%s was taken with it", next.Name)
	}
}

func TestOnlyZramIsTakenOver(t *testing.T) {
	testenv.NeedRoot(t)
	s := block.New()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	l, err := s.AttachLoop(t.Context(), f, block.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.DetachLoop(context.Background(), l.ID) }()
	if _, err := New().Adopt(l.ID); !errors.Is(err, ErrNotOurs) {
		t.Errorf("taking over a loop gave %v, want ErrNotOurs", err)
	}
}

func TestWhatWasCutOffCanBeTakenOver(t *testing.T) {
	testenv.NeedRoot(t)
	for name, recorded := range map[string]func(id block.ID) block.ID{
		"before its size":        func(id block.ID) block.ID { return id },
		"before it was known of": func(id block.ID) block.ID { return block.ID{Path: id.Path, Size: id.Size} },
	} {
		t.Run(name, func(t *testing.T) {
			m := New()
			made, err := m.hotAdd()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = m.hotRemove(context.Background(), made) }()
			id, err := m.identify(made)
			if err != nil {
				t.Fatal(err)
			}
			id.Size = 1 << 30
			got, err := m.Adopt(recorded(id))
			if err != nil || got.Num != id.Num {
				t.Fatalf("took over %+v (%v), want %+v", got, err, id)
			}
			if err := m.Remove(t.Context(), got); err != nil {
				t.Error(err)
			}
			if slices.Contains(devices(t), "/sys/block/"+made) {
				t.Errorf("%s is still there", made)
			}
		})
	}
	t.Run("not with a size", func(t *testing.T) {
		d, err := New().Create(t.Context(), Config{Size: 1 << 30})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = New().hotRemove(context.Background(), d.Name) }()
		if _, err := New().Adopt(block.ID{Path: d.Path, Size: d.Size}); !errors.Is(err, ErrNotOurs) {
			t.Errorf("taking over a device of others gave %v, want ErrNotOurs", err)
		}
	})
}
