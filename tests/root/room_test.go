package root

import (
	"os/exec"
	"strings"
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// table lists the partitions on a disk as its table has them.
func table(t *testing.T, disk string) []string {
	t.Helper()
	out, err := exec.Command("sfdisk", "--dump", disk).Output()
	must(t, err)
	var list []string
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, disk) {
			list = append(list, strings.Join(strings.Fields(line), " "))
		}
	}
	return list
}

// TestPersistMakesItsPartitionAndFindsItAgain uses a stick to which an image was
// copied that is smaller: its partition table ends where the image did.
func TestPersistMakesItsPartitionAndFindsItAgain(t *testing.T) {
	testenv.NeedTool(t, "systemd-repart", "sfdisk")
	w := harness.New(t, programs)
	stick := w.OpenStick(seedtest.StickSpec{Seed: seedtest.New(t, seedtest.Spec{Content: files(10)}).Path, Free: seedtest.GiB})
	before, media := table(t, stick.Path), sum(t, stick.Media)

	sprout := w.Create(stick.Seed, client.CreateOptions{})
	plan, err := w.Plan(w.Context(), sprout.Path, "persist", "free", client.MoveOptions{})
	must(t, err)
	if plan.Err() != nil || plan.TargetSize < seedtest.GiB-2*seedtest.MiB || plan.TargetSize > seedtest.GiB || plan.Steps[0].Kind != "make-partition" {
		t.Fatalf("the plan is %+v", plan)
	}
	if after := table(t, stick.Path); len(after) != len(before) {
		t.Fatalf("the plan has changed the table to %q", after)
	}
	w.Done(w.Persist(w.Context(), sprout.Path, "free", client.MoveOptions{}))
	sprout = w.Show(sprout.Path)
	wantState(t, sprout, "persistent", "seed", "persistent")
	made := sprout.Members[len(sprout.Members)-1].Path
	after := table(t, stick.Path)
	if len(after) != len(before)+1 || after[0] != before[0] {
		t.Errorf("the table was %q, and is %q", before, after)
	}
	for _, word := range []string{made, "type=5B3F9A1E-7C0D-4D7E-9D39-5A2C1F8E6B47", `name="sprout-persist"`} {
		if last := after[len(after)-1]; !strings.Contains(last, word) {
			t.Errorf("the new entry is %q, without %q", last, word)
		}
	}
	if sum(t, stick.Media) != media {
		t.Error("the partition of the seed was changed")
	}
	must(t, w.Teardown(w.Context(), sprout.Path))

	// In the next session it holds what the last one kept, and then what a move
	// left that was cut off. Neither is destroyed unless that is asked for.
	for _, words := range []string{"one of the 2 devices of a file system", "cut off"} {
		sprout = w.Create(stick.Seed, client.CreateOptions{})
		_, err := w.Persist(w.Context(), sprout.Path, "free", client.MoveOptions{})
		if client.CodeOf(err) != "TargetNotEmpty" || !strings.Contains(err.Error(), made) || !strings.Contains(err.Error(), words) {
			t.Errorf("it is refused with %v, which does not say %q", err, words)
		}
		w.Done(w.AddDevice(w.Context(), sprout.Path, made, client.MoveOptions{Wipe: true}))
		must(t, w.Teardown(w.Context(), sprout.Path))
	}
	sprout = w.Create(stick.Seed, client.CreateOptions{})
	w.Done(w.Persist(w.Context(), sprout.Path, "free", client.MoveOptions{Wipe: true}))
	wantState(t, w.Show(sprout.Path), "persistent", "seed", "persistent")
	if again := table(t, stick.Path); len(again) != len(after) {
		t.Errorf("the table is %q", again)
	}
}

func TestPersistToTheFreeSpaceOfAStickWithoutAGPTIsRefused(t *testing.T) {
	w := harness.New(t, programs)
	stick := w.OpenStick(seedtest.StickSpec{Seed: seedtest.New(t, seedtest.Spec{Content: files(10)}).Path})
	sprout := w.Create(stick.Seed, client.CreateOptions{})
	_, err := w.Persist(w.Context(), sprout.Path, "free", client.MoveOptions{})
	if client.CodeOf(err) != "NotSupported" || !strings.Contains(err.Error(), "GPT") {
		t.Errorf("it is refused with %v", err)
	}
}
