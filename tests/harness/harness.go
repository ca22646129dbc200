// Package harness runs the real daemon on a private bus, for the tests, the
// demo and the benchmark.
package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// busConfig is a bus on which everybody may do everything, as on a system bus
// with a policy that leaves all to polkit.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
    <allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
  </policy>
</busconfig>
`

// process is a child that is waited for by one goroutine.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // valid once ended is closed
}

func start(cmd *exec.Cmd) (*process, error) {
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", cmd.Path, err)
	}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// end sends a signal and waits for the process.
func (p *process) end(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // it may have ended by itself
	<-p.ended
}

// Bus is a private message bus.
type Bus struct {
	// Address is what DBUS_SYSTEM_BUS_ADDRESS has to be to use the bus.
	Address string
	p       *process
}

// StartBus starts a bus with its socket in dir, whose name must be short: the
// path of a socket has at most 107 bytes.
func StartBus(dir string) (*Bus, error) {
	socket, conf := filepath.Join(dir, "bus"), filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, busConfig, socket), 0o644); err != nil {
		return nil, fmt.Errorf("cannot configure the bus: %w", err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile", "--print-address", "--nosyslog")
	cmd.SysProcAttr = own()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("cannot start the bus: %w", err)
	}
	p, err := start(cmd)
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n') // comes when the socket is there
	if err != nil {
		p.end(os.Kill)
		return nil, fmt.Errorf("cannot start the bus: %w", err)
	}
	address, _, _ := strings.Cut(strings.TrimSpace(line), ",guid=")
	return &Bus{Address: address, p: p}, nil
}

// Stop ends the bus. It may be called more than once.
func (b *Bus) Stop() { b.p.end(os.Kill) }

// own gives a child a process group of its own, so that Ctrl-C reaches the
// program that tidies up and not its helpers, and ends it with that program.
func own() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// Daemon is a running sproutd.
type Daemon struct {
	PID      int
	p        *process
	stopping chan struct{}
}

// Spec says how to run the daemon.
type Spec struct {
	// Binary is the path of sproutd.
	Binary string
	// Address of the bus.
	Address string
	// Dir is where the state directory "state" and the socket for readiness are.
	Dir string
	// Log receives what the daemon logs; nil for nothing.
	Log io.Writer
}

// StartDaemon starts sproutd and returns when it says that it is ready.
func StartDaemon(ctx context.Context, s Spec) (*Daemon, error) {
	socket := filepath.Join(s.Dir, "notify")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot prepare the daemon: %w", err)
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("cannot prepare the daemon: %w", err)
	}
	cmd := exec.Command(s.Binary, "--state-dir", filepath.Join(s.Dir, "state"), "--log-level", "debug")
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+s.Address, "NOTIFY_SOCKET="+socket)
	cmd.SysProcAttr = own()
	cmd.Stdout, cmd.Stderr = s.Log, s.Log
	p, err := start(cmd)
	if err != nil {
		return nil, errors.Join(err, notify.Close())
	}
	ready, stopping := make(chan struct{}), make(chan struct{})
	go func() {
		defer notify.Close()
		<-p.ended
	}()
	go func() {
		readyOnce, stoppingOnce := sync.OnceFunc(func() { close(ready) }), sync.OnceFunc(func() { close(stopping) })
		message := make([]byte, 256)
		for {
			n, err := notify.Read(message)
			if err != nil {
				return // closed above
			}
			for line := range strings.Lines(string(message[:n])) {
				switch strings.TrimSpace(line) {
				case "READY=1":
					readyOnce()
				case "STOPPING=1":
					stoppingOnce()
				}
			}
		}
	}()
	select {
	case <-ready:
	case <-p.ended:
		err = fmt.Errorf("it ended: %w", errors.Join(p.err, errors.New("see its log")))
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		p.end(os.Kill)
		return nil, fmt.Errorf("cannot start the daemon: %w", err)
	}
	return &Daemon{PID: cmd.Process.Pid, p: p, stopping: stopping}, nil
}

// Stop asks the daemon to end and waits for it.
func (d *Daemon) Stop() { d.p.end(syscall.SIGTERM) }

// Kill ends the daemon with SIGKILL and waits for it.
func (d *Daemon) Kill() { d.p.end(os.Kill) }

// KillBetweenCalls ends the daemon with SIGKILL while none of its threads is
// in the kernel: it is stopped first, which lets each system call come to its
// end. A fatal signal in the middle of adding a device to a mounted seed can
// make Linux 6.18 oops, and leaves the file system in use until the next boot.
func (d *Daemon) KillBetweenCalls() error {
	defer d.Kill()
	d.Signal(syscall.SIGSTOP)
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !stopped(d.PID) {
		select {
		case <-tick.C:
		case <-d.Ended():
			return nil
		case <-deadline.C:
			return fmt.Errorf("cannot stop the daemon %d: one of its threads stays in the kernel", d.PID)
		}
	}
	return nil
}

// stopped reports whether every thread of a process is stopped.
// Source: proc_pid_stat(5), the field after the name in parentheses.
func stopped(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		if _, rest, ok := strings.Cut(string(stat), ") "); !ok || rest[0] != 'T' {
			return false
		}
	}
	return true
}

// Signal sends the daemon a signal and does not wait for what comes of it. One
// that has ended already gets none.
func (d *Daemon) Signal(s os.Signal) { _ = d.p.cmd.Process.Signal(s) }

// Stopping is closed when the daemon says that it is about to end.
func (d *Daemon) Stopping() <-chan struct{} { return d.stopping }

// Ended is closed when the daemon has ended.
func (d *Daemon) Ended() <-chan struct{} { return d.p.ended }

// Build builds the programs into dir, with the race detector if race is true,
// and gives the path of a program in it.
func Build(ctx context.Context, dir string, race bool, programs ...string) error {
	args := []string{"build", "-o", dir + "/"}
	if race {
		args = append(args, "-race")
	}
	for _, program := range programs {
		args = append(args, "sproutd.org/sproutd/cmd/"+program)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build %s: %w\n%s", strings.Join(programs, ", "), err, out)
	}
	return nil
}

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
