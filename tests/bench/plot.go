package main

import (
	"bytes"
	"cmp"
	"fmt"
	"html"
	"io"
	"math"
	"slices"
)

// Colours that can be told apart in print and by those who see few, on white.
const (
	ink, faint       = "#1b1b1b", "#d0d0d0"
	wallColor        = "#1f6f8b"
	processorsColor  = "#e0a030"
	plotWidth, label = 860, 270
)

// draw makes an SVG picture of the scoreboard: for each source and tree the
// bars of all tools, and where there are trees of several sizes how time and
// processor time grow.
func draw(r report) []byte {
	var body bytes.Buffer
	y := 30
	text(&body, 10, y, "bold", "%s", fmt.Sprintf("Linux %s, %d processors", r.Kernel, r.Processors))
	y += 24
	for _, group := range groups(r.Board) {
		y = bars(&body, y, group)
	}
	for _, lines := range bySize(r.Board) {
		y = growth(&body, y, lines)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		plotWidth, y, plotWidth, y)
	fmt.Fprintf(&out, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotWidth, y)
	_, _ = body.WriteTo(&out) // a buffer takes everything
	out.WriteString("</svg>\n")
	return out.Bytes()
}

// groups are the rows that are compared with each other, without the empty ones.
func groups(rows []row) (list [][]row) {
	for _, r := range rows {
		if len(r.Runs) == 0 {
			continue
		}
		if n := len(list); n == 0 || list[n-1][0].Source != r.Source || list[n-1][0].Tree != r.Tree {
			list = append(list, nil)
		}
		list[len(list)-1] = append(list[len(list)-1], r)
	}
	return list
}

func text(out io.Writer, x, y int, style, format string, args ...any) {
	attributes := map[string]string{"bold": ` font-weight="bold"`, "end": ` text-anchor="end"`, "middle": ` text-anchor="middle"`}[style]
	fmt.Fprintf(out, `<text x="%d" y="%d" fill="%s"%s>%s</text>`+"\n", x, y, ink, attributes, html.EscapeString(fmt.Sprintf(format, args...)))
}

func box(out io.Writer, x, y, width, height int, color string) {
	fmt.Fprintf(out, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x, y, max(width, 1), height, color)
}

func line(out io.Writer, x1, y1, x2, y2 int, color string) {
	fmt.Fprintf(out, `<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s"/>`+"\n", x1, y1, x2, y2, color)
}

func title(r row) string {
	return fmt.Sprintf("%s, %s files, %.1f GB", sourceWords(r.Source), r.Tree.Kind, float64(r.Tree.Bytes)/1e9)
}

// bars draws time and processor time of each tool, and gives the place below.
func bars(out io.Writer, y int, rows []row) int {
	text(out, 10, y, "bold", "Source: %s", title(rows[0]))
	box(out, label+190, y-10, 12, 10, wallColor)
	text(out, label+206, y, "", "time; the stick is free at the mark")
	box(out, label+440, y-10, 12, 10, processorsColor)
	text(out, label+456, y, "", "processors")
	top := 0.0
	for _, r := range rows {
		top = max(top, r.Median.Wall, r.Median.CPU)
	}
	scale := float64(plotWidth-label-70) / top
	y += 10
	first := y
	for _, r := range rows {
		y += 26
		m := r.Median
		text(out, label-8, y-8, "end", "%s", r.Label)
		box(out, label, y-18, int(m.Wall*scale), 8, wallColor)
		box(out, label, y-9, int(m.CPU*scale), 6, processorsColor)
		at := label + int(m.Unplug*scale)
		line(out, at, y-20, at, y-9, ink)
		text(out, label+int(max(m.Wall, m.CPU)*scale)+6, y-8, "", "%.1f s", m.Wall)
	}
	for i, at := range ticks(top) {
		x := label + int(at*scale)
		line(out, x, first+4, x, y, faint)
		if i > 0 {
			text(out, x, y+14, "middle", "%g s", at)
		}
	}
	return y + 44
}

// ticks are round numbers up to top.
func ticks(top float64) (list []float64) {
	step := math.Pow(10, math.Floor(math.Log10(max(top, 1e-6)/2)))
	for top/step > 8 {
		step *= 2
	}
	for at := 0.0; at <= top; at += step {
		list = append(list, math.Round(at/step)*step)
	}
	return list
}

// bySize collects the rows of tools that ran with several sizes, for each source
// and kind.
func bySize(rows []row) (list [][]row) {
	at := map[[2]string]int{}
	for _, r := range rows {
		several := slices.ContainsFunc(rows, func(o row) bool {
			return o.Tool == r.Tool && o.Source == r.Source && o.Tree.Kind == r.Tree.Kind && o.Tree != r.Tree && len(o.Runs) > 0
		})
		if !several || len(r.Runs) == 0 {
			continue
		}
		key := [2]string{r.Source, r.Tree.Kind}
		if _, ok := at[key]; !ok {
			at[key] = len(list)
			list = append(list, nil)
		}
		list[at[key]] = append(list[at[key]], r)
	}
	return list
}

// growth draws a line for each tool, time on the left and processor time on the
// right.
func growth(out io.Writer, y int, rows []row) int {
	text(out, 10, y, "bold", "By size: %s, %s files", sourceWords(rows[0].Source), rows[0].Tree.Kind)
	slices.SortStableFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.Label, b.Label), cmp.Compare(a.Tree.Bytes, b.Tree.Bytes))
	})
	const height, width = 220, 250
	var topX, topY float64
	for _, r := range rows {
		topX, topY = max(topX, float64(r.Tree.Bytes)/1e9), max(topY, r.Median.Wall, r.Median.CPU)
	}
	for i, c := range []struct {
		name  string
		value func(outcome) float64
	}{{"time", func(o outcome) float64 { return o.Wall }}, {"processors", func(o outcome) float64 { return o.CPU }}} {
		left, bottom := 40+i*(width+50), y+30+height
		place := func(gb, seconds float64) (int, int) {
			return left + int(gb/topX*width), bottom - int(seconds/topY*height)
		}
		for _, at := range ticks(topY) {
			_, level := place(0, at)
			line(out, left, level, left+width, level, faint)
			text(out, left-4, level+4, "end", "%g", at)
		}
		text(out, left, y+22, "", "%s, s", c.name)
		tools := 0
		for j, r := range rows {
			x, level := place(float64(r.Tree.Bytes)/1e9, c.value(r.Median))
			fresh := j == 0 || rows[j-1].Tool != r.Tool
			if fresh {
				tools++
			}
			color := fmt.Sprintf("hsl(%d,65%%,38%%)", tools*137%360) // far from the last one
			fmt.Fprintf(out, `<circle cx="%d" cy="%d" r="3" fill="%s"/>`+"\n", x, level, color)
			if !fresh {
				fromX, fromY := place(float64(rows[j-1].Tree.Bytes)/1e9, c.value(rows[j-1].Median))
				line(out, fromX, fromY, x, level, color)
			} else if i == 1 {
				at := y + 20 + 16*tools
				box(out, left+width+20, at-9, 10, 10, color)
				text(out, left+width+36, at, "", "%s", r.Label)
			}
			text(out, x, bottom+16, "middle", "%.1f GB", float64(r.Tree.Bytes)/1e9)
		}
	}
	return y + height + 90
}
