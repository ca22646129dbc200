//go:build race

package harness

// raceEnabled: the daemon is tested with the race detector when the tests are.
const raceEnabled = true
