package dbus_test

import (
	"testing"

	"sproutd.org/sproutd/dbus/names"
)

// BenchmarkPropertyGet reads one property at a time over a bus, as a client
// that polls does. The aim is 5,000 reads a second, 200 µs each.
func BenchmarkPropertyGet(b *testing.B) {
	s := serve(b)
	object := s.conn.Object(names.Bus, names.RootSprout)
	var state string
	for b.Loop() {
		if err := object.Call(names.Properties+".Get", 0, names.Sprout, "State").Store(&state); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
}
