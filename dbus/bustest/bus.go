// Package bustest gives tests a message bus of their own, connections to it as
// any user, and stand-ins for the services sproutd asks: polkit and logind.
package bustest

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/testenv"
)

// open lets everybody do everything, strict is what a system bus starts from.
const (
	openPolicy = `<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>`

	strictPolicy = `<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/>
    <allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/>
    <allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/></policy>
  <policy user="root"><allow own="org.freedesktop.PolicyKit1"/></policy>`

	config = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  %s
</busconfig>
`
)

// Bus is a private bus that ends with its test.
type Bus struct {
	Address string

	process *os.Process
	exited  chan struct{}
}

// Start starts a bus. With no policy files everybody may do everything on it;
// with some it is as strict as a system bus, apart from what they allow.
func Start(t testing.TB, policyFiles ...string) *Bus {
	t.Helper()
	testenv.NeedTool(t, "dbus-daemon")
	// A test's own temporary directory is closed to other users, and its name
	// may be too long for a socket.
	dir, err := os.MkdirTemp("", "bus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	policy := openPolicy
	if len(policyFiles) > 0 {
		policy = strictPolicy
		for _, file := range policyFiles {
			absolute, err := filepath.Abs(file)
			if err != nil {
				t.Fatal(err)
			}
			policy += "\n  <include>" + absolute + "</include>"
		}
	}
	socket, conf := filepath.Join(dir, "socket"), filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, config, socket, policy), 0o644); err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile", "--print-address", "--nosyslog")
	var complaints strings.Builder
	daemon.Stderr = &complaints
	out, err := daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	b := &Bus{process: daemon.Process, exited: make(chan struct{})}
	// The line comes when the socket is there.
	line, err := bufio.NewReader(out).ReadString('\n')
	go func() {
		defer close(b.exited)
		_ = daemon.Wait()
	}()
	t.Cleanup(b.Stop)
	if err != nil {
		b.Stop()
		t.Fatalf("dbus-daemon did not start: %v: %s", err, complaints.String())
	}
	b.Address, _, _ = strings.Cut(strings.TrimSpace(line), ",guid=")
	return b
}

// Stop ends the bus at once. It may be called more than once.
func (b *Bus) Stop() {
	_ = b.process.Kill()
	<-b.exited
}

// Env gives the environment in which programs take the bus for the system bus.
func (b *Bus) Env() []string {
	return append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+b.Address, "LC_ALL=C.UTF-8")
}

// Conn connects as the user of the test.
func (b *Bus) Conn(t testing.TB, opts ...godbus.ConnOption) *godbus.Conn {
	t.Helper()
	opts = append([]godbus.ConnOption{godbus.WithSignalHandler(godbus.NewSequentialSignalHandler())}, opts...)
	conn, err := godbus.Connect(b.Address, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// ConnAs connects as another user. It needs root.
//
// The kernel notes who connects from the thread that does it, so one thread
// changes its user for that moment; a process of its own is not needed.
func (b *Bus) ConnAs(t testing.TB, uid uint32, opts ...godbus.ConnOption) *godbus.Conn {
	t.Helper()
	testenv.NeedRoot(t)
	socket, err := dialAs(strings.TrimPrefix(b.Address, "unix:path="), uid)
	if err != nil {
		t.Fatalf("cannot connect as user %d: %v", uid, err)
	}
	opts = append([]godbus.ConnOption{godbus.WithSignalHandler(godbus.NewSequentialSignalHandler())}, opts...)
	conn, err := godbus.NewConn(socket, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.Auth([]godbus.Auth{godbus.AuthExternal(strconv.FormatUint(uint64(uid), 10))}); err != nil {
		t.Fatal(err)
	}
	if err := conn.Hello(); err != nil {
		t.Fatal(err)
	}
	return conn
}

func dialAs(path string, uid uint32) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		// Never unlocked: the thread ends with the goroutine, whatever user it is.
		runtime.LockOSThread()
		// The raw call changes this thread only, unlike the one of package syscall.
		keep := ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			done <- result{nil, errno}
			return
		}
		conn, err := net.Dial("unix", path)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
