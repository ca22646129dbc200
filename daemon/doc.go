// Package daemon is the engine: it reads what the kernel shows, keeps the
// journal of what was intended, and runs jobs one step at a time.
//
//   - kernel.go   all that the engine sees and does, as an interface
//   - service.go  the service: starts, cancels and shows jobs
//   - job.go      one job: look, plan, do the first step, and again
//   - ahead.go    the seed that is read before its removal comes to it
//   - give.go     what is given back: memory, loop devices, the media
//   - release.go  the seed that is copied off its media
//   - meter.go    progress of a removal
//   - look.go     what is shown of sprouts, devices and the media
//   - warn.go     what the user is warned of, and told at once
//   - reset.go    the wish to start over at the next boot
//   - create.go   from a seed to a session, and its end
//   - journal.go  what was intended, on disk
//   - view.go     what is shown to clients, as plain values
//
// What to do is decided in daemon/plan, which is pure. The real kernel is
// daemon/machine; daemontest has one in memory that can fail or die at any call.
package daemon
