package dbus

import (
	"context"
	"slices"
	"strings"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// standardFunctions answer the interfaces that every service has.
func standardFunctions() map[string]function {
	return map[string]function{
		names.Introspectable + ".Introspect":       introspect,
		names.Properties + ".Get":                  getProperty,
		names.Properties + ".GetAll":               getProperties,
		names.Properties + ".Set":                  setProperty,
		names.ObjectManager + ".GetManagedObjects": managedObjects,
	}
}

const introspectionHead = `<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node>
`

func introspect(_ context.Context, c *session, call *call) ([]any, error) {
	var b strings.Builder
	b.WriteString(introspectionHead)
	for _, name := range interfacesOf(call.object) {
		b.WriteString(c.server.specs[name].text)
	}
	for _, child := range call.tree.children[call.path] {
		b.WriteString("  <node name=\"" + child + "\"/>\n")
	}
	b.WriteString("</node>\n")
	return []any{b.String()}, nil
}

// propertiesOf gives the properties of one of the object's interfaces. The
// standard ones have none. An empty name stands for any.
func propertiesOf(call *call, iface string) (variants, error) {
	if iface == "" || iface == call.object.iface {
		return call.object.props, nil
	}
	if slices.Contains(interfacesOf(call.object), iface) {
		return variants{}, nil
	}
	return nil, busError(names.ErrorUnknownInterface, "%s has no interface %s", call.path, iface)
}

func getProperty(_ context.Context, _ *session, call *call) ([]any, error) {
	iface, name := argument[string](call, 0), argument[string](call, 1)
	props, err := propertiesOf(call, iface)
	if err != nil {
		return nil, err
	}
	value, ok := props[name]
	if !ok {
		return nil, busError(names.ErrorUnknownProperty, "%s has no property %s", call.path, name)
	}
	return []any{value}, nil
}

func getProperties(_ context.Context, _ *session, call *call) ([]any, error) {
	props, err := propertiesOf(call, argument[string](call, 0))
	if err != nil {
		return nil, err
	}
	return []any{props}, nil
}

// setProperty refuses: what can be changed is changed by methods, which are
// authorised.
func setProperty(_ context.Context, _ *session, call *call) ([]any, error) {
	iface, name := argument[string](call, 0), argument[string](call, 1)
	props, err := propertiesOf(call, iface)
	if err != nil {
		return nil, err
	}
	if _, ok := props[name]; !ok {
		return nil, busError(names.ErrorUnknownProperty, "%s has no property %s", call.path, name)
	}
	return nil, busError(names.ErrorPropertyReadOnly, "property %s cannot be set", name)
}

func managedObjects(_ context.Context, _ *session, call *call) ([]any, error) {
	out := make(map[godbus.ObjectPath]map[string]variants, len(call.tree.managed))
	for _, o := range call.tree.managed {
		out[o.path] = o.interfaces()
	}
	return []any{out}, nil
}

// interfaces gives the object's interfaces with their properties, as
// ObjectManager has them. Those that every object has are left out.
func (o *object) interfaces() map[string]variants {
	return map[string]variants{o.iface: o.props}
}
