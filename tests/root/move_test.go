package root

import (
	"testing"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
)

func TestVolatileToPersistentToInstalled(t *testing.T) {
	w := harness.New(t, programs)
	seed := seedtest.New(t, seedtest.Spec{})
	stick := seedtest.OpenStick(t, seedtest.StickSpec{Seed: seed.Path, PersistSize: seedtest.GiB})
	disk := seedtest.OpenDisk(t, seedtest.DiskSpec{})

	sprout := w.Create(stick.Seed, client.CreateOptions{})
	if sprout.State != "volatile" || sprout.SafeToUnplug {
		t.Errorf("a new sprout is shown as %+v", sprout)
	}
	w.Done(w.Persist(t.Context(), sprout.Path, stick.Persist, client.MoveOptions{}))
	if got := w.Show(sprout.Path); got.State != "persistent" {
		t.Errorf("after persist the sprout is shown as %+v", got)
	}
	w.Done(w.Flatten(t.Context(), sprout.Path, disk.Path, client.MoveOptions{Bootloader: "none"}))
	if got := w.Show(sprout.Path); got.State != "installed" || len(got.Members) != 1 {
		t.Errorf("after flatten the sprout is shown as %+v", got)
	}
	if err := stick.Unmount(); err != nil {
		t.Error(err)
	}
	if got := w.Show(sprout.Path); !got.SafeToUnplug {
		t.Errorf("the stick cannot be unplugged: %v", got.MediaHolders)
	}
}
