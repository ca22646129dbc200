package boot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/btrfs"
)

const (
	// lookFor bounds the search for the names of damaged files, which reads all
	// of the seed once more, and maxFiles how many are named.
	lookFor  = 10 * time.Minute
	maxFiles = 20
)

// check compares the whole seed with its checksums. Damage is told and no
// reason not to boot; the error is that nothing of the seed can be used.
func (b *boot) check(ctx context.Context, m *media) error {
	b.Say(Info, "Checking the seed, as rd.sprout.check asks for.")
	if err := b.mountSeed(ctx, m); err != nil {
		return err
	}
	if err := b.scrub(ctx, m); err != nil {
		b.warn(sentence(fmt.Sprintf("cannot check the seed: %v", err)))
	}
	return unmount(ctx, b.NewRoot)
}

// scrub checks the mounted seed.
func (b *boot) scrub(ctx context.Context, m *media) error {
	f, err := btrfs.Open(b.NewRoot)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	said := uint64(0)
	result, err := f.Scrub(ctx, m.super.DevID, func(r btrfs.ScrubResult) {
		// One line for each tenth: the console may be slow.
		if tenth := 10 * r.Bytes / max(m.super.Used, 1); tenth > said {
			said = tenth
			b.Say(Info, fmt.Sprintf("Checked %d of %d MiB.", r.Bytes>>20, m.super.Used>>20))
		}
	})
	// With EIO it came to its end too early: it could not read what to check.
	if err != nil && !errors.Is(err, unix.EIO) {
		return err
	}
	b.note.Checked = true
	if err == nil && !result.Damaged() {
		b.Say(Info, fmt.Sprintf("The seed is whole: %d MiB were checked.", result.Bytes>>20))
		return nil
	}
	b.Say(Error, "THE SEED IS DAMAGED. Looking for the files that it is about.")
	looking, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	// What was found is worth telling also when the search failed half-way.
	files, err := f.UnreadableFiles(looking, m.super.DevID, maxFiles)
	b.note.BadFiles = files
	switch {
	case len(files) == maxFiles:
		b.warn(fmt.Sprintf("The seed is damaged: these files cannot be read, and perhaps more: %s.", strings.Join(files, ", ")))
	case len(files) > 0:
		b.warn(fmt.Sprintf("The seed is damaged: these files cannot be read: %s.", strings.Join(files, ", ")))
	case err != nil:
		b.warn(fmt.Sprintf("The seed is damaged, and so is the list of its files: %v.", err))
	default:
		b.warn(fmt.Sprintf("The seed is damaged, but in no file: %d errors in its own structures.", result.TreeErrors+result.SuperErrors+result.CsumErrors))
	}
	return nil
}
