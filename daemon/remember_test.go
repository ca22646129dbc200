package daemon_test

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/daemontest"
)

// hesitant is a kernel on which whoever finds a new sprout by looking around
// takes so long about it that CreateSprout is done before.
type hesitant struct {
	*daemontest.Kernel
	born  func()
	found func()
	asked int
	mu    sync.Mutex
}

func (h *hesitant) MakeWritable(ctx context.Context, mountpoint string, options ...string) error {
	h.born()
	return h.Kernel.MakeWritable(ctx, mountpoint, options...)
}

func (h *hesitant) Media(ctx context.Context, seed block.ID) (daemon.Media, error) {
	h.mu.Lock()
	h.asked++
	first := h.asked == 1 // CreateSprout itself
	h.mu.Unlock()
	if !first {
		h.found()
	}
	return h.Kernel.Media(ctx, seed)
}

func TestALookAtANewSproutDoesNotHideWhoMadeIt(t *testing.T) {
	k := daemontest.New()
	dir, mnt := ramDir(t), ramDir(t)
	looking := make(chan struct{})
	h := &hesitant{Kernel: k}
	s, err := daemon.New(t.Context(), daemon.Config{Kernel: h, StateDir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })

	looked := make(chan error, 1)
	h.born = sync.OnceFunc(func() {
		go func() { looked <- s.Refresh(ctx) }()
		<-looking
	})
	h.found = sync.OnceFunc(func() {
		close(looking)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for range tick.C { // until CreateSprout has recorded what it made
			if left, err := filepath.Glob(filepath.Join(dir, "sprouts", "creating-*")); err != nil || len(left) == 0 {
				return
			}
		}
	})
	fsid, err := s.CreateSprout(ctx, daemon.Caller{}, "/run/media/root.img", mnt, daemon.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-looked; err != nil {
		t.Fatal(err)
	}
	if err := s.Teardown(ctx, fsid); err != nil {
		t.Errorf("a sprout that CreateSprout made cannot be torn down: %v", err)
	}
	if len(k.Mounted)+len(k.Loops)+len(k.Zrams) > 0 {
		t.Errorf("left behind: mounts %v, loops %v, zrams %v", k.Mounted, k.Loops, k.Zrams)
	}
}
