package seedtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

// TestDiffNamesEachChange changes one thing at a time in a small tree and
// looks for the one line that says so.
func TestDiffNamesEachChange(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	top := newBtrfs(t)

	when := time.Date(2020, 2, 3, 4, 5, 6, 789, time.UTC)
	prepare := func(t *testing.T) string {
		dir := filepath.Join(top, strings.ReplaceAll(filepath.Base(t.Name()), "/", "-"))
		must(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "file"), make([]byte, 100*KiB), 0o644))
		must(t, os.WriteFile(filepath.Join(dir, "other"), []byte("other"), 0o644))
		must(t, os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "link")))
		must(t, os.Symlink("file", filepath.Join(dir, "symlink")))
		must(t, unix.Mknod(filepath.Join(dir, "node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		must(t, unix.Lsetxattr(filepath.Join(dir, "file"), "user.a", []byte("1"), 0))
		if _, err := run(t.Context(), "btrfs", "subvolume", "create", filepath.Join(dir, "subvolume")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"sub", "file", "other", "subvolume", "."} {
			must(t, os.Chtimes(filepath.Join(dir, name), when, when))
		}
		return dir
	}
	// Where a change has to touch the directory, its time is set back.
	again := func(t *testing.T, dir string) { must(t, os.Chtimes(dir, when, when)) }

	for _, c := range []struct {
		name   string
		change func(t *testing.T, dir string)
		want   []string
	}{
		{"nothing", func(*testing.T, string) {}, nil},
		{"reading", func(t *testing.T, dir string) {
			_, err := os.ReadFile(filepath.Join(dir, "file"))
			must(t, err)
		}, nil},
		{"content", func(t *testing.T, dir string) {
			must(t, writeAt(filepath.Join(dir, "other"), []byte("X"), 2))
			must(t, os.Chtimes(filepath.Join(dir, "other"), when, when))
		}, []string{`"other": content was`}},
		{"content of both links", func(t *testing.T, dir string) {
			must(t, writeAt(filepath.Join(dir, "link"), []byte("X"), 5000))
			must(t, os.Chtimes(filepath.Join(dir, "link"), when, when))
		}, []string{`"file": content was`, `"link": content was`}},
		{"size", func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, "other"), 4))
			must(t, os.Chtimes(filepath.Join(dir, "other"), when, when))
		}, []string{`"other": size was 5, is 4`, `"other": data extents was`}},
		{"mode", func(t *testing.T, dir string) {
			must(t, unix.Chmod(filepath.Join(dir, "other"), 0o4644))
		}, []string{`"other": mode was 0644, is 4644`}},
		{"owner and group", func(t *testing.T, dir string) {
			must(t, os.Lchown(filepath.Join(dir, "symlink"), 7, 8))
		}, []string{`"symlink": owner was 0, is 7`, `"symlink": group was 0, is 8`}},
		{"one nanosecond", func(t *testing.T, dir string) {
			must(t, os.Chtimes(filepath.Join(dir, "sub"), when, when.Add(1)))
		}, []string{`"sub": mtime was 2020-02-03T04:05:06.000000789Z, is 2020-02-03T04:05:06.00000079Z`}},
		{"new file", func(t *testing.T, dir string) {
			must(t, os.Symlink("x", filepath.Join(dir, "new")))
			again(t, dir)
		}, []string{`".": size was`, `"new": new (symlink)`}},
		{"file gone", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "node")))
			again(t, dir)
		}, []string{`".": size was`, `"node": gone (char)`}},
		{"type", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "node")))
			must(t, unix.Mknod(filepath.Join(dir, "node"), unix.S_IFBLK|0o600, int(unix.Mkdev(1, 3))))
			again(t, dir)
			copyTimes(t, dir, "node")
		}, []string{`"node": type was char, is block`}},
		{"device number", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "node")))
			must(t, unix.Mknod(filepath.Join(dir, "node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
			again(t, dir)
			copyTimes(t, dir, "node")
		}, []string{`"node": device number was 1:3, is 1:5`}},
		{"link target", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "symlink")))
			must(t, os.Symlink("fILE", filepath.Join(dir, "symlink")))
			again(t, dir)
			copyTimes(t, dir, "symlink")
		}, []string{`"symlink": link target was "file", is "fILE"`}},
		{"hard link to a copy", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "link")))
			must(t, os.WriteFile(filepath.Join(dir, "link"), make([]byte, 100*KiB), 0o644))
			must(t, unix.Lsetxattr(filepath.Join(dir, "link"), "user.a", []byte("1"), 0))
			must(t, os.Chtimes(filepath.Join(dir, "link"), when, when))
			again(t, dir)
		}, []string{`"file": number of links was 2, is 1`, `"file": hard link of was "file", is ""`,
			`"link": number of links was 2, is 1`, `"link": hard link of was "file", is ""`}},
		{"hard link to another file", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "link")))
			must(t, os.Link(filepath.Join(dir, "other"), filepath.Join(dir, "link")))
			again(t, dir)
		}, []string{`"file": number of links`, `"other": number of links was 1, is 2`, `"link": hard link of was "file", is "link"`}},
		{"xattr value", func(t *testing.T, dir string) {
			must(t, unix.Lsetxattr(filepath.Join(dir, "file"), "user.a", []byte("2"), 0))
		}, []string{`"file": xattr user.a was "1", is "2"`, `"link": xattr user.a`}},
		{"xattr gone, xattr new", func(t *testing.T, dir string) {
			must(t, unix.Lremovexattr(filepath.Join(dir, "file"), "user.a"))
			must(t, unix.Lsetxattr(filepath.Join(dir, "sub"), "trusted.b", nil, 0))
		}, []string{`"file": xattr user.a was "1", is absent`, `"link": xattr user.a`, `"sub": xattr trusted.b was absent, is ""`}},
		{"a hole where zeros were", func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
			must(t, err)
			must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 8192))
			must(t, f.Close())
			must(t, os.Chtimes(filepath.Join(dir, "file"), when, when))
		}, []string{`"file": data extents was [{0 102400}], is [{0 8192} {16384 102400}]`, `"link": data extents`}},
		{"inode flags", func(t *testing.T, dir string) {
			must(t, SetInodeFlags(filepath.Join(dir, "sub"), flagNoCow))
		}, []string{`"sub": inode flags was 0x0, is 0x800000`}},
		{"read-only subvolume", func(t *testing.T, dir string) {
			_, err := run(t.Context(), "btrfs", "property", "set", filepath.Join(dir, "subvolume"), "ro", "true")
			must(t, err)
		}, []string{`"subvolume": subvolume was subvolume, is read-only subvolume`}},
		{"a directory for the subvolume", func(t *testing.T, dir string) {
			_, err := run(t.Context(), "btrfs", "subvolume", "delete", filepath.Join(dir, "subvolume"))
			must(t, err)
			must(t, os.Mkdir(filepath.Join(dir, "subvolume"), 0o755))
			must(t, os.Chtimes(filepath.Join(dir, "subvolume"), when, when))
			again(t, dir)
		}, []string{`"subvolume": subvolume was subvolume, is none`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := prepare(t)
			before := scanTree(t, dir)
			saveTimes(t, dir)
			c.change(t, dir)
			got := Diff(before, scanTree(t, dir))
			for _, want := range c.want {
				if !slices.ContainsFunc(got, func(line string) bool { return strings.HasPrefix(line, want) }) {
					t.Errorf("no line says: %s", want)
				}
			}
			if len(c.want) == 0 && len(got) > 0 || len(got) > len(c.want)+5 {
				t.Errorf("too much is said to have changed")
			}
			if t.Failed() {
				t.Logf("the difference:\n%s", strings.Join(got, "\n"))
			}
		})
	}
}

// savedTimes holds what copyTimes sets again
// on a path that was made anew.
var savedTimes = map[string]time.Time{}

func saveTimes(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"node", "symlink"} {
		info, err := os.Lstat(filepath.Join(dir, name))
		must(t, err)
		savedTimes[filepath.Join(dir, name)] = info.ModTime()
	}
}

func copyTimes(t *testing.T, dir, name string) {
	t.Helper()
	path := filepath.Join(dir, name)
	ts, err := unix.TimeToTimespec(savedTimes[path])
	must(t, err)
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestManifestStaysOnItsMount(t *testing.T) {
	needTools(t)
	testenv.NoLeftovers(t)
	top := newBtrfs(t)
	must(t, os.Mkdir(filepath.Join(top, "mounted"), 0o755))
	must(t, mount("tmpfs", filepath.Join(top, "mounted"), "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { must(t, unmount(filepath.Join(top, "mounted"))) })
	must(t, os.WriteFile(filepath.Join(top, "mounted", "file"), nil, 0o644))
	if m := scanTree(t, top); len(m) != 1 {
		t.Errorf("the manifest has %d records, want the top directory's only", len(m))
	}
}

func TestDiffIgnores(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "home", "writer"), 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "home", "writer2"), 0o755))
	before, err := TakeManifest(t.Context(), dir)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "home", "writer", "file"), nil, 0o644))
	must(t, os.Chtimes(filepath.Join(dir, "home"), time.Time{}, time.Unix(1, 1)))
	after, err := TakeManifest(t.Context(), dir)
	must(t, err)
	if got := Diff(before, after, "home/writer"); len(got) > 0 {
		t.Errorf("what is to be ignored was not: %v", got)
	}
	if got := Diff(before, after, "home/writer2"); len(got) == 0 {
		t.Error("too much is ignored")
	}
	if m := after.Without("home/writer"); len(m) != 3 {
		t.Errorf("%d records are left without the writer's directory, want 3", len(m))
	}
}

func TestManifestDoesNotLookWhereFilesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "var", "lib", "busy"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "var", "lib", "still"), nil, 0o644))
	var coming sync.WaitGroup
	end := make(chan struct{})
	coming.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
			}
			name := filepath.Join(dir, "var", "lib", "busy", "file")
			_ = os.WriteFile(name, nil, 0o644)
			_ = os.Remove(name)
		}
	})
	defer coming.Wait()
	defer close(end)
	for range 200 {
		m, err := TakeManifest(t.Context(), dir, "var/lib/busy")
		must(t, err)
		if len(m) != 4 {
			t.Fatalf("the manifest has %d records: want the directories and the file that stays", len(m))
		}
	}
}
