package systemd

import (
	"fmt"
	"strings"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
)

// Notifier tells the service manager about the daemon's state with
// sd_notify(3). Its methods do nothing when NOTIFY_SOCKET is not set. They dial
// the socket on each call, so a caller with progress to report limits its rate.
// The zero value is ready to use.
type Notifier struct{}

// Ready says that start-up is finished: the name is on the bus and answers.
func (Notifier) Ready() error { return notify(sdnotify.SdNotifyReady) }

// Stopping says that the daemon has begun to shut down.
func (Notifier) Stopping() error { return notify(sdnotify.SdNotifyStopping) }

// Status sets the one line that `systemctl status` shows. Line breaks in text
// become spaces, since each line of a message is an assignment of its own.
func (Notifier) Status(text string) error {
	return notify("STATUS=" + strings.NewReplacer("\n", " ", "\r", " ").Replace(text))
}

// ExtendTimeout asks the manager to wait at least d from now before it counts
// the start or stop that is under way as failed. It is for a kernel operation
// that cannot be left in the middle; call it again before d is over.
func (Notifier) ExtendTimeout(d time.Duration) error {
	return notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", d.Microseconds()))
}

// notify sends one sd_notify message. The variables stay in the environment:
// child processes are not allowed to notify (NotifyAccess=main) and the
// watchdog reads them later.
func notify(state string) error {
	if _, err := sdnotify.SdNotify(false, state); err != nil {
		return fmt.Errorf("cannot notify the service manager: %w", err)
	}
	return nil
}
