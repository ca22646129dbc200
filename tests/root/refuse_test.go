package root

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// options are the options of a raw call, which may be wrong in any way.
type options = map[string]any

// refusals is a world in which calls are refused, and a look at what must not
// change by it. Make it before the disks and mounts of a test.
type refusals struct {
	*harness.World
	t    *testing.T
	conn *godbus.Conn
	// watched are the images and devices whose bytes must stay the same.
	watched []string
}

func newRefusals(t *testing.T) *refusals {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "losetup", "blockdev", "wipefs")
	w := harness.New(t, programs)
	conn, err := godbus.Connect(w.Bus.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &refusals{World: w, t: t, conn: conn}
}

// call makes a call with the very arguments given; a map of options becomes a{sv}.
func (r *refusals) call(path, method string, args ...any) error {
	args = slices.Clone(args)
	for i, a := range args {
		if o, ok := a.(options); ok {
			v := map[string]godbus.Variant{}
			for key, value := range o {
				v[key] = godbus.MakeVariant(value)
			}
			args[i] = v
		}
	}
	return r.conn.Object(names.Bus, godbus.ObjectPath(path)).CallWithContext(r.Context(), method, 0, args...).Err
}

// refused makes a call that must fail with the D-Bus error of that name and say
// each of the words.
func (r *refusals) refused(t *testing.T, name string, words []string, path, method string, args ...any) {
	t.Helper()
	err := r.call(path, method, args...)
	var reply godbus.Error
	if !errors.As(err, &reply) {
		t.Errorf("%s%v gave %v, want %s", method, args, err, name)
		return
	}
	if reply.Name != name {
		t.Errorf("%s%v was refused with %s (%s), want %s", method, args, reply.Name, reply.Error(), name)
	}
	for _, word := range words {
		if !strings.Contains(reply.Error(), word) {
			t.Errorf("%s%v was refused with %q, which does not say %q", method, args, reply.Error(), word)
		}
	}
}

// unchanged runs a subtest whose calls must not change anything.
func (r *refusals) unchanged(name string, calls func(t *testing.T)) {
	r.t.Helper()
	r.t.Run(name, func(t *testing.T) {
		before := r.look(t)
		calls(t)
		after := r.look(t)
		for _, line := range before {
			if !slices.Contains(after, line) {
				t.Errorf("the refused call changed this: %s", line)
			}
		}
		for _, line := range after {
			if !slices.Contains(before, line) {
				t.Errorf("the refused call made this: %s", line)
			}
		}
	})
}

// look describes all that a refused call must leave alone: what is shown of
// sprouts and jobs, loops and mounts, and the bytes of what is watched.
func (r *refusals) look(t *testing.T) []string {
	t.Helper()
	objects, err := r.Objects(r.Context())
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	note := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, s := range objects.Sprouts {
		if !strings.HasPrefix(s.MountPoint, r.Dir) {
			continue // of somebody else on this machine
		}
		note("sprout %s at %s, %s, label %q, job %q, intent %v", s.Fsid, s.MountPoint, s.State, s.Label, s.CurrentJob, s.Intent)
		for _, m := range s.Members {
			note("member %d of %s: %s, %d bytes, %s, writable %t", m.DevID, s.Fsid, m.Path, m.Size, m.Role, m.Writable)
		}
	}
	for _, j := range objects.Jobs {
		note("%s: %s", j.Path, j.Operation)
	}
	left, err := testenv.Leftovers()
	if err != nil {
		t.Fatal(err)
	}
	// All directories of a test lie in one that is its own.
	lines = append(lines, left.Under(filepath.Dir(r.Dir)).List()...)
	for _, path := range r.watched {
		note("%s has the SHA-256 %x", path, fingerprint(t, path))
	}
	return lines
}

// fingerprint is the SHA-256 of what is not zero in a file, with its place, so
// that holes need not be read. Of a loop device it is that of its file.
func fingerprint(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if backing, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/loop/backing_file"); err == nil {
		if err := f.Sync(); err != nil { // what was written to the device is in its file now
			t.Fatal(err)
		}
		return fingerprint(t, strings.TrimSpace(string(backing)))
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	sum, block, zero := sha256.New(), make([]byte, 256<<10), make([]byte, 256<<10)
	fmt.Fprintln(sum, end)
	for at := int64(0); at < end; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole to the end
		}
		if err != nil {
			t.Fatal(err)
		}
		at = data / int64(len(block)) * int64(len(block))
		n, err := f.ReadAt(block, at)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if !bytes.Equal(block[:n], zero[:n]) {
			fmt.Fprintln(sum, at)
			_, _ = sum.Write(bytes.TrimRight(block[:n], "\x00"))
		}
		at += int64(n)
	}
	return sum.Sum(nil)
}

// tool runs a program of the system.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	testenv.NeedTool(t, name)
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// copyOf copies an image, holes and all, so that it can be damaged.
func copyOf(t *testing.T, image string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy.img")
	tool(t, "cp", "--sparse=always", image, to)
	return to
}

// changeSuper changes the primary superblock of an image and, with seal, gives
// it a right crc32c. The offsets are those of struct btrfs_super_block.
func changeSuper(t *testing.T, image string, seal bool, change func(super []byte)) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	super := make([]byte, 4096)
	if _, err := f.ReadAt(super, 64<<10); err != nil {
		t.Fatal(err)
	}
	change(super)
	if seal {
		binary.LittleEndian.PutUint32(super, crc32.Checksum(super[32:], crc32.MakeTable(crc32.Castagnoli)))
	}
	_, err = f.WriteAt(super, 64<<10)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// small is a little content for seeds that are only looked at.
func small(dir string) error {
	return os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("small "), 10000), 0o644)
}

// smallSeed builds a seed that is quick to make.
func smallSeed(t *testing.T, spec seedtest.Spec) seedtest.Seed {
	t.Helper()
	if spec.Content == nil {
		spec.Content = small
	}
	if spec.ImageSize == 0 {
		spec.ImageSize = 256 * seedtest.MiB
	}
	return seedtest.New(t, spec)
}

func TestCreateRefusesWhatIsNoUsableSeed(t *testing.T) {
	r := newRefusals(t)
	seed := smallSeed(t, seedtest.Spec{})
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }

	noise := make([]byte, seedtest.MiB)
	_, _ = rand.Read(noise)
	for name, data := range map[string][]byte{"noise": noise, "empty": nil, "short": noise[:70<<10]} {
		if err := os.WriteFile(in(name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, "truncate", "-s", "64M", in("ext4"))
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", in("ext4"))
	if err := errors.Join(os.Mkdir(in("directory"), 0o755), unix.Mkfifo(in("fifo"), 0o644)); err != nil {
		t.Fatal(err)
	}
	plain := smallSeed(t, seedtest.Spec{Plain: true})

	corrupt := copyOf(t, seed.Path)
	changeSuper(t, corrupt, false, func(super []byte) { super[300] ^= 0xff })
	impossible := copyOf(t, seed.Path)
	changeSuper(t, impossible, true, func(super []byte) { binary.LittleEndian.PutUint32(super[148:], 12345) })
	truncated := copyOf(t, seed.Path)
	tool(t, "truncate", "-s", "100M", truncated)
	csum := copyOf(t, seed.Path)
	changeSuper(t, csum, true, func(super []byte) { binary.LittleEndian.PutUint16(super[196:], 99) })
	feature := copyOf(t, seed.Path)
	changeSuper(t, feature, true, func(super []byte) { super[188+7] |= 0x40 }) // incompat bit 62
	// What a block past the superblock has lost is found by the kernel only.
	hollow := copyOf(t, seed.Path)
	tool(t, "fallocate", "--punch-hole", "--offset", "128K", "--length", "255M", hollow)

	disk := r.OpenDisk(seedtest.DiskSpec{}) // with nothing on it

	r.watched = []string{
		seed.Path, in("noise"), in("empty"), in("short"), in("ext4"), plain.Path, corrupt,
		impossible, truncated, csum, feature, hollow, disk.Path,
	}
	for _, c := range []struct {
		what, path, err string
		words           []string
		opens           bool // InspectSeed describes it and does not fail
	}{
		{"a Btrfs without the seed flag", plain.Path, "NotSeed", []string{plain.Path, "btrfstune -S 1"}, true},
		{"an ext4", in("ext4"), "NotSeed", []string{"no Btrfs", "mkfs.btrfs", "btrfstune -S 1"}, false},
		{"random bytes", in("noise"), "NotSeed", []string{"no Btrfs", "btrfstune -S 1"}, false},
		{"a file too short for a superblock", in("short"), "NotSeed", []string{"no Btrfs"}, false},
		{"an empty file", in("empty"), "NotSeed", []string{"no Btrfs"}, false},
		{"an empty disk", disk.Path, "NotSeed", []string{"no Btrfs"}, false},
		{"a superblock with a wrong checksum", corrupt, "SeedDamaged", []string{corrupt, "damaged"}, false},
		{"a superblock with an impossible value", impossible, "SeedDamaged", []string{"damaged"}, false},
		{"a truncated image", truncated, "SeedDamaged", []string{"truncated", fmt.Sprint(100 << 20), fmt.Sprint(seed.Size)}, false},
		{"a seed whose tree is gone", hollow, "SeedDamaged", []string{"damaged"}, true},
		{"an unknown checksum", csum, "SeedUnsupported", []string{"checksum type 99"}, true},
		{"an unknown feature", feature, "SeedUnsupported", []string{"incompat bit 62"}, true},
		{"a directory", in("directory"), "NotSeed", []string{"neither an image file nor a block device"}, false},
		{"a named pipe", in("fifo"), "NotSeed", []string{"neither an image file nor a block device"}, false},
		{"a character device", "/dev/null", "NotSeed", []string{"neither an image file nor a block device"}, false},
		{"a missing path", in("missing"), "NoSuchDevice", []string{in("missing")}, false},
	} {
		r.unchanged(c.what, func(t *testing.T) {
			mnt := t.TempDir()
			r.refused(t, names.ErrorPrefix+c.err, c.words, names.Root, names.Manager+".CreateSprout", c.path, mnt, options{})
			if entries, err := os.ReadDir(mnt); err != nil || len(entries) > 0 {
				t.Errorf("the mount point holds %v (%v)", entries, err)
			}
			if !c.opens {
				r.refused(t, names.ErrorPrefix+c.err, c.words, names.Root, names.Manager+".InspectSeed", c.path)
				return
			}
			if _, err := r.InspectSeed(r.Context(), c.path); err != nil {
				t.Errorf("InspectSeed has no answer: %v", err)
			}
		})
	}

	mnt := t.TempDir()
	for _, c := range []struct {
		what, path, mountpoint string
		o                      options
		err                    string
		words                  []string
	}{
		{"a relative path", "root.img", mnt, options{}, names.ErrorInvalidArgs, []string{"absolute"}},
		{"a missing mount point", seed.Path, in("missing"), options{}, names.ErrorInvalidArgs, []string{"mount point", in("missing")}},
		{"a file as the mount point", seed.Path, in("noise"), options{}, names.ErrorInvalidArgs, []string{"no directory"}},
		{"a zram too small to sprout onto", seed.Path, mnt, options{"zram_size": uint64(500 << 20)}, names.ErrorPrefix + "TargetTooSmall", []string{"512.0 MiB"}},
		{"an unknown zram algorithm", seed.Path, mnt, options{"zram_algorithm": "rot13"}, names.ErrorInvalidArgs, []string{"rot13"}},
		{"an unknown compression", seed.Path, mnt, options{"compress": "rot13"}, names.ErrorInvalidArgs, []string{"rot13"}},
		{"a mount option the kernel does not know", seed.Path, mnt, options{"mount_options": "rot13"}, names.ErrorInvalidArgs, []string{"options"}},
		{"a device and a zram size", seed.Path, mnt, options{"device": disk.Path, "zram_size": uint64(1 << 30)}, names.ErrorInvalidArgs, []string{"exclude"}},
		{"the seed itself as the device", seed.Path, mnt, options{"device": seed.Path}, names.ErrorPrefix + "NoSuchDevice", []string{"a regular file"}},
	} {
		r.unchanged(c.what, func(t *testing.T) {
			r.refused(t, c.err, c.words, names.Root, names.Manager+".CreateSprout", c.path, c.mountpoint, c.o)
		})
	}
	little := r.OpenDisk(seedtest.DiskSpec{Size: 500 * seedtest.MiB})
	r.watched = append(r.watched, little.Path)
	r.unchanged("a device too small to sprout onto", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"TargetTooSmall", []string{little.Path, "512.0 MiB"},
			names.Root, names.Manager+".CreateSprout", seed.Path, mnt, options{"device": little.Path})
	})
	sprout := r.Create(seed.Path, client.CreateOptions{})
	other := smallSeed(t, seedtest.Spec{})
	r.watched = append(r.watched, other.Path)
	r.unchanged("a mount point that is taken", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"WrongState", []string{sprout.Fsid},
			names.Root, names.Manager+".CreateSprout", other.Path, sprout.MountPoint, options{})
	})
}

// things gives what can be on a disk, each with its maker and the word by which
// the refusal names it.
func things(t *testing.T) []thing {
	run := func(name string, args ...string) func(*testing.T, string) {
		return func(t *testing.T, device string) { t.Helper(); tool(t, name, append(args, device)...) }
	}
	table := func(label string) func(*testing.T, string) {
		return func(t *testing.T, device string) {
			t.Helper()
			cmd := exec.CommandContext(t.Context(), "sfdisk", "--no-reread", "--no-tell-kernel", "-q", device)
			cmd.Stdin = strings.NewReader("label: " + label + "\nsize=100M\nsize=200M\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sfdisk: %v: %s", err, out)
			}
		}
	}
	testenv.NeedTool(t, "mke2fs", "mkfs.xfs", "mkfs.btrfs", "sfdisk", "cryptsetup", "mkswap")
	return []thing{
		{"ext4", "ext4", run("mke2fs", "-q", "-F", "-t", "ext4", "-L", "precious")},
		{"xfs", "xfs", run("mkfs.xfs", "-q", "-f")},
		{"btrfs", "btrfs", run("mkfs.btrfs", "-q", "-f")},
		{"a GUID partition table", "gpt", table("gpt")},
		{"an MBR partition table", "dos", table("dos")},
		{"LUKS", "LUKS", func(t *testing.T, device string) {
			t.Helper()
			key := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(key, []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			// The cheapest key derivation: this is about the header.
			tool(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", device, key)
		}},
		{"swap space", "swap", run("mkswap")},
	}
}

type thing struct {
	name, word string
	put        func(t *testing.T, device string)
}

func TestATargetWithSomethingOnItIsRefusedUnlessWiped(t *testing.T) {
	r := newRefusals(t)
	sprout := r.Create(smallSeed(t, seedtest.Spec{}).Path, client.CreateOptions{})
	operations := map[string]options{"Persist": {}, "Flatten": {"bootloader": "none"}, "AddDevice": {}}
	all := things(t)
	for _, thing := range all {
		disk := r.OpenDisk(seedtest.DiskSpec{Size: seedtest.GiB})
		thing.put(t, disk.Path)
		r.watched = []string{disk.Path}
		r.unchanged(thing.name, func(t *testing.T) {
			for method, o := range operations {
				for _, wipe := range []any{nil, false} {
					o := maps.Clone(o)
					if wipe != nil {
						o["wipe"] = wipe
					}
					r.refused(t, names.ErrorPrefix+"TargetNotEmpty", []string{disk.Path, thing.word},
						sprout.Path, names.Sprout+"."+method, disk.Path, o)
				}
			}
			plan, err := r.Plan(r.Context(), sprout.Path, "add-device", disk.Path, client.MoveOptions{})
			if err != nil || client.CodeOf(plan.Err()) != "TargetNotEmpty" {
				t.Errorf("the plan gives %+v (%v), want TargetNotEmpty", plan, err)
			}
			plan, err = r.Plan(r.Context(), sprout.Path, "add-device", disk.Path, client.MoveOptions{Wipe: true})
			if err != nil || plan.Err() != nil || len(plan.Destroys) != 1 || !strings.Contains(plan.Destroys[0], thing.word) {
				t.Errorf("the plan with wipe gives %+v (%v), want it to say that %s is destroyed", plan, err, thing.word)
			}
		})
		t.Run(thing.name+", wiped", func(t *testing.T) {
			r.Done(r.AddDevice(r.Context(), sprout.Path, disk.Path, client.MoveOptions{Wipe: true}))
			if !isMember(r.Show(sprout.Path), disk.Path) {
				t.Errorf("with wipe %s did not become a member", disk.Path)
			}
			r.Done(r.RemoveDevice(r.Context(), sprout.Path, disk.Path))
			if found := tool(t, "wipefs", "--noheadings", "--parsable", disk.Path); found != "" {
				t.Errorf("after wipe, add and remove there is still something on the disk:\n%s", found)
			}
		})
	}
	t.Run("persist and flatten with wipe", func(t *testing.T) {
		stick, disk := r.OpenDisk(seedtest.DiskSpec{}), r.OpenDisk(seedtest.DiskSpec{})
		all[0].put(t, stick.Path)
		all[3].put(t, disk.Path)
		r.Done(r.Persist(r.Context(), sprout.Path, stick.Path, client.MoveOptions{Wipe: true}))
		r.Done(r.Flatten(r.Context(), sprout.Path, disk.Path, client.MoveOptions{Wipe: true, Bootloader: "none"}))
		got := r.Show(sprout.Path)
		if got.State != "installed" || len(got.Members) != 1 || got.Members[0].Path != disk.Path {
			t.Errorf("after both the sprout is shown as %+v", got)
		}
	})
}

func isMember(s client.Sprout, path string) bool {
	return slices.ContainsFunc(s.Members, func(m client.Member) bool { return m.Path == path })
}

func TestATargetThatMustNotBeTakenIsRefusedAlsoWithWipe(t *testing.T) {
	r := newRefusals(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	stick := r.OpenStick(seedtest.StickSpec{Seed: smallSeed(t, seedtest.Spec{}).Path, PersistSize: seedtest.GiB})
	disk := func() *seedtest.Disk { return r.OpenDisk(seedtest.DiskSpec{Dir: dir, Size: seedtest.GiB}) }
	after := func(name string, args ...string) {
		t.Cleanup(func() {
			if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", name, err, out)
			}
		})
	}
	ext4 := func(device string) (mountpoint string) {
		mnt := t.TempDir()
		tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0", device)
		tool(t, "mount", "-o", "ro", device, mnt)
		after("umount", mnt)
		return mnt
	}

	mounted, parted, swap, twice, foreign := disk(), disk(), disk(), disk(), disk()
	mnt := ext4(mounted.Path)
	part, err := parted.AddPartition(t.Context(), 1, seedtest.MiB, 600*seedtest.MiB)
	if err != nil {
		t.Fatal(err)
	}
	partMnt := ext4(part)
	tool(t, "mkswap", swap.Path)
	tool(t, "swapon", swap.Path)
	after("swapoff", swap.Path)
	tool(t, "truncate", "-s", "1G", in("ro.img"))
	readOnly := tool(t, "losetup", "--find", "--show", "--read-only", in("ro.img"))
	after("losetup", "--detach", readOnly)
	if err := errors.Join(
		os.WriteFile(in("file"), make([]byte, seedtest.MiB), 0o644),
		unix.Mkfifo(in("fifo"), 0o644),
		os.Symlink(in("nowhere"), in("dangling")),
		os.Symlink("loop", in("loop")),
	); err != nil {
		t.Fatal(err)
	}
	little := r.OpenDisk(seedtest.DiskSpec{Size: 16 * seedtest.MiB})

	sprout := r.Create(stick.Seed, client.CreateOptions{})
	neighbour := r.Create(smallSeed(t, seedtest.Spec{}).Path, client.CreateOptions{Device: foreign.Path})
	r.Done(r.AddDevice(r.Context(), sprout.Path, twice.Path, client.MoveOptions{}))
	sprout = r.Show(sprout.Path)
	var loop, zram string
	for _, m := range sprout.Members {
		switch m.Role {
		case "seed":
			loop = m.Path
		case "zram":
			zram = m.Path
		}
	}
	// The swap space is the kernel's to write; its header is looked at below.
	r.watched = []string{
		stick.Path, mounted.Path, parted.Path, in("ro.img"), in("file"), little.Path, twice.Path, foreign.Path,
	}
	for _, mountpoint := range []string{sprout.MountPoint, neighbour.MountPoint} {
		tool(t, "btrfs", "filesystem", "sync", mountpoint) // from here on the members are idle
	}

	for _, c := range []struct {
		what, path, err string
		words           []string
	}{
		{"a mounted device", mounted.Path, "DeviceBusy", []string{mounted.Path, "mounted at " + mnt}},
		{"a disk with a mounted partition", parted.Path, "DeviceBusy", []string{filepath.Base(part), partMnt}},
		{"an active swap device", swap.Path, "DeviceBusy", []string{swap.Path, "swap"}},
		{"a read-only device", readOnly, "DeviceReadOnly", []string{readOnly}},
		{"the same device twice", twice.Path, "DeviceIsMember", []string{twice.Path}},
		{"the seed's loop device", loop, "DeviceIsMember", []string{loop}},
		{"the zram device", zram, "DeviceIsMember", []string{zram}},
		{"a member of another sprout", foreign.Path, "DeviceIsMember", []string{foreign.Path, neighbour.Fsid}},
		{"the stick the seed is on", stick.Path, "DeviceIsMedia", []string{stick.Path, "seed"}},
		{"the partition the seed is on", stick.Media, "DeviceIsMedia", []string{stick.Media, "seed"}},
		{"a regular file", in("file"), "NoSuchDevice", []string{in("file"), "a regular file"}},
		{"a directory", dir, "NoSuchDevice", []string{dir, "a directory"}},
		{"a missing path", in("missing"), "NoSuchDevice", []string{in("missing")}},
		{"a dangling symlink", in("dangling"), "NoSuchDevice", []string{in("dangling")}},
		{"a symlink that leads to itself", in("loop"), "NoSuchDevice", []string{in("loop")}},
		{"a path below a file", in("file") + "/x", "NoSuchDevice", []string{in("file")}},
		{"a named pipe", in("fifo"), "NoSuchDevice", []string{"a named pipe"}},
		{"a character device", "/dev/null", "NoSuchDevice", []string{"a character device"}},
		{"a device that is too small", little.Path, "TargetTooSmall", []string{little.Path, "16.0 MiB", "needed"}},
	} {
		r.unchanged(c.what, func(t *testing.T) {
			for _, method := range []string{"Persist", "Flatten", "AddDevice"} {
				if c.path == twice.Path && method != "AddDevice" {
					continue // naming a member again is how a move goes on
				}
				for _, wipe := range []bool{false, true} {
					o := options{"wipe": wipe}
					if method == "Flatten" {
						o["bootloader"] = "none"
					}
					r.refused(t, names.ErrorPrefix+c.err, c.words, sprout.Path, names.Sprout+"."+method, c.path, o)
				}
			}
		})
	}
	for path, name := range map[string]string{"": names.ErrorInvalidArgs, "sda": names.ErrorInvalidArgs, "free": names.ErrorPrefix + "NotSupported"} {
		r.unchanged(fmt.Sprintf("the name %q", path), func(t *testing.T) {
			r.refused(t, name, nil, sprout.Path, names.Sprout+".Persist", path, options{})
		})
	}
	r.unchanged("removing what is no member", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"NoSuchDevice", []string{mounted.Path}, sprout.Path, names.Sprout+".RemoveDevice", mounted.Path, options{})
	})
	r.unchanged("removing the only writable member", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"WrongState", []string{"only writable"}, neighbour.Path, names.Sprout+".RemoveDevice", foreign.Path, options{})
	})
	r.unchanged("resuming when there is nothing to resume", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"NothingToResume", nil, neighbour.Path, names.Sprout+".Resume", options{})
	})
	page := make([]byte, os.Getpagesize())
	f, err := os.Open(swap.Image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(page, 0); err != nil || !bytes.HasSuffix(page, []byte("SWAPSPACE2")) {
		t.Errorf("the header of the swap space is gone (%v)", err)
	}
}

func TestASymlinkIsFollowedOnce(t *testing.T) {
	r := newRefusals(t)
	sprout := r.Create(smallSeed(t, seedtest.Spec{}).Path, client.CreateOptions{})
	dir := t.TempDir()
	link := filepath.Join(dir, "target")
	point := func(to string) error {
		return errors.Join(os.Symlink(to, link+".new"), os.Rename(link+".new", link))
	}
	a, b := r.OpenDisk(seedtest.DiskSpec{Size: seedtest.GiB}), r.OpenDisk(seedtest.DiskSpec{Size: seedtest.GiB})
	if err := point(a.Path); err != nil {
		t.Fatal(err)
	}

	t.Run("a symlink works and the kernel's name is shown", func(t *testing.T) {
		r.Done(r.AddDevice(r.Context(), sprout.Path, link, client.MoveOptions{}))
		if got := r.Show(sprout.Path); !isMember(got, a.Path) {
			t.Errorf("%s is no member of %+v", a.Path, got.Members)
		}
		r.Done(r.RemoveDevice(r.Context(), sprout.Path, link))
	})

	// The link goes back and forth for the rest of the test.
	flip := func(t *testing.T) {
		stop, stopped := make(chan struct{}), make(chan error, 1)
		go func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
				if err := point([]string{a.Path, b.Path}[i%2]); err != nil {
					stopped <- err
					return
				}
			}
		}()
		t.Cleanup(func() {
			close(stop)
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		})
	}
	precious := func(t *testing.T, d *seedtest.Disk) {
		t.Helper()
		tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0", d.Path)
	}
	other := func(d string) *seedtest.Disk {
		if d == a.Path {
			return b
		}
		return a
	}
	taken := func(t *testing.T) string {
		t.Helper()
		s := r.Show(sprout.Path)
		if isMember(s, a.Path) == isMember(s, b.Path) {
			t.Fatalf("one of the two disks must be a member, there is %+v", s.Members)
		}
		if isMember(s, a.Path) {
			return a.Path
		}
		return b.Path
	}

	t.Run("what holds data is safe without wipe", func(t *testing.T) {
		precious(t, a)
		before := fingerprint(t, a.Path)
		flip(t)
		refused, done := 0, 0
		for refused < 3 || done < 3 {
			job, err := r.AddDevice(r.Context(), sprout.Path, link, client.MoveOptions{})
			if err != nil {
				if code := client.CodeOf(err); code != "TargetNotEmpty" || !strings.Contains(err.Error(), a.Path) && !strings.Contains(err.Error(), link) {
					t.Fatalf("%s: %v", code, err)
				}
				refused++
			} else {
				r.Done(job, nil)
				if got := taken(t); got != b.Path {
					t.Fatalf("%s was taken although it was not empty", got)
				}
				r.Done(r.RemoveDevice(r.Context(), sprout.Path, b.Path))
				done++
			}
			if !bytes.Equal(before, fingerprint(t, a.Path)) {
				t.Fatal("the disk that is not empty was written to")
			}
		}
		t.Logf("refused %d times, done %d times", refused, done)
	})

	t.Run("with wipe only the device that was named at first is touched", func(t *testing.T) {
		flip(t)
		seen := map[string]bool{}
		for range 30 {
			precious(t, a)
			precious(t, b)
			before := map[string][]byte{a.Path: fingerprint(t, a.Path), b.Path: fingerprint(t, b.Path)}
			r.Done(r.AddDevice(r.Context(), sprout.Path, link, client.MoveOptions{Wipe: true}))
			got := taken(t)
			if rest := other(got); !bytes.Equal(before[rest.Path], fingerprint(t, rest.Path)) {
				t.Fatalf("%s became the member, but %s was written to", got, rest.Path)
			}
			r.Done(r.RemoveDevice(r.Context(), sprout.Path, got))
			if seen[got] = true; len(seen) == 2 {
				break
			}
		}
		if len(seen) != 2 {
			t.Errorf("the link never changed: only %v was named", seen)
		}
	})
}

func TestWrongArgumentsAreRefused(t *testing.T) {
	r := newRefusals(t)
	seed, disk := smallSeed(t, seedtest.Spec{}), r.OpenDisk(seedtest.DiskSpec{})
	r.watched = []string{seed.Path, disk.Path}
	sprout := r.Create(seed.Path, client.CreateOptions{})
	mnt := t.TempDir()
	job, err := r.AddDevice(r.Context(), sprout.Path, "zram", client.MoveOptions{Size: seedtest.GiB})
	r.Done(job, err)

	type method struct {
		path, name string
		args       []any
	}
	all := []method{
		{names.Root, names.Manager + ".CreateSprout", []any{seed.Path, mnt}},
		{names.Root, names.Manager + ".ListDevices", nil},
		{sprout.Path, names.Sprout + ".Plan", []any{"persist", disk.Path}},
		{sprout.Path, names.Sprout + ".Persist", []any{disk.Path}},
		{sprout.Path, names.Sprout + ".Flatten", []any{disk.Path}},
		{sprout.Path, names.Sprout + ".AddDevice", []any{disk.Path}},
		{sprout.Path, names.Sprout + ".RemoveDevice", []any{disk.Path}},
		{sprout.Path, names.Sprout + ".Resume", nil},
		{sprout.Path, names.Sprout + ".Teardown", nil},
		{job, names.Job + ".Cancel", nil},
	}
	for _, m := range all {
		r.unchanged(m.name[strings.LastIndexByte(m.name, '.')+1:], func(t *testing.T) {
			with := func(o ...any) []any { return append(slices.Clone(m.args), o...) }
			for _, c := range []struct {
				what  string
				args  []any
				words []string
			}{
				{"an unknown key", with(options{"colour": "blue"}), []string{"colour"}},
				{"a key in the wrong case", with(options{"Wipe": true}), []string{"Wipe"}},
				{"an option of the wrong type", with(options{"auth.no_user_interaction": "yes"}), []string{"auth.no_user_interaction", "type b"}},
				{"no options at all", m.args, []string{"arguments of the types"}},
				{"one argument too many", with(options{}, "more"), []string{"arguments of the types"}},
				{"a text for the options", with("wipe"), []string{"arguments of the types"}},
				{"a plain dictionary for the options", with(map[string]string{"compress": "zstd"}), []string{"arguments of the types"}},
			} {
				t.Run(c.what, func(t *testing.T) { r.refused(t, names.ErrorInvalidArgs, c.words, m.path, m.name, c.args...) })
			}
		})
	}
	for name, c := range map[string]struct {
		method
		o options
	}{
		"wipe as a text":              {all[3], options{"wipe": "true"}},
		"wipe as a number":            {all[4], options{"wipe": int32(1)}},
		"compress as a number":        {all[3], options{"compress": uint64(3)}},
		"a size of 32 bits":           {all[5], options{"size": uint32(1 << 30)}},
		"a signed size":               {all[5], options{"size": int64(1 << 30)}},
		"zram_size as a text":         {all[0], options{"zram_size": "1G"}},
		"a label of bytes":            {all[4], options{"label": []byte("label")}},
		"an option of another method": {all[3], options{"zram_size": uint64(1 << 30)}},
		"no such compression":         {all[3], options{"compress": "zstd:99"}},
		"no such boot loader":         {all[4], options{"bootloader": "lilo"}},
		"no such profile":             {all[4], options{"bootloader": "none", "metadata_profile": "raid7"}},
		"a label that is too long":    {all[3], options{"label": strings.Repeat("l", 256)}},
	} {
		r.unchanged(name, func(t *testing.T) {
			r.refused(t, names.ErrorInvalidArgs, nil, c.path, c.name, append(slices.Clone(c.args), c.o)...)
		})
	}
	r.unchanged("what a later version will do", func(t *testing.T) {
		for _, o := range []options{{}, {"bootloader": "grub"}, {"bootloader": "none", "verify": true}, {"passphrase": []byte("x")}} {
			r.refused(t, names.ErrorPrefix+"NotSupported", nil, sprout.Path, names.Sprout+".Flatten", disk.Path, o)
		}
	})
	r.unchanged("no such operation", func(t *testing.T) {
		r.refused(t, names.ErrorInvalidArgs, []string{"explode"}, sprout.Path, names.Sprout+".Plan", "explode", disk.Path, options{})
	})
	r.unchanged("no such object, interface or method", func(t *testing.T) {
		r.refused(t, names.ErrorUnknownObject, []string{"/job/999"}, names.JobsParent+"/999", names.Job+".Cancel", options{})
		r.refused(t, names.ErrorUnknownObject, []string{"/job/999"}, names.JobsParent+"/999", names.Job+".Wait")
		r.refused(t, names.ErrorUnknownObject, nil, names.SproutsParent+"/nobody", names.Sprout+".Teardown", options{})
		r.refused(t, names.ErrorUnknownInterface, nil, names.Root, names.Sprout+".Persist", disk.Path, options{})
		r.refused(t, names.ErrorUnknownMethod, nil, sprout.Path, names.Sprout+".Explode", options{})
		r.refused(t, names.ErrorPropertyReadOnly, nil, sprout.Path, names.Properties+".Set", names.Sprout, "Label", godbus.MakeVariant("x"))
	})
	r.unchanged("cancelling a job that has ended", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"WrongState", []string{"job 1", "done"}, job, names.Job+".Cancel", options{})
	})
}

func TestASecondJobIsRefusedAndToldOfTheFirst(t *testing.T) {
	r := newRefusals(t)
	seed := seedtest.New(t, seedtest.Spec{})
	disk, other := r.OpenDisk(seedtest.DiskSpec{Gate: true}), r.OpenDisk(seedtest.DiskSpec{})
	r.watched = []string{seed.Path, other.Path}
	sprout := r.Create(seed.Path, client.CreateOptions{})

	held := make(chan error, 1)
	go func() { held <- disk.HoldAfter(t.Context(), 4*seedtest.MiB) }()
	job, err := r.Flatten(r.Context(), sprout.Path, disk.Path, client.MoveOptions{Bootloader: "none"})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	for _, second := range []struct {
		method string
		args   []any
	}{
		{"Persist", []any{other.Path, options{}}},
		{"Flatten", []any{other.Path, options{"bootloader": "none"}}},
		{"Flatten", []any{disk.Path, options{"bootloader": "none"}}},
		{"AddDevice", []any{"zram", options{"size": uint64(1 << 30)}}},
		{"RemoveDevice", []any{sprout.Members[0].Path, options{}}},
		{"Resume", []any{options{}}},
		{"Teardown", []any{options{}}},
	} {
		r.unchanged(second.method, func(t *testing.T) {
			first := fmt.Sprintf("job %d (flatten)", client.JobNumber(job))
			r.refused(t, names.ErrorPrefix+"Busy", []string{first}, sprout.Path, names.Sprout+"."+second.method, second.args...)
		})
	}
	if got := r.Show(sprout.Path); got.CurrentJob != job {
		t.Errorf("the current job is shown as %q, want %s", got.CurrentJob, job)
	}
	if err := disk.Let(); err != nil {
		t.Fatal(err)
	}
	r.Done(job, nil)
	if got := r.Show(sprout.Path); got.State != "installed" || got.CurrentJob != "" {
		t.Errorf("the first job ended, and the sprout is shown as %+v", got)
	}
}

func TestTeardownNamesTheProcessInside(t *testing.T) {
	r := newRefusals(t)
	seed := smallSeed(t, seedtest.Spec{})
	r.watched = []string{seed.Path}
	sprout := r.Create(seed.Path, client.CreateOptions{})

	sleeper := exec.Command("sleep", "1000")
	sleeper.Dir = sprout.MountPoint
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() }
	t.Cleanup(end)
	r.unchanged("teardown", func(t *testing.T) {
		r.refused(t, names.ErrorPrefix+"DeviceBusy", []string{"sleep", fmt.Sprint(sleeper.Process.Pid)},
			sprout.Path, names.Sprout+".Teardown", options{})
	})
	if err := os.WriteFile(filepath.Join(sprout.MountPoint, "still writable"), []byte("yes"), 0o644); err != nil {
		t.Error(err)
	}
	end()
	if err := r.Teardown(r.Context(), sprout.Path); err != nil {
		t.Errorf("the process has ended, but: %v", err)
	}
	r.refused(t, names.ErrorUnknownObject, nil, sprout.Path, names.Sprout+".Teardown", options{})
}
