// Package daemon is the engine: it reads what the kernel shows, keeps the
// journal of what was intended, and runs jobs one step at a time.
//
//   - view.go     what is shown to clients, as plain values
package daemon
