package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"sproutd.org/sproutd/dbus/client"
)

func (a *app) createCommand() *cobra.Command {
	var options client.CreateOptions
	var zram sizeFlag
	cmd := &cobra.Command{
		Use:   "create SEED MOUNTPOINT",
		Short: "Mount a seed as a writable sprout",
		Long: `Mount SEED, an image file or a block device, at MOUNTPOINT and make it writable
with compressed RAM, or with --device on a block device. The seed is not changed.`,
		Example: "  sproutctl create root.img /mnt --size 4G",
		Args:    takes(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			seed, err := absolute(args[0])
			if err != nil {
				return err
			}
			mountpoint, err := absolute(args[1])
			if err != nil {
				return err
			}
			if options.Device, err = absolute(options.Device); err != nil {
				return err
			}
			options.ZramSize = uint64(zram)
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				return a.create(cmd.Context(), c, seed, mountpoint, options)
			}), "create a sprout of %s", args[0])
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return nil, cobra.ShellCompDirectiveDefault
			case 1:
				return nil, cobra.ShellCompDirectiveFilterDirs
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	flags := cmd.Flags()
	flags.Var(&zram, "size", "size of the zram device, such as 4G or 512MiB")
	flags.StringVar(&options.ZramAlgorithm, "zram-algorithm", "", "compression `ALGORITHM` of the zram device")
	flags.StringVar(&options.Compress, "compress", "", "`METHOD` to compress files: zstd:1, lzo, zlib, none")
	flags.StringVar(&options.MountOptions, "mount-options", "", "further mount `OPTIONS`, separated by commas")
	flags.StringVar(&options.Device, "device", "", "block `DEVICE` to write to, in place of zram")
	flags.BoolVar(&options.Wipe, "wipe", false, "destroy what is on --device")
	must(cmd.RegisterFlagCompletionFunc("compress", cobra.FixedCompletions([]string{"zstd:1", "lzo", "zlib", "none"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func (a *app) create(ctx context.Context, c *client.Client, seed, mountpoint string, options client.CreateOptions) error {
	if options.Wipe && options.Device != "" {
		warning := func(out io.Writer) { fmt.Fprintf(out, "THIS DESTROYS: everything on %s\n", options.Device) }
		if err := a.confirm(ctx, "Wipe "+options.Device+"?", warning); err != nil {
			return err
		}
	}
	path, err := c.CreateSprout(ctx, seed, mountpoint, options)
	if err != nil {
		return err
	}
	sprout, err := c.Sprout(ctx, path)
	if err != nil {
		return err
	}
	if a.json {
		a.printJSON(sprout)
		return nil
	}
	a.showSprout(sprout, nil)
	return nil
}

func (a *app) teardownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "teardown MOUNTPOINT",
		Short: "Unmount a sprout that create made, and free its loop and zram",
		Long: `Unmount a sprout that create made and free its loop and zram devices. What is
in RAM only is lost, so that is asked about.`,
		Args: takes(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				return a.teardown(cmd.Context(), c, args[0])
			}), "tear down %s", args[0])
		},
		ValidArgsFunction: a.completeSprouts,
	}
}

func (a *app) teardown(ctx context.Context, c *client.Client, name string) error {
	objects, err := c.Objects(ctx)
	if err != nil {
		return err
	}
	sprout, err := choose(objects.Sprouts, name)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(sprout.Members, func(m client.Member) bool { return m.Role == "zram" }) {
		warning := func(out io.Writer) {
			fmt.Fprintf(out, "THIS DESTROYS: what was written to %s since it was created; it is in RAM only\n", sprout.MountPoint)
		}
		if err := a.confirm(ctx, "Tear down "+sprout.MountPoint+"?", warning); err != nil {
			return err
		}
	}
	if err := c.Teardown(ctx, sprout.Path); err != nil {
		return err
	}
	if a.json {
		a.printJSON(map[string]any{"mount_point": sprout.MountPoint, "fsid": sprout.Fsid})
		return nil
	}
	fmt.Fprintf(a.out, "%s is unmounted.\n", sprout.MountPoint)
	return nil
}
