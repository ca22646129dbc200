package boot

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCommandLine(t *testing.T) {
	stick := Spec{By: byLabel, Value: "LIVE"}
	plain := Request{Media: stick, Image: "/LiveOS/root.img", Zram: Size{Percent: 50}, Timeout: time.Minute}
	with := func(change func(*Request)) Request {
		r := plain
		change(&r)
		return r
	}
	media := func(by, value string) Request { return with(func(r *Request) { r.Media = Spec{By: by, Value: value} }) }
	for _, c := range []struct {
		line string
		want Request
		// warnings are words of each that is wanted.
		warnings []string
	}{
		{"BOOT_IMAGE=/vmlinuz root=sprout:LABEL=LIVE quiet splash", plain, nil},
		{"root=sprout:UUID=2026-08-01-12-00-00-00", media(byUUID, "2026-08-01-12-00-00-00"), nil},
		{"root=sprout:PARTUUID=5b3f9a1e-02", media(byPartUUID, "5b3f9a1e-02"), nil},
		{"root=sprout:PARTLABEL=live", media(byPartLabel, "live"), nil},
		{"root=sprout:/dev/disk/by-id/usb-x", media(byPath, "/dev/disk/by-id/usb-x"), nil},
		{"root=sprout:label=LIVE", plain, nil},
		{`root=sprout:LABEL=My\x20Stick\x2f`, media(byLabel, "My Stick/"), nil},
		{`"root=sprout:LABEL=My Stick" quiet`, media(byLabel, "My Stick"), nil},
		{`root=sprout:LABEL="My Stick"`, media(byLabel, "My Stick"), nil},
		{`root=sprout:LABEL=a\xzz\x4`, media(byLabel, `a\xzz\x4`), nil},
		{"root=/dev/sda1 root=sprout:LABEL=LIVE\n", plain, nil},

		{"quiet", with(func(r *Request) { r.Media = Spec{} }), nil},
		{"root=sprout:LABEL=LIVE root=/dev/sda1", with(func(r *Request) { r.Media = Spec{} }), nil},
		{"root=sprout:", with(func(r *Request) { r.Media = Spec{} }), []string{"root=sprout: names no device"}},
		{"root=sprout:LABEL=", with(func(r *Request) { r.Media = Spec{} }), []string{"root=sprout:LABEL= names no device"}},
		{"root=sprout:stick", with(func(r *Request) { r.Media = Spec{} }), []string{"root=sprout:stick names no device"}},
		{"root=sprout:/dev/", with(func(r *Request) { r.Media = Spec{} }), []string{"root=sprout:/dev/ names no device"}},

		{"rd.sprout.image=/a/b.img", with(func(r *Request) { r.Image = "/a/b.img" }), nil},
		{"rd.sprout.image=../a//b.img", with(func(r *Request) { r.Image = "/a/b.img" }), nil},
		{"rd.sprout.image=", plain, []string{"rd.sprout.image= is no path of a file: /LiveOS/root.img is used."}},
		{"rd.sprout.image=/", plain, []string{"rd.sprout.image=/ is no path"}},

		{"rd.sprout.zram=75%", with(func(r *Request) { r.Zram = Size{Percent: 75} }), nil},
		{"rd.sprout.zram=1048576", with(func(r *Request) { r.Zram = Size{Bytes: 1 << 20} }), nil},
		{"rd.sprout.zram=3k", with(func(r *Request) { r.Zram = Size{Bytes: 3 << 10} }), nil},
		{"rd.sprout.zram=512M", with(func(r *Request) { r.Zram = Size{Bytes: 512 << 20} }), nil},
		{"rd.sprout.zram=2G", with(func(r *Request) { r.Zram = Size{Bytes: 2 << 30} }), nil},
		{"rd.sprout.zram=1T", with(func(r *Request) { r.Zram = Size{Bytes: 1 << 40} }), nil},
		{"rd.sprout.zram=2G rd.sprout.zram=4G", with(func(r *Request) { r.Zram = Size{Bytes: 4 << 30} }), nil},
		{"rd.sprout.zram=much", plain, []string{"rd.sprout.zram=much is no size"}},
		{"rd.sprout.zram=", plain, []string{"rd.sprout.zram= is no size"}},
		{"rd.sprout.zram=0", plain, []string{"rd.sprout.zram=0 is no size"}},
		{"rd.sprout.zram=0%", plain, []string{"rd.sprout.zram=0% is no size"}},
		{"rd.sprout.zram=401%", plain, []string{"50% is used."}},
		{"rd.sprout.zram=-1G", plain, []string{"rd.sprout.zram=-1G is no size"}},
		{"rd.sprout.zram=1.5G", plain, []string{"rd.sprout.zram=1.5G is no size"}},
		{"rd.sprout.zram=99999999999999999999", plain, []string{"is no size"}},
		{"rd.sprout.zram=18446744073709551615G", plain, []string{"is no size"}},
		{"rd.sprout.zram=%", plain, []string{"rd.sprout.zram=% is no size"}},

		{"rd.sprout.persist=auto", plain, nil},
		{"rd.sprout.persist=no", with(func(r *Request) { r.NoPersist = true }), nil},
		{"rd.sprout.persist=0", with(func(r *Request) { r.NoPersist = true }), nil},
		{"rd.sprout.persist=no rd.sprout.persist=yes", plain, nil},
		{"rd.sprout.persist=/dev/sdb2", with(func(r *Request) { r.Persist = Spec{By: byPath, Value: "/dev/sdb2"} }), nil},
		{"rd.sprout.persist=PARTLABEL=mine", with(func(r *Request) { r.Persist = Spec{By: byPartLabel, Value: "mine"} }), nil},
		{"rd.sprout.persist=mine", plain, []string{"rd.sprout.persist=mine is none of auto, no and the name of a device: auto is used."}},
		{"rd.sprout.persist", plain, []string{"auto is used"}},

		{"rd.sprout.reset rd.sprout.check", with(func(r *Request) { r.Reset, r.Check = true, true }), nil},
		{"rd.sprout.reset=1 rd.sprout.check=yes", with(func(r *Request) { r.Reset, r.Check = true, true }), nil},
		{"rd.sprout.reset=0 rd.sprout.check=off", plain, nil},
		{"rd.sprout.reset rd.sprout.reset=no", plain, nil},
		{"rd.sprout.reset=please", plain, []string{"rd.sprout.reset=please is neither yes nor no: it was ignored."}},
		{"rd.sprout.check=", plain, []string{"rd.sprout.check= is neither yes nor no"}},
		{"rd.sprout.ram", with(func(r *Request) { r.RAM = true }), nil},
		{"rd.sprout.ram=0", plain, nil},

		{"rd.sprout.timeout=5", with(func(r *Request) { r.Timeout = 5 * time.Second }), nil},
		{"rd.sprout.timeout=0", with(func(r *Request) { r.Timeout = 0 }), nil},
		{"rd.sprout.timeout=soon", plain, []string{"rd.sprout.timeout=soon is no number of seconds up to 3600: 60 is used."}},
		{"rd.sprout.timeout=3601", plain, []string{"60 is used"}},
		{"rd.sprout.timeout=-1", plain, []string{"60 is used"}},

		{"rd.sprout.zrma=1G rd.sprout rd.sproutx=1 rd.live.image", plain,
			[]string{"rd.sprout.zrma=1G is no parameter of this version", "rd.sprout is no parameter"}},
	} {
		line := c.line
		if !strings.Contains(line, "root=") && line != "quiet" {
			line = "root=sprout:LABEL=LIVE " + line
		}
		got, warnings := ParseCommandLine(line)
		if got != c.want {
			t.Errorf("%s\ngave %+v\nwant %+v", c.line, got, c.want)
		}
		wantWarnings(t, warnings, c.warnings...)
	}
}

func TestWords(t *testing.T) {
	got := words("a  b=\"c d\"\te \"f g\"=h \"\" i=\"j")
	if want := []string{"a", "b=c d", "e", "f g=h", "", "i=j"}; !slices.Equal(got, want) {
		t.Errorf("the words are %q, wanted %q", got, want)
	}
}

// Whatever the boot loader passes on, a warning is a sentence that can be shown.
func FuzzCommandLine(f *testing.F) {
	f.Add("root=sprout:LABEL=\\x20 rd.sprout.zram=5% rd.sprout.persist=/dev/x rd.sprout.timeout=1 rd.sprout.image=\"a b\"")
	f.Fuzz(func(t *testing.T, line string) {
		r, warnings := ParseCommandLine(line)
		for _, w := range warnings {
			if !strings.HasSuffix(w, ".") || strings.Contains(w, "%!") {
				t.Errorf("the warning %q is no sentence", w)
			}
		}
		if r.Zram.of(1<<30) == 0 || r.Timeout < 0 || r.Timeout > maxTimeout*time.Second || !strings.HasPrefix(r.Image, "/") {
			t.Errorf("%q gave %+v", line, r)
		}
	})
}

func TestTheSizeOfTheFirstDevice(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for _, c := range []struct {
		asked           Size
		memory, reserve uint64
		want            uint64
		warning         string
	}{
		{Size{Percent: 50}, 8 * gib, 5 * mib, 4 * gib, ""},
		{Size{Percent: 50}, 1 * gib, 5 * mib, 1 * gib, ""}, // a small machine
		{Size{Percent: 10}, 4 * gib, 5 * mib, 1 * gib, "rd.sprout.zram=10% is too small"},
		{Size{Bytes: 100 * mib}, 4 * gib, 5 * mib, 1 * gib, "rd.sprout.zram=104857600 is too small"},
		{Size{Percent: 50}, 4 * gib, 512 * mib, 20 * 512 * mib, ""}, // a seed with huge trees
		{Size{Bytes: 3 * gib}, 4 * gib, 5 * mib, 3 * gib, ""},
		{Size{Bytes: 1 << 50}, 4 * gib, 5 * mib, 2 * gib, "is more than 400% of the memory: 2048 MiB are used."},
		{Size{Percent: 400}, 4 * gib, 5 * mib, 16 * gib, ""},
	} {
		got, warning := sizeFor(c.asked, c.memory, c.reserve)
		if got != c.want || c.warning == "" != (warning == "") || !strings.Contains(warning, c.warning) {
			t.Errorf("%s of %d gave %d (%q), wanted %d (%q)", c.asked, c.memory, got, warning, c.want, c.warning)
		}
	}
}
