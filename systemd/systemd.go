// Package systemd is how the daemon speaks to the init system and its kin:
// readiness and status ([Notifier]), liveness ([Watchdog]), the lock against
// shutdown and sleep ([Inhibitor]) and the journal ([NewLogger]).
//
// Everything here is optional at run time. Without systemd the notifier and the
// watchdog do nothing, the inhibitor says that there is no logind, and the log
// goes to standard error.
package systemd
