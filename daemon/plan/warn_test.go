package plan_test

import (
	"strings"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/plan"
)

// lost gives a copy of s whose members with these paths were unplugged, as the
// machine shows them: without a number, under their last name.
func lost(s plan.Sprout, ids ...block.ID) plan.Sprout {
	s.Members = append([]plan.Member(nil), s.Members...)
	for i := range s.Members {
		for _, id := range ids {
			if m := &s.Members[i]; m.ID.Same(id) {
				m.ID, m.Missing = block.ID{Path: id.Path}, true
			}
		}
	}
	return s
}

func TestWhatTheUserIsWarnedOf(t *testing.T) {
	stick := plan.Lookout{Media: "/dev/sda", Unplugged: true}
	for _, c := range []struct {
		what    string
		sprout  plan.Sprout
		lookout plan.Lookout
		want    []string // the beginning of each
	}{
		{"all is well", sprout(loop, zram), plan.Lookout{Media: "/dev/sda"}, nil},
		{"the stick of a volatile session is pulled", sprout(loop, zram), stick, []string{"The stick (/dev/sda) was unplugged"}},
		{"the stick with the persistence is pulled", lost(sprout(loop, usb), usb), stick, []string{"The stick (/dev/sda) was unplugged"}},
		{"the target is pulled", lost(sprout(loop, usb, disk), disk), plan.Lookout{Media: "/dev/sda"}, []string{"The device /dev/nvme0n1 was unplugged"}},
		{"both are pulled", lost(sprout(loop, usb, disk), usb, disk), stick,
			[]string{"The stick (/dev/sda) was unplugged", "The device /dev/nvme0n1 was unplugged"}},
		{"a seed without a loop is pulled", lost(sprout(loop, zram), loop), plan.Lookout{}, []string{"The seed (/dev/loop0) was unplugged"}},
		{"the stick is pulled when nobody needs it", sprout(disk), stick, nil},
		{"the kernel gives up writing", sprout(disk), plan.Lookout{TurnedReadOnly: true}, []string{"The file system has become read-only"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			got := plan.Warnings(c.sprout, c.lookout)
			if len(got) != len(c.want) {
				t.Fatalf("the warnings are %q, wanted are %q", got, c.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], c.want[i]) {
					t.Errorf("warning %d is %q, wanted is %q", i, got[i], c.want[i])
				}
			}
		})
	}
}
