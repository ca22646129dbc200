package seed

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"sproutd.org/sproutd/tests/seedtest"
	"sproutd.org/sproutd/tests/testenv"
)

// BenchmarkSeed builds a seed of the directory in SPROUTD_BENCH_TREE, or else of
// the standard content, in two ways: as this package does, and as one would by
// hand, with cp -a. What counts is not the time but the geometry.
func BenchmarkSeed(b *testing.B) {
	testenv.NeedRoot(b)
	testenv.NeedTool(b, "mkfs.btrfs", "btrfstune", "cp")
	source := os.Getenv("SPROUTD_BENCH_TREE")
	if source == "" {
		source = b.TempDir()
		if err := seedtest.Standard(source, seedtest.StandardOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	report := func(b *testing.B, image string) {
		found, err := Inspect(b.Context(), image)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(found.Super.Used)/1e6, "MB-used")
		b.ReportMetric(float64(found.Length)/1e6, "MB-long")
		b.ReportMetric(float64(found.Geometry.DataExtents), "extents")
		b.ReportMetric(float64(found.Geometry.TreeNodes), "nodes")
		b.ReportMetric(found.Geometry.FlattenTime(0).Seconds(), "s-flatten")
	}
	b.Run("packed", func(b *testing.B) {
		image := filepath.Join(b.TempDir(), "root.img")
		for b.Loop() {
			if _, err := Build(b.Context(), Options{Source: source, Image: image, Overwrite: true}); err != nil {
				b.Fatal(err)
			}
		}
		report(b, image)
	})
	b.Run("cp", func(b *testing.B) {
		var seed seedtest.Seed
		dir := b.TempDir()
		for b.Loop() {
			var err error
			seed, err = seedtest.Build(b.Context(), seedtest.Spec{
				Dir: dir, ImageSize: 12 * gib, Compress: "zstd:9",
				Content: func(to string) error { return exec.Command("cp", "-a", source+"/.", to).Run() },
			})
			if err != nil {
				b.Fatal(err)
			}
		}
		report(b, seed.Path)
	})
}
