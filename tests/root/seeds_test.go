package root

import (
	"fmt"
	"strings"
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

// TestEverySeedKeepsEveryByte moves seeds that were made in different ways to
// the stick and on to the disk. All hold the standard content: subvolumes and
// snapshots, hard links, attributes and capabilities, sparse and reflinked
// files, device nodes, empty and inline files and odd names.
func TestEverySeedKeepsEveryByte(t *testing.T) {
	for i, spec := range []seedtest.Spec{
		{Method: seedtest.RootDir, Metadata: "single", Csum: "crc32c"},
		{Method: seedtest.RootDir, Metadata: "dup", Csum: "xxhash"},
		{Method: seedtest.Copy, Compress: "none", Metadata: "single", Csum: "sha256"},
		{Method: seedtest.Copy, Compress: "zstd", Metadata: "dup", Csum: "blake2"},
	} {
		spec.Random, spec.ImageSize = uint64(i), 512*seedtest.MiB //nolint:gosec // a small index
		name := strings.Join(strings.Fields(fmt.Sprint(spec.Method, " ", spec.Compress, " ", spec.Metadata, " ", spec.Csum)), " ")
		t.Run(name, func(t *testing.T) {
			w := harness.New(t, programs)
			seed := seedtest.New(t, spec)
			stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
			disk := w.OpenDisk(seedtest.DiskSpec{})
			before := sum(t, stick.Media)

			sprout := w.Create(stick.Seed, client.CreateOptions{})
			wantState(t, sprout, "volatile", "seed", "zram")
			want := manifest(t, sprout.MountPoint)

			w.Done(w.Persist(w.Context(), sprout.Path, stick.Persist, client.MoveOptions{}))
			wantState(t, w.Show(sprout.Path), "persistent", "seed", "persistent")
			wantSame(t, "after persist", want, sprout.MountPoint)

			w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
			wantState(t, w.Show(sprout.Path), "installed", "disk")
			wantSame(t, "after flatten", want, sprout.MountPoint)

			checkUnmounted(t, w, sprout.Path, disk.Path, want)
			if sum(t, stick.Media) != before {
				t.Error("something was written to the partition that holds the seed")
			}
		})
	}
}
