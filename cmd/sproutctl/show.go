package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sproutd.org/sproutd/dbus/client"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the sprouts, their members, and whether the stick can be unplugged",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error { return a.status(cmd.Context(), c) }),
				"show the status")
		},
	}
}

func (a *app) status(ctx context.Context, c *client.Client) error {
	objects, err := c.Objects(ctx)
	if err != nil {
		return err
	}
	sprouts := objects.Sprouts
	if a.sprout != "" {
		sprout, err := choose(sprouts, a.sprout)
		if err != nil {
			return err
		}
		sprouts = []client.Sprout{sprout}
	}
	if a.json {
		jobs := slices.DeleteFunc(slices.Clone(objects.Jobs), client.Job.Finished)
		a.printJSON(map[string]any{"sprouts": list(sprouts), "jobs": list(jobs)})
		return nil
	}
	if len(sprouts) == 0 {
		fmt.Fprintln(a.out, "There is no sprout. Make one: sproutctl create SEED MOUNTPOINT")
		return nil
	}
	for i, sprout := range sprouts {
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		a.showSprout(sprout, objects.Jobs)
	}
	return nil
}

func (a *app) showSprout(s client.Sprout, jobs []client.Job) {
	fmt.Fprintf(a.out, "%s is %s\n", s.MountPoint, s.State)
	for _, warning := range s.Warnings {
		fmt.Fprintf(a.out, "  WARNING: %s\n", oneLine(warning))
	}
	free := size(s.Free) + " of " + size(s.Size)
	if s.LowSpace {
		free += ", low: add room with 'sproutctl add zram', or delete files"
	}
	facts(a.out, "  ", "label", s.Label, "fsid", s.Fsid, "seed", s.SeedFsid, "free", free)
	fmt.Fprintln(a.out)
	rows := [][]string{{"ID", "ROLE", "DEVICE", "SIZE", "USED", "ACCESS"}}
	for _, m := range s.Members {
		access := "read-only"
		if m.Writable {
			access = "writable"
		}
		rows = append(rows, []string{fmt.Sprint(m.DevID), m.Role, m.Path, size(m.Size), size(m.Used), access})
	}
	table(a.out, "  ", rows...)
	fmt.Fprintln(a.out)
	if i := slices.IndexFunc(jobs, func(j client.Job) bool { return s.CurrentJob != "" && j.Path == s.CurrentJob }); i >= 0 {
		job := jobs[i]
		fmt.Fprintf(a.out, "  job %d: %s, %s\n", job.Number(), job.Operation, strings.Join(progressWords(job, time.Now()), ", "))
		if step := stepWords(job); step != "" {
			fmt.Fprintf(a.out, "    %s\n", step)
		}
	} else if operation, ok := s.Intent["operation"].(string); ok {
		target, _ := s.Intent["target"].(string)
		fmt.Fprintf(a.out, "  unfinished: %s; go on with 'sproutctl resume'\n", operationWords(operation, target))
	}
	a.showUnplug(s)
}

// operationWords is an operation of the service as a person says it.
func operationWords(operation, target string) string {
	switch operation {
	case "persist", "flatten", "release":
		return operation + " to " + target
	case "add-device":
		return "add " + target
	case "remove-device":
		return "remove " + target
	}
	return operation
}

func (a *app) showUnplug(s client.Sprout) {
	fmt.Fprintf(a.out, "  safe to unplug: %s\n", yesNo(s.SafeToUnplug))
	for _, holder := range s.MediaHolders {
		fmt.Fprintf(a.out, "    %s\n", holder)
	}
}

// list makes nil an empty JSON list.
func list[T any](items []T) []T {
	if items == nil {
		return []T{}
	}
	return items
}

func (a *app) devicesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "devices",
		Short: "Show the block devices and what each can be used for",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				if err := c.LookAtDevices(cmd.Context()); err != nil {
					return err
				}
				objects, err := c.Objects(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					a.printJSON(map[string]any{"devices": list(objects.Devices)})
					return nil
				}
				a.showDevices(objects.Devices)
				return nil
			}), "list the devices")
		},
	}
}

func (a *app) showDevices(devices []client.Device) {
	if len(devices) == 0 {
		fmt.Fprintln(a.out, "There is no block device.")
		return
	}
	rows := [][]string{{"DEVICE", "SIZE", "MODEL", "ROLE", "CONTENT", "GOOD FOR"}}
	for _, d := range devices {
		goodFor := strings.ReplaceAll(strings.Join(d.EligibleFor, ", "), "-device", "")
		if goodFor == "" {
			goodFor = "nothing: " + reason(d)
		}
		rows = append(rows, []string{d.Path, size(d.Size), d.Model, d.Role, strings.Join(d.Signatures, ", "), goodFor})
	}
	table(a.out, "", rows...)
}

// reason picks one reason why a device is good for nothing.
func reason(d client.Device) string {
	for _, operation := range []string{"flatten", "persist"} {
		if text := d.Reasons[operation]; text != "" {
			return text
		}
	}
	for _, text := range d.Reasons {
		return text
	}
	return "no reason given"
}

// operations are the words of `plan` and the names the service has for them.
func operations() map[string]string {
	return map[string]string{
		"persist": "persist", "flatten": "flatten", "install": "flatten", "release": "release",
		"add": "add-device", "remove": "remove-device", "resume": "resume",
	}
}

func (a *app) planCommand() *cobra.Command {
	var options moveFlags
	cmd := &cobra.Command{
		Use:   "plan OPERATION [TARGET]",
		Short: "Show what an operation would do, without doing it",
		Long: `Show the steps an operation would take, what it would destroy, and why it
would be refused. OPERATION is persist, flatten, release, add, remove or
resume.
Nothing is changed and no permission is needed.`,
		Args: takes(cobra.RangeArgs(1, 2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			operation, ok := operations()[args[0]]
			switch {
			case !ok:
				return fail(usage, "cannot plan %s: it is none of persist, flatten, release, add, remove, resume", args[0])
			case operation == "resume" && len(args) == 2:
				return fail(usage, "cannot plan resume with a target: it is the one of the unfinished operation")
			case operation != "resume" && len(args) == 1:
				return fail(usage, "cannot plan %s without a target", args[0])
			}
			target := ""
			if len(args) == 2 {
				var err error
				if target, err = absolute(args[1]); err != nil {
					return err
				}
			}
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				sprout, err := a.theSprout(cmd.Context(), c)
				if err != nil {
					return err
				}
				plan, err := c.Plan(cmd.Context(), sprout.Path, operation, target, options.move())
				if err != nil {
					return err
				}
				if a.json {
					a.printJSON(plan)
				} else {
					showPlan(a.out, plan)
				}
				return nil
			}), "plan %s", strings.Join(args, " "))
		},
		ValidArgsFunction: a.completePlan,
	}
	options.register(cmd, "wipe", "compress", "label", "bootloader", "metadata-profile", "release-first", "size", "zram-algorithm")
	return cmd
}

func (a *app) jobsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "jobs",
		Short: "Show the jobs, those that ended not long ago too",
		Args:  takes(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cannot(a.with(cmd.Context(), func(c *client.Client) error {
				objects, err := c.Objects(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					a.printJSON(map[string]any{"jobs": list(objects.Jobs)})
					return nil
				}
				if len(objects.Jobs) == 0 {
					fmt.Fprintln(a.out, "There is no job.")
					return nil
				}
				rows := [][]string{{"JOB", "OPERATION", "SPROUT", "STATE", "PROGRESS", "STEP OR ERROR"}}
				for _, job := range objects.Jobs {
					last := job.Step
					if err := job.Err(); err != nil {
						last = oneLine(err.Error())
					}
					rows = append(rows, []string{
						fmt.Sprint(job.Number()), job.Operation, mountPoint(objects.Sprouts, job.Sprout),
						job.State, percent(job.Progress), last,
					})
				}
				table(a.out, "", rows...)
				return nil
			}), "list the jobs")
		},
	}
}

// mountPoint gives the mount point of the sprout at path, "" if it has gone.
func mountPoint(sprouts []client.Sprout, path string) string {
	for _, sprout := range sprouts {
		if sprout.Path == path {
			return sprout.MountPoint
		}
	}
	return ""
}
