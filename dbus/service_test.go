package dbus_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/testenv"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (-update writes it anew):\n%s", file, got)
	}
}

func TestIntrospectionIsAsPublished(t *testing.T) {
	s := serve(t)
	for name, path := range map[string]godbus.ObjectPath{
		"manager": names.Root, "sprout": rootSprout, "job": names.JobPath(1), "device": names.DevicePath("sdb1"),
		"between": "/org/sproutd", "sprouts": names.SproutsParent,
	} {
		var xml string
		if err := s.call(path, names.Introspectable+".Introspect").Store(&xml); err != nil {
			t.Fatal(err)
		}
		golden(t, "introspect-"+name+".xml", xml)
	}
}

func TestEveryPathDownToAnObjectCanBeIntrospected(t *testing.T) {
	s := serve(t)
	child := regexp.MustCompile(`<node name="([^"]+)"/>`)
	var walk func(path string) []string
	walk = func(path string) (found []string) {
		var xml string
		if err := s.call(godbus.ObjectPath(path), "org.freedesktop.DBus.Introspectable.Introspect").Store(&xml); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		found = append(found, path)
		for _, m := range child.FindAllStringSubmatch(xml, -1) {
			found = append(found, walk(strings.TrimSuffix(path, "/")+"/"+m[1])...)
		}
		return found
	}
	found := walk("/")
	for _, want := range []godbus.ObjectPath{
		names.Root, rootSprout, names.RootSprout, names.SproutPath(otherFSID),
		names.JobPath(1), names.JobPath(2), names.DevicePath("sdb1"), names.DevicePath("zram7"),
	} {
		if !slices.Contains(found, string(want)) {
			t.Errorf("%s is not found from / down: %v", want, found)
		}
	}
}

func TestPropertiesShowTheView(t *testing.T) {
	s := serve(t)
	var sprout dict
	if err := s.call(names.RootSprout, names.Properties+".GetAll", names.Sprout).Store(&sprout); err != nil {
		t.Fatal(err)
	}
	want := with("Fsid", rootFSID, "SeedFsid", "99999999-2222-3333-4444-555555555555", "Label", "live", "MountPoint", "/",
		"State", "partial", "Size", uint64(2<<30), "Free", uint64(1<<30), "LowSpace", false, "CurrentJob", names.JobPath(2),
		"SafeToUnplug", false, "MediaHolders", []string{"loop /dev/loop9", "mount /run/media"},
		"Warnings", []string{"no persistence was used"},
		"Intent", with("job", uint32(1), "operation", "persist", "target", "/dev/sdb1", "state", "cancelled"),
		"Members", []dict{
			with("devid", uint64(1), "path", "/dev/loop9", "size", uint64(1<<30), "used", uint64(900<<20), "role", "seed", "writable", false),
			with("devid", uint64(2), "path", "/dev/zram7", "size", uint64(2<<30), "used", uint64(1<<30), "role", "zram", "writable", true),
		})
	if !reflect.DeepEqual(sprout, want) {
		t.Errorf("sprout:\n%v\nwant\n%v", sprout, want)
	}
	var job, device dict
	if err := s.call(names.JobPath(1), names.Properties+".GetAll", names.Job).Store(&job); err != nil {
		t.Fatal(err)
	}
	want = with("Operation", "persist", "Sprout", rootSprout, "StartedByUid", uint32(65534), "StartTime", uint64(1_700_000_000_000_000),
		"State", "cancelled", "Step", "", "StepNumber", uint32(1), "StepCount", uint32(2), "Progress", 0.0, "BytesDone", uint64(0),
		"BytesTotal", uint64(0), "Rate", uint64(0), "ExpectedEndTime", uint64(0), "Cancelable", false,
		"ErrorName", "org.sproutd.Sprout1.Error.Cancelled", "ErrorMessage", "the job was cancelled", "Result", dict{})
	if !reflect.DeepEqual(job, want) {
		t.Errorf("job:\n%v\nwant\n%v", job, want)
	}
	if err := s.call(names.DevicePath("sdb1"), names.Properties+".GetAll", "").Store(&device); err != nil {
		t.Fatal(err)
	}
	want = with("Path", "/dev/sdb1", "Size", uint64(8<<30), "Model", "USB Stick", "Serial", "S123", "Removable", true, "ReadOnly", false,
		"Signatures", []string{`ext4 "data"`}, "Holders", []string{"mount /mnt"}, "Role", "", "EligibleFor", []string{"persist"},
		"Reasons", map[string]string{"flatten": "mounted at /mnt"})
	if !reflect.DeepEqual(device, want) {
		t.Errorf("device:\n%v\nwant\n%v", device, want)
	}
}

func TestNamesThatAreNoTextAreShownAsText(t *testing.T) {
	s := serve(t)
	var mountpoint string
	if err := s.call(names.SproutPath(otherFSID), names.Properties+".Get", names.Sprout, "MountPoint").Store(&mountpoint); err != nil {
		t.Fatal(err)
	}
	if mountpoint != "/srv/a\uFFFDb" {
		t.Errorf("mount point %q", mountpoint)
	}
}

func TestManagedObjectsAreEachThingOnce(t *testing.T) {
	s := serve(t)
	var objects map[godbus.ObjectPath]map[string]dict
	if err := s.call(names.Root, names.ObjectManager+".GetManagedObjects").Store(&objects); err != nil {
		t.Fatal(err)
	}
	if len(objects) != 6 {
		t.Errorf("%d objects, want 2 sprouts, 2 jobs and 2 devices", len(objects))
	}
	if _, ok := objects[names.RootSprout]; ok {
		t.Error("the alias is there as well")
	}
	if got := objects[names.JobPath(2)][names.Job]["Progress"].Value(); got != 0.25 {
		t.Errorf("progress of job 2 is %v", got)
	}
}

func TestMethodsReachTheEngineAndReplyInTheShapesOfTheContract(t *testing.T) {
	s := serve(t)
	me := daemon.Caller{UID: uint32(os.Getuid()), Name: s.conn.Names()[0]}
	if me.UID != 0 {
		testenv.NeedRoot(t)
	}
	all := with("wipe", true, "compress", "lzo", "label", "new", "bootloader", "none", "metadata_profile", "dup")
	for _, c := range []struct {
		path   godbus.ObjectPath
		method string
		args   []any
		reply  []any
		did    any
	}{
		{
			names.Root, names.Manager + ".CreateSprout",
			[]any{"/a.img", "/mnt", with("zram_size", uint64(9), "zram_algorithm", "lz4", "compress", "none", "mount_options", "noatime", "device", "/dev/sdb1", "wipe", true)},
			[]any{names.SproutPath(otherFSID)},
			created{me, "/a.img", "/mnt", daemon.CreateOptions{ZramSize: 9, ZramAlgorithm: "lz4", Compress: "none", MountOptions: "noatime", Device: "/dev/sdb1", Wipe: true}},
		},
		{
			names.Root, names.Manager + ".InspectSeed",
			[]any{"/a.img"},
			[]any{with("seeding", true, "fsid", rootFSID, "label", "live", "size", uint64(5), "used", uint64(4), "csum_type", "crc32c",
				"metadata_profile", "single", "supported", false, "reasons", []string{"feature x"})},
			inspected("/a.img"),
		},
		{
			names.Root, names.Manager + ".ListDevices",
			[]any{dict{}},
			[]any{[][]any{
				{names.DevicePath("sdb1"), "/dev/sdb1", uint64(8 << 30), with("model", "USB Stick", "serial", "S123", "removable", true, "read_only", false,
					"signatures", []string{`ext4 "data"`}, "holders", []string{"mount /mnt"}, "role", "", "eligible_for", []string{"persist"}, "reasons", map[string]string{"flatten": "mounted at /mnt"})},
				{names.DevicePath("zram7"), "/dev/zram7", uint64(2 << 30), with("model", "", "serial", "", "removable", false, "read_only", false,
					"signatures", []string{}, "holders", []string{}, "role", "zram", "eligible_for", []string{}, "reasons", map[string]string{})},
			}},
			nil,
		},
		{
			names.Root, names.Manager + ".ListJobs",
			nil,
			[]any{[][]any{{names.JobPath(1), "persist", "cancelled", ""}, {names.JobPath(2), "flatten", "running", "move everything off /dev/zram7"}}},
			nil,
		},
		{
			rootSprout, names.Sprout + ".Plan",
			[]any{"flatten", "/dev/sdb1", all},
			[]any{with("steps", []dict{with("kind", "add", "device", "/dev/sdb1", "bytes", uint64(7), "text", "add /dev/sdb1")},
				"bytes_to_move", uint64(7), "target_size", uint64(8), "min_target_size", uint64(6), "destroys", []string{"ext4 on /dev/sdb1"}, "resumes", true,
				"problems", []dict{with("error", "org.sproutd.Sprout1.Error.TargetTooSmall", "message", "too small"), with("error", "org.freedesktop.DBus.Error.InvalidArgs", "message", "odd")})},
			planned{rootFSID, daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/sdb1", Options: plan.Options{Wipe: true, Compress: "lzo", Label: "new", Bootloader: "none", MetadataProfile: "dup"}}},
		},
		{
			rootSprout, names.Sprout + ".Persist",
			[]any{"/dev/sdb1", with("label", "x", "auth.no_user_interaction", true)},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.Persist, Target: "/dev/sdb1", Options: plan.Options{Label: "x"}}},
		},
		{
			names.RootSprout, names.Sprout + ".Flatten",
			[]any{"/dev/sdb1", with("bootloader", "auto")},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/sdb1", Options: plan.Options{Bootloader: "auto"}}},
		},
		{
			rootSprout, names.Sprout + ".Flatten",
			[]any{"/dev/sdb1", with("bootloader", "none", "release_first", true)},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.Flatten, Target: "/dev/sdb1", Options: plan.Options{Bootloader: "none", ReleaseFirst: true}}},
		},
		{
			rootSprout, names.Sprout + ".Release",
			[]any{"ram", dict{}},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.Release, Target: "ram"}},
		},
		{
			rootSprout, names.Sprout + ".AddDevice",
			[]any{"zram", with("size", uint64(1<<30), "algorithm", "lz4")},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.AddDevice, Target: "zram", Options: plan.Options{Size: 1 << 30, Algorithm: "lz4"}}},
		},
		{
			rootSprout, names.Sprout + ".RemoveDevice",
			[]any{"/dev/zram7", dict{}},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.RemoveDevice, Target: "/dev/zram7"}},
		},
		{
			rootSprout, names.Sprout + ".Resume",
			[]any{dict{}},
			[]any{names.JobPath(2)},
			started{me, rootFSID, daemon.RequestArgs{Operation: plan.Resume}},
		},
		{rootSprout, names.Sprout + ".Teardown", []any{dict{}}, nil, tornDown(rootFSID)},
		{rootSprout, names.Sprout + ".Reset", []any{dict{}}, nil, reset{rootFSID, false}},
		{rootSprout, names.Sprout + ".Reset", []any{with("undo", true)}, nil, reset{rootFSID, true}},
		{names.JobPath(2), names.Job + ".Cancel", []any{dict{}}, nil, cancelled(2)},
	} {
		before := len(s.engine.did())
		call := s.call(c.path, c.method, c.args...)
		if call.Err != nil {
			t.Errorf("%s: %v", c.method, call.Err)
			continue
		}
		if !reflect.DeepEqual(call.Body, c.reply) && len(call.Body)+len(c.reply) > 0 {
			t.Errorf("%s replied\n%v\nwant\n%v", c.method, call.Body, c.reply)
		}
		did := s.engine.did()[before:]
		if c.did == nil && len(did) != 0 || c.did != nil && !reflect.DeepEqual(did, []any{c.did}) {
			t.Errorf("%s reached the engine as\n%v\nwant\n%v", c.method, did, c.did)
		}
	}
}

func TestMistakesGetTheStandardErrors(t *testing.T) {
	s := serve(t)
	none := dict{}
	for _, c := range []struct {
		path   godbus.ObjectPath
		method string
		args   []any
		want   string
		says   string
	}{
		{"/nowhere", names.Introspectable + ".Introspect", nil, names.ErrorUnknownObject, "/nowhere"},
		{names.JobPath(77), names.Job + ".Cancel", []any{none}, names.ErrorUnknownObject, "job/77"},
		{names.SproutPath("no-such"), names.Properties + ".GetAll", []any{names.Sprout}, names.ErrorUnknownObject, ""},
		{names.SproutsParent, names.Properties + ".GetAll", []any{names.Sprout}, names.ErrorUnknownInterface, ""},
		{names.Root, "org.example.Nothing.Do", nil, names.ErrorUnknownInterface, "org.example.Nothing"},
		{names.Root, names.Job + ".Cancel", []any{none}, names.ErrorUnknownInterface, ""},
		{rootSprout, names.ObjectManager + ".GetManagedObjects", nil, names.ErrorUnknownInterface, ""},
		{rootSprout, names.Sprout + ".Verify", []any{none}, names.ErrorUnknownMethod, "Verify"},
		{rootSprout, names.Properties + ".Get", []any{names.Sprout, "Colour"}, names.ErrorUnknownProperty, "Colour"},
		{rootSprout, names.Properties + ".Get", []any{names.Job, "State"}, names.ErrorUnknownInterface, ""},
		{rootSprout, names.Properties + ".Get", []any{names.Introspectable, "State"}, names.ErrorUnknownProperty, ""},
		{rootSprout, names.Properties + ".GetAll", []any{"org.example.Nothing"}, names.ErrorUnknownInterface, ""},
		{rootSprout, names.Properties + ".Set", []any{names.Sprout, "Label", godbus.MakeVariant("x")}, names.ErrorPropertyReadOnly, "Label"},
		{rootSprout, names.Properties + ".Set", []any{names.Sprout, "Colour", godbus.MakeVariant("x")}, names.ErrorUnknownProperty, ""},
		{rootSprout, names.Properties + ".Get", []any{names.Sprout}, names.ErrorInvalidArgs, "(ss)"},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1"}, names.ErrorInvalidArgs, "(sa{sv})"},
		{rootSprout, names.Sprout + ".Persist", []any{uint32(1), none}, names.ErrorInvalidArgs, "(ua{sv})"},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1", map[string]string{}}, names.ErrorInvalidArgs, "(sa{ss})"},
		{rootSprout, names.Sprout + ".Teardown", nil, names.ErrorInvalidArgs, ""},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1", with("wpie", true)}, names.ErrorInvalidArgs, `no option "wpie", only wipe, compress, label`},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1", with("wipe", "yes")}, names.ErrorInvalidArgs, `"wipe" must be of type b, not s`},
		{rootSprout, names.Sprout + ".AddDevice", []any{"zram", with("size", uint32(5))}, names.ErrorInvalidArgs, `"size" must be of type t, not u`},
		{rootSprout, names.Sprout + ".RemoveDevice", []any{"/dev/zram7", with("wipe", true)}, names.ErrorInvalidArgs, "wipe"},
		{rootSprout, names.Sprout + ".Plan", []any{"persist", "/dev/sdb1", with("bootloader", "none")}, names.ErrorInvalidArgs, "Persist"},
		{rootSprout, names.Sprout + ".Plan", []any{"destroy", "/dev/sdb1", none}, names.ErrorInvalidArgs, "destroy"},
		{names.Root, names.Manager + ".ListDevices", []any{with("all", true)}, names.ErrorInvalidArgs, "all"},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1", with("passphrase", []byte("x"))}, names.ErrorPrefix + "NotSupported", "passphrase"},
		{rootSprout, names.Sprout + ".Persist", []any{"/dev/sdb1", with("passphrase", "x")}, names.ErrorInvalidArgs, "type ay"},
		{rootSprout, names.Sprout + ".Flatten", []any{"/dev/sdb1", with("verify", true)}, names.ErrorPrefix + "NotSupported", "verify"},
		{rootSprout, names.Sprout + ".Flatten", []any{"/dev/sdb1", with("layout", "x")}, names.ErrorPrefix + "NotSupported", "layout"},
		{rootSprout, names.Sprout + ".Release", []any{"ram", with("label", "x")}, names.ErrorInvalidArgs, "label"},
		{rootSprout, names.Sprout + ".Flatten", []any{"/dev/sdb1", with("bootloader", "grub")}, names.ErrorPrefix + "NotSupported", "grub"},
		{rootSprout, names.Sprout + ".Flatten", []any{"/dev/sdb1", with("bootloader", "lilo")}, names.ErrorInvalidArgs, "lilo"},
	} {
		name, message := errorOf(s.call(c.path, c.method, c.args...).Err)
		if name != c.want || !strings.Contains(message, c.says) {
			t.Errorf("%s%v on %s: %s: %s\nwant %s with %q", c.method, c.args, c.path, name, message, c.want, c.says)
		}
	}
	if did := s.engine.did(); len(did) != 0 {
		t.Errorf("the engine was asked to do %v", did)
	}
}

func TestEveryFaultHasItsErrorName(t *testing.T) {
	s := serve(t)
	standard := map[fault.Code]string{
		fault.NoSuchSprout: names.ErrorUnknownObject, fault.InvalidArgs: names.ErrorInvalidArgs,
		fault.AccessDenied: names.ErrorAccessDenied, fault.InteractionNeeded: names.ErrorInteractionNeeded,
	}
	for _, code := range fault.Codes() {
		want := standard[code]
		if want == "" {
			want = "org.sproutd.Sprout1.Error." + string(code)
		}
		says := "what \uFFFD happened: the cause"
		if code == fault.Internal || code == fault.AccessDenied || code == fault.InteractionNeeded {
			says = "what \uFFFD happened"
		}
		s.engine.fail(fmt.Errorf("on the way: %w", fault.Wrap(errors.New("the cause"), code, "what \x00 happened")))
		name, message := errorOf(s.call(names.Root, names.Manager+".InspectSeed", "/x").Err)
		if name != want || message != says {
			t.Errorf("%s is shown as %s: %q, want %s", code, name, message, want)
		}
	}
	s.engine.fail(errors.New("no fault"))
	if name, _ := errorOf(s.call(names.Root, names.Manager+".InspectSeed", "/x").Err); name != names.ErrorPrefix+"Internal" {
		t.Errorf("an error without a code is shown as %s", name)
	}
}

func TestADefectEndsOneCallOnly(t *testing.T) {
	s := serve(t)
	s.engine.mu.Lock()
	s.engine.panics = true
	s.engine.mu.Unlock()
	if name, _ := errorOf(s.call(names.Root, names.Manager+".InspectSeed", "/x").Err); name != names.ErrorPrefix+"Internal" {
		t.Errorf("a panic is shown as %s", name)
	}
	if err := s.call(names.Root, names.Manager+".ListJobs").Err; err != nil {
		t.Errorf("after it the service does not answer: %v", err)
	}
}

// raw sends a method call that godbus would not make, without an interface or
// with any flags, and gives the reply.
func raw(conn *godbus.Conn, path godbus.ObjectPath, iface, member string, flags godbus.Flags, body ...any) *godbus.Call {
	m := &godbus.Message{Type: godbus.TypeMethodCall, Flags: flags, Body: body, Headers: map[godbus.HeaderField]godbus.Variant{
		godbus.FieldDestination: godbus.MakeVariant(names.Bus),
		godbus.FieldPath:        godbus.MakeVariant(path),
		godbus.FieldMember:      godbus.MakeVariant(member),
	}}
	if iface != "" {
		m.Headers[godbus.FieldInterface] = godbus.MakeVariant(iface)
	}
	if len(body) > 0 {
		m.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(body...))
	}
	call := conn.Send(m, make(chan *godbus.Call, 1))
	<-call.Done
	return call
}

func TestCallsWithoutAnInterface(t *testing.T) {
	s := serve(t)
	if call := raw(s.conn, names.Root, "", "ListJobs", 0); call.Err != nil || len(call.Body) != 1 {
		t.Errorf("ListJobs: %v %v", call.Body, call.Err)
	}
	if call := raw(s.conn, rootSprout, "", "Get", 0, names.Sprout, "Label"); call.Err != nil {
		t.Errorf("Get: %v", call.Err)
	}
	if name, _ := errorOf(raw(s.conn, names.Root, "", "Nothing", 0).Err); name != names.ErrorUnknownMethod {
		t.Errorf("Nothing: %s", name)
	}
}

func TestWhoWantsNoReplyGetsNone(t *testing.T) {
	s := serve(t)
	replies := s.bus.Conn(t, godbus.WithIncomingInterceptor(func(m *godbus.Message) {
		if m.Type == godbus.TypeError && strings.Contains(fmt.Sprint(m.Body), "unwanted") {
			t.Errorf("a reply came: %s", m)
		}
	}))
	raw(replies, rootSprout, names.Sprout, "Persist", godbus.FlagNoReplyExpected, "/dev/sdb1", with("unwanted", true))
	raw(replies, rootSprout, names.Sprout, "Unwanted", godbus.FlagNoReplyExpected)
	if err := callOn(replies, names.Root, names.Manager+".ListJobs").Err; err != nil {
		t.Error(err)
	}
}

func TestHugeMessagesAreLeftOut(t *testing.T) {
	s := serve(t)
	raw(s.conn, names.Root, names.Manager, "InspectSeed", godbus.FlagNoReplyExpected, strings.Repeat("x", 3<<20))
	large := strings.Repeat("y", 512<<10)
	for _, path := range []string{"/a", large, "/b"} {
		if err := s.call(names.Root, names.Manager+".InspectSeed", path).Err; err != nil {
			t.Fatal(err)
		}
	}
	if did := s.engine.did(); !reflect.DeepEqual(did, []any{inspected("/a"), inspected(large), inspected("/b")}) {
		t.Errorf("%d calls came through", len(did))
	}
}

func TestFileDescriptorsAreNotTaken(t *testing.T) {
	s := serve(t)
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	call := s.call(rootSprout, names.Sprout+".Persist", "/dev/sdb1", with("passphrase_fd", godbus.UnixFD(file.Fd())))
	if name, _ := errorOf(call.Err); !strings.HasSuffix(name, ".NotSupported") {
		t.Errorf("a call with a file descriptor: %v", call.Err)
	}
}

func TestOneCallerCannotTakeAllCalls(t *testing.T) {
	s := serve(t)
	const limit = 64
	block := make(chan struct{})
	s.engine.mu.Lock()
	s.engine.block = block
	s.engine.mu.Unlock()
	greedy := s.bus.Conn(t)
	var calls []*godbus.Call
	for range limit {
		calls = append(calls, greedy.Object(names.Bus, names.Root).Go(names.Manager+".InspectSeed", 0, nil, "/x"))
	}
	for range limit {
		<-s.engine.entered
	}
	if name, _ := errorOf(callOn(greedy, names.Root, names.Manager+".ListJobs").Err); name != names.ErrorLimitsExceeded {
		t.Errorf("one call too many: %s", name)
	}
	waiting := greedy.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	if err := <-s.engine.waiting; err != nil {
		t.Errorf("a wait beside the calls: %v", err)
	}
	if err := s.call(names.Root, names.Manager+".ListJobs").Err; err != nil {
		t.Errorf("another caller: %v", err)
	}
	close(block)
	for _, call := range calls {
		if <-call.Done; call.Err != nil {
			t.Error(call.Err)
		}
	}
	s.engine.over(2) <- daemon.JobView{State: daemon.JobDone}
	<-waiting.Done
	if err := callOn(greedy, names.Root, names.Manager+".ListJobs").Err; err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestWaitRepliesWithTheResultOrTheErrorOfTheJob(t *testing.T) {
	s := serve(t)
	if name, message := errorOf(s.call(names.JobPath(1), names.Job+".Wait").Err); name != names.ErrorPrefix+"Cancelled" || message == "" {
		t.Errorf("waiting for a cancelled job: %s: %s", name, message)
	}
	waiting := s.conn.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	<-s.engine.waiting
	s.engine.over(2) <- daemon.JobView{State: daemon.JobDone, Result: map[string]any{
		"moved": uint64(5), "clean": true, "text": "t", "files": []string{"a\xff"}, "odd": struct{}{},
	}}
	var got dict
	if err := (<-waiting.Done).Store(&got); err != nil {
		t.Fatal(err)
	}
	if want := with("moved", uint64(5), "clean", true, "text", "t", "files", []string{"a\uFFFD"}, "odd", "{}"); !reflect.DeepEqual(got, want) {
		t.Errorf("result %v, want %v", got, want)
	}
}

func TestWaitEndsWhenTheCallerLeaves(t *testing.T) {
	s := serve(t)
	// Two callers wait; the other one must not be disturbed.
	other := s.conn.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	<-s.engine.waiting
	leaving := s.bus.Conn(t)
	leaving.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	<-s.engine.waiting
	_ = leaving.Close()
	if err := <-s.engine.waiting; err == nil || !strings.Contains(err.Error(), "left the bus") {
		t.Errorf("the wait ended with %v", err)
	}
	s.engine.over(2) <- daemon.JobView{State: daemon.JobDone}
	if err := (<-other.Done).Err; err != nil {
		t.Errorf("the other wait: %v", err)
	}
}

// listen gives the signals of the service to a client.
func listen(t *testing.T, s *service) <-chan *godbus.Signal {
	t.Helper()
	conn := s.bus.Conn(t)
	if err := conn.AddMatchSignal(godbus.WithMatchSender(names.Bus)); err != nil {
		t.Fatal(err)
	}
	got := make(chan *godbus.Signal, 100)
	conn.Signal(got)
	return got
}

func next(t *testing.T, signals <-chan *godbus.Signal) *godbus.Signal {
	t.Helper()
	select {
	case s := <-signals:
		return s
	case <-time.After(20 * time.Second):
		t.Fatal("no signal came")
		return nil
	}
}

func expect(t *testing.T, s *godbus.Signal, path godbus.ObjectPath, name string, body ...any) {
	t.Helper()
	if s.Path != path || s.Name != name || !reflect.DeepEqual(s.Body, body) {
		t.Errorf("signal %s of %s\n%v\nwant %s of %s\n%v", s.Name, s.Path, s.Body, name, path, body)
	}
}

func TestOneSignalTellsAllThatChangedOfAnObject(t *testing.T) {
	s := serve(t)
	signals := listen(t, s)
	changed := names.Properties + ".PropertiesChanged"
	s.engine.change(func(v *daemon.View) {
		v.Jobs[1].Progress, v.Jobs[1].BytesDone, v.Jobs[1].State = 0.5, 200, daemon.JobCancelling
	})
	expect(t, next(t, signals), names.JobPath(2), changed, names.Job,
		with("Progress", 0.5, "BytesDone", uint64(200), "State", "cancelling"), []string{})
	s.engine.change(func(*daemon.View) {}) // nothing changed, nothing is said
	s.engine.change(func(v *daemon.View) { v.Sprouts[0].Free = 5 })
	expect(t, next(t, signals), rootSprout, changed, names.Sprout, with("Free", uint64(5)), []string{})
	expect(t, next(t, signals), names.RootSprout, changed, names.Sprout, with("Free", uint64(5)), []string{})
}

func TestComingAndGoingIsTold(t *testing.T) {
	s := serve(t)
	signals := listen(t, s)
	s.engine.change(func(v *daemon.View) {
		v.Jobs = append(v.Jobs, daemon.JobView{Number: 3, Operation: plan.Persist, Sprout: otherFSID, State: daemon.JobRunning})
	})
	sig := next(t, signals)
	if sig.Name != names.ObjectManager+".InterfacesAdded" || sig.Path != names.Root || sig.Body[0] != names.JobPath(3) {
		t.Errorf("signal %v", sig)
	}
	if props := sig.Body[1].(map[string]map[string]godbus.Variant)[names.Job]; props["State"].Value() != "running" || len(props) != 17 {
		t.Errorf("properties of the new job: %v", props)
	}
	expect(t, next(t, signals), names.Root, names.Manager+".JobNew", names.JobPath(3))

	s.engine.change(func(v *daemon.View) { v.Jobs[2].State = daemon.JobDone })
	expect(t, next(t, signals), names.JobPath(3), names.Properties+".PropertiesChanged", names.Job, with("State", "done"), []string{})
	expect(t, next(t, signals), names.Root, names.Manager+".JobRemoved", names.JobPath(3), "done")

	s.engine.change(func(v *daemon.View) { v.Jobs, v.Sprouts = v.Jobs[:2], v.Sprouts[:1] })
	expect(t, next(t, signals), names.Root, names.Properties+".PropertiesChanged", names.Manager,
		with("Sprouts", []godbus.ObjectPath{rootSprout}), []string{})
	expect(t, next(t, signals), names.Root, names.ObjectManager+".InterfacesRemoved", names.SproutPath(otherFSID), []string{names.Sprout})
	expect(t, next(t, signals), names.Root, names.ObjectManager+".InterfacesRemoved", names.JobPath(3), []string{names.Job})

	// Another stick under the same kernel name is another object.
	s.engine.change(func(v *daemon.View) { v.Devices[0].Serial = "T456" })
	expect(t, next(t, signals), names.Root, names.ObjectManager+".InterfacesRemoved", names.DevicePath("sdb1"), []string{names.Device})
	if sig := next(t, signals); sig.Name != names.ObjectManager+".InterfacesAdded" || sig.Body[0] != names.DevicePath("sdb1") {
		t.Errorf("signal %v", sig)
	}
}

func TestTheReplyOfWaitComesAfterTheSignals(t *testing.T) {
	s := serve(t)
	if err := s.conn.AddMatchSignal(godbus.WithMatchSender(names.Bus)); err != nil {
		t.Fatal(err)
	}
	signals := make(chan *godbus.Signal, 100)
	s.conn.Signal(signals)
	waiting := s.conn.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, make(chan *godbus.Call, 1))
	<-s.engine.waiting
	var last daemon.JobView
	s.engine.change(func(v *daemon.View) {
		v.Jobs[1].State, v.Jobs[1].Progress = daemon.JobDone, 1
		last = v.Jobs[1]
	})
	s.engine.over(2) <- last
	reply := <-waiting.Done
	if reply.Err != nil {
		t.Fatal(reply.Err)
	}
	changed, removed := next(t, signals), next(t, signals)
	if changed.Path != names.JobPath(2) || removed.Name != names.Manager+".JobRemoved" {
		t.Fatalf("signals %v and %v", changed, removed)
	}
	if changed.Sequence > reply.ResponseSequence || removed.Sequence > reply.ResponseSequence {
		t.Error("the reply came before the signals")
	}
}

func TestObjectsComeAndGoWhileClientsLook(t *testing.T) {
	s := serve(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var work sync.WaitGroup
	looks := make([]int, 4)
	for i := range looks {
		conn := s.bus.Conn(t)
		work.Go(func() {
			for ctx.Err() == nil {
				if err := callOn(conn, names.JobsParent, names.Introspectable+".Introspect").Err; err != nil {
					t.Error(err)
					return
				}
				if err := callOn(conn, names.Root, names.ObjectManager+".GetManagedObjects").Err; err != nil {
					t.Error(err)
					return
				}
				looks[i]++
			}
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for number := uint32(10); ctx.Err() == nil; number++ {
		s.engine.change(func(v *daemon.View) {
			if len(v.Jobs) > 20 {
				v.Jobs = v.Jobs[1:]
			}
			v.Jobs = append(v.Jobs, daemon.JobView{Number: number, Sprout: rootFSID, State: daemon.JobRunning})
		})
		<-tick.C
	}
	work.Wait()
	for i, n := range looks {
		if n == 0 {
			t.Errorf("client %d never got an answer", i)
		}
	}
}

func TestOnlyOneServerHasTheName(t *testing.T) {
	s := serve(t)
	second, err := dbus.New(s.bus.Address, s.engine, discard(), "1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	err = second.Run(t.Context(), func() { t.Error("the second server got ready") })
	if err == nil || !strings.Contains(err.Error(), "another sproutd is running") {
		t.Errorf("the second server ended with %v", err)
	}
}

func TestTheServerEndsWhenAsked(t *testing.T) {
	s := serve(t)
	waiting := s.conn.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	<-s.engine.waiting
	if err := s.stop(); err != nil {
		t.Errorf("stopping is an error: %v", err)
	}
	if err := (<-waiting.Done).Err; err == nil {
		t.Error("the wait replied as if the job were done")
	}
}

func TestWhoWaitsHearsHowTheJobEndedBeforeTheServerDoes(t *testing.T) {
	s := serve(t)
	waiting := s.conn.Object(names.Bus, names.JobPath(2)).Go(names.Job+".Wait", 0, nil)
	<-s.engine.waiting
	stopped := make(chan error)
	go func() { stopped <- s.stop() }()
	s.engine.over(2) <- daemon.JobView{State: daemon.JobInterrupted, Err: fault.New(fault.Interrupted, "the daemon ended")}
	<-waiting.Done
	if name, _ := errorOf(waiting.Err); name != names.ErrorPrefix+"Interrupted" {
		t.Errorf("the wait ended with %v", waiting.Err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestTheServerEndsWithTheBus(t *testing.T) {
	s := serve(t)
	s.bus.Stop()
	if err := s.ended(); err == nil || !strings.Contains(err.Error(), "closed the connection") {
		t.Errorf("without a bus the server ended with %v", err)
	}
}

func TestTheAddressOfTheSystemBusIsHonoured(t *testing.T) {
	s := serve(t)
	_ = s.stop()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", s.bus.Address)
	server, err := dbus.New("", s.engine, discard(), "1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := server.Run(ctx, cancel); err != nil {
		t.Error(err)
	}
}

func TestBadAddressesAreRefused(t *testing.T) {
	for _, address := range []string{"tcp:host=localhost", "unix:", "unix:guid=1", "nonsense", "unix:path=/nonexistent/bus", "unix:path=%zz"} {
		server, err := dbus.New(address, newEngine(&daemon.View{}), discard(), "")
		if err != nil {
			t.Fatal(err)
		}
		if err := server.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "cannot connect") {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// transcript runs a program against the bus and gives what it prints.
func transcript(t *testing.T, s *service, uid uint32, program string, args ...string) string {
	t.Helper()
	testenv.NeedTool(t, program)
	cmd := exec.Command(program, args...)
	cmd.Env = s.bus.Env()
	cmd.Dir = "/"
	if uid != 0 {
		testenv.NeedRoot(t)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	out, _ := cmd.CombinedOutput()
	return "$ " + program + " " + strings.Join(args, " ") + "\n" + string(out)
}

// sortDicts sorts the words of lines with dictionaries, which have no order.
func sortDicts(transcript string) string {
	lines := strings.Split(transcript, "\n")
	for i, line := range lines {
		if signature, values, ok := strings.Cut(line, " "); ok && strings.HasPrefix(signature, "a") && strings.Contains(signature, "{sv}") {
			words := strings.Fields(values)
			slices.Sort(words)
			lines[i] = signature + " sorted: " + strings.Join(words, " ")
		}
	}
	return strings.Join(lines, "\n")
}

func TestBusctlShowsTheService(t *testing.T) {
	s := serve(t)
	if os.Getuid() != 0 {
		testenv.NeedRoot(t)
	}
	var b strings.Builder
	for _, args := range [][]string{
		{"tree", "--no-pager", names.Bus},
		{"introspect", "--no-pager", "-l", names.Bus, string(names.JobPath(2)), names.Job},
		{"introspect", "--no-pager", "-l", names.Bus, names.Root, names.Manager},
		{"get-property", names.Bus, names.RootSprout, names.Sprout, "State", "Members"},
		{"-j", "get-property", names.Bus, names.RootSprout, names.Sprout, "CurrentJob"},
		{"call", names.Bus, names.Root, names.Manager, "ListJobs"},
		{"call", names.Bus, names.Root, names.Manager, "ListDevices", "a{sv}", "0"},
		{"call", names.Bus, names.RootSprout, names.Sprout, "Plan", "ssa{sv}", "flatten", "/dev/sdb1", "2", "wipe", "b", "true", "bootloader", "s", "none"},
		{"call", names.Bus, names.RootSprout, names.Sprout, "Persist", "sa{sv}", "/dev/sdb1", "0"},
		{"call", names.Bus, names.RootSprout, names.Sprout, "Persist", "sa{sv}", "/dev/sdb1", "1", "wpie", "b", "true"},
		{"call", names.Bus, names.JobsParent + "/1", names.Job, "Wait"},
		{"call", names.Bus, names.JobsParent + "/9", names.Job, "Wait"},
		{"set-property", names.Bus, names.RootSprout, names.Sprout, "Label", "s", "x"},
	} {
		b.WriteString(transcript(t, s, 0, "busctl", args...))
	}
	golden(t, "busctl.txt", sortDicts(b.String()))
}

func TestGdbusShowsTheService(t *testing.T) {
	s := serve(t)
	if os.Getuid() != 0 {
		testenv.NeedRoot(t)
	}
	var b strings.Builder
	for _, args := range [][]string{
		{"introspect", "--system", "-d", names.Bus, "-o", string(names.JobPath(1)), "--only-properties"},
		{"call", "--system", "-d", names.Bus, "-o", names.Root, "-m", names.Manager + ".ListJobs"},
		{"call", "--system", "-d", names.Bus, "-o", names.RootSprout, "-m", names.Properties + ".Get", names.Sprout, "MediaHolders"},
		{"call", "--system", "-d", names.Bus, "-o", names.RootSprout, "-m", names.Sprout + ".Flatten", "/dev/sdb1", "{'bootloader': <'none'>}"},
		{"call", "--system", "-d", names.Bus, "-o", names.RootSprout, "-m", names.Sprout + ".Flatten", "/dev/sdb1", "{'wipe': <'yes'>}"},
	} {
		b.WriteString(transcript(t, s, 0, "gdbus", args...))
	}
	golden(t, "gdbus.txt", b.String())
}
