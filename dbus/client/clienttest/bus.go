// Package clienttest is a stand-in for the service on a private bus: objects
// with properties that a test sets, and methods that a test scripts. It knows
// the contract's names and nothing of sprouts, so what the command line prints
// does not depend on the engine.
package clienttest

import (
	"testing"

	"sproutd.org/sproutd/dbus/bustest"
)

// StartBus starts a bus for this test alone, makes it the system bus of this
// process and its children, and gives its address.
func StartBus(t testing.TB) string {
	t.Helper()
	address := bustest.Start(t).Address
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	return address
}
