package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/names"
)

// width is that of the narrowest terminal on which nothing wraps.
const width = 100

// printer writes for people. It ignores errors of the output: who closed it is
// told by SIGPIPE.
type printer struct {
	out   io.Writer
	color bool
}

const (
	bold  = "1"
	dim   = "2"
	green = "32"
	cyan  = "36"
)

func (p printer) paint(code, text string) string {
	if !p.color || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (p printer) text(format string, args ...any) { fmt.Fprintf(p.out, format+"\n", args...) }

func (p printer) heading(number int, title string) {
	line := fmt.Sprintf("== %d. %s ", number, title)
	p.text("\n%s\n", p.paint(bold, line+strings.Repeat("=", max(0, width-len(line)))))
}

// command shows a command line that can be copied.
func (p printer) command(args ...string) {
	line := "$"
	for i, arg := range args {
		word := quoted(arg)
		if i < len(args)-1 && len(line)+1+len(word) > width-2 || len(line)+1+len(word) > width {
			p.text("%s", p.paint(cyan, line+" \\"))
			line = "   "
		}
		line += " " + word
	}
	p.text("%s", p.paint(cyan, line))
}

// quoted is arg as a shell needs it.
func quoted(arg string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-=:,+"
	if arg != "" && strings.Trim(arg, plain) == "" {
		return arg
	}
	return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
}

// answer shows what a command printed, folded at words.
func (p printer) answer(text string) {
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		for indent := ""; line != ""; indent = "  " {
			cut := line
			if limit := width - len(indent); len(line) > limit {
				if cut = line[:limit]; strings.LastIndexByte(cut, ' ') > 0 {
					cut = cut[:strings.LastIndexByte(cut, ' ')+1]
				}
			}
			p.text("%s%s", indent, strings.TrimRight(cut, " "))
			line = line[len(cut):]
		}
	}
}

func (p printer) table(rows ...[]string) {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, "   "+strings.Join(row, "\t"))
	}
	w.Flush() // a buffer takes everything
	for i, line := range strings.Split(strings.TrimRight(b.String(), "\n"), "\n") {
		if line = strings.TrimRight(line, " "); i == 0 {
			line = p.paint(dim, line)
		}
		p.text("%s", line)
	}
}

func size(bytes uint64) string { return humanize.IBytes(bytes) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// progress shows how far a job is.
func (p printer) progress(job client.Job) {
	const cells = 30
	full := int(job.Progress * cells)
	p.text("   %3d %%  %s%s  %s of %s, %s/s", int(job.Progress*100),
		p.paint(green, strings.Repeat("#", full)), strings.Repeat(".", cells-full),
		size(job.BytesDone), size(job.BytesTotal), size(job.Rate))
}

// busctl shows a call, makes it with busctl, and shows and gives the answer.
// The call is always made to its end, so that it is known what there is to undo.
func (p printer) busctl(args ...string) (string, error) {
	p.command(append([]string{"busctl"}, args...)...)
	text, err := ask(args...)
	if err == nil {
		p.answer(text)
	}
	return text, err
}

func ask(args ...string) (string, error) {
	cmd := exec.Command("busctl", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cannot call busctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return string(out), nil
}

// object gives the path in an answer such as `o "/org/..."`.
func object(answer string) string {
	_, path, _ := strings.Cut(answer, `"`)
	path, _, _ = strings.Cut(path, `"`)
	return path
}

// situation shows what the sprout is now, as it says itself.
func (p printer) situation(sprout string) error {
	if _, err := p.busctl("get-property", names.Bus, sprout, names.Sprout, "State", "SafeToUnplug"); err != nil {
		return err
	}
	args := []string{"--json=short", "get-property", names.Bus, sprout, names.Sprout, "Members", "MediaHolders"}
	p.command(append([]string{"busctl"}, args...)...)
	text, err := ask(args...)
	if err != nil {
		return err
	}
	var members struct {
		Data []map[string]struct {
			Data any `json:"data"`
		} `json:"data"`
	}
	var holders struct {
		Data []string `json:"data"`
	}
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	for _, value := range []any{&members, &holders} {
		if err := decoder.Decode(value); err != nil {
			return fmt.Errorf("cannot understand what busctl printed: %w", err)
		}
	}
	rows := [][]string{{"DEVID", "ROLE", "DEVICE", "SIZE", "USED", "WRITABLE"}}
	for _, m := range members.Data {
		cell := func(key string) string { return fmt.Sprint(m[key].Data) }
		bytes := func(key string) string {
			n, _ := m[key].Data.(json.Number)
			i, _ := n.Int64() // a size is an integer
			return size(uint64(i))
		}
		rows = append(rows, []string{cell("devid"), cell("role"), cell("path"), bytes("size"), bytes("used"), cell("writable")})
	}
	p.text("")
	p.table(rows...)
	p.text("")
	if len(holders.Data) == 0 {
		p.text("   %s", p.paint(green, "Nothing holds the stick any more."))
	}
	for _, holder := range holders.Data {
		p.text("   holds the stick: %s", holder)
	}
	return nil
}
