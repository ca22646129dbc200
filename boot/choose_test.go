package boot

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/boot/probe"
	"sproutd.org/sproutd/btrfs"
)

// The devices of a story: disks are 8:0 (the stick booted from), 8:16 and so
// on, partitions are numbered from them.
func disk(n uint32) block.DevNum { return block.DevNum{Major: 8, Minor: 16 * n} }

// part is partition p of disk n with a member of a filesystem on it.
func part(n, p uint32, fsid byte, devid, generation uint64) found {
	f := found{Disk: disk(n), FS: probe.FS{Type: "btrfs"}}
	f.Num = block.DevNum{Major: 8, Minor: 16*n + p}
	f.Path = fmt.Sprintf("/dev/sd%c%d", 'a'+n, p)
	f.Super = btrfs.Super{
		FSID: btrfs.UUID{fsid}, DevUUID: btrfs.UUID{fsid, byte(devid)}, DevID: devid, Generation: generation, Label: "live",
	}
	return f
}

// own is the device item of a member, seed that of a seed.
func own(fsid byte, devid uint64) btrfs.DevItem {
	return btrfs.DevItem{DevID: devid, UUID: btrfs.UUID{fsid, byte(devid)}, FSID: btrfs.UUID{fsid}}
}

func seed(fsid byte, generation uint64) btrfs.DevItem {
	return btrfs.DevItem{DevID: 1, UUID: btrfs.UUID{fsid, 1}, FSID: btrfs.UUID{fsid}, Generation: generation}
}

const (
	theSeed = 0x5e
	other   = 0x0e
)

func TestChoice(t *testing.T) {
	type items = map[byte][]btrfs.DevItem
	lost := &btrfs.MissingDeviceError{UUID: btrfs.UUID{9}}
	relabelled := func(f found, label string) found {
		f.Super.Label = label
		return f
	}
	for _, c := range []struct {
		name  string
		found []found
		items items
		errs  map[byte]error
		only  []found
		// want are the devices of the sprout that is chosen.
		want     string
		warnings []string
		hopeful  bool
		ours     string // what a reset would drop
	}{
		{name: "nothing is there"},
		{name: "the persistence of this stick",
			found: []found{part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 7), own('a', 3)}},
			want: "/dev/sda4", ours: "/dev/sda4"},
		{name: "a persist that was cut off",
			found: []found{part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 7), own('a', 2), own('a', 3)}},
			warnings: []string{"The sprout on /dev/sda4 lacks 1 of 2 devices"}, hopeful: true, ours: "/dev/sda4"},
		{name: "a persist that was cut off early: the list of devices was in memory",
			found: []found{part(0, 4, 'a', 3, 20)}, errs: map[byte]error{'a': lost},
			warnings: []string{"The sprout on /dev/sda4 lacks a device"}, hopeful: true, ours: "/dev/sda4"},
		{name: "a flatten that was cut off",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'a', 4, 21)}, items: items{'a': {seed(theSeed, 7), own('a', 3), own('a', 4)}},
			want: "/dev/sda4 and /dev/sdb2", ours: "/dev/sda4 and /dev/sdb2"},
		{name: "a flatten that was cut off while the seed left",
			found: []found{part(1, 2, 'a', 4, 21)}, items: items{'a': {seed(theSeed, 7), own('a', 4)}},
			want: "/dev/sdb2"},
		{name: "an installed system",
			found: []found{part(1, 2, 'a', 4, 21)}, items: items{'a': {own('a', 4)}}},
		{name: "an ordinary filesystem that lacks a device",
			found: []found{relabelled(part(1, 2, 'a', 1, 21), "data")}, errs: map[byte]error{'a': lost}},
		{name: "an ordinary filesystem that is damaged",
			found: []found{relabelled(part(1, 2, 'a', 1, 21), "")}, errs: map[byte]error{'a': btrfs.ErrTreeCorrupt}},
		{name: "the persistence is damaged",
			found: []found{part(0, 4, 'a', 3, 20)}, errs: map[byte]error{'a': btrfs.ErrTreeCorrupt},
			warnings: []string{"The filesystem on /dev/sda4 is damaged and is not used: a tree block is damaged."}, ours: "/dev/sda4"},
		{name: "another filesystem on the stick is damaged",
			found: []found{relabelled(part(0, 5, 'a', 1, 20), "data")}, errs: map[byte]error{'a': btrfs.ErrTreeCorrupt},
			warnings: []string{"The filesystem on /dev/sda5 is damaged"}},
		{name: "the sprout of another seed",
			found: []found{part(1, 4, 'a', 2, 20)}, items: items{'a': {seed(other, 7), own('a', 2)}},
			warnings: []string{"The sprout on /dev/sdb4 belongs to another seed (0e000000-0000-0000-0000-000000000000) and is left alone."}},
		{name: "an older version of the image",
			found: []found{part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 6), own('a', 3)}},
			warnings: []string{"The sprout on /dev/sda4 was made with another version of this seed"}, ours: "/dev/sda4"},
		{name: "a copied stick",
			found: []found{part(1, 4, 'a', 3, 20), part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 7), own('a', 3)}},
			want: "/dev/sda4", warnings: []string{"There are copies of the sprout on /dev/sda4: /dev/sdb4. Only the former is used."}, ours: "/dev/sda4"},
		{name: "a copied stick that was used since",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 4, 'a', 3, 99)}, items: items{'a': {seed(theSeed, 7), own('a', 3)}},
			want: "/dev/sda4", warnings: []string{"There are copies"}, ours: "/dev/sda4"},
		{name: "copies elsewhere: all from one disk",
			found: []found{part(1, 2, 'a', 3, 20), part(1, 3, 'a', 4, 20), part(2, 2, 'a', 3, 30), part(2, 3, 'a', 4, 30)},
			items: items{'a': {seed(theSeed, 7), own('a', 3), own('a', 4)}},
			want:  "/dev/sdc2 and /dev/sdc3", warnings: []string{"There are copies of the sprout on /dev/sdc2 and /dev/sdc3: /dev/sdb2 and /dev/sdb3."}},
		{name: "half of it is an old copy",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'a', 4, 30)}, items: items{'a': {seed(theSeed, 7), own('a', 3), own('a', 4)}},
			warnings: []string{"The devices of the sprout on /dev/sda4 and /dev/sdb2 are of different times"}, ours: "/dev/sda4 and /dev/sdb2"},
		{name: "the power was cut between the two superblocks",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'a', 4, 21)}, items: items{'a': {seed(theSeed, 7), own('a', 3), own('a', 4)}},
			want: "/dev/sda4 and /dev/sdb2", ours: "/dev/sda4 and /dev/sdb2"},
		{name: "two sprouts: the one on the stick is taken",
			found: []found{part(1, 2, 'b', 3, 90), part(0, 4, 'a', 3, 20)},
			items: items{'a': {seed(theSeed, 7), own('a', 3)}, 'b': {seed(theSeed, 7), own('b', 3)}},
			want:  "/dev/sda4", warnings: []string{"the one on /dev/sda4 is used, which is on the disk of the media, and that on /dev/sdb2 is left alone."}, ours: "/dev/sda4"},
		{name: "two sprouts elsewhere: the one used more is taken",
			found: []found{part(1, 2, 'a', 3, 20), part(2, 2, 'b', 3, 90)},
			items: items{'a': {seed(theSeed, 7), own('a', 3)}, 'b': {seed(theSeed, 7), own('b', 3)}},
			want:  "/dev/sdc2", warnings: []string{"the one on /dev/sdc2 is used, which was written to most often, and that on /dev/sdb2"}},
		{name: "the broken one on the stick and a good one elsewhere",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'b', 3, 90)},
			items: items{'a': {seed(theSeed, 7), own('a', 2), own('a', 3)}, 'b': {seed(theSeed, 7), own('b', 3)}},
			want:  "/dev/sdb2", warnings: []string{"The sprout on /dev/sda4 lacks"}, hopeful: true, ours: "/dev/sda4"},
		{name: "a device was named",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'b', 3, 90)}, only: []found{part(1, 2, 0, 0, 0)},
			items: items{'a': {seed(theSeed, 7), own('a', 3)}, 'b': {seed(theSeed, 7), own('b', 3)}},
			want:  "/dev/sdb2", warnings: []string{"The sprout on /dev/sda4 is not used: rd.sprout.persist= names /dev/sdb2."}, ours: "/dev/sda4"},
		{name: "a disk was named",
			found: []found{part(1, 2, 'b', 3, 90)}, only: []found{{ID: block.ID{Num: disk(1), Path: "/dev/sdb"}}},
			items: items{'b': {seed(theSeed, 7), own('b', 3)}},
			want:  "/dev/sdb2"},
		{name: "a seed of two generations",
			found: []found{part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 7), seed(other, 3), own('a', 3)}},
			warnings: []string{"belongs to another seed"}},
		{name: "a device with the right UUID and another number",
			found: []found{part(0, 4, 'a', 3, 20)}, items: items{'a': {seed(theSeed, 7), {DevID: 4, UUID: btrfs.UUID{'a', 3}, FSID: btrfs.UUID{'a'}}}},
			warnings: []string{"it does not know the devices that it is on"}, ours: "/dev/sda4"},
		{name: "the power was cut right after a device was removed",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'a', 4, 99)}, items: items{'a': {seed(theSeed, 7), own('a', 4)}},
			want: "/dev/sdb2"},
		{name: "the power was cut while a device was replaced",
			found: []found{part(0, 4, 'a', 3, 20), part(1, 2, 'a', 0, 20)}, items: items{'a': {seed(theSeed, 7), own('a', 3)}},
			want: "/dev/sda4", ours: "/dev/sda4"},
		{name: "only the half-made replacement is there",
			found: []found{part(1, 2, 'a', 0, 20)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			super := part(0, 1, theSeed, 1, 7).Super
			super.Seeding = true
			image := found{FS: probe.FS{Type: "btrfs"}, Super: super}
			damaged := found{FS: probe.FS{Type: "btrfs"}, Err: btrfs.ErrSuperCorrupt}
			s := situation{seed: super, disk: disk(0), only: c.only}
			// The order of the kernel's list is no reason for anything.
			for _, list := range [][]found{append(c.found, image, damaged), slices.Concat([]found{image}, reversed(c.found))} {
				s.found = group(list, disk(0))
				for i := range s.found {
					fsid := s.found[i].fsid[0]
					s.found[i].consistsOf(c.items[fsid], c.errs[fsid])
				}
				got := choose(s)
				paths := ""
				if got.sprout != nil {
					paths = got.sprout.paths()
				}
				if paths != c.want || got.hopeful != c.hopeful {
					t.Errorf("chose %q (hopeful %v), wanted %q (%v)", paths, got.hopeful, c.want, c.hopeful)
				}
				wantWarnings(t, got.warnings, c.warnings...)
				var ours []string
				for _, a := range got.ours {
					ours = append(ours, a.paths())
				}
				if strings.Join(ours, ", ") != c.ours {
					t.Errorf("a reset would drop %q, wanted %q", ours, c.ours)
				}
			}
		})
	}
}

func reversed(list []found) []found {
	list = slices.Clone(list)
	slices.Reverse(list)
	return list
}

func TestWhichMediaAreTriedFirst(t *testing.T) {
	iso := func(n, p uint32, label string) found {
		f := part(n, p, 0, 0, 0)
		f.FS = probe.FS{Type: "iso9660", Label: label, UUID: "2026-08-01-12-00-00-00"}
		if p == 0 {
			f.Path = strings.TrimSuffix(f.Path, "0")
		}
		return f
	}
	list := []found{
		iso(2, 0, "LIVE"), iso(2, 1, "LIVE"), // an isohybrid stick
		iso(1, 0, "LIVE"), iso(1, 1, "LIVE"), // and its copy
		iso(3, 0, "LIVE"), // a CD
		iso(4, 0, "DATA"), iso(4, 1, ""),
	}
	grown := part(5, 1, 'a', 3, 9)
	grown.FS.Label = "LIVE"
	list = append(list, grown)
	list[1].PartUUID, list[1].PartLabel = "5B3F-01", "stick"
	at := func(path string) block.DevNum {
		return map[string]block.DevNum{
			"/dev/cdrom": list[4].Num, "/dev/disk/by-partuuid/0000-02": list[3].Num,
		}[path]
	}
	for _, c := range []struct {
		spec     Spec
		complete map[block.DevNum]bool
		want     string
	}{
		{Spec{byLabel, "LIVE"}, nil, "/dev/sdd /dev/sdb1 /dev/sdc1"},
		{Spec{byLabel, "LIVE"}, map[block.DevNum]bool{disk(2): true}, "/dev/sdc1 /dev/sdd /dev/sdb1"},
		{Spec{byLabel, "live"}, nil, ""},
		{Spec{byLabel, "DATA"}, nil, "/dev/sde"},
		{Spec{byUUID, "2026-08-01-12-00-00-00"}, nil, "/dev/sdd /dev/sdb1 /dev/sdc1 /dev/sde1"},
		{Spec{byPartUUID, "5b3f-01"}, nil, "/dev/sdc1"},
		{Spec{byPartUUID, "0000-02"}, nil, "/dev/sdb1"},
		{Spec{byPartLabel, "stick"}, nil, "/dev/sdc1"},
		{Spec{byPath, "/dev/cdrom"}, nil, "/dev/sdd"},
		{Spec{byPath, "/dev/nothing"}, nil, ""},
	} {
		var got []string
		for _, f := range rank(mediaOf(c.spec, list, at), c.complete) {
			got = append(got, f.Path)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s gave %q, wanted %q", c.spec, got, c.want)
		}
	}
}

func TestWhichSeedsStandInForTheMedia(t *testing.T) {
	bare := func(n, p uint32, fsid byte, generation uint64) found {
		f := part(n, p, fsid, 1, generation)
		f.Super.Seeding = true
		return f
	}
	broken := bare(7, 1, theSeed, 5)
	broken.Err = errors.New("unreadable")
	for _, c := range []struct {
		name  string
		items []btrfs.DevItem
		list  []found
		want  string
	}{
		{"none", []btrfs.DevItem{own('a', 2), seed(theSeed, 5)}, nil, ""},
		{"the seed", []btrfs.DevItem{own('a', 2), seed(theSeed, 5)}, []found{bare(2, 1, theSeed, 5), bare(1, 3, theSeed, 5)}, "/dev/sdb3 /dev/sdc1"},
		{"others", []btrfs.DevItem{own('a', 2), seed(theSeed, 5)}, []found{bare(2, 1, theSeed, 6), bare(3, 1, other, 5), broken, part(4, 1, theSeed, 1, 5)}, ""},
		{"of a sprout that lacks a member", []btrfs.DevItem{own('a', 2), own('a', 3), seed(theSeed, 5)}, []found{bare(2, 1, theSeed, 5)}, ""},
		{"of what is no sprout", []btrfs.DevItem{own('a', 2)}, []found{bare(2, 1, theSeed, 5)}, ""},
		{"of two seeds", []btrfs.DevItem{own('a', 2), seed(theSeed, 5), seed(other, 5)}, []found{bare(2, 1, theSeed, 5)}, ""},
	} {
		list := append([]found{part(1, 2, 'a', 2, 9)}, c.list...)
		assemblies := group(list, block.DevNum{})
		for i := range assemblies {
			if assemblies[i].fsid == (btrfs.UUID{'a'}) {
				assemblies[i].consistsOf(c.items, nil)
			}
		}
		var got []string
		for _, f := range seedsOf(assemblies, list) {
			got = append(got, f.Path)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, wanted %q", c.name, got, c.want)
		}
	}
}

func TestWhatIsNoSeed(t *testing.T) {
	good := btrfs.Super{Seeding: true, NumDevices: 1, SectorSize: 4096}
	for _, c := range []struct {
		change func(*btrfs.Super)
		err    error
		want   string
	}{
		{nil, btrfs.ErrNotBtrfs, "x is no seed: there is no Btrfs in it"},
		{nil, fmt.Errorf("%w: 5 of 9 bytes", btrfs.ErrTruncated), "cannot use the seed x: shorter than the filesystem on it"},
		{nil, errors.New("input/output error"), "cannot use the seed x: input/output error"},
		{func(s *btrfs.Super) { s.Seeding = false }, nil, "btrfstune"},
		{func(s *btrfs.Super) { s.NumDevices = 2 }, nil, "it is one of 2 devices"},
		{func(s *btrfs.Super) { s.CsumType = 77 }, nil, "cannot use the seed x: "},
	} {
		super := good
		if c.change != nil {
			c.change(&super)
		}
		if err := usable(super, c.err, "x"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("gave %v, wanted %q", err, c.want)
		}
	}
}
