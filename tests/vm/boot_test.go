package vm

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

// BenchmarkTimeToRoot boots, by turns, the stick and one with the same system as
// squashfs and overlayfs (SPROUTD_VM_BASELINE), both with dracut. It reports the
// medians of the seconds from the start of the kernel to a mounted root that can
// be written to, their ratio, and what the other initramfs is smaller by.
func BenchmarkTimeToRoot(b *testing.B) {
	needVM(b)
	dir := filepath.Join(artefacts, "baseline")
	must(b, os.MkdirAll(dir, 0o755))
	squashfs, err := openImage(os.Getenv("SPROUTD_VM_BASELINE"), dir)
	must(b, err)
	times := map[*image][]float64{}
	for b.Loop() {
		for _, system := range []*image{live, squashfs} {
			times[system] = append(times[system], timeToRoot(b, system))
		}
	}
	for _, list := range times {
		b.Logf("%.2f", list)
		slices.Sort(list)
	}
	sprout, other := times[live][len(times[live])/2], times[squashfs][len(times[squashfs])/2]
	b.ReportMetric(sprout, "s-sprout")
	b.ReportMetric(other, "s-squashfs")
	b.ReportMetric(sprout/other, "ratio")
	b.ReportMetric(float64(size(b, live.initrd)-size(b, squashfs.initrd))/mib, "MiB-initramfs-more")
	b.ReportMetric(0, "ns/op") // with firmware and all that is after the root, so nothing to look at
}

// timeToRoot boots a stick and gives the seconds that the initramfs had the root
// mounted after.
func timeToRoot(b *testing.B, system *image) float64 {
	b.Helper()
	m := newMachine(b)
	m.live = system
	m.stick()
	m.startWith()
	m.awaitAgent()
	said := m.run("journalctl", "--boot", "--output=json", "--lines=1", "UNIT=sysroot.mount", "JOB_TYPE=start", "JOB_RESULT=done")
	m.cut()
	var line struct {
		Monotonic string `json:"__MONOTONIC_TIMESTAMP"`
	}
	must(b, json.Unmarshal([]byte(said), &line))
	us, err := strconv.ParseFloat(line.Monotonic, 64)
	must(b, err)
	return us / 1e6
}

func size(b *testing.B, path string) int64 {
	b.Helper()
	st, err := os.Stat(path)
	must(b, err)
	return st.Size()
}
