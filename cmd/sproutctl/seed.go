package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/seed"
)

// seeds are the functions of package seed; a test has its own.
type seeds struct {
	build   func(context.Context, seed.Options) (seed.Report, error)
	inspect func(context.Context, string) (seed.Inspection, error)
}

func (a *app) seedCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "seed",
		Short: "Build seeds, look at them, and make a file system a seed",
		Args:  takes(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return fail(usage, "cannot do seed alone: say build, inspect or mark")
		},
	}
	cmd.AddCommand(a.buildCommand(), &cobra.Command{
		Use:   "inspect SEED",
		Short: "Show whether an image or device can be a seed here, and what a flatten costs",
		Long: `Show whether an image or block device is a seed and can be used on this kernel.
As root, its geometry and an estimate of what a flatten costs are shown too.`,
		Args: takes(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cannot(a.inspect(cmd.Context(), args[0]), "inspect %s", args[0])
		},
	}, &cobra.Command{
		Use:   "mark IMAGE",
		Short: "Make an unmounted Btrfs file system a seed",
		Long: `Set the seed flag of a Btrfs file system in an image file or on a block device,
with btrfstune(8). From then on it is mounted read-only. No service is needed.`,
		Args: takes(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.mark(cmd.Context(), args[0])
		},
	})
	return cmd
}

func (a *app) buildCommand() *cobra.Command {
	var options seed.Options
	checksums := []string{"crc32c", "xxhash", "sha256", "blake2"}
	cmd := &cobra.Command{
		Use:   "build DIR|TAR IMAGE",
		Short: "Build a seed image of a directory or a tar archive",
		Long: `Build a seed image that is small and moves fast: small files share extents,
equal files are stored once, and what compresses is compressed with zstd.
Owners, modes, times, attributes, links, devices and subvolumes are kept; what
is mounted in DIR is not. It needs root and btrfs-progs, but no service.

IMAGE has its name only when it is complete. Ctrl-C leaves nothing behind.`,
		Example: `  sproutctl seed build --label my-live /srv/root root.img
  sproutctl seed build root.tar.gz root.img`,
		Args: takes(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(checksums, options.Csum) {
				return fail(usage, "cannot build %s with checksums of the type %s: it is none of %s", args[1], options.Csum, strings.Join(checksums, ", "))
			}
			if options.CompressLevel < 1 || options.CompressLevel > 15 {
				return fail(usage, "cannot build %s with level %d of zstd: it is 1 to 15", args[1], options.CompressLevel)
			}
			options.Source, options.Image = args[0], args[1]
			return cannot(a.build(cmd.Context(), options), "build %s", args[1])
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) < 2 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&options.Label, "label", "", "`LABEL` of the file system")
	flags.IntVar(&options.CompressLevel, "compress-level", 9, "`LEVEL` of zstd, 1 to 15: more takes longer to build, not to read")
	flags.StringVar(&options.Csum, "csum", "crc32c", "checksum `TYPE`: crc32c, xxhash, sha256 or blake2")
	flags.BoolVar(&options.Overwrite, "overwrite", false, "replace IMAGE if it exists")
	must(cmd.RegisterFlagCompletionFunc("csum", cobra.FixedCompletions(checksums, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("label", cobra.NoFileCompletions))
	must(cmd.RegisterFlagCompletionFunc("compress-level", cobra.NoFileCompletions))
	return cmd
}

func (a *app) build(ctx context.Context, options seed.Options) error {
	a.tidies.Store(true)
	defer a.tidies.Store(false)
	view := a.view()
	progress := buildProgress{now: time.Now, options: options}
	var job client.Job
	options.Progress = func(p seed.Progress) {
		if a.json {
			a.printJSON(map[string]any{"phase": p.Phase, "bytes_done": p.Done, "bytes_total": p.Total})
			return
		}
		job = progress.job(p)
		view.update(job)
	}
	report, err := a.seeds.build(ctx, options)
	if err == nil {
		job.State, job.Step = client.Done, ""
	}
	view.close(job)
	if err != nil {
		return buildError(err)
	}
	if a.json {
		a.printJSON(builtJSON(options.Image, report))
		return nil
	}
	fmt.Fprintf(a.out, "%s is a seed.\n", options.Image)
	facts(a.out, "  ", append(builtFacts(report), geometryFacts(report.Geometry)...)...)
	return nil
}

// buildProgress shows a build in the way of a job.
type buildProgress struct {
	now     func() time.Time
	options seed.Options
	writing time.Time
}

func (b *buildProgress) job(p seed.Progress) client.Job {
	job := client.Job{State: "running", StepCount: 4}
	switch p.Phase {
	case seed.PhaseScan:
		job.StepNumber, job.Step = 1, "list what is in "+b.options.Source
	case seed.PhaseSample:
		job.StepNumber, job.Step = 2, "find what compresses and what is equal"
	case seed.PhaseWrite:
		job.StepNumber, job.Step = 3, "write "+b.options.Image
		job.BytesDone, job.BytesTotal = p.Done, p.Total
		if p.Total > 0 {
			job.Progress = float64(p.Done) / float64(p.Total)
		}
		now := b.now()
		if b.writing.IsZero() {
			b.writing = now
		}
		if spent := now.Sub(b.writing); spent > time.Second && p.Done > 0 {
			job.Rate = uint64(float64(p.Done) / spent.Seconds())
			left := time.Duration(float64(spent) * (1 - job.Progress) / job.Progress)
			job.ExpectedEndTime = uint64(now.Add(left).UnixMicro())
		}
	case seed.PhaseFinish:
		job.StepNumber, job.Step, job.Progress = 4, "write out the rest, shrink it and mark it as a seed", 1
	}
	return job
}

// buildError gives an error of package seed its place in the table of remedies.
func buildError(err error) error {
	var full *seed.NoSpaceError
	code := notBuilt
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, seed.ErrBadSource):
		code = badSource
	case errors.Is(err, seed.ErrExists):
		code = imageExists
	case errors.Is(err, seed.ErrNoTool):
		code = missingTool
	case errors.Is(err, seed.ErrChanged):
		code = changed
	case errors.As(err, &full):
		code = noRoom
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		code = "AccessDenied"
	}
	return fail(code, "%s", strings.TrimPrefix(err.Error(), "cannot build a seed: "))
}

func builtFacts(r seed.Report) []string {
	count := func(n int, format string, args ...any) string {
		if n == 0 {
			return ""
		}
		return strconv.Itoa(n) + fmt.Sprintf(format, args...)
	}
	return []string{
		"fsid", r.FSID.String(),
		"content", size(r.BytesIn),
		"used", fmt.Sprintf("%s, %.0f %% of it", size(r.UsedBytes), 100*r.Ratio()),
		"length", size(r.ImageSize) + ", with holes where nothing is used",
		"files", strconv.Itoa(r.Files),
		"packed", count(r.Packed, " small ones share extents"),
		"equal", count(r.SameFiles, " are stored once with others, %s saved", size(r.SameBytes)),
		"not compressed", count(r.Stored, ", since it does not help"),
		"subvolumes", count(r.Subvolumes, ""),
		"left out", count(r.Mounts, " mount points: they are empty directories"),
		"time", r.Time.Round(time.Second).String(),
	}
}

// slowStick is what a usual stick reads, in bytes a second.
const slowStick = 150e6

// geometryFacts is what decides the cost of a flatten, and the cost.
func geometryFacts(g seed.Geometry) []string {
	return []string{
		"data extents", fmt.Sprintf("%d, of %s on average", g.DataExtents, size(g.DataUsed/uint64(max(g.DataExtents, 1)))),
		"data groups", fmt.Sprintf("%d, of %s on average", g.DataGroups, size(g.DataLength/uint64(max(g.DataGroups, 1)))),
		"tree nodes", fmt.Sprintf("%d of %s", g.TreeNodes, size(uint64(g.NodeSize))),
		"flatten", fmt.Sprintf("about %s, from a stick with 150 MB/s %s (estimated)", seconds(g.FlattenTime(0)), seconds(g.FlattenTime(slowStick))),
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.0f s", max(d.Seconds(), 1)) }

func builtJSON(image string, r seed.Report) map[string]any {
	return map[string]any{
		"image": image, "fsid": r.FSID.String(), "bytes_in": r.BytesIn, "size": r.ImageSize, "used": r.UsedBytes,
		"entries": r.Entries, "files": r.Files, "packed": r.Packed, "stored": r.Stored, "subvolumes": r.Subvolumes,
		"mounts_left_out": r.Mounts, "equal_files": r.SameFiles, "equal_bytes": r.SameBytes,
		"seconds": r.Time.Seconds(), "geometry": geometryJSON(r.Geometry),
	}
}

func geometryJSON(g seed.Geometry) map[string]any {
	var histogram []map[string]any
	for _, b := range g.Histogram {
		histogram = append(histogram, map[string]any{"limit": b.Limit, "extents": b.Extents, "bytes": b.Bytes})
	}
	return map[string]any{
		"data_extents": g.DataExtents, "data_used": g.DataUsed, "data_groups": g.DataGroups, "data_length": g.DataLength,
		"tree_nodes": g.TreeNodes, "node_size": g.NodeSize, "metadata_used": g.MetadataUsed, "histogram": list(histogram),
		"flatten_seconds": g.FlattenTime(0).Seconds(), "flatten_seconds_150_mb": g.FlattenTime(slowStick).Seconds(),
	}
}

// withoutService stands for the answer that only the service has.
const withoutService = "not known without the service"

// inspect asks the service whether a seed can be used. The geometry it reads
// itself, which takes a mount: where that is not to be had it says why. Who
// builds seeds need not have the service; all else is shown then.
func (a *app) inspect(ctx context.Context, name string) error {
	path, err := absolute(name)
	if err != nil {
		return err
	}
	var info client.SeedInfo
	err = a.with(ctx, func(c *client.Client) error {
		info, err = c.InspectSeed(ctx, path)
		return err
	})
	if err != nil && client.CodeOf(err) != client.Unavailable {
		return err
	}
	found, unknown := a.seeds.inspect(ctx, path)
	usable := yesNo(info.Supported)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && unknown != nil:
		return err
	case err != nil:
		info, usable = infoOf(found), withoutService
	}
	if a.json {
		object := struct {
			client.SeedInfo
			Geometry map[string]any `json:"geometry"`
		}{SeedInfo: info}
		if unknown == nil {
			object.Geometry = geometryJSON(found.Geometry)
		}
		a.printJSON(object)
		return nil
	}
	fmt.Fprintln(a.out, name)
	pairs := []string{
		"seed flag", yesNo(info.Seeding), "usable here", usable,
		"label", info.Label, "fsid", info.Fsid, "size", size(info.Size), "used", size(info.Used),
		"checksums", info.CsumType, "metadata", info.MetadataProfile,
	}
	if unknown == nil {
		pairs = append(pairs, geometryFacts(found.Geometry)...)
	} else {
		pairs = append(pairs, "geometry", "not known: "+whyUnknown(unknown))
	}
	facts(a.out, "  ", pairs...)
	if usable != withoutService {
		for _, reason := range info.Reasons {
			fmt.Fprintf(a.out, "  not usable: %s\n", reason)
		}
	}
	if !info.Seeding {
		fmt.Fprintf(a.out, "  %s\n", adviceFor("NotSeed").remedy)
	}
	return nil
}

// infoOf is what the service would say, as far as it is known without it.
func infoOf(found seed.Inspection) client.SeedInfo {
	super := found.Super
	return client.SeedInfo{
		Seeding: super.Seeding, Fsid: super.FSID.String(), Label: super.Label, Size: super.Size, Used: super.Used,
		CsumType: super.CsumType.String(), MetadataProfile: super.MetadataProfile, Reasons: []string{withoutService},
	}
}

func whyUnknown(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "only root can look"
	case errors.Is(err, seed.ErrMounted):
		return "it is mounted"
	}
	return oneLine(err.Error())
}

func (a *app) mark(ctx context.Context, image string) error {
	path, err := absolute(image)
	if err != nil {
		return err
	}
	output, err := exec.CommandContext(ctx, "btrfstune", "-S", "1", path).CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fail(missingTool, "cannot mark %s: the program btrfstune is not installed", image)
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		reason := cmp.Or(strings.TrimPrefix(oneLine(string(output)), "ERROR: "), err.Error())
		return fail(notMarked, "cannot mark %s: %s", image, reason)
	}
	if a.json {
		a.printJSON(map[string]any{"image": path, "seeding": true})
		return nil
	}
	fmt.Fprintf(a.out, "%s is a seed now.\n", image)
	return nil
}
