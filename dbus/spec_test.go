package dbus

import (
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/dbus/names"
)

func specsOf(t *testing.T) map[string]spec {
	t.Helper()
	specs, err := loadSpecs()
	if err != nil {
		t.Fatal(err)
	}
	return specs
}

func TestEveryDescribedMethodIsThereAndNoOther(t *testing.T) {
	specs := specsOf(t)
	functions := standardFunctions()
	maps.Copy(functions, ownFunctions())
	for _, s := range specs {
		for method := range s.methods {
			name := s.name + "." + method
			if functions[name] == nil && s.name != names.Peer { // godbus answers Peer
				t.Errorf("%s is described and not there", name)
			}
			delete(functions, name)
		}
	}
	for name := range functions {
		t.Errorf("%s is there and not described", name)
	}
}

func TestEveryPropertyHasTheTypeThatIsDescribed(t *testing.T) {
	specs := specsOf(t)
	objects := []*object{
		{iface: names.Manager, props: newTree(&daemon.View{}, "").objects[names.Root].props},
		{iface: names.Sprout, props: sproutProperties(&daemon.SproutView{Intent: &daemon.Intent{}})},
		{iface: names.Job, props: jobProperties(&daemon.JobView{})},
		{iface: names.Device, props: deviceProperties(&daemon.DeviceView{})},
	}
	for _, o := range objects {
		described := specs[o.iface].properties
		for name, p := range described {
			value, ok := o.props[name]
			if !ok {
				t.Errorf("%s.%s is described and not there", o.iface, name)
				continue
			}
			if got := value.Signature().String(); got != p.signature {
				t.Errorf("%s.%s has type %s, described is %s", o.iface, name, got, p.signature)
			}
			if !slices.Contains([]string{"true", "const"}, p.emits) {
				t.Errorf("%s.%s does not say whether its changes are announced", o.iface, name)
			}
		}
		for name := range o.props {
			if _, ok := described[name]; !ok {
				t.Errorf("%s.%s is there and not described", o.iface, name)
			}
		}
	}
}

func TestEveryMethodOfOursSaysWhichActionsItNeeds(t *testing.T) {
	policy, err := os.ReadFile("../data/org.sproutd.sprout1.policy")
	if err != nil {
		t.Fatal(err)
	}
	open := []string{"InspectSeed", "ListDevices", "ListJobs", "Plan", "Wait"}
	for _, s := range specsOf(t) {
		if !strings.HasPrefix(s.name, names.Bus) {
			continue
		}
		text, err := interfaceFiles.ReadFile("interfaces/" + s.name + ".xml")
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(string(text), names.PolkitAnnotation); got != len(s.methods) {
			t.Errorf("%s has %d methods and %d annotations", s.name, len(s.methods), got)
		}
		for name, m := range s.methods {
			if (len(m.actions) == 0) != slices.Contains(open, name) {
				t.Errorf("%s needs the actions %v", name, m.actions)
			}
			for _, action := range m.actions {
				if !strings.Contains(string(policy), `<action id="`+action+`">`) {
					t.Errorf("%s needs %s, which the policy does not have", name, action)
				}
			}
		}
	}
}

func TestMemberNamesAreUniqueOnEachObject(t *testing.T) {
	specs := specsOf(t)
	for _, o := range []*object{{path: names.Root, iface: names.Manager}, {iface: names.Sprout}, {iface: names.Job}, {iface: names.Device}} {
		owner := map[string]string{}
		for _, iface := range interfacesOf(o) {
			for method := range specs[iface].methods {
				if owner[method] != "" {
					t.Errorf("%s is a method of %s and of %s", method, owner[method], iface)
				}
				owner[method] = iface
			}
		}
	}
}

// TestTheDocumentationOfOptionsIsTheTable reads the lines "@options:" of the
// interfaces.
func TestTheDocumentationOfOptionsIsTheTable(t *testing.T) {
	table := optionTable()
	doc := regexp.MustCompile(`(?s)<!--\s+(\w+):.*?@options: ([^\n]*)\n`)
	key := regexp.MustCompile(`(\w+) \((\w+)\)`)
	found := 0
	for _, iface := range []string{names.Manager, names.Sprout, names.Job} {
		text, err := interfaceFiles.ReadFile("interfaces/" + iface + ".xml")
		if err != nil {
			t.Fatal(err)
		}
		for _, comment := range regexp.MustCompile(`(?s)<!--.*?-->`).FindAllString(string(text), -1) {
			m := doc.FindStringSubmatch(comment)
			if m == nil || m[2] == "As for the operation" {
				continue
			}
			found++
			var documented, known []string
			for _, k := range key.FindAllStringSubmatch(m[2], -1) {
				documented = append(documented, k[1]+" "+k[2])
			}
			for _, o := range table[m[1]] {
				known = append(known, o.name+" "+o.signature)
			}
			if !reflect.DeepEqual(documented, known) {
				t.Errorf("%s documents the options %v and takes %v", m[1], documented, known)
			}
			// What is planned must be called so.
			for _, o := range table[m[1]] {
				if o.planned && !regexp.MustCompile(`(?s)`+o.name+`.*`+o.name).MatchString(comment) {
					t.Errorf("%s does not say that %s is not supported", m[1], o.name)
				}
			}
		}
	}
	if found != 11 {
		t.Errorf("%d methods document options, want 11", found)
	}
}

func TestAllRepliesHaveTheTypeThatIsDescribed(t *testing.T) {
	// The shapes of the replies are compared in TestMethodsReachTheEngine…;
	// here the Go types behind empty replies are.
	for signature, v := range map[string]any{"a(osta{sv})": []listedDevice{}, "a(osss)": []listedJob{}} {
		if got := godbus.SignatureOf(v).String(); got != signature {
			t.Errorf("%T is %s, want %s", v, got, signature)
		}
	}
}
