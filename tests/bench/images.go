package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sproutd.org/sproutd/seed"
	"sproutd.org/sproutd/tests/seedtest"
)

// The images that tools start from, all of one tree.
const (
	built    = "built"     // a seed as seed build makes it
	plain    = "plain"     // a seed as cp -a into compress=zstd makes it: groups of 1 GiB
	plainDup = "plain-dup" // the same with two copies of metadata
	rootdir  = "rootdir"   // a seed as mkfs --rootdir makes it: groups of 8 MiB, not compressed
	single   = "single"    // as plain, but no seed, and with a read-only snapshot to send
	squash   = "squashfs"
)

// buildSize is how long the plain images are, with holes: long enough that the
// kernel makes groups of 1 GiB, and that a replace finds room.
const buildSize = 12 * seedtest.GiB

// image is one of them.
type image struct {
	Name    string  `json:"name"`
	Used    int64   `json:"used_bytes"`
	Extents int     `json:"data_extents,omitempty"`
	Nodes   int     `json:"tree_nodes,omitempty"`
	Groups  int     `json:"data_groups,omitempty"`
	Seconds float64 `json:"build_seconds"`
	Tree    tree    `json:"tree"`

	path string
}

// images makes the images of one tree, each when it is needed.
type images struct {
	dir   string // where they are, in memory
	keep  bool   // leave them there, and use those that are there
	kind  string
	bytes int64
	level int
	pack  int
	made  map[string]image
}

func (b *bench) imagesOf(kind string, gb float64) *images {
	return &images{
		dir: cmp.Or(b.options.images, b.dir), keep: b.options.images != "", kind: kind, bytes: int64(gb * 1e9), level: b.options.level,
		pack: b.options.pack, made: map[string]image{},
	}
}

// missing gives those of the images with these names that have to be made.
func (s *images) missing(names []string) (missing []string) {
	for _, name := range names {
		if _, ok := s.made[name]; !ok && !s.load(name) {
			missing = append(missing, name)
		}
	}
	return missing
}

// prepare makes the images with these names that are not there yet. The tree is
// there for as long as that takes.
func (s *images) prepare(ctx context.Context, names []string) (err error) {
	missing := s.missing(names)
	if len(missing) == 0 {
		return nil
	}
	top, err := os.MkdirTemp(s.dir, "tree-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(top)) }()
	t, err := makeTree(ctx, top, s.kind, s.bytes)
	if err != nil {
		return err
	}
	say("a tree of %d files, %.2f GB (%s)", t.Files, float64(t.Bytes)/1e9, s.kind)
	for _, name := range missing {
		i := image{Name: name, Tree: t, path: s.path(name)}
		begin := time.Now()
		if err := s.build(ctx, &i, top); err != nil {
			return fmt.Errorf("cannot make the image %s: %w", name, err)
		}
		i.Seconds = time.Since(begin).Seconds()
		if err := i.look(ctx); err != nil {
			return err
		}
		say("image %s: %.0f MB used, %d extents, %d nodes, %d groups; built in %.0f s",
			name, float64(i.Used)/1e6, i.Extents, i.Nodes, i.Groups, i.Seconds)
		s.made[name] = i
		raw, err := json.Marshal(i)
		if err != nil {
			return err
		}
		if err := os.WriteFile(i.path+".json", raw, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (s *images) path(name string) string {
	if name == built && s.pack != 0 {
		name += fmt.Sprintf("-%d", s.pack)
	}
	return filepath.Join(s.dir, fmt.Sprintf("%s-%g-%d-%s.img", s.kind, float64(s.bytes)/1e9, s.level, name))
}

// load takes an image that an earlier run has kept.
func (s *images) load(name string) bool {
	raw, err := os.ReadFile(s.path(name) + ".json")
	if err != nil {
		return false
	}
	i := image{path: s.path(name)}
	if json.Unmarshal(raw, &i) != nil {
		return false
	}
	if _, err := os.Stat(i.path); err != nil {
		return false
	}
	s.made[name] = i
	return true
}

// drop deletes an image, unless all are kept.
func (s *images) drop() error {
	var errs []error
	for _, i := range s.made {
		if !s.keep {
			errs = append(errs, os.Remove(i.path), os.Remove(i.path+".json"))
		}
	}
	clear(s.made)
	return errors.Join(errs...)
}

func (s *images) build(ctx context.Context, i *image, top string) error {
	compress := "zstd:" + strconv.Itoa(s.level)
	switch i.Name {
	case built:
		_, err := seed.Build(ctx, seed.Options{Source: top, Image: i.path, Label: "sproutd-bench", CompressLevel: s.level, PackTimes: s.pack, Overwrite: true})
		return err
	case squash:
		return command(ctx, "mksquashfs", top, i.path, "-comp", "zstd", "-Xcompression-level", strconv.Itoa(s.level),
			"-noappend", "-no-progress", "-quiet")
	case rootdir:
		if err := os.WriteFile(i.path, nil, 0o644); err != nil {
			return err
		}
		return cmp.Or(os.Truncate(i.path, buildSize),
			command(ctx, "mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "single", "--rootdir", top, i.path),
			command(ctx, "btrfstune", "-S", "1", "-f", i.path))
	}
	spec := seedtest.Spec{Dir: s.dir, ImageSize: buildSize, Label: "sproutd-bench", Compress: compress, Plain: i.Name == single}
	if i.Name == plainDup {
		spec.Metadata = "dup"
	}
	spec.Content = func(dir string) error {
		if err := command(ctx, "cp", "-a", top+"/.", dir); err != nil || i.Name != single {
			return err
		}
		return command(ctx, "btrfs", "subvolume", "snapshot", "-r", dir, filepath.Join(dir, snapshotName))
	}
	made, err := seedtest.Build(ctx, spec)
	if err != nil {
		return err
	}
	return os.Rename(made.Path, i.path)
}

// snapshotName is what the image single has for send.
const snapshotName = "snapshot"

// look notes how much of an image is used, and its geometry.
func (i *image) look(ctx context.Context) error {
	if i.Name == squash {
		info, err := os.Stat(i.path)
		if err != nil {
			return err
		}
		i.Used = info.Size()
		return nil
	}
	found, err := seed.Inspect(ctx, i.path)
	if err != nil {
		return err
	}
	g := found.Geometry
	i.Used, i.Extents, i.Nodes, i.Groups = int64(found.Super.Used), g.DataExtents, g.TreeNodes, g.DataGroups
	return nil
}

// command runs a program and makes what it complained about its error.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		text := strings.TrimSpace(complaint.String())
		return fmt.Errorf("cannot run %s: %w: %s", name, err, text[max(0, len(text)-500):])
	}
	return nil
}
