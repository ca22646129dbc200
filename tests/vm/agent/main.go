// Command agent answers the tests from inside a virtual machine: see package guest.
package main

import (
	"fmt"
	"io"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/vm/guest"
)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// serve answers until the machine is switched off.
func serve() error {
	// Everything that is mapped now: the program is read to its end, and stays.
	if err := unix.Mlockall(unix.MCL_CURRENT); err != nil {
		return fmt.Errorf("cannot stay in memory: %w", err)
	}
	calls, err := open(guest.CallPort)
	if err != nil {
		return err
	}
	promises, err := open(guest.PromisePort)
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.RegisterName(guest.Service, guest.New(noted{promises})); err != nil {
		return err
	}
	// In JSON each call stands for itself, so that the other end can be another
	// one from one call to the next: it is when a machine's memory was restored.
	server.ServeCodec(jsonrpc.NewServerCodec(calls))
	return nil
}

// noted writes what somebody has to have noted, and says so with a byte, before
// it goes on.
type noted struct{ port io.ReadWriter }

func (n noted) Write(p []byte) (int, error) {
	count, err := n.port.Write(p)
	if err == nil {
		_, err = io.ReadFull(n.port, make([]byte, 1))
	}
	return count, err
}

// open opens a port. It is read and written by a thread that waits, as the
// kernel reports nothing to poll(2) while nobody listens at the other end.
func open(path string) (io.ReadWriteCloser, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}
