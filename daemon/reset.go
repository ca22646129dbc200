package daemon

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"

	"github.com/google/renameio/v2"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// resetMark asks the early boot to drop the persistence; it looks for the file of
// this name in /var/lib/sproutd of the sprout, which is the state directory.
const resetMark = "reset"

// Reset makes the early boot drop what the booted stick keeps, at the next boot;
// with undo it takes that back.
func (s *Service) Reset(ctx context.Context, fsid string, undo bool) error {
	if err := s.claim(fsid); err != nil {
		return err
	}
	defer s.release(fsid)
	sprout, ok := s.look(ctx, fsid)
	switch {
	case !ok:
		return fault.New(fault.NoSuchSprout, "there is no sprout %s", fsid)
	case fsid != s.boot.FSID:
		return fault.New(fault.NotSupported, "this is not the system that was booted from a stick, so no boot will look for what is kept of it")
	case undo && !s.journal.marked(resetMark):
		return fault.New(fault.WrongState, "no reset was asked for")
	case undo:
	case sprout.State == plan.Volatile:
		return fault.New(fault.WrongState, "nothing is kept of this session: the next boot starts over anyway")
	case sprout.State != plan.Persistent:
		return fault.New(fault.WrongState, "the system is %s: what is written is not on the stick alone, and must not be dropped", sprout.State)
	}
	if err := s.journal.mark(resetMark, !undo); err != nil {
		return fault.Wrap(err, fault.IOError, "cannot leave word for the next boot")
	}
	s.log.Info("reset at the next boot", slog.String("sprout", fsid), slog.Bool("wanted", !undo))
	return s.Refresh(ctx)
}

// resets tells whether the sprout is going to be dropped.
func (s *Service) resets(fsid string) bool {
	return fsid == s.boot.FSID && s.journal.marked(resetMark)
}

// mark sets or takes away a mark. It is on stable storage when mark returns.
func (j *journal) mark(name string, on bool) error {
	if on {
		const text = "sproutd: drop what is kept, at the next boot\n"
		if err := renameio.WriteFile(j.path(name), []byte(text), 0o600, renameio.WithTempDir(j.dir)); err != nil {
			return err
		}
	} else if err := os.Remove(j.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(j.dir)
}

func (j *journal) marked(name string) bool {
	_, err := os.Stat(j.path(name))
	return err == nil
}
