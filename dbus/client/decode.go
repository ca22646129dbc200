package client

import (
	"errors"
	"fmt"
	"reflect"

	godbus "github.com/godbus/dbus/v5"
)

// decode stores the entries of a D-Bus dictionary in the fields of the struct
// that into points to, by their `dbus` tags. Entries without a field are left
// out, since a newer service may send more; fields without an entry stay.
func decode(entries map[string]godbus.Variant, into any) error {
	value := reflect.ValueOf(into).Elem()
	for i := range value.NumField() {
		name := value.Type().Field(i).Tag.Get("dbus")
		variant, ok := entries[name]
		if name == "" || !ok {
			continue
		}
		if err := assign(value.Field(i), variant.Value()); err != nil {
			return fmt.Errorf("cannot read %s: %w", name, err)
		}
	}
	return nil
}

func assign(field reflect.Value, value any) error {
	if list, ok := value.([]map[string]godbus.Variant); ok && field.Kind() == reflect.Slice {
		slice := reflect.MakeSlice(field.Type(), len(list), len(list))
		for i, entries := range list {
			if err := decode(entries, slice.Index(i).Addr().Interface()); err != nil {
				return err
			}
		}
		field.Set(slice)
		return nil
	}
	if entries, ok := value.(map[string]godbus.Variant); ok {
		value = plainMap(entries)
	}
	from := reflect.ValueOf(value)
	switch {
	case !from.IsValid():
		return errors.New("no value")
	case from.Type().AssignableTo(field.Type()):
		field.Set(from)
	case field.CanUint() && from.CanUint(), field.Kind() == reflect.String && from.Kind() == reflect.String:
		field.Set(from.Convert(field.Type())) // a narrower integer, or an object path
	default:
		return fmt.Errorf("the type is %s, want %s", from.Type(), field.Type())
	}
	return nil
}

// encode makes the options dictionary of a struct: the fields that are not zero.
func encode(options any) map[string]godbus.Variant {
	entries := map[string]godbus.Variant{}
	value := reflect.ValueOf(options)
	for i := range value.NumField() {
		if field := value.Field(i); !field.IsZero() {
			entries[value.Type().Field(i).Tag.Get("dbus")] = godbus.MakeVariant(field.Interface())
		}
	}
	return entries
}

// plain takes the D-Bus types out of a value, so that it can become JSON.
func plain(value any) any {
	switch v := value.(type) {
	case godbus.Variant:
		return plain(v.Value())
	case godbus.ObjectPath:
		return string(v)
	case map[string]godbus.Variant:
		return plainMap(v)
	case []map[string]godbus.Variant:
		list := make([]any, len(v))
		for i, entries := range v {
			list[i] = plainMap(entries)
		}
		return list
	}
	return value
}

func plainMap(entries map[string]godbus.Variant) map[string]any {
	values := make(map[string]any, len(entries))
	for name, variant := range entries {
		values[name] = plain(variant)
	}
	return values
}
