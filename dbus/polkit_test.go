package dbus_test

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus/bustest"
	"sproutd.org/sproutd/dbus/names"
	"sproutd.org/sproutd/tests/testenv"
)

// nobody is a user who is not root.
const nobody = 65534

// guarded are all calls that change something, with the actions they need
// when nobody asks.
var guarded = []struct {
	path    godbus.ObjectPath
	method  string
	args    []any
	actions []string
	details map[string]string
}{
	{
		names.Root, names.Manager + ".CreateSprout",
		[]any{"/a.img", "/mnt", dict{}},
		[]string{names.ActionCreate},
		map[string]string{"operation": "create", "seed": "/a.img", "wipe": "false"},
	},
	{
		names.Root, names.Manager + ".CreateSprout",
		[]any{"/a.img", "/mnt", with("device", "/dev/sdb1", "wipe", true)},
		[]string{names.ActionCreate, names.ActionWipe},
		merge(stick, map[string]string{"operation": "create", "seed": "/a.img", "wipe": "true"}),
	},
	{
		rootSprout, names.Sprout + ".Persist",
		[]any{"/dev/sdb1", dict{}},
		[]string{names.ActionPersist},
		merge(stick, map[string]string{"operation": "persist", "wipe": "false"}),
	},
	{
		rootSprout, names.Sprout + ".Persist",
		[]any{"/dev/sdb1", with("wipe", true)},
		[]string{names.ActionPersist, names.ActionWipe},
		merge(stick, map[string]string{"operation": "persist", "wipe": "true"}),
	},
	{
		rootSprout, names.Sprout + ".Flatten",
		[]any{"/dev/unknown", with("wipe", false)},
		[]string{names.ActionFlatten},
		map[string]string{"operation": "flatten", "wipe": "false", "device": "/dev/unknown"},
	},
	{
		rootSprout, names.Sprout + ".Flatten",
		[]any{"/dev/sdb1", with("wipe", true)},
		[]string{names.ActionFlatten, names.ActionWipe},
		merge(stick, map[string]string{"operation": "flatten", "wipe": "true"}),
	},
	{
		rootSprout, names.Sprout + ".Release",
		[]any{"/mnt/disk", dict{}},
		[]string{names.ActionRelease},
		map[string]string{"operation": "release", "wipe": "false", "device": "/mnt/disk"},
	},
	{
		rootSprout, names.Sprout + ".Release",
		[]any{"/dev/sdb1", with("wipe", true)},
		[]string{names.ActionRelease, names.ActionWipe},
		merge(stick, map[string]string{"operation": "release", "wipe": "true"}),
	},
	{
		rootSprout, names.Sprout + ".AddDevice",
		[]any{"zram", dict{}},
		[]string{names.ActionManageDevices},
		map[string]string{"operation": "add-device", "wipe": "false", "device": "zram"},
	},
	{
		rootSprout, names.Sprout + ".AddDevice",
		[]any{"/dev/sdb1", with("wipe", true)},
		[]string{names.ActionManageDevices, names.ActionWipe},
		merge(stick, map[string]string{"operation": "add-device", "wipe": "true"}),
	},
	{
		rootSprout, names.Sprout + ".RemoveDevice",
		[]any{"/dev/sdb1", dict{}},
		[]string{names.ActionManageDevices},
		merge(stick, map[string]string{"operation": "remove-device", "wipe": "false"}),
	},
	{ // an earlier persist is what there is to resume
		rootSprout, names.Sprout + ".Resume",
		[]any{dict{}},
		[]string{names.ActionPersist},
		merge(stick, map[string]string{"operation": "resume", "wipe": "false"}),
	},
	{ // nothing shown to resume: the strictest
		names.SproutPath(otherFSID), names.Sprout + ".Resume",
		[]any{dict{}},
		[]string{names.ActionFlatten},
		map[string]string{"operation": "resume", "wipe": "false"},
	},
	{
		rootSprout, names.Sprout + ".Teardown",
		[]any{dict{}},
		[]string{names.ActionCreate},
		map[string]string{"operation": "teardown", "wipe": "false", "mountpoint": "/"},
	},
	{
		rootSprout, names.Sprout + ".Reset",
		[]any{dict{}},
		[]string{names.ActionWipe},
		map[string]string{"operation": "reset", "wipe": "false"},
	},
	{ // nobody's own job
		names.JobPath(1), names.Job + ".Cancel",
		[]any{dict{}},
		[]string{names.ActionCancel},
		map[string]string{"operation": "cancel", "wipe": "false", "job": string(names.JobPath(1))},
	},
	{ // root's
		names.JobPath(2), names.Job + ".Cancel",
		[]any{dict{}},
		[]string{names.ActionCancelOther},
		map[string]string{"operation": "cancel", "wipe": "false", "job": string(names.JobPath(2))},
	},
}

var stick = map[string]string{"device": "/dev/sdb1", "model": "USB Stick", "serial": "S123", "size": "8589934592", "removable": "true"}

func merge(all ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range all {
		maps.Copy(out, m)
	}
	return out
}

func TestEveryChangeNeedsItsActions(t *testing.T) {
	testenv.NeedRoot(t)
	for _, c := range guarded {
		t.Run(fmt.Sprint(c.method, c.args), func(t *testing.T) {
			s := serve(t)
			polkit := s.bus.StartPolkit(t)
			conn := s.bus.ConnAs(t, nobody)
			// Each action of the call alone is not enough, if there are several.
			for i, missing := range c.actions {
				for j, action := range c.actions {
					polkit.Say(action, bustest.Answer{Authorized: j != i})
				}
				name, message := errorOf(callOn(conn, c.path, c.method, c.args...).Err)
				if name != names.ErrorAccessDenied || !strings.Contains(message, missing) {
					t.Errorf("without %s: %s: %s", missing, name, message)
				}
			}
			if did := s.engine.did(); len(did) != 0 {
				t.Fatalf("the engine was asked before: %v", did)
			}
			for _, action := range c.actions {
				polkit.Say(action, bustest.Answer{Authorized: true})
			}
			before := len(polkit.Checks())
			if err := callOn(conn, c.path, c.method, c.args...).Err; err != nil {
				t.Fatal(err)
			}
			var want []bustest.Check
			for _, action := range c.actions {
				want = append(want, bustest.Check{Kind: "system-bus-name", Name: conn.Names()[0], Action: action, Details: c.details})
			}
			if got := polkit.Checks()[before:]; !reflect.DeepEqual(got, want) {
				t.Errorf("polkit was asked\n%+v\nwant\n%+v", got, want)
			}
			did := s.engine.did()
			if len(did) != 1 {
				t.Fatalf("the engine was asked %v", did)
			}
			if start, ok := did[0].(started); ok && start.caller != (daemon.Caller{UID: nobody, Name: conn.Names()[0]}) {
				t.Errorf("the engine took the caller for %+v", start.caller)
			}
		})
	}
}

func TestReadingNeedsNoPermission(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	conn := s.bus.ConnAs(t, nobody)
	for _, err := range []error{
		callOn(conn, names.Root, names.Manager+".InspectSeed", "/a.img").Err,
		callOn(conn, names.Root, names.Manager+".ListDevices", dict{}).Err,
		callOn(conn, names.Root, names.Manager+".ListJobs").Err,
		callOn(conn, rootSprout, names.Sprout+".Plan", "persist", "/dev/sdb1", dict{}).Err,
		callOn(conn, rootSprout, names.Properties+".GetAll", names.Sprout).Err,
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if name, _ := errorOf(callOn(conn, names.JobPath(1), names.Job+".Wait").Err); name != names.ErrorPrefix+"Cancelled" {
		t.Errorf("waiting: %s", name)
	}
}

func TestRootIsNotAskedAndNeedsNoPolkit(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	if err := s.call(rootSprout, names.Sprout+".Flatten", "/dev/sdb1", with("wipe", true)).Err; err != nil {
		t.Error(err)
	}
	polkit := s.bus.StartPolkit(t)
	if err := s.call(rootSprout, names.Sprout+".Flatten", "/dev/sdb1", with("wipe", true)).Err; err != nil {
		t.Error(err)
	}
	if checks := polkit.Checks(); len(checks) != 0 {
		t.Errorf("polkit was asked about root: %v", checks)
	}
}

func TestWithoutPolkitOnlyRootMay(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	conn := s.bus.ConnAs(t, nobody)
	for _, c := range guarded {
		name, message := errorOf(callOn(conn, c.path, c.method, c.args...).Err)
		if name != names.ErrorAccessDenied || !strings.Contains(message, "polkit is not running") {
			t.Errorf("%s: %s: %s", c.method, name, message)
		}
	}
	if did := s.engine.did(); len(did) != 0 {
		t.Errorf("the engine was asked %v", did)
	}
}

func TestAQuestionIsAskedOnlyWhereTheCallAllowsIt(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	polkit := s.bus.StartPolkit(t)
	conn := s.bus.ConnAs(t, nobody)
	persist := func(flags godbus.Flags, options dict) (name, message string) {
		return errorOf(raw(conn, rootSprout, names.Sprout, "Persist", flags, "/dev/sdb1", options).Err)
	}
	polkit.Say(names.ActionPersist, bustest.Answer{Challenge: true})
	if name, _ := persist(0, dict{}); name != names.ErrorInteractionNeeded {
		t.Errorf("a challenge to a call that allows no question: %s", name)
	}
	const ask = godbus.FlagAllowInteractiveAuthorization
	if name, _ := persist(ask, with("auth.no_user_interaction", true)); name != names.ErrorInteractionNeeded {
		t.Errorf("a challenge to a call whose options allow no question: %s", name)
	}
	if name, _ := persist(ask, dict{}); name != names.ErrorAccessDenied {
		t.Errorf("a question nobody answered: %s", name)
	}
	polkit.Say(names.ActionPersist, bustest.Answer{Details: map[string]string{"polkit.dismissed": "true"}})
	if name, message := persist(ask, dict{}); name != names.ErrorAccessDenied || !strings.Contains(message, "dismissed") {
		t.Errorf("a dismissed question: %s: %s", name, message)
	}
	var flags []uint32
	for _, check := range polkit.Checks() {
		flags = append(flags, check.Flags)
	}
	if want := []uint32{0, 0, 1, 1}; !reflect.DeepEqual(flags, want) {
		t.Errorf("flags of the questions %v, want %v", flags, want)
	}
}

func TestTheQuestionIsTakenBackWhenTheCallerLeaves(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	polkit := s.bus.StartPolkit(t)
	polkit.Say(names.ActionPersist, bustest.Answer{Hold: true})
	conn := s.bus.ConnAs(t, nobody)
	conn.Object(names.Bus, rootSprout).Go(names.Sprout+".Persist", 0, nil, "/dev/sdb1", dict{})
	<-polkit.Asked()
	_ = conn.Close()
	select {
	case <-polkit.Cancelled():
	case <-time.After(20 * time.Second):
		t.Fatal("the question was not taken back")
	}
	if err := s.stop(); err != nil { // all calls are over then
		t.Fatal(err)
	}
	if did := s.engine.did(); len(did) != 0 {
		t.Errorf("the engine was asked %v", did)
	}
}

func TestResumeAsksAgainWhenWhatIsResumedChanges(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t)
	polkit := s.bus.StartPolkit(t)
	conn := s.bus.ConnAs(t, nobody)
	polkit.Say(names.ActionManageDevices, bustest.Answer{Authorized: true})
	s.engine.change(func(v *daemon.View) {
		v.Sprouts[0].Intent = &daemon.Intent{Operation: plan.RemoveDevice, Target: "/dev/zram7"}
	})
	if err := callOn(conn, rootSprout, names.Sprout+".Resume", dict{}).Err; err != nil {
		t.Errorf("resuming what manage-devices allows: %v", err)
	}
	s.engine.change(func(v *daemon.View) {
		v.Sprouts[0].Intent = &daemon.Intent{Operation: plan.Flatten, Target: "/dev/sdb1"}
	})
	if name, _ := errorOf(callOn(conn, rootSprout, names.Sprout+".Resume", dict{}).Err); name != names.ErrorAccessDenied {
		t.Errorf("resuming a flatten with manage-devices: %s", name)
	}
}

func TestTheShippedBusPolicy(t *testing.T) {
	testenv.NeedRoot(t)
	s := serve(t, "../data/org.sproutd.Sprout1.conf")
	conn := s.bus.ConnAs(t, nobody)
	if err := callOn(conn, rootSprout, names.Properties+".GetAll", names.Sprout).Err; err != nil {
		t.Errorf("anybody may read: %v", err)
	}
	if name, message := errorOf(callOn(conn, rootSprout, names.Sprout+".Teardown", dict{}).Err); name != names.ErrorAccessDenied || !strings.Contains(message, "polkit") {
		t.Errorf("anybody may call, and is refused by sproutd: %s: %s", name, message)
	}
	_ = s.stop()
	if reply, err := conn.RequestName(names.Bus, godbus.NameFlagDoNotQueue); err == nil {
		t.Errorf("nobody took the name: %v", reply)
	}
}

// startPolkitd runs the real polkitd on the bus of s, with the policy we ship
// and the given rules. It sees them in a mount namespace of its own; nothing
// is installed.
func startPolkitd(t *testing.T, s *service, rules string) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "unshare")
	var polkitd string
	for _, path := range []string{"/usr/libexec/polkitd", "/usr/lib/polkit-1/polkitd", "/usr/libexec/polkit-1/polkitd"} {
		if _, err := os.Stat(path); err == nil {
			polkitd = path
		}
	}
	if polkitd == "" {
		testenv.Skip(t, "needs polkitd: `sudo make setup` installs it")
	}
	dir := t.TempDir()
	policy, err := filepath.Abs("../data/org.sproutd.sprout1.policy")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "10-test.rules"), []byte(rules), 0o644); err != nil {
		t.Fatal(err)
	}
	// A tmpfs is readable for the user that polkitd becomes; t.TempDir is not.
	const script = `set -e
mount --make-rprivate /
mkdir -p /etc/polkit-1/rules.d
for d in /usr/share/polkit-1/actions /usr/share/polkit-1/rules.d /etc/polkit-1/rules.d; do
	mount -t tmpfs -o mode=755 tmpfs "$d"
done
cp "$2" /usr/share/polkit-1/actions/
cp "$3"/10-test.rules /usr/share/polkit-1/rules.d/
exec "$1" --no-debug`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, "sh", polkitd, policy, dir)
	cmd.Env = s.bus.Env()
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out

	owners := make(chan *godbus.Signal, 10)
	watcher := s.bus.Conn(t)
	if err := watcher.AddMatchSignal(godbus.WithMatchSender("org.freedesktop.DBus"), godbus.WithMatchMember("NameOwnerChanged"),
		godbus.WithMatchArg(0, "org.freedesktop.PolicyKit1")); err != nil {
		t.Fatal(err)
	}
	watcher.Signal(owners)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	select {
	case <-owners:
	case <-ended:
		t.Fatalf("polkitd ended: %s", out.String())
	case <-time.After(20 * time.Second):
		t.Fatal("polkitd does not take its name")
	}
}

func TestARealPolkitDeniesNobody(t *testing.T) {
	s := serve(t)
	startPolkitd(t, s, "")
	conn := s.bus.ConnAs(t, nobody)
	for _, c := range guarded {
		name, message := errorOf(callOn(conn, c.path, c.method, c.args...).Err)
		if name != names.ErrorInteractionNeeded {
			t.Errorf("%s: %s: %s", c.method, name, message)
		}
	}
	// With the flag polkit looks for somebody to ask, and there is nobody.
	call := raw(conn, rootSprout, names.Sprout, "Persist", godbus.FlagAllowInteractiveAuthorization, "/dev/sdb1", dict{})
	if name, _ := errorOf(call.Err); name != names.ErrorAccessDenied {
		t.Errorf("with a question: %v", call.Err)
	}
	if did := s.engine.did(); len(did) != 0 {
		t.Errorf("the engine was asked %v", did)
	}
}

func TestARuleOfARealPolkitAllowsByDetails(t *testing.T) {
	s := serve(t)
	startPolkitd(t, s, `polkit.addRule(function(action, subject) {
	if (action.id == "org.sproutd.sprout1.persist" && subject.user == "nobody" &&
	    action.lookup("removable") == "true" && action.lookup("device") == "/dev/sdb1" && action.lookup("wipe") == "false")
		return polkit.Result.YES;
	return polkit.Result.NO;
});
`)
	conn := s.bus.ConnAs(t, nobody)
	if err := callOn(conn, rootSprout, names.Sprout+".Persist", "/dev/sdb1", dict{}).Err; err != nil {
		t.Errorf("what the rule allows: %v", err)
	}
	for _, call := range []*godbus.Call{
		callOn(conn, rootSprout, names.Sprout+".Persist", "/dev/sdb1", with("wipe", true)),
		callOn(conn, rootSprout, names.Sprout+".Persist", "/dev/zram7", dict{}),
		callOn(conn, rootSprout, names.Sprout+".Flatten", "/dev/sdb1", dict{}),
	} {
		if name, _ := errorOf(call.Err); name != names.ErrorAccessDenied {
			t.Errorf("what the rule does not allow: %v", call.Err)
		}
	}
	if did := s.engine.did(); len(did) != 1 {
		t.Errorf("the engine was asked %v", did)
	}
}
