package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sproutd.org/sproutd/dbus/client"
)

// completionPatience is how long a person who pressed Tab waits for the
// service before there are no suggestions.
const completionPatience = 500 * time.Millisecond

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print the completion script for bash, zsh or fish",
		Example: `  sproutctl completion bash > /usr/share/bash-completion/completions/sproutctl
  sproutctl completion zsh > /usr/share/zsh/site-functions/_sproutctl
  sproutctl completion fish > /usr/share/fish/vendor_completions.d/sproutctl.fish`,
		Args:      takes(cobra.ExactArgs(1)),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			switch args[0] {
			case "bash":
				err = cmd.Root().GenBashCompletionV2(a.out, true)
			case "zsh":
				err = cmd.Root().GenZshCompletion(a.out)
			case "fish":
				err = cmd.Root().GenFishCompletion(a.out, true)
			default:
				return fail(usage, "cannot complete for %s: only for bash, zsh and fish", args[0])
			}
			return cannot(err, "print the completion script")
		},
	}
}

// objects asks the service for everything, quickly and without starting it; on
// any failure there is nothing.
func (a *app) objects(cmd *cobra.Command) client.Objects {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionPatience)
	defer cancel()
	c, err := client.Connect(ctx, client.Options{NoAutoStart: true})
	if err != nil {
		return client.Objects{}
	}
	defer c.Close()
	objects, err := c.Objects(ctx)
	if err != nil {
		return client.Objects{}
	}
	return objects
}

func (a *app) completeSprouts(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var words []string
	for _, sprout := range a.objects(cmd).Sprouts {
		words = append(words, fmt.Sprintf("%s\t%s %s", sprout.MountPoint, sprout.State, sprout.Label))
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

// completeTargets suggests the devices that can take an operation.
func (a *app) completeTargets(operation string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var words []string
		others := cobra.ShellCompDirectiveNoFileComp
		switch operation {
		case "release":
			words = append(words, "ram\tmemory")
			others = cobra.ShellCompDirectiveDefault // any directory
		case "add-device":
			words = append(words, "zram\tmore compressed RAM")
		case "persist":
			words = append(words, "free\ta new partition on the stick")
		}
		for _, device := range a.objects(cmd).Devices {
			if slices.Contains(device.EligibleFor, operation) {
				words = append(words, fmt.Sprintf("%s\t%s %s", device.Path, size(device.Size), device.Model))
			}
		}
		return words, others
	}
}

// completeMembers suggests the members that can leave.
func (a *app) completeMembers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	sprout, err := choose(a.objects(cmd).Sprouts, a.sprout)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var words []string
	for _, member := range sprout.Members {
		words = append(words, fmt.Sprintf("%s\t%s %s", member.Path, member.Role, size(member.Size)))
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

// completeJobs suggests the jobs that run.
func (a *app) completeJobs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	objects := a.objects(cmd)
	var words []string
	for _, job := range objects.Jobs {
		if !job.Finished() {
			words = append(words, fmt.Sprintf("%d\t%s of %s", job.Number(), job.Operation, mountPoint(objects.Sprouts, job.Sprout)))
		}
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completePlan(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return []string{
			"persist\tmove what is in RAM to a partition", "flatten\tinstall", "release\tgive the stick back", "add\tadd a device",
			"remove\tremove a member", "resume\tfinish what is left",
		}, cobra.ShellCompDirectiveNoFileComp
	}
	switch operation := operations()[args[0]]; operation {
	case "remove-device":
		return a.completeMembers(cmd, args[1:], word)
	case "resume", "":
		return nil, cobra.ShellCompDirectiveNoFileComp
	default:
		return a.completeTargets(operation)(cmd, args[1:], word)
	}
}
