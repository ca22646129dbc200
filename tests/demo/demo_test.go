package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sproutd.org/sproutd/tests/harness"
	"sproutd.org/sproutd/tests/testenv"
)

// programs is the directory of demo, sproutd and sproutctl; TestMain sets it.
var programs string

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 { // every test skips itself, with the reason
		os.Exit(m.Run())
	}
	var err error
	if programs, err = harness.Programs(context.Background()); err == nil {
		var out []byte
		if out, err = exec.Command("go", "build", "-o", programs+"/", ".").CombinedOutput(); err != nil {
			err = fmt.Errorf("cannot build the demo: %w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := testenv.Main(m)
	_ = os.RemoveAll(programs)
	os.Exit(code)
}

// needDemo asks for all that the demo runs.
func needDemo(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTool(t, "dbus-daemon", "busctl", "mkfs.btrfs", "btrfstune", "mke2fs", "losetup", "addpart", "delpart")
}

// performance is a demo that runs in a process group of its own.
type performance struct {
	t     *testing.T
	cmd   *exec.Cmd
	out   *bufio.Reader
	said  bytes.Buffer
	dir   string
	zrams map[string]string // name -> disk sequence number
}

// perform starts the demo. At the end of the test nothing of it may be left.
func perform(t *testing.T, args ...string) *performance {
	t.Helper()
	needDemo(t)
	testenv.NoLeftovers(t)
	dir, err := os.MkdirTemp("", "d") // short, for the sake of the bus's socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("the demo left in its directory: %v (%v)", left, err)
			return // it may be a mount
		}
		_ = os.Remove(dir)
	})
	p := &performance{t: t, dir: dir, zrams: map[string]string{}}
	p.cmd = exec.Command(filepath.Join(programs, "demo"), args...)
	p.cmd.Env = append(os.Environ(), "TMPDIR="+dir, "PATH="+programs+":"+os.Getenv("PATH"))
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil { // the test gave up before its end
			_ = p.cmd.Process.Signal(os.Interrupt)
			_ = p.end()
		}
		now, err := testenv.Leftovers()
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range now.Under(dir).List() {
			t.Errorf("left behind: %s", line)
		}
		for name, sequence := range p.zrams {
			if sequence == diskSequence(name) {
				t.Errorf("left behind: /dev/%s", name)
			}
		}
	})
	return p
}

var zramName = regexp.MustCompile(`/dev/(zram\d+)`)

// diskSequence tells a device from another one that has its name later. It is
// "" when there is none.
func diskSequence(name string) string {
	raw, _ := os.ReadFile("/sys/block/" + name + "/diskseq")
	return strings.TrimSpace(string(raw))
}

// await reads until a line contains what is awaited. Without anything it reads
// to the end.
func (p *performance) await(what string) {
	p.t.Helper()
	for {
		line, err := p.out.ReadString('\n')
		p.said.WriteString(line)
		if name := zramName.FindStringSubmatch(line); name != nil && p.zrams[name[1]] == "" {
			p.zrams[name[1]] = diskSequence(name[1])
		}
		switch {
		case what != "" && strings.Contains(line, what):
			return
		case errors.Is(err, io.EOF) && what == "":
			return
		case err != nil:
			p.t.Fatalf("the demo did not say %q but\n%s\n%v", what, &p.said, err)
		}
	}
}

// end reads the rest and gives the exit code.
func (p *performance) end() int {
	p.t.Helper()
	p.await("")
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return p.cmd.ProcessState.ExitCode()
}

func TestTheWholeStory(t *testing.T) {
	p := perform(t)
	if code := p.end(); code != 0 {
		t.Fatalf("the demo ended with %d:\n%s", code, &p.said)
	}
	said := p.said.String()
	for _, line := range []string{
		`(?m)^\$ busctl call org\.sproutd\.Sprout1 /org/sproutd/Sprout1 org\.sproutd\.Sprout1\.Manager CreateSprout`,
		`(?m)^s "volatile"$`,
		`(?m)^ +1 +seed +/dev/loop\d+ `,
		`(?m)^ +2 +zram +/dev/zram\d+ `,
		`Persist 'sa\{sv\}' /dev/loop\d+p2 0\n`,
		`(?m)^s "persistent"$`,
		`Flatten 'sa\{sv\}' /dev/loop\d+ 1 bootloader s none\n`,
		`(?m)^ +100 %  #{30}  `,
		`(?m)^s "installed"$`,
		`Nothing holds the stick any more\.`,
		`/dev/loop\d+ has no medium any more`,
		`all it fsynced is there`,
		`(?m)^All \d{3,} files are the same\.$`,
	} {
		at := regexp.MustCompile(line).FindStringIndex(said)
		if at == nil {
			t.Fatalf("the demo did not say %s, in this order, but\n%s", line, &p.said)
		}
		said = said[at[0]:]
	}
	for line := range strings.Lines(p.said.String()) {
		if len(strings.ReplaceAll(line, p.dir, "/tmp")) > width+1 {
			t.Errorf("this line is wider than %d columns: %s", width, line)
		}
		if strings.Contains(line, "\x1b") {
			t.Errorf("there is colour where there is no terminal: %q", line)
		}
	}
	sums := regexp.MustCompile(`(?m)(?:before|after) +\d+ +([0-9a-f]{64})$`).FindAllStringSubmatch(p.said.String(), -1)
	if len(sums) != 2 || sums[0][1] != sums[1][1] {
		t.Errorf("the checksums are %v", sums)
	}
}

func TestItTidiesUpWhenInterrupted(t *testing.T) {
	for _, c := range []struct {
		when, moment string
		signal       syscall.Signal
	}{
		{"while the seed is built", "== 1.", syscall.SIGINT},
		{"while the sprout is made", "CreateSprout", syscall.SIGHUP},
		{"in the middle of a move", "off the seed", syscall.SIGTERM},
		{"when the stick is gone", "has no medium any more", syscall.SIGQUIT},
	} {
		t.Run(c.when, func(t *testing.T) {
			p := perform(t, "--size", "96")
			p.await(c.moment)
			// As a terminal does it: to everybody in the group, and twice since
			// people are impatient.
			for range 2 {
				if err := syscall.Kill(-p.cmd.Process.Pid, c.signal); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			if code := p.end(); code != 128+int(c.signal) {
				t.Errorf("it ended with %d:\n%s", code, &p.said)
			}
			t.Logf("tidied up in %v", time.Since(begin).Round(time.Millisecond))
			if !strings.Contains(p.said.String(), "tidying up") {
				t.Errorf("it does not say what it does:\n%s", &p.said)
			}
		})
	}
}

func TestQuoted(t *testing.T) {
	for arg, want := range map[string]string{
		"Persist": "Persist", "sa{sv}": "'sa{sv}'", "": "''", "/a b": "'/a b'", "it's": `'it'\''s'`,
	} {
		if got := quoted(arg); got != want {
			t.Errorf("quoted(%q) = %s, want %s", arg, got, want)
		}
	}
}

// TestTheReadmeNamesTestsThatExist: a promise without a test is none.
func TestTheReadmeNamesTestsThatExist(t *testing.T) {
	root := filepath.Join("..", "..")
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var tests bytes.Buffer
	err = filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		tests.Write(source)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile("`(Test[A-Z]\\w+)`").FindAllSubmatch(readme, -1) {
		if !bytes.Contains(tests.Bytes(), fmt.Appendf(nil, "func %s(", name[1])) {
			t.Errorf("there is no test %s", name[1])
		}
	}
}
