// Package data_test checks the files that packages install: the unit, the bus
// and polkit policies.
package data_test

import (
	"bufio"
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/tests/testenv"
)

const busName = "org.sproutd.Sprout1"

func read(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// settings gives the assignments of a unit file, without its comments.
func settings(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for line := range strings.Lines(read(t, "sproutd.service.in")) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && !strings.HasPrefix(key, "#") {
			all[key] = value
		}
	}
	return all
}

// A service with a mount namespace of its own mounts sprouts where nobody sees
// them. The list is exec_needs_mount_namespace() of systemd.
func TestUnitStaysInTheMountNamespaceOfTheHost(t *testing.T) {
	unit := settings(t)
	for _, key := range []string{
		"PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateNetwork", "PrivateIPC", "PrivatePIDs", "ProtectSystem",
		"ProtectHome", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups",
		"ProtectProc", "ProcSubset", "MountFlags", "MountAPIVFS", "MountImages", "BindPaths", "BindReadOnlyPaths",
		"TemporaryFileSystem", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths",
		"RootDirectory", "RootImage", "ExtensionImages", "ExtensionDirectories", "NetworkNamespacePath",
		"IPCNamespacePath", "LogNamespace", "DynamicUser", "DeviceAllow", "DevicePolicy", "ProtectClock",
	} {
		if value, ok := unit[key]; ok {
			t.Errorf("the unit has %s=%s", key, value)
		}
	}
}

func TestUnitIsTheOneTheBusStarts(t *testing.T) {
	unit := settings(t)
	if unit["Type"] != "notify" || unit["BusName"] != busName {
		t.Errorf("Type=%s BusName=%s", unit["Type"], unit["BusName"])
	}
	activation := read(t, busName+".service")
	for _, line := range []string{"Name=" + busName, "SystemdService=sproutd.service"} {
		if !strings.Contains(activation, line+"\n") {
			t.Errorf("the activation file lacks %s", line)
		}
	}
}

func TestUnitPassesSystemdsOwnCheck(t *testing.T) {
	testenv.NeedTool(t, "systemd-analyze")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sproutd"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(dir, "sproutd.service")
	content := strings.ReplaceAll(read(t, "sproutd.service.in"), "@libexecdir@", dir)
	if err := os.WriteFile(unit, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput()
	if err != nil || strings.Contains(string(out), "sproutd.service:") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// Where the system was booted from a stick, the service does not wait for a
// caller.
func TestTheGeneratorStartsTheServiceWhereTheEarlyBootWas(t *testing.T) {
	dir := t.TempDir()
	note, units := filepath.Join(dir, "boot.json"), filepath.Join(dir, "units")
	script := strings.NewReplacer("/run/sprout/boot.json", note, "@unitdir@", "/usr/lib/systemd/system").Replace(read(t, "sproutd-generator.in"))
	wanted := func() string {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "sh", "-c", script, "sproutd-generator", units).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		unit, _ := os.Readlink(filepath.Join(units, "multi-user.target.wants", "sproutd.service"))
		return unit
	}
	if unit := wanted(); unit != "" {
		t.Errorf("without a note %s is wanted", unit)
	}
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if unit := wanted(); unit != "/usr/lib/systemd/system/sproutd.service" {
		t.Errorf("with a note %q is wanted", unit)
	}
}

func TestXMLIsWellFormed(t *testing.T) {
	testenv.NeedTool(t, "xmllint")
	for _, name := range []string{busName + ".conf", "org.sproutd.sprout1.policy"} {
		if out, err := exec.CommandContext(t.Context(), "xmllint", "--noout", "--nonet", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// action is one action of the polkit policy.
type action struct {
	ID          string `xml:"id,attr"`
	Description string `xml:"description"`
	Message     string `xml:"message"`
	Any         string `xml:"defaults>allow_any"`
	Inactive    string `xml:"defaults>allow_inactive"`
	Active      string `xml:"defaults>allow_active"`
}

func TestPolkitAsksAsPromised(t *testing.T) {
	var policy struct {
		Actions []action `xml:"action"`
	}
	if err := xml.Unmarshal([]byte(read(t, "org.sproutd.sprout1.policy")), &policy); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, action := range policy.Actions {
		name, ok := strings.CutPrefix(action.ID, "org.sproutd.sprout1.")
		if !ok {
			t.Errorf("%s is not an action of ours", action.ID)
		}
		names = append(names, name)
		if action.Description == "" || action.Message == "" {
			t.Errorf("%s says nothing to the person who is asked", name)
		}
		// Who does not sit at the machine is always asked.
		if action.Any != "auth_admin" || action.Inactive != "auth_admin" {
			t.Errorf("%s: any %s, inactive %s; want auth_admin", name, action.Any, action.Inactive)
		}
		if (name == "flatten" || name == "wipe") && action.Active != "auth_admin" {
			t.Errorf("%s: active %s; what cannot be undone asks each time", name, action.Active)
		}
	}
	slices.Sort(names)
	want := []string{"cancel", "cancel-other", "create", "flatten", "manage-devices", "persist", "release", "verify", "wipe"}
	if !slices.Equal(names, want) {
		t.Errorf("the actions are %v, want %v", names, want)
	}
}

// A bus with the defaults of the system bus and our policy: root may own the
// name, nobody else may, and everybody may call its owner.
func TestBusPolicy(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.Skip(t, "needs root to be two users: run `sudo make test`")
	}
	testenv.NeedTool(t, "dbus-daemon", "busctl")
	address := systemLikeBus(t)
	call := func(uid uint32, arguments ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "busctl", append([]string{"--address=" + address, "call"}, arguments...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	const nobody = 65534

	out, err := call(nobody, "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", busName, "4")
	if err == nil || !strings.Contains(out, "Access denied") {
		t.Errorf("an ordinary user asks for the name: %v: %s", err, out)
	}
	owner, other := connect(t, address), connect(t, address)
	if reply, err := owner.RequestName(busName, godbus.NameFlagDoNotQueue); err != nil || reply != godbus.RequestNameReplyPrimaryOwner {
		t.Errorf("root may not own the name: %v: %v", reply, err)
	}
	if out, err := call(nobody, busName, "/", "org.freedesktop.DBus.Peer", "Ping"); err != nil {
		t.Errorf("an ordinary user may not call the service: %v: %s", err, out)
	}
	// The check has teeth: the same call to anybody else is refused.
	out, err = call(nobody, other.Names()[0], "/", "org.freedesktop.DBus.Peer", "Ping")
	if err == nil || !strings.Contains(out, "Access denied") {
		t.Errorf("a call to another service: %v: %s", err, out)
	}
}

func connect(t *testing.T, address string) *godbus.Conn {
	t.Helper()
	conn, err := godbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// systemLikeBus starts a dbus-daemon with the default policy of a system bus and
// ours on top, and gives its address.
func systemLikeBus(t *testing.T) string {
	t.Helper()
	policy, err := filepath.Abs(busName + ".conf")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "bus.conf")
	if err := os.WriteFile(config, []byte(`<busconfig>
  <listen>unix:tmpdir=/tmp</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>`+policy+`</include>
</busconfig>`), 0o600); err != nil {
		t.Fatal(err)
	}
	bus := exec.CommandContext(t.Context(), "dbus-daemon", "--config-file="+config, "--nofork", "--nopidfile", "--print-address")
	bus.Cancel = func() error { return bus.Process.Signal(syscall.SIGTERM) } // it then removes its socket
	stdout, err := bus.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bus.Wait() })
	address, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(address)
}
