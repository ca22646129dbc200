package root

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// TestTheSeedIsReadAheadAndNothingTwice flattens a seed on a stick and counts
// what was read from it.
func TestTheSeedIsReadAheadAndNothingTwice(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{Content: files(200)})
	stick := w.OpenStick(seedtest.StickSpec{Seed: seed.Path})
	disk := w.OpenDisk(seedtest.DiskSpec{})
	sprout := w.Create(stick.Seed, client.CreateOptions{})
	want := manifest(t, sprout.MountPoint)
	plan, err := w.Plan(w.Context(), sprout.Path, "flatten", disk.Path, noBootloader)
	must(t, err)

	before := bytesRead(t, stick.Media)
	result := w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
	read := bytesRead(t, stick.Media) - before
	how, _ := result["read_ahead"].(string)
	if strings.HasPrefix(how, "off: the media turns") {
		testenv.Skip(t, "the temporary directory is on a disk that turns")
	}
	ahead, _ := result["read_ahead_bytes"].(uint64)
	t.Logf("of %d bytes to move, %d were read ahead and %d were read", plan.BytesToMove, ahead, read)
	if how != "on" || ahead < plan.BytesToMove/2 || ahead > plan.BytesToMove {
		t.Errorf("read-ahead is %q, with %d of %d bytes", how, ahead, plan.BytesToMove)
	}
	// The file system of the stick has to be read as well.
	if limit := plan.BytesToMove + plan.BytesToMove*3/100 + seedtest.MiB; read > limit {
		t.Errorf("%d bytes were read from the stick, more than %d", read, limit)
	}
	wantSame(t, "after flatten", want, sprout.MountPoint)
}

// TestReadAheadSaysWhyItIsOff flattens seeds where it cannot help.
func TestReadAheadSaysWhyItIsOff(t *testing.T) {
	image := seedtest.New(t, seedtest.Spec{Content: files(5), ImageSize: 512 * seedtest.MiB})
	memory, err := os.MkdirTemp("/dev/shm", "sproutd-test-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	inMemory := filepath.Join(memory, "root.img")
	command(t, "cp", "--sparse=always", image.Path, inMemory)
	for why, seed := range map[string]string{
		"the seed's image lies in memory": inMemory,
		"the seed is a block device":      "",
	} {
		t.Run(why, func(t *testing.T) {
			w := harness.New(t, programs)
			disk := w.OpenDisk(seedtest.DiskSpec{})
			if seed == "" {
				stick := w.OpenDisk(seedtest.DiskSpec{})
				part, err := stick.AddPartition(t.Context(), 1, seedtest.MiB, image.Size)
				must(t, err)
				command(t, "dd", "if="+image.Path, "of="+part, "bs=4M", "conv=fsync", "status=none")
				seed = part
			}
			sprout := w.Create(seed, client.CreateOptions{})
			result := w.Done(w.Flatten(w.Context(), sprout.Path, disk.Path, noBootloader))
			how, _ := result["read_ahead"].(string)
			if n, _ := result["read_ahead_bytes"].(uint64); !strings.HasPrefix(how, "off: "+why) || n != 0 {
				t.Errorf("read-ahead is %q with %d bytes", how, n)
			}
		})
	}
}

// bytesRead is how much was read from a partition since boot
// (Documentation/block/stat.rst).
func bytesRead(t *testing.T, device string) uint64 {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(device), "stat"))
	must(t, err)
	sectors, err := strconv.ParseUint(strings.Fields(string(raw))[2], 10, 64)
	must(t, err)
	return sectors * 512
}
