package machine

import (
	"os"
	"path/filepath"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/tests/testenv"
)

func TestOnWhichKernelsASeedIsReleased(t *testing.T) {
	for release, fine := range map[string]bool{
		"5.15.0-1-amd64": true, "6.1.0-30-amd64": true, "6.12.117": true, "6.18.44-fc": true,
		"6.19.0-rc1": false, "7.0.0": false, "10.1": false, "": false, "hurd": false,
	} {
		if why := newKernel(release); (why == "") != fine {
			t.Errorf("on %q it says %q", release, why)
		}
	}
}

func TestWhatIsLeftOfACopyIsTidiedUp(t *testing.T) {
	testenv.NeedRoot(t) // the loops are looked at
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	part := filepath.Join(dir, plan.CopyName("fsid")+partial)
	if err := m.SettleCopy(t.Context(), dir, "fsid"); err != nil {
		t.Errorf("where nothing is left: %v", err)
	}
	if err := m.SettleCopy(t.Context(), filepath.Join(dir, "none"), "fsid"); err != nil {
		t.Errorf("where the directory is gone: %v", err)
	}
	others := filepath.Join(dir, "others"+partial)
	for _, path := range []string{part, others} {
		if err := os.WriteFile(path, []byte("a part of a copy"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.SettleCopy(t.Context(), dir, "fsid"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(part); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := os.Stat(others); err != nil {
		t.Errorf("something else is gone: %v", err)
	}
	// A symbolic link that somebody has put there is not followed.
	if err := os.Symlink(others, part); err != nil {
		t.Fatal(err)
	}
	if err := m.SettleCopy(t.Context(), dir, "fsid"); err == nil {
		t.Error("a link in its place is no error")
	}
	if _, err := os.Stat(others); err != nil {
		t.Errorf("what the link names is gone: %v", err)
	}
}

func TestTheCopyOfAnotherReleaseIsLeftAlone(t *testing.T) {
	testenv.NeedRoot(t)
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	r := daemon.Release{To: t.TempDir(), SeedFSID: "fsid"}
	first, err := m.newCopy(t.Context(), r, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.newCopy(t.Context(), r, 1<<20); fault.CodeOf(err) != fault.DeviceBusy {
		t.Errorf("a second copy in the same place: %v", err)
	}
	info, err := os.Stat(first.file.Name())
	if err != nil || info.Size() != 1<<20 || info.Mode() != 0o600 {
		t.Errorf("the first one is %v (%v)", info, err)
	}
	if err := first.close(true); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(r.To); err != nil || len(left) > 0 {
		t.Errorf("left are %v (%v)", left, err)
	}
}

func TestWhereASeedCanBeCopiedTo(t *testing.T) {
	testenv.NeedRoot(t)
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Destination(t.Context(), link, block.ID{}); err != nil || got.Path != dir || got.Free == 0 || got.ReadOnly || got.Media {
		t.Errorf("a link to a directory is %+v (%v)", got, err)
	}
	for path, code := range map[string]fault.Code{
		filepath.Join(dir, "none"): fault.NoSuchDevice, file: fault.InvalidArgs, "/dev/null": fault.NoSuchDevice,
	} {
		if _, err := m.Destination(t.Context(), path, block.ID{}); fault.CodeOf(err) != code {
			t.Errorf("%s: %v, want %s", path, err, code)
		}
	}
}
