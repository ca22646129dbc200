package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/tests/testenv"
)

const docs = "../../docs/"

func page(t *testing.T, name string) string {
	t.Helper()
	source, err := os.ReadFile(docs + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(source)
}

func wantInPage(t *testing.T, page, text string) {
	t.Helper()
	if !strings.Contains(page, text) {
		t.Errorf("the page lacks %q", text)
	}
}

func TestTheManPageHasEveryCommandAndFlag(t *testing.T) {
	source := page(t, "sproutctl.1")
	root := (&app{out: io.Discard, err: io.Discard}).command().Command
	root.InitDefaultHelpCmd()
	root.InitDefaultHelpFlag()
	root.InitDefaultVersionFlag()
	known := map[string]bool{"help": true, "version": true}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		flag := func(f *pflag.Flag) {
			known[f.Name] = true
			wantInPage(t, source, "Fl -"+f.Name)
		}
		cmd.Flags().VisitAll(flag)
		cmd.PersistentFlags().VisitAll(flag)
		_, path, _ := strings.Cut(cmd.CommandPath(), " ")
		names := append([]string{path}, cmd.Aliases...)
		for _, name := range names {
			if cmd.Runnable() && !cmd.HasSubCommands() && !regexp.MustCompile(`(?m)^\.It Ic `+name+`( |$)`).MatchString(source) {
				t.Errorf("the page lacks the command %s", name)
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
	for _, match := range regexp.MustCompile(`Fl -([a-z][a-z-]*)`).FindAllStringSubmatch(source, -1) {
		if !known[match[1]] {
			t.Errorf("the page has --%s, which no command takes", match[1])
		}
	}
}

// ownCodes are the errors that arise in sproutctl itself.
func ownCodes() []string {
	return []string{
		client.Unavailable, usage, unconfirmed, missingTool, whichSprout, notMarked,
		badSource, imageExists, noRoom, changed, notBuilt,
	}
}

func TestTheManPageHasEveryExitCodeAndRemedy(t *testing.T) {
	source := page(t, "sproutctl.1")
	for code, meaning := range exitMeanings() {
		wantInPage(t, source, fmt.Sprintf(".It %d\n%s%s.\n", code, strings.ToUpper(meaning[:1]), meaning[1:]))
	}
	text := strings.Join(strings.Fields(strings.NewReplacer(`\(aq`, "'", `\-`, "-").Replace(source)), " ")
	codes := ownCodes()
	for _, code := range fault.Codes() {
		codes = append(codes, string(code))
	}
	for _, code := range codes {
		advice := adviceFor(code)
		wantInPage(t, text, fmt.Sprintf(".It Er %s Pq exit code %d %s", code, advice.exit, advice.remedy))
	}
}

// introspection is what a test needs of an introspection file.
type introspection struct {
	Interface struct {
		Methods []member `xml:"method"`
		Signals []member `xml:"signal"`
		Props   []struct {
			Name string `xml:"name,attr"`
			Type string `xml:"type,attr"`
		} `xml:"property"`
	} `xml:"interface"`
}

type member struct {
	Name string `xml:"name,attr"`
	Args []struct {
		Name      string `xml:"name,attr"`
		Type      string `xml:"type,attr"`
		Direction string `xml:"direction,attr"`
	} `xml:"arg"`
}

// head is the line of the man page for a method or signal.
func (m member) head() string {
	words := []string{".It Fn", m.Name}
	for _, arg := range m.Args {
		if arg.Direction == "out" {
			words = append(words, `No \(-> Fa`)
		}
		words = append(words, fmt.Sprintf("%q", arg.Type+" "+arg.Name))
	}
	return strings.Join(words, " ") + "\n"
}

func TestTheManPageOfTheInterfaceHasAllOfIt(t *testing.T) {
	source := page(t, "org.sproutd.Sprout1.5")
	files, err := filepath.Glob("../../dbus/interfaces/org.sproutd.Sprout1.*.xml")
	if err != nil || len(files) != 4 {
		t.Fatalf("found %v, %v", files, err)
	}
	// An option in a comment of the introspection: "wipe (b)".
	option := regexp.MustCompile(`([a-z_.]+) \((b|s|t|u|h|as|ay|a\{ss\}|aa\{sv\})[):]`)
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var in introspection
		if err := xml.Unmarshal(data, &in); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, m := range append(in.Interface.Methods, in.Interface.Signals...) {
			wantInPage(t, source, m.head())
		}
		for _, p := range in.Interface.Props {
			line := regexp.MustCompile(`(?m)^\.It Va (.* )?` + p.Name + `( , .*)?( .*)? No \(` + regexp.QuoteMeta(p.Type) + `\)$`)
			if !line.MatchString(source) {
				t.Errorf("the page lacks the property %s of type %s", p.Name, p.Type)
			}
		}
		for _, match := range option.FindAllStringSubmatch(string(data), -1) {
			key, signature := match[1], match[2]
			if !strings.Contains(source, ".Cm "+key+"\n("+signature) && !strings.Contains(source, ".Cm "+key+"\n"+signature) &&
				!strings.Contains(source, ".Cm "+key+"\n.Pq "+signature) {
				t.Errorf("the page lacks the key %s of type %s", key, signature)
			}
		}
	}
	for _, code := range fault.Codes() {
		name := string(code)
		if code == fault.NoSuchSprout { // on the bus
			name = "UnknownObject"
		}
		wantInPage(t, source, ".It Er "+name+"\n")
	}
	wantInPage(t, source, "busctl --timeout=infinity call")
}

func TestTheManPageOfTheDaemonHasItsFlags(t *testing.T) {
	program, err := os.ReadFile("../sproutd/main.go")
	if err != nil {
		t.Fatal(err)
	}
	source := page(t, "sproutd.8")
	flags := regexp.MustCompile(`flag\.[A-Z][A-Za-z]*\((?:&\w+, )?"([a-z-]+)"`).FindAllSubmatch(program, -1)
	if len(flags) == 0 {
		t.Error("found no flag")
	}
	for _, match := range flags {
		wantInPage(t, source, ".It Fl -"+string(match[1]))
	}
}

func TestManPagesAreFormattedWithoutAWarning(t *testing.T) {
	testenv.NeedTool(t, "man")
	for _, name := range []string{"sproutctl.1", "org.sproutd.Sprout1.5", "sprout.7", "sproutd.8"} {
		cmd := exec.Command("man", "--warnings", "-l", docs+name)
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=80")
		var complaints strings.Builder
		cmd.Stderr = &complaints
		if err := cmd.Run(); err != nil || complaints.String() != "" {
			t.Errorf("%s: %v: %s", name, err, &complaints)
		}
	}
}
