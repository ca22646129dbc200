package machine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/mount"
)

// GuardArgument is the only argument of the program when it is to run [Guard].
const GuardArgument = "thaw-when-alone"

// guardFor is how long a file system may be frozen: should the kernel never come
// back, those who wait to write to it matter more.
const guardFor = 30 * time.Second

// guarded is the descriptor of the frozen file system in the guard.
const guarded = 3

// What the daemon tells its guard, a byte each: that it is going to freeze the
// file system, that it has done so, and that it could not.
const (
	willFreeze = 'w'
	hasFrozen  = 'f'
	hasNot     = 'n'
)

// Guard is the life of a process that thaws a file system when the daemon dies
// while it is frozen: nobody could write to it any more, the next daemon neither.
// It writes a byte once it is on guard, and ends when its standard input does,
// which it does not before the daemon is out of the kernel, killed or not.
func Guard() error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	dir := os.NewFile(guarded, "the frozen file system")
	if dir == nil {
		return errors.New("cannot guard: there is nothing to thaw")
	}
	told := make(chan byte)
	go func() {
		defer close(told)
		for b := make([]byte, 1); ; {
			if _, err := os.Stdin.Read(b); err != nil {
				return
			}
			told <- b[0]
		}
	}()
	if _, err := os.Stdout.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("cannot guard: %w", err)
	}
	err := watchOver(told, time.After, func() error { return mount.Thaw(dir) })
	return errors.Join(err, dir.Close()) // so that it can be unmounted from now on
}

// watchOver thaws when the daemon is gone, or has left the file system frozen for
// too long. What the daemon did not freeze is not thawed: somebody else may have
// frozen it.
func watchOver(told <-chan byte, after func(time.Duration) <-chan time.Time, thaw func() error) error {
	var late <-chan time.Time
	for armed := false; ; {
		select {
		case what, alive := <-told:
			switch {
			case !alive && !armed:
				return nil
			case alive && what == willFreeze:
				armed = true
				continue
			case alive && what == hasFrozen:
				late = after(guardFor)
				continue
			case alive && what == hasNot:
				armed = false
				continue
			}
		case <-late:
		}
		err := thaw()
		if errors.Is(err, syscall.EINVAL) {
			err = nil // thawed already
		}
		return err
	}
}

// frozen calls act while nobody can write to the file system at mountpoint and
// all of it is written out. act must be short, and must neither write to a file
// nor wait for anybody who may.
func frozen(mountpoint string, act func() error) (err error) {
	const what = "cannot hold the file system at %s still"
	dir, err := os.Open(mountpoint)
	if err != nil {
		return explain(err, what, mountpoint)
	}
	defer dir.Close()
	tell, relieve, err := startGuard(dir)
	if err != nil {
		return fault.Wrap(err, fault.Internal, what, mountpoint)
	}
	defer relieve()
	if err := tell(willFreeze); err != nil {
		return fault.Wrap(err, fault.Internal, what, mountpoint)
	}
	if err := mount.Freeze(dir); err != nil {
		return errors.Join(explain(err, what, mountpoint), tell(hasNot))
	}
	if err = tell(hasFrozen); err == nil {
		err = act()
	}
	if thawErr := mount.Thaw(dir); thawErr != nil && !errors.Is(thawErr, syscall.EINVAL) {
		err = errors.Join(err, fault.Wrap(thawErr, fault.Internal, "cannot let the file system at %s go on", mountpoint))
	}
	return err
}

// startGuard starts the guard of a file system, and gives what tells it something
// and what relieves it.
func startGuard(dir *os.File) (tell func(what byte) error, relieve func(), err error) {
	// This very program, whatever its name means by now.
	guard := exec.Command("/proc/self/exe", GuardArgument)
	guard.ExtraFiles = []*os.File{dir}
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	alive, err := guard.StdinPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot start a guard: %w", err)
	}
	ready, err := guard.StdoutPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot start a guard: %w", err)
	}
	if err := guard.Start(); err != nil {
		return nil, nil, fmt.Errorf("cannot start a guard: %w", err)
	}
	relieve = func() {
		_ = alive.Close()
		_ = guard.Wait() // what it could not thaw was thawed here
	}
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		relieve()
		return nil, nil, fmt.Errorf("cannot start a guard: %w", err)
	}
	tell = func(what byte) error {
		_, err := alive.Write([]byte{what})
		return err
	}
	return tell, relieve, nil
}
