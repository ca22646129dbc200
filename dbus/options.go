package dbus

import (
	"slices"
	"strings"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// noInteraction is the option every method takes: do not ask the user.
const noInteraction = "auth.no_user_interaction"

// option is one key a method takes.
type option struct {
	name, signature string
	// planned marks what the contract has and this version has not.
	planned bool
}

// optionTable gives the options of each method that takes any.
func optionTable() map[string][]option {
	move := []option{
		{name: "wipe", signature: "b"},
		{name: "compress", signature: "s"},
		{name: "label", signature: "s"},
		{name: "passphrase", signature: "ay", planned: true},
		{name: "passphrase_fd", signature: "h", planned: true},
	}
	return map[string][]option{
		"CreateSprout": {
			{name: "zram_size", signature: "t"},
			{name: "zram_algorithm", signature: "s"},
			{name: "compress", signature: "s"},
			{name: "mount_options", signature: "s"},
			{name: "device", signature: "s"},
			{name: "wipe", signature: "b"},
		},
		"Persist": move,
		"Flatten": append(move[:len(move):len(move)],
			option{name: "bootloader", signature: "s"},
			option{name: "metadata_profile", signature: "s"},
			option{name: "verify", signature: "b", planned: true},
			option{name: "layout", signature: "s", planned: true},
			option{name: "release_first", signature: "b"}),
		"Release": {{name: "wipe", signature: "b"}},
		"AddDevice": {
			{name: "wipe", signature: "b"},
			{name: "size", signature: "t"},
			{name: "algorithm", signature: "s"},
		},
		"Reset": {{name: "undo", signature: "b"}},
	}
}

// methodOf gives the method whose options an operation takes.
func methodOf(operation plan.Operation) (method string, ok bool) {
	switch operation {
	case plan.Persist:
		return "Persist", true
	case plan.Flatten:
		return "Flatten", true
	case plan.AddDevice:
		return "AddDevice", true
	case plan.Release:
		return "Release", true
	case plan.RemoveDevice:
		return "RemoveDevice", true
	case plan.Resume:
		return "Resume", true
	}
	return "", false
}

// options are the options of one call, checked against the table. A key that
// is not there reads as the zero value.
type options map[string]any

func (o options) str(key string) string { s, _ := o[key].(string); return s }
func (o options) num(key string) uint64 { n, _ := o[key].(uint64); return n }
func (o options) is(key string) bool    { b, _ := o[key].(bool); return b }

// readOptions checks the options argument of a call of the given method.
func readOptions(table map[string][]option, method string, given variants) (options, error) {
	known := slices.Concat(table[method], []option{{name: noInteraction, signature: "b"}})
	out := options{}
	var planned string
	for key, value := range given {
		o, ok := find(known, key)
		if !ok {
			return nil, fault.New(fault.InvalidArgs, "%s has no option %q, only %s", method, key, list(known))
		}
		if got := value.Signature().String(); got != o.signature {
			return nil, fault.New(fault.InvalidArgs, "option %q must be of type %s, not %s", key, o.signature, got)
		}
		if o.planned {
			planned = key
		}
		out[key] = value.Value()
	}
	if planned != "" {
		return nil, fault.New(fault.NotSupported, "option %q is not supported in this version", planned)
	}
	switch loader := out.str("bootloader"); loader {
	case "", "auto", "none":
	case "systemd-boot", "grub":
		return nil, fault.New(fault.NotSupported, "boot loader %q is not supported in this version, only \"none\"", loader)
	default:
		return nil, fault.New(fault.InvalidArgs, "option \"bootloader\" must be auto, systemd-boot, grub or none, not %q", loader)
	}
	return out, nil
}

func find(known []option, name string) (option, bool) {
	for _, o := range known {
		if o.name == name {
			return o, true
		}
	}
	return option{}, false
}

func list(known []option) string {
	all := make([]string, len(known))
	for i, o := range known {
		all[i] = o.name
	}
	return strings.Join(all, ", ")
}

func createOptions(o options) daemon.CreateOptions {
	return daemon.CreateOptions{
		ZramSize:      o.num("zram_size"),
		ZramAlgorithm: o.str("zram_algorithm"),
		Compress:      o.str("compress"),
		MountOptions:  o.str("mount_options"),
		Device:        o.str("device"),
		Wipe:          o.is("wipe"),
	}
}

func requestArgs(operation plan.Operation, target string, o options) daemon.RequestArgs {
	return daemon.RequestArgs{Operation: operation, Target: target, Options: plan.Options{
		Wipe:            o.is("wipe"),
		Compress:        o.str("compress"),
		Label:           o.str("label"),
		MetadataProfile: o.str("metadata_profile"),
		Bootloader:      o.str("bootloader"),
		Size:            o.num("size"),
		Algorithm:       o.str("algorithm"),
		ReleaseFirst:    o.is("release_first"),
	}}
}
