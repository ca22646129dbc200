package systemd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// listen plays the service manager: it sets NOTIFY_SOCKET and gives a function
// that reads the next message.
func listen(t *testing.T) func() string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		message := make([]byte, 4096)
		n, err := conn.Read(message)
		if err != nil {
			t.Fatal(err)
		}
		return string(message[:n])
	}
}

func TestNotifierTellsTheManager(t *testing.T) {
	next := listen(t)
	var manager Notifier
	for _, test := range []struct {
		name string
		call func() error
		want string
	}{
		{"ready", manager.Ready, "READY=1"},
		{"stopping", manager.Stopping, "STOPPING=1"},
		{"status", func() error { return manager.Status("flatten: 40 %") }, "STATUS=flatten: 40 %"},
		{"a status cannot smuggle in an assignment", func() error { return manager.Status("a\nREADY=1\r\n") }, "STATUS=a READY=1  "},
		{"extend", func() error { return manager.ExtendTimeout(1500 * time.Millisecond) }, "EXTEND_TIMEOUT_USEC=1500000"},
	} {
		if err := test.call(); err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if got := next(); got != test.want {
			t.Errorf("%s: the manager got %q, want %q", test.name, got, test.want)
		}
	}
}

func TestNotifierIsSilentWithoutAManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := (Notifier{}).Ready(); err != nil {
		t.Error(err)
	}
}

func TestNotifierReportsABrokenSocket(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	var broken *net.OpError
	if err := (Notifier{}).Ready(); !errors.As(err, &broken) {
		t.Errorf("got %v, want the error of the socket", err)
	}
}

func TestWatchdogFeedsTheManager(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "60000000")
	t.Setenv("WATCHDOG_PID", "")
	watchdog, err := NewWatchdog()
	if err != nil {
		t.Fatal(err)
	}
	if watchdog.Interval != time.Minute {
		t.Errorf("the interval is %v, want one minute", watchdog.Interval)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchdog.Run(ctx, func(context.Context) error { return nil })
	}()
	if got := next(); got != "WATCHDOG=1" {
		t.Errorf("the manager got %q", got)
	}
	cancel()
	<-done
}
