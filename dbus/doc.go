// Package dbus shows the engine on D-Bus as design §4 has it: objects,
// properties, signals, methods, and polkit before everything that changes
// something.
//
// It does not use godbus' own export tables: those crash the process when an
// object comes or goes during an Introspect (godbus issue 340) or when a method
// panics. Instead each call is answered from an immutable tree of objects.
//
//   - server.go     the connection and its life
//   - transport.go  the connection to the bus, without file descriptors
//   - handler.go    from a message to the function that answers it
//   - standard.go   Introspectable, Properties, ObjectManager
//   - methods.go    the methods of design §4
//   - options.go    the tables of options
//   - tree.go       from a view to objects and properties
//   - signals.go    from two trees to signals
//   - polkit.go     authorisation
//   - callers.go    limits for callers, and their disappearance
//   - spec.go       the introspection XML, which is what dispatch goes by
package dbus
