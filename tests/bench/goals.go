package main

import (
	"fmt"
	"slices"
)

// goals are what the project wants to reach, as far as it was measured. All are
// ratios of medians of one run.
func goals(rows []row, made []image) (list []figure) {
	find := func(tool, source string, like tree) *row {
		for i, r := range rows {
			if r.Tool == tool && r.Source == source && r.Tree == like && len(r.Runs) > 0 {
				return &rows[i]
			}
		}
		return nil
	}
	wall := func(r *row) float64 { return r.Median.Wall }
	unplug := func(r *row) float64 { return r.Median.Unplug }
	processors := func(r *row) float64 { return r.Median.CPU }
	for i, r := range rows {
		if find(r.Tool, r.Source, r.Tree) != &rows[i] {
			continue // not run, or run again to be compared with something else
		}
		note := fmt.Sprintf("%s, %s, %.1f GB", r.Source, r.Tree.Kind, float64(r.Tree.Bytes)/1e9)
		against := func(what, other string, value func(*row) float64, goal float64) {
			if o := find(other, r.Source, r.Tree); o != nil {
				list = append(list, atMost(figure{Name: what, Value: value(&r) / value(o), Unit: "times", Note: note}, goal))
			}
		}
		// A machine that is faster in one minute than in the next moves the ratio of the
		// medians by more than the goal allows. Two runs of one round are next to each other.
		pairs := func(other string) {
			if o := find(other, r.Source, r.Tree); o != nil && len(o.Runs) == len(r.Runs) {
				var ratios []float64
				for i := range r.Runs {
					ratios = append(ratios, r.Runs[i].Wall/o.Runs[i].Wall)
				}
				last := &list[len(list)-1]
				last.Note += fmt.Sprintf("; pair by pair %.2f (%.2f to %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios))
			}
		}
		limit := func(what string, value, goal float64) {
			list = append(list, atMost(figure{Name: what, Value: value, Unit: "times the limit", Note: note}, goal))
		}
		memory := r.Source == "memory"
		switch r.Tool {
		case "flatten-release", "release-ram", "release-dir":
			if memory {
				against(r.Label+": unplug, against unsquashfs to ext4", "unsquashfs-ext4", unplug, 0.333)
				if r.Tool != "flatten-release" { // its processor time goes on after that
					against(r.Label+": processors, against unsquashfs to ext4", "unsquashfs-ext4", processors, 0.2)
				}
			} else {
				limit(r.Label+": unplug", r.UnplugOfLimit, 1.08)
			}
		case "flatten":
			switch {
			case memory:
				against("flatten: end, against unsquashfs to ext4", "unsquashfs-ext4", wall, 0.8)
				against("flatten: processors, against unsquashfs to ext4", "unsquashfs-ext4", processors, 0.6)
				against("flatten: end, against rsync to ext4", "rsync-ext4", wall, 0.27)
				against("flatten: processors, against rsync to ext4", "rsync-ext4", processors, 0.27)
				against("flatten: end, against unsquashfs to Btrfs", "unsquashfs-btrfs", wall, 0.4)
			case r.Source == "150":
				limit("flatten: end", r.OfLimit, 1.10)
			case r.Source == "40":
				limit("flatten: end", r.OfLimit, 1.05)
			}
			against("flatten: end, against the bare ioctls", "bare", wall, 1.03)
			pairs("bare")
			list = append(list, atMost(figure{
				Name: "flatten: polling for progress", Value: 100 * r.Median.Polling / r.Median.CPU, Unit: "% of the processors", Note: note,
			}, 1), figure{
				Name: "flatten: the daemon outside of the kernel", Value: 100 * r.Median.User / r.Median.CPU, Unit: "% of the processors",
				Note: note + "; with read-ahead, and all that is done before and after",
			})
		case "flatten-plain":
			against("flatten, plain seed: end, against the bare ioctls", "bare-plain", wall, 1.03)
			pairs("bare-plain")
		}
		// In memory nothing tells a copy in memory from the source.
		counts := r.Median.Read >= 0 && (r.Tool != "flatten-release" || r.Source != "memory")
		if counts && (r.Tool == "flatten" || r.Tool == "flatten-release" || r.Tool == "release-ram" || r.Tool == "release-dir") {
			list = append(list, atMost(figure{
				Name: r.Label + ": read from the source", Value: float64(r.Median.Read) / float64(r.Used), Unit: "times what is used", Note: note,
			}, 1.03))
		}
	}
	return append(append(list, costPerByte(rows)...), sizes(made)...)
}

// costPerByte compares the largest tree with the smallest of its kind.
func costPerByte(rows []row) (list []figure) {
	for _, large := range rows {
		if large.Tool != "flatten" || len(large.Runs) == 0 {
			continue
		}
		for _, small := range rows {
			if small.Tool != large.Tool || small.Source != large.Source || small.Tree.Kind != large.Tree.Kind || len(small.Runs) == 0 ||
				small.Tree.Bytes*10 > large.Tree.Bytes {
				continue
			}
			ratio := large.Median.Wall / float64(large.Tree.Bytes) / (small.Median.Wall / float64(small.Tree.Bytes))
			list = append(list, atMost(figure{
				Name: "flatten: time for a GB", Value: ratio, Unit: "times", Note: fmt.Sprintf("%s, %s, %.1f GB against %.1f GB", large.Source,
					large.Tree.Kind, float64(large.Tree.Bytes)/1e9, float64(small.Tree.Bytes)/1e9),
			}, 1.1))
		}
	}
	return list
}

// sizes compares the seeds with squashfs of the same tree at the same level.
func sizes(made []image) (list []figure) {
	for _, s := range made {
		for _, i := range made {
			if s.Name != squash || s.Tree != i.Tree || i.Name != built && i.Name != plain {
				continue
			}
			f := figure{
				Name: i.Name + " seed: size, against squashfs", Value: float64(i.Used) / float64(s.Used), Unit: "times",
				Note: fmt.Sprintf("%s, %.1f GB; %.0f and %.0f MB", i.Tree.Kind, float64(i.Tree.Bytes)/1e9, float64(i.Used)/1e6, float64(s.Used)/1e6),
			}
			if i.Name == built {
				f = atMost(f, 1.2)
			}
			list = append(list, f)
		}
	}
	return list
}
