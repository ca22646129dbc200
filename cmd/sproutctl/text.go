package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
)

// table writes rows in aligned columns. An empty cell becomes a dash, so that
// a table can be cut into columns by a script.
func table(out io.Writer, indent string, rows ...[]string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			if cells[i] = cell; cell == "" {
				cells[i] = "-"
			}
		}
		fmt.Fprintln(w, indent+strings.Join(cells, "\t"))
	}
	w.Flush()
}

// facts writes name and value pairs in two aligned columns.
func facts(out io.Writer, indent string, pairs ...string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s%s\t%s\n", indent, pairs[i], pairs[i+1])
		}
	}
	w.Flush()
}

func size(bytes uint64) string { return humanize.IBytes(bytes) }

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// percent never says 100 before the end.
func percent(progress float64) string { return fmt.Sprintf("%d %%", int(progress*100)) }

// timeLeft is a rough time in words, "" when it is not known or over.
func timeLeft(end uint64, now time.Time) string {
	if end == 0 {
		return ""
	}
	left := time.UnixMicro(int64(end)).Sub(now)
	switch {
	case left <= 0:
		return ""
	case left < time.Minute:
		return fmt.Sprintf("%d s left", int(left.Seconds())+1)
	case left < time.Hour:
		return fmt.Sprintf("%d min %d s left", int(left.Minutes()), int(left.Seconds())%60)
	}
	return fmt.Sprintf("%d h %d min left", int(left.Hours()), int(left.Minutes())%60)
}

func bareUnit() *regexp.Regexp { return regexp.MustCompile(`(?i)^(.*[0-9])\s*([kmgtpe])i?$`) }

// sizeFlag is a size in bytes on the command line. As everywhere with file
// systems, 4G and 4GiB are powers of 1024, and 4GB is a power of 1000.
type sizeFlag uint64

// String gives the size in bytes, "" for none.
func (s *sizeFlag) String() string {
	if *s == 0 {
		return ""
	}
	return fmt.Sprint(uint64(*s))
}

// Type names the flag's argument.
func (s *sizeFlag) Type() string { return "SIZE" }

// Set reads the argument.
func (s *sizeFlag) Set(text string) error {
	if match := bareUnit().FindStringSubmatch(strings.TrimSpace(text)); match != nil {
		text = match[1] + match[2] + "iB"
	}
	bytes, err := humanize.ParseBytes(text)
	if err != nil || bytes == 0 {
		return errors.New("a size is a number and a unit, such as 4G or 512MiB")
	}
	*s = sizeFlag(bytes)
	return nil
}
