package throttle

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const mib = 1 << 20

// stick shows one file of so many MiB.
func stick(t *testing.T, size int, spec Spec) (f *FS, content []byte) {
	t.Helper()
	testenv.NeedRoot(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.Skip(t, "needs /dev/fuse: load the fuse module")
	}
	testenv.NoLeftovers(t)
	spec.Dir = t.TempDir()
	content = make([]byte, size*mib)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	if err := os.WriteFile(filepath.Join(spec.Dir, "image"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Mount(spec, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, content
}

func open(t *testing.T, f *FS) *os.File {
	t.Helper()
	file, err := os.OpenFile(f.Path("image"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}

// took checks a time: never less than what is wanted. The machine may be busy, so
// it may be a good deal more.
func took(t *testing.T, want time.Duration, work func()) {
	t.Helper()
	begin := time.Now()
	work()
	if got := time.Since(begin); got < want*95/100 || got > want*5+time.Second {
		t.Errorf("it took %v, want about %v", got, want)
	}
}

func TestASequentialReadHasTheRateAndIsReadOnce(t *testing.T) {
	f, content := stick(t, 32, Spec{Rate: 64 * mib, Latency: time.Millisecond})
	file := open(t, f)
	took(t, 500*time.Millisecond, func() {
		got, err := io.ReadAll(file)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("what was read is not what was written: %v", err)
		}
	})
	if f.BytesRead() != 32*mib || f.LastRead().IsZero() || time.Since(f.LastRead()) > time.Minute {
		t.Errorf("%d bytes were read, the last at %v", f.BytesRead(), f.LastRead())
	}
	// The second time it comes from the page cache, also for who opens it anew,
	// but for what the kernel may have taken away meanwhile.
	if _, err := io.Copy(io.Discard, open(t, f)); err != nil {
		t.Fatal(err)
	}
	if f.BytesRead() > 33*mib {
		t.Errorf("read again from the stick: %d bytes", f.BytesRead()-32*mib)
	}
}

func TestReadAheadThatIsAskedForGoesOnByItself(t *testing.T) {
	f, content := stick(t, 8, Spec{Rate: 64 * mib})
	file := open(t, f)
	for at := int64(0); at < 8*mib; at += 128 * 1024 { // of more the kernel takes the beginning
		if err := unix.Fadvise(int(file.Fd()), at, 128*1024, unix.FADV_WILLNEED); err != nil {
			t.Fatal(err)
		}
	}
	for begin := time.Now(); f.BytesRead() < 8*mib && time.Since(begin) < 10*time.Second; {
		time.Sleep(time.Millisecond)
	}
	if f.BytesRead() != 8*mib {
		t.Fatalf("%d bytes were read ahead", f.BytesRead())
	}
	got := make([]byte, 8*mib)
	if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) || f.BytesRead() != 8*mib {
		t.Errorf("after the read-ahead it was read again: %d bytes, %v", f.BytesRead(), err)
	}
}

func TestRandomReadsPayTheLatencyAloneAndShareTheRate(t *testing.T) {
	f, content := stick(t, 16, Spec{Rate: 256 * mib, Latency: 10 * time.Millisecond})
	file := open(t, f)
	if err := unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	check := func(at int64) {
		got := make([]byte, 4096)
		if _, err := file.ReadAt(got, at); err != nil || !bytes.Equal(got, content[at:at+4096]) {
			t.Errorf("at %d it reads something else: %v", at, err)
		}
	}
	took(t, 200*time.Millisecond, func() {
		for i := range int64(20) {
			check(i * mib / 2)
		}
	})
	took(t, 10*time.Millisecond, func() {
		var all sync.WaitGroup
		for i := range int64(20) {
			all.Go(func() { check(i*mib/2 + 64*1024) })
		}
		all.Wait()
	})
	if f.BytesRead() != 40*4096 || f.Reads() != 40 {
		t.Errorf("%d bytes in %d reads for 40 reads of 4 KiB", f.BytesRead(), f.Reads())
	}
}

func TestWritesArriveAndHolesAreSeen(t *testing.T) {
	f, _ := stick(t, 1, Spec{})
	file := open(t, f)
	if _, err := file.WriteAt([]byte("written"), 4000); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 7)
	if _, err := open(t, f).ReadAt(got, 4000); err != nil || string(got) != "written" || f.BytesWritten() != 7 {
		t.Errorf("it reads %q, %v after %d bytes were written", got, err, f.BytesWritten())
	}
	if at, err := unix.Seek(int(file.Fd()), 0, unix.SEEK_HOLE); err != nil || at != mib {
		t.Errorf("the first hole is at %d, %v", at, err)
	}
}

func TestIdleTimeIsNotSavedUp(t *testing.T) {
	q := queue{rate: mib}
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		after time.Duration
		bytes int
		want  time.Duration // from the start on
	}{
		{0, mib, time.Second - catchUp},
		{0, mib, 2*time.Second - catchUp},
		{time.Minute, mib, time.Minute + time.Second - catchUp},
		{time.Minute + time.Second, mib, time.Minute + 2*time.Second - catchUp},
	} {
		if got := q.add(c.bytes, now.Add(c.after)).Sub(now); got != c.want {
			t.Errorf("%d bytes asked for after %v are there after %v, want %v", c.bytes, c.after, got, c.want)
		}
	}
}
