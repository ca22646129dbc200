package dbus

import (
	"embed"
	"encoding/xml"
	"fmt"
	"regexp"
	"strings"

	"sproutd.org/sproutd/dbus/names"
)

//go:embed interfaces/*.xml
var interfaceFiles embed.FS

// spec is one interface as its XML file describes it. The files are what the
// documentation is made from, what clients are shown, and what arguments,
// properties, signals and authorisation are checked against.
type spec struct {
	name       string
	text       string // the interface element without its comments
	methods    map[string]methodSpec
	properties map[string]propertySpec
}

type methodSpec struct {
	in, out string   // signatures
	actions []string // polkit actions it may ask for
}

type propertySpec struct {
	signature string
	emits     string // value of EmitsChangedSignal
}

type xmlNode struct {
	Interfaces []struct {
		Name    string `xml:"name,attr"`
		Methods []struct {
			Name        string          `xml:"name,attr"`
			Args        []xmlArg        `xml:"arg"`
			Annotations []xmlAnnotation `xml:"annotation"`
		} `xml:"method"`
		Properties []struct {
			Name        string          `xml:"name,attr"`
			Type        string          `xml:"type,attr"`
			Annotations []xmlAnnotation `xml:"annotation"`
		} `xml:"property"`
	} `xml:"interface"`
}

type xmlArg struct {
	Type      string `xml:"type,attr"`
	Direction string `xml:"direction,attr"`
}

type xmlAnnotation struct {
	Name  string `xml:"name,attr"`
	Value string `xml:"value,attr"`
}

func annotation(all []xmlAnnotation, name string) string {
	for _, a := range all {
		if a.Name == name {
			return a.Value
		}
	}
	return ""
}

// loadSpecs reads the embedded interfaces, by name.
func loadSpecs() (map[string]spec, error) {
	files, err := interfaceFiles.ReadDir("interfaces")
	if err != nil {
		return nil, fmt.Errorf("cannot list the interfaces: %w", err)
	}
	comments := regexp.MustCompile(`(?s)[ \t]*<!--.*?-->\n`)
	specs := map[string]spec{}
	for _, file := range files {
		text, err := interfaceFiles.ReadFile("interfaces/" + file.Name())
		if err != nil {
			return nil, fmt.Errorf("cannot read interface %s: %w", file.Name(), err)
		}
		var node xmlNode
		if err := xml.Unmarshal(text, &node); err != nil {
			return nil, fmt.Errorf("cannot parse interface %s: %w", file.Name(), err)
		}
		if len(node.Interfaces) != 1 || node.Interfaces[0].Name+".xml" != file.Name() {
			return nil, fmt.Errorf("file %s must describe the one interface it is named after", file.Name())
		}
		in := node.Interfaces[0]
		plain := comments.ReplaceAllString(string(text), "")
		from, to := strings.Index(plain, "  <interface"), strings.Index(plain, "</node>")
		s := spec{
			name: in.Name, text: plain[from:to],
			methods: map[string]methodSpec{}, properties: map[string]propertySpec{},
		}
		for _, m := range in.Methods {
			var ms methodSpec
			for _, arg := range m.Args {
				if arg.Direction == "out" {
					ms.out += arg.Type
				} else {
					ms.in += arg.Type
				}
			}
			if value := annotation(m.Annotations, names.PolkitAnnotation); value != "none" {
				ms.actions = strings.Fields(value)
			}
			s.methods[m.Name] = ms
		}
		for _, p := range in.Properties {
			s.properties[p.Name] = propertySpec{
				signature: p.Type,
				emits:     annotation(p.Annotations, "org.freedesktop.DBus.Property.EmitsChangedSignal"),
			}
		}
		specs[in.Name] = s
	}
	return specs, nil
}
