package clienttest

import (
	"maps"
	"sync"
	"testing"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// Props are the properties of an interface, or the entries of a dictionary.
type Props = map[string]any

// Call is a method call that arrived.
type Call struct {
	Path, Interface, Member string
	Args                    []any
	// Interactive is true when the caller lets polkit ask for a password.
	Interactive bool
}

// Text gives the i-th argument if it is a string, else "".
func (c Call) Text(i int) string {
	if i >= len(c.Args) {
		return ""
	}
	text, _ := c.Args[i].(string)
	return text
}

// Method answers a call. An error of type *godbus.Error keeps its name.
type Method func(Call) ([]any, error)

// Service is a scripted service that owns the contract's bus name.
type Service struct {
	t       testing.TB
	conn    *godbus.Conn
	mu      sync.Mutex
	objects map[string]map[string]Props // path, interface
	methods map[string]Method           // "Interface.Member"
	calls   []Call
	reads   map[string]func()
	hooks   sync.WaitGroup
}

// Start takes the bus name on the bus at address. It is ended by [Service.Stop]
// or with the test.
func Start(t testing.TB, address string) *Service {
	t.Helper()
	s := &Service{t: t, objects: map[string]map[string]Props{}, methods: map[string]Method{}, reads: map[string]func(){}}
	conn, err := godbus.Connect(address, godbus.WithHandler(s))
	if err != nil {
		t.Fatal(err)
	}
	s.conn = conn
	t.Cleanup(s.Stop)
	s.Put(names.Root, names.Manager, Props{"Version": "1.2.3"})
	reply, err := conn.RequestName(names.Bus, godbus.NameFlagDoNotQueue)
	if err != nil || reply != godbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("cannot own the name: %v %v", reply, err)
	}
	return s
}

// Stop makes the service leave the bus, as a crash does.
func (s *Service) Stop() {
	s.hooks.Wait()
	s.conn.Close()
}

// OnRead has f run once, after the properties of the object at path were next
// read. What f changes is then seen by the reader as changes.
func (s *Service) OnRead(path string, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[path] = f
}

// Put makes an object, or replaces it.
func (s *Service) Put(path, iface string, props Props) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[path] = map[string]Props{iface: maps.Clone(props)}
}

// Change sets properties and announces them in one signal.
func (s *Service) Change(path, iface string, changes Props) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.objects[path][iface], changes)
	if err := s.conn.Emit(godbus.ObjectPath(path), names.Properties+".PropertiesChanged", iface, Variants(changes), []string{}); err != nil {
		s.t.Errorf("cannot announce a change: %v", err)
	}
}

// Handle scripts a method of one of the contract's interfaces.
func (s *Service) Handle(iface, member string, method Method) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.methods[iface+"."+member] = method
}

// Calls gives the calls of the contract's methods so far.
func (s *Service) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Call(nil), s.calls...)
}

// Error makes an error reply; code is appended to the contract's prefix.
func Error(code, message string) error {
	return godbus.NewError(names.ErrorPrefix+code, []any{message})
}

// Variants wraps the values of a dictionary, those of inner ones as well.
func Variants(props Props) map[string]godbus.Variant {
	out := make(map[string]godbus.Variant, len(props))
	for name, value := range props {
		switch v := value.(type) {
		case Props:
			value = Variants(v)
		case []Props:
			list := make([]map[string]godbus.Variant, len(v))
			for i, entry := range v {
				list[i] = Variants(entry)
			}
			value = list
		}
		out[name] = godbus.MakeVariant(value)
	}
	return out
}

// LookupObject is a part of godbus.Handler. Together with the next two it makes
// every call arrive at handle.
func (s *Service) LookupObject(godbus.ObjectPath) (godbus.ServerObject, bool) { return s, true }

// LookupInterface is a part of godbus.ServerObject.
func (s *Service) LookupInterface(string) (godbus.Interface, bool) { return s, true }

// LookupMethod is a part of godbus.Interface.
func (s *Service) LookupMethod(string) (godbus.Method, bool) { return method{s}, true }

type method struct{ s *Service }

func (m method) DecodeArguments(_ *godbus.Conn, _ string, msg *godbus.Message, args []any) ([]any, error) {
	header := func(field godbus.HeaderField) string {
		switch v := msg.Headers[field].Value().(type) {
		case string:
			return v
		case godbus.ObjectPath:
			return string(v)
		}
		return ""
	}
	return []any{Call{
		Path: header(godbus.FieldPath), Interface: header(godbus.FieldInterface), Member: header(godbus.FieldMember), Args: args,
		Interactive: msg.Flags&godbus.FlagAllowInteractiveAuthorization != 0,
	}}, nil
}

func (m method) Call(args ...any) ([]any, error) {
	call, _ := args[0].(Call) // DecodeArguments made it
	return m.s.handle(call)
}

func (m method) NumArguments() int     { return 1 }
func (m method) NumReturns() int       { return 1 }
func (m method) ArgumentValue(int) any { return Call{} }
func (m method) ReturnValue(int) any   { return nil }

func (s *Service) handle(call Call) ([]any, error) {
	s.mu.Lock()
	object, known := s.objects[call.Path]
	if !known {
		s.mu.Unlock()
		return nil, godbus.NewError(names.ErrorUnknownObject, []any{"there is no object " + call.Path})
	}
	switch call.Interface + "." + call.Member {
	case names.ObjectManager + ".GetManagedObjects":
		tree := map[godbus.ObjectPath]map[string]map[string]godbus.Variant{}
		for path, interfaces := range s.objects {
			if path == names.Root {
				continue
			}
			tree[godbus.ObjectPath(path)] = map[string]map[string]godbus.Variant{}
			for iface, props := range interfaces {
				tree[godbus.ObjectPath(path)][iface] = Variants(props)
			}
		}
		s.mu.Unlock()
		return []any{tree}, nil
	case names.Properties + ".GetAll":
		props := Variants(object[call.Text(0)])
		hook := s.reads[call.Path]
		delete(s.reads, call.Path)
		s.mu.Unlock()
		if hook != nil {
			s.hooks.Go(hook)
		}
		return []any{props}, nil
	case names.Properties + ".Get":
		value := Variants(object[call.Text(0)])[call.Text(1)]
		s.mu.Unlock()
		return []any{value}, nil
	}
	s.calls = append(s.calls, call)
	answer := s.methods[call.Interface+"."+call.Member]
	s.mu.Unlock()
	if answer == nil {
		return nil, godbus.NewError(names.ErrorUnknownMethod, []any{"there is no method " + call.Member})
	}
	return answer(call)
}
