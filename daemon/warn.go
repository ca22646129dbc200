package daemon

import (
	"context"
	"log/slog"
	"slices"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/plan"
)

// lookout is what was seen of the sprouts before, by fsid.
type lookout struct {
	writable map[string]bool     // it could be written once
	told     map[string][]string // the warnings that were told already
}

// warnings gives what the user has to know about a sprout, and tells at once
// what is new of it and cannot wait until somebody asks. s.looking must be held.
func (s *Service) warnings(ctx context.Context, sprout plan.Sprout) []string {
	fsid, seen := sprout.FSID, &s.lookout
	media, gone := s.unplugged(ctx, sprout)
	live := plan.Warnings(sprout, plan.Lookout{
		Media: media.Path, Unplugged: gone, TurnedReadOnly: sprout.ReadOnly && seen.writable[fsid],
	})
	for _, text := range live {
		if !slices.Contains(seen.told[fsid], text) {
			s.alarm(text)
			s.log.Error(text, slog.String("sprout", fsid))
		}
	}
	seen.told[fsid] = live
	seen.writable[fsid] = seen.writable[fsid] || !sprout.ReadOnly
	if fsid != s.boot.FSID {
		return live
	}
	var boot []string
	if s.resets(fsid) {
		boot = []string{"What is kept on the stick will be dropped at the next boot. 'sproutctl reset --undo' takes that back."}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused != "" {
		boot = append(boot, s.refused)
	}
	return slices.Concat(live, boot, s.boot.Warnings)
}

// unplugged tells whether the media that the sprout needs is gone.
func (s *Service) unplugged(ctx context.Context, sprout plan.Sprout) (media block.ID, gone bool) {
	s.mu.Lock()
	record := s.records[sprout.FSID]
	s.mu.Unlock()
	media = record.Media.Disk
	if _, needed := plan.SeedOf(sprout.Members); !needed || media.Num.IsZero() {
		return media, false
	}
	there, err := s.kernel.Attached(ctx, []block.ID{media})
	if err != nil || len(there) > 0 {
		return media, false
	}
	file, err := s.seedFile(ctx, sprout, record)
	return media, err == nil && !file.Elsewhere
}
