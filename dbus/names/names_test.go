package names_test

import (
	"testing"

	godbus "github.com/godbus/dbus/v5"
	"pgregory.net/rapid"

	"sproutd.org/sproutd/dbus/names"
)

func TestPathsOfKnownThings(t *testing.T) {
	for path, want := range map[godbus.ObjectPath]godbus.ObjectPath{
		names.SproutPath("0b1c2d3e-0000-4000-8000-00000000beef"): "/org/sproutd/Sprout1/sprout/0b1c2d3e_0000_4000_8000_00000000beef",
		names.JobPath(7):               "/org/sproutd/Sprout1/job/7",
		names.DevicePath("sda4"):       "/org/sproutd/Sprout1/device/sda4",
		names.DevicePath("dm-0"):       "/org/sproutd/Sprout1/device/dm_2d0",
		names.DevicePath("cciss!c0d0"): "/org/sproutd/Sprout1/device/cciss_21c0d0",
		names.DevicePath("9p_x"):       "/org/sproutd/Sprout1/device/_39p_5fx",
	} {
		if path != want {
			t.Errorf("path %s, want %s", path, want)
		}
	}
}

func TestEveryKernelNameComesBackFromItsPath(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.String().Draw(t, "name")
		path := names.DevicePath(name)
		if !path.IsValid() {
			t.Fatalf("%q became the invalid path %s", name, path)
		}
		if back, ok := names.DeviceOf(path); !ok || back != name {
			t.Fatalf("%q became %s and came back as %q, %v", name, path, back, ok)
		}
	})
}

func TestForeignPathsAreNothing(t *testing.T) {
	for _, path := range []godbus.ObjectPath{
		"/", names.Root, names.JobsParent, names.JobsParent + "/", names.JobsParent + "/07", names.JobsParent + "/-1",
		names.JobsParent + "/4294967296", names.JobsParent + "/1/2", names.DevicesParent + "/a_2", names.DevicesParent + "/a_zz",
		names.DevicesParent + "/_41", names.RootSprout,
	} {
		if n, ok := names.JobOf(path); ok {
			t.Errorf("%s is job %d", path, n)
		}
		if name, ok := names.DeviceOf(path); ok {
			t.Errorf("%s is device %q", path, name)
		}
		if fsid, ok := names.SproutOf(path); ok {
			t.Errorf("%s is sprout %q", path, fsid)
		}
	}
	if n, ok := names.JobOf(names.JobPath(12)); !ok || n != 12 {
		t.Errorf("job 12 came back as %d, %v", n, ok)
	}
	if fsid, ok := names.SproutOf(names.SproutPath("a-b")); !ok || fsid != "a-b" {
		t.Errorf("sprout a-b came back as %q, %v", fsid, ok)
	}
}
