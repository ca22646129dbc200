package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"sproutd.org/sproutd/dbus/client"
)

func (a *app) resetCommand() *cobra.Command {
	var options client.ResetOptions
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Start over: drop what is kept on the stick, at the next boot",
		Long: `Make the next boot drop what is kept on the stick, and start over. This is for a
system that was booted from a stick and is persistent. Until the next boot
--undo takes it back.`,
		Args: takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error { return a.reset(cmd.Context(), c, options) }), "reset")
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&options.Undo, "undo", false, "take back what was asked for before")
	return cmd
}

func (a *app) reset(ctx context.Context, c *client.Client, options client.ResetOptions) error {
	sprout, err := a.theSprout(ctx, c)
	if err != nil {
		return err
	}
	if !options.Undo {
		warning := func(out io.Writer) {
			fmt.Fprintln(out, "THIS DESTROYS, at the next boot: all changes that are kept on the stick")
		}
		if err := a.confirm(ctx, "Start over at the next boot?", warning); err != nil {
			return err
		}
	}
	if err := c.Reset(ctx, sprout.Path, options); err != nil {
		return err
	}
	switch {
	case a.json:
		a.printJSON(map[string]any{"mount_point": sprout.MountPoint, "fsid": sprout.Fsid, "reset": !options.Undo})
	case options.Undo:
		fmt.Fprintln(a.out, "What is kept on the stick stays.")
	default:
		fmt.Fprintln(a.out, "What is kept on the stick will be dropped at the next boot. 'sproutctl reset --undo' takes that back.")
	}
	return nil
}
