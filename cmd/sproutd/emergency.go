package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// tellConsole writes a message for whoever sits at the machine. The node is in
// memory, so this works also when nothing can be read from the stick. It does
// not wait for a console that was stopped with Ctrl-S.
func tellConsole(path, text string) error {
	console, err := unix.Open(path, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the console: %w", err)
	}
	_, err = unix.Write(console, fmt.Appendf(nil, "\r\nsproutd: %s\r\n", text))
	return errors.Join(err, unix.Close(console))
}
