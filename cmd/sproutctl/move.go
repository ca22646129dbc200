package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"sproutd.org/sproutd/dbus/client"
)

// moveFlags are the options of the operations on a sprout.
type moveFlags struct {
	wipe                        bool
	compress, label, bootloader string
	metadata                    string
	size                        sizeFlag
	algorithm                   string
	releaseFirst                bool
}

// register adds the named flags to cmd.
func (f *moveFlags) register(cmd *cobra.Command, names ...string) {
	flags := cmd.Flags()
	for _, name := range names {
		switch name {
		case "wipe":
			flags.BoolVar(&f.wipe, name, false, "destroy what is on the target")
		case "compress":
			flags.StringVar(&f.compress, name, "", "`METHOD` to compress what is written from now on: zstd, zstd:3, lzo, zlib, none")
			must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions([]string{"zstd", "lzo", "zlib", "none"}, cobra.ShellCompDirectiveNoFileComp)))
		case "label":
			flags.StringVar(&f.label, name, "", "new `LABEL` of the file system")
		case "bootloader":
			flags.StringVar(&f.bootloader, name, "", "boot loader to install: auto, systemd-boot, grub or `none`")
			must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions([]string{"auto", "systemd-boot", "grub", "none"}, cobra.ShellCompDirectiveNoFileComp)))
		case "metadata-profile":
			flags.StringVar(&f.metadata, name, "", "convert the metadata to `PROFILE`: single or dup")
			must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions([]string{"single", "dup"}, cobra.ShellCompDirectiveNoFileComp)))
		case "release-first":
			flags.BoolVar(&f.releaseFirst, name, false, "copy the seed to memory first, so that the stick is free early")
		case "size":
			flags.Var(&f.size, name, "size of the new zram device, such as 4G or 512MiB")
		case "zram-algorithm":
			flags.StringVar(&f.algorithm, name, "", "compression `ALGORITHM` of the new zram device")
		}
	}
}

func (f *moveFlags) move() client.MoveOptions {
	return client.MoveOptions{
		Wipe: f.wipe, Compress: f.compress, Label: f.label, Bootloader: f.bootloader,
		MetadataProfile: f.metadata, Size: uint64(f.size), Algorithm: f.algorithm, ReleaseFirst: f.releaseFirst,
	}
}

// move is one operation on a sprout as the user gave it.
type move struct {
	operation string // the service's word for it
	target    string
	what      string // "flatten to /dev/sda2"
	options   moveFlags
	follow    followFlags
	// always asks, also when nothing on the target is destroyed.
	always bool
	start  func(ctx context.Context, c *client.Client, sprout, target string) (string, error)
}

func (a *app) persistCommand() *cobra.Command {
	m := &move{operation: "persist"}
	m.start = func(ctx context.Context, c *client.Client, sprout, target string) (string, error) {
		return c.Persist(ctx, sprout, target, m.options.move())
	}
	cmd := &cobra.Command{
		Use:   "persist TARGET",
		Short: "Keep the live session: move what is in RAM to a partition",
		Long: `Move what the live session has written from RAM to TARGET, a partition, or with
free a new partition that is made in the free space of the stick. The seed stays
where it is. The session goes on meanwhile.`,
		Example: "  sproutctl persist free\n  sproutctl persist /dev/sdb3",
	}
	a.moveCommand(cmd, m, "persist to")
	m.options.register(cmd, "wipe", "compress", "label")
	return cmd
}

func (a *app) flattenCommand() *cobra.Command {
	m := &move{operation: "flatten", always: true}
	m.start = func(ctx context.Context, c *client.Client, sprout, target string) (string, error) {
		return c.Flatten(ctx, sprout, target, m.options.move())
	}
	cmd := &cobra.Command{
		Use:     "flatten TARGET",
		Aliases: []string{"install"},
		Short:   "Install: move the whole running system to a partition",
		Long: `Move the whole running system to TARGET and give the stick back. The session
goes on meanwhile; at the end the stick can be unplugged.`,
		Example: "  sproutctl install /dev/nvme0n1p2\n  sproutctl flatten --wipe --yes /dev/sda2",
	}
	a.moveCommand(cmd, m, "flatten to")
	m.options.register(cmd, "wipe", "compress", "label", "bootloader", "metadata-profile", "release-first")
	return cmd
}

func (a *app) releaseCommand() *cobra.Command {
	m := &move{operation: "release"}
	m.start = func(ctx context.Context, c *client.Client, sprout, target string) (string, error) {
		return c.Release(ctx, sprout, target, m.options.move())
	}
	cmd := &cobra.Command{
		Use:   "release DESTINATION",
		Short: "Give the stick back: copy the seed to a directory, a partition or memory",
		Long: `Copy what is in use of the seed from the stick to DESTINATION, a directory of
another disk, a partition, or with ram to memory, and read it there from then on.
The session goes on meanwhile; at the end the stick can be unplugged, unless it is
in use for something else. Nothing is installed: the next boot needs the stick
again. A partition gets all of the seed and is as good as the stick to a session
that was made persistent elsewhere.`,
		Example: "  sproutctl release ram\n  sproutctl release /mnt/disk\n  sproutctl release --wipe /dev/sdb3",
	}
	a.moveCommand(cmd, m, "release to")
	m.options.register(cmd, "wipe")
	return cmd
}

func (a *app) addCommand() *cobra.Command {
	m := &move{operation: "add-device"}
	m.start = func(ctx context.Context, c *client.Client, sprout, target string) (string, error) {
		return c.AddDevice(ctx, sprout, target, m.options.move())
	}
	cmd := &cobra.Command{
		Use:     "add DEVICE",
		Short:   "Add a device, or with zram more compressed RAM",
		Example: "  sproutctl add zram --size 4G\n  sproutctl add /dev/sdc1",
	}
	a.moveCommand(cmd, m, "add")
	m.options.register(cmd, "wipe", "size", "zram-algorithm")
	return cmd
}

func (a *app) removeCommand() *cobra.Command {
	m := &move{operation: "remove-device"}
	m.start = func(ctx context.Context, c *client.Client, sprout, target string) (string, error) {
		return c.RemoveDevice(ctx, sprout, target)
	}
	cmd := &cobra.Command{
		Use:     "remove DEVICE",
		Short:   "Move everything off a member and remove it",
		Example: "  sproutctl remove /dev/zram1",
	}
	a.moveCommand(cmd, m, "remove")
	cmd.ValidArgsFunction = a.completeMembers
	return cmd
}

func (a *app) resumeCommand() *cobra.Command {
	m := &move{operation: "resume"}
	m.start = func(ctx context.Context, c *client.Client, sprout, _ string) (string, error) {
		return c.Resume(ctx, sprout)
	}
	cmd := &cobra.Command{
		Use:   "resume",
		Short: "Finish what a cancelled, failed or interrupted job left",
	}
	a.moveCommand(cmd, m, "resume")
	cmd.Args = takes(cobra.NoArgs)
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	return cmd
}

// moveCommand fills in what the commands that start a job have in common.
func (a *app) moveCommand(cmd *cobra.Command, m *move, verb string) {
	cmd.Args = takes(cobra.ExactArgs(1))
	cmd.ValidArgsFunction = a.completeTargets(m.operation)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m.what = verb
		if len(args) > 0 {
			var err error
			if m.target, err = absolute(args[0]); err != nil {
				return err
			}
			m.what = verb + " " + args[0]
		}
		return cannot(a.with(cmd.Context(), func(c *client.Client) error { return a.move(cmd.Context(), c, m) }), "%s", m.what)
	}
	m.follow.register(cmd)
}

func (a *app) move(ctx context.Context, c *client.Client, m *move) error {
	sprout, err := a.theSprout(ctx, c)
	if err != nil {
		return err
	}
	plan, err := c.Plan(ctx, sprout.Path, m.operation, m.target, m.options.move())
	if err != nil {
		return err
	}
	if err := plan.Err(); err != nil {
		return err
	}
	if m.always || len(plan.Destroys) > 0 {
		question := strings.ToUpper(m.what[:1]) + m.what[1:] + "?"
		if err := a.confirm(ctx, question, func(out io.Writer) { showPlan(out, plan) }); err != nil {
			return err
		}
	}
	path, err := m.start(ctx, c, sprout.Path, m.target)
	if err != nil {
		return err
	}
	return a.follow(ctx, c, path, m.follow)
}

func (a *app) watchCommand() *cobra.Command {
	flags := followFlags{wait: true}
	cmd := &cobra.Command{
		Use:   "watch [JOB]",
		Short: "Follow a job to its end",
		Long:  "Follow a job to its end: the given one, or the one that is under way.",
		Args:  takes(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				path, err := a.jobToWatch(cmd.Context(), c, args)
				if err != nil {
					return err
				}
				if path == "" {
					if a.json {
						a.printJSON(map[string]any{"job": nil})
					} else {
						fmt.Fprintln(a.out, "No job is under way.")
					}
					return nil
				}
				return cannot(a.follow(cmd.Context(), c, path, flags), "finish job %d", client.JobNumber(path))
			}), "watch")
		},
		ValidArgsFunction: a.completeJobs,
	}
	cmd.Flags().BoolVar(&flags.cancel, "cancel-on-interrupt", false, "cancel the job on Ctrl-C, not only stop watching")
	return cmd
}

// jobToWatch gives the path of the job the user means, "" if none is under way.
func (a *app) jobToWatch(ctx context.Context, c *client.Client, args []string) (string, error) {
	if len(args) == 1 {
		return client.JobPath(args[0])
	}
	objects, err := c.Objects(ctx)
	if err != nil {
		return "", err
	}
	if a.sprout != "" {
		sprout, err := choose(objects.Sprouts, a.sprout)
		return sprout.CurrentJob, err
	}
	var running []string
	path := ""
	for _, job := range objects.Jobs {
		if !job.Finished() {
			path = job.Path
			running = append(running, fmt.Sprintf("%d (%s of %s)", job.Number(), job.Operation, mountPoint(objects.Sprouts, job.Sprout)))
		}
	}
	if len(running) > 1 {
		return "", fail(usage, "more than one job is under way: %s; name one", strings.Join(running, ", "))
	}
	return path, nil
}

func (a *app) cancelCommand() *cobra.Command {
	var flags followFlags
	cmd := &cobra.Command{
		Use:   "cancel JOB",
		Short: "Stop a job; nothing is lost, and it can be resumed",
		Args:  takes(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error { return a.cancel(cmd.Context(), c, args[0], flags) }),
				"cancel job %s", args[0])
		},
		ValidArgsFunction: a.completeJobs,
	}
	flags.registerWait(cmd)
	return cmd
}

func (a *app) cancel(ctx context.Context, c *client.Client, name string, flags followFlags) error {
	path, err := client.JobPath(name)
	if err != nil {
		return err
	}
	if err := c.Cancel(ctx, path); err != nil {
		return err
	}
	job := client.Job{Path: path}
	if flags.waits() {
		watch, err := c.WatchJob(ctx, path)
		if err != nil {
			return err
		}
		defer watch.Close()
		for job = range watch.Updates() {
		}
		if err := watch.Err(); err != nil {
			return err
		}
	} else if job, err = c.Job(ctx, path); err != nil {
		return err
	}
	if a.json {
		a.printJSON(job)
		return nil
	}
	switch job.State {
	case client.Cancelled:
		fmt.Fprintf(a.out, "Job %d was cancelled. Go on with 'sproutctl resume'.\n", job.Number())
	case client.Done:
		fmt.Fprintf(a.out, "Job %d was done before it could be cancelled.\n", job.Number())
	default:
		fmt.Fprintf(a.out, "Job %d is %s.\n", job.Number(), job.State)
	}
	return nil
}
