package btrfs

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
)

// fakeTrees answers tree searches from memory, at most two items at a time.
type fakeTrees map[uint64][]fakeItem

type fakeItem struct {
	key  key
	data []byte
}

func (trees fakeTrees) ioctl(_ uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
	if req != iocTreeSearchV2 {
		return ^uintptr(0), unix.ENOTTY
	}
	args := (*searchArgsV2)(arg)
	items, ok := trees[args.key.treeID]
	if !ok {
		return ^uintptr(0), unix.ENOENT
	}
	from := key{args.key.minObjectID, uint8(args.key.minType), args.key.minOffset}
	to := key{args.key.maxObjectID, uint8(args.key.maxType), args.key.maxOffset}
	out := unsafe.Slice((*byte)(unsafe.Add(arg, unsafe.Sizeof(*args))), args.bufSize)[:0]
	args.key.nrItems = 0
	for _, item := range items {
		if item.key.compare(from) < 0 || item.key.compare(to) > 0 || args.key.nrItems == 2 {
			continue
		}
		args.key.nrItems++
		out = binary.NativeEndian.AppendUint64(out, 1)
		out = binary.NativeEndian.AppendUint64(out, item.key.object)
		out = binary.NativeEndian.AppendUint64(out, item.key.offset)
		out = binary.NativeEndian.AppendUint32(out, uint32(item.key.typ))
		out = binary.NativeEndian.AppendUint32(out, uint32(len(item.data)))
		out = append(out, item.data...)
	}
	return 0, 0
}

func words(values ...uint64) []byte {
	var data []byte
	for _, v := range values {
		data = binary.LittleEndian.AppendUint64(data, v)
	}
	return data
}

func TestGroupsFromEitherTree(t *testing.T) {
	const mib = 1 << 20
	devExtent := func(offset, logical, length uint64) fakeItem {
		return fakeItem{key{2, typeDevExtent, offset}, append(words(3, 256, logical, length), make([]byte, 16)...)}
	}
	group := func(logical, length, used, flags uint64) fakeItem {
		return fakeItem{key{logical, typeBlockGroup, length}, words(used, 256, flags)}
	}
	extents := []fakeItem{
		devExtent(1*mib, 100*mib, 8*mib), devExtent(9*mib, 200*mib, 4*mib), devExtent(13*mib, 200*mib, 4*mib),
		devExtent(20*mib, 300*mib, 8*mib), // its group is gone already
		devExtent(30*mib, 400*mib, 8*mib),
	}
	groups := []fakeItem{
		group(100*mib, 8*mib, 5, flagData), group(200*mib, 4*mib, 6, flagMetadata|flagDup), group(400*mib, 8*mib, 7, flagData),
	}
	mixedIn := slices.Clone(groups)
	for _, at := range []uint64{100 * mib, 200 * mib, 400 * mib} {
		mixedIn = append(mixedIn, fakeItem{key{at, typeExtentItem, 4096}, words(1, 1, 1)})
	}
	slices.SortFunc(mixedIn, func(a, b fakeItem) int { return a.key.compare(b.key) })
	want := []Group{
		{400 * mib, 8 * mib, 30 * mib, 8 * mib, flagData, 7},
		{200 * mib, 4 * mib, 13 * mib, 4 * mib, flagMetadata | flagDup, 6},
		{200 * mib, 4 * mib, 9 * mib, 4 * mib, flagMetadata | flagDup, 6},
		{100 * mib, 8 * mib, 1 * mib, 8 * mib, flagData, 5},
	}
	for name, trees := range map[string]fakeTrees{
		"extent tree":      {treeDev: extents, treeExtent: mixedIn},
		"block group tree": {treeDev: extents, treeExtent: nil, treeBlockGroup: groups},
	} {
		f := fakeFS(t, 0, 0)
		f.ioctl = trees.ioctl
		if got, err := f.Groups(2); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %+v (%v), wanted %+v", name, got, err, want)
		}
	}
	f := fakeFS(t, ^uintptr(0), unix.EPERM)
	if _, err := f.Groups(2); !errors.Is(err, unix.EPERM) {
		t.Errorf("without the right to search: %v", err)
	}
}

func TestSearchDoesNotTrustLengths(t *testing.T) {
	f := fakeFS(t, 0, 0)
	f.ioctl = func(_ uintptr, _ uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		args := (*searchArgsV2)(arg)
		args.key.nrItems = 1
		(*searchHeader)(unsafe.Add(arg, unsafe.Sizeof(*args))).length = searchBuffer
		return 0, 0
	}
	err := f.search(treeDev, key{}, key{object: 9}, func(key, []byte) error { return nil })
	if !errors.Is(err, unix.EBADMSG) {
		t.Errorf("an item longer than the buffer: %v", err)
	}
}

func TestKeyNext(t *testing.T) {
	for _, c := range []struct{ from, to key }{
		{key{1, 2, 3}, key{1, 2, 4}},
		{key{1, 2, ^uint64(0)}, key{1, 3, 0}},
		{key{1, 255, ^uint64(0)}, key{2, 0, 0}},
	} {
		if got, ok := c.from.next(); !ok || got != c.to || c.from.compare(got) >= 0 {
			t.Errorf("after %v comes %v", c.from, got)
		}
	}
	if _, ok := (key{^uint64(0), 255, ^uint64(0)}).next(); ok {
		t.Error("there is a key after the last")
	}
}

func TestEachLink(t *testing.T) {
	var got []string
	collect := func(dir uint64, name string) error {
		got = append(got, string(rune('0'+dir))+name)
		return nil
	}
	ref := append(words(1), 1, 0, 'a')
	ref = append(append(ref, words(2)...), 2, 0, 'b', 'c')
	extref := append(words(7, 1), 1, 0, 'd')
	if err := errors.Join(eachLink(key{9, typeInodeRef, 5}, ref, collect), eachLink(key{9, typeInodeExtref, 5}, extref, collect)); err != nil {
		t.Error(err)
	}
	if !slices.Equal(got, []string{"5a", "5bc", "7d"}) {
		t.Errorf("the links are %q", got)
	}
	for n := 1; n < len(extref); n++ {
		if err := eachLink(key{9, typeInodeExtref, 5}, extref[:n], collect); !errors.Is(err, unix.EBADMSG) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
}

// A sprout in the middle of the removal of device 2, as sysfs and the ioctls
// show it; the kernel remembers odd names for the devices. Device 7 was
// unplugged, of which the kernel says nothing: only its link leads nowhere.
func TestMembersWhileOneLeavesAndOneIsUnplugged(t *testing.T) {
	own, seed := UUID{1}, UUID{2}
	f := fakeFS(t, 0, 0)
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(f.sys, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	dir := "fs/btrfs/" + own.String()
	for id, flags := range map[string][3]string{"1": {seed.String(), "0", "0"}, "2": {own.String(), "1", "0"}, "5": {own.String(), "1", "0"}, "6": {own.String(), "0", "1"}, "7": {own.String(), "1", "0"}} {
		put(dir+"/devinfo/"+id+"/fsid", flags[0])
		put(dir+"/devinfo/"+id+"/writeable", flags[1])
		put(dir+"/devinfo/"+id+"/missing", flags[2])
	}
	put(dir+"/devices/loop900/dev", "7:900")
	put(dir+"/devices/zram900/dev", "252:900")
	put(dir+"/devices/cciss!c0d900/dev", "104:900")
	put("dev/block/252:900/size", "4096")
	if err := os.Symlink("../../../../devices/usb1/sdz900", filepath.Join(f.sys, dir, "devices/sdz900")); err != nil {
		t.Fatal(err)
	}
	devices := map[uint64]devInfoArgs{1: {totalBytes: 100}, 2: {}, 5: {totalBytes: 300}, 6: {totalBytes: 400}, 7: {totalBytes: 500}}
	paths := map[uint64]string{1: "/dev/root-gone", 2: "/dev/zram900", 5: "/dev/cciss/c0d900", 7: "/dev/sdz900"}
	f.ioctl = func(_ uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		switch req {
		case iocFSInfo:
			args := (*fsInfoArgs)(arg)
			args.fsid, args.maxID = own, 5
			return 0, 0
		case iocDevInfo:
			args := (*devInfoArgs)(arg)
			info, ok := devices[args.devid]
			if !ok {
				return ^uintptr(0), unix.ENODEV
			}
			args.totalBytes = info.totalBytes
			copy(args.path[:], paths[args.devid])
			return 0, 0
		}
		return ^uintptr(0), unix.ENOTTY
	}
	got, err := f.Members()
	want := []Member{
		{DevID: 1, FSID: seed, Path: paths[1], Num: block.DevNum{Major: 7, Minor: 900}, Size: 100, Seed: true},
		{DevID: 2, FSID: own, Path: paths[2], Num: block.DevNum{Major: 252, Minor: 900}, Size: 4096 * 512, Writable: true, Leaving: true},
		{DevID: 5, FSID: own, Path: paths[5], Num: block.DevNum{Major: 104, Minor: 900}, Size: 300, Writable: true},
		{DevID: 6, FSID: own, Size: 400, Missing: true},
		{DevID: 7, FSID: own, Path: paths[7], Size: 500, Writable: true, Gone: true},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("the members are\n%+v (%v), wanted\n%+v", got, err, want)
	}
}

// In the middle of making a sprout the filesystem has its new fsid, but sysfs
// still has the old one.
func TestMembersWhileTheSproutIsBorn(t *testing.T) {
	f := fakeFS(t, 0, 0)
	if err := os.MkdirAll(filepath.Join(f.sys, "fs/btrfs", UUID{1}.String()), 0o700); err != nil {
		t.Fatal(err)
	}
	fsids := []UUID{{2}, {1}, {2}}
	f.ioctl = func(_ uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		if req == iocFSInfo {
			(*fsInfoArgs)(arg).fsid = fsids[0]
			fsids = fsids[1:]
		}
		return 0, 0
	}
	for _, when := range []string{"before the call", "during the call"} {
		if members, err := f.Members(); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("the fsid changed %s: %+v (%v)", when, members, err)
		}
	}
}

func TestInUseJoinsWhatAdjoins(t *testing.T) {
	const node = 16 << 10
	f := fakeFS(t, 0, 0)
	trees := fakeTrees{treeExtent: {
		{key{96 << 10, typeExtentItem, 4096}, words(1, 1, 1)}, // of the group before
		{key{1 << 20, typeTreeBlock, 0}, nil},
		{key{1 << 20, typeBlockGroup, 1 << 20}, words(5, 256, flagMetadata)},
		{key{1<<20 + node, typeTreeBlock, 2}, nil},
		{key{1<<20 + 4*node, typeExtentItem, 8192}, words(1, 1, 1)},
		{key{1<<20 + 4*node + 8192, typeTreeBlock, 0}, nil},
		{key{2 << 20, typeTreeBlock, 0}, nil}, // of the group after
	}}
	f.ioctl = func(fd uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		if req == iocFSInfo {
			(*fsInfoArgs)(arg).nodeSize = node
			return 0, 0
		}
		return trees.ioctl(fd, req, arg)
	}
	got, err := f.InUse(Group{Logical: 1 << 20, Length: 1 << 20})
	want := []Extent{{1 << 20, 2 * node}, {1<<20 + 4*node, 8192 + node}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("in use are %v (%v), want %v", got, err, want)
	}
}
