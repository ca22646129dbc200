package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"sproutd.org/sproutd/dbus/client"
)

// app is one run of sproutctl: where it reads and writes, and the global flags.
type app struct {
	in       *os.File
	out, err io.Writer
	// started is true once the command line was understood.
	started bool
	// tidies is true while a second signal must not end the process: something
	// would be left behind.
	tidies atomic.Bool
	seeds  seeds

	json, noAskPassword, yes bool
	sprout                   string
}

// root is the command tree.
type root struct{ *cobra.Command }

func (r root) run(ctx context.Context, args []string) error {
	r.SetArgs(args)
	return r.ExecuteContext(ctx)
}

func (a *app) command() root {
	cmd := &cobra.Command{
		Use:   "sproutctl",
		Short: "Make, move and install live Btrfs systems",
		Long: `sproutctl controls sproutd: it makes a writable live session of a read-only
Btrfs seed, and moves the running session to a stick or an internal disk
without a reboot.`,
		Example: `  sproutctl status
  sproutctl devices
  sproutctl persist /dev/sdb3
  sproutctl install /dev/nvme0n1p2`,
		Version:           programVersion(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { a.started = true },
	}
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	flags := cmd.PersistentFlags()
	flags.BoolVar(&a.json, "json", false, "print JSON: one object, or one a line while a job runs")
	flags.BoolVar(&a.noAskPassword, "no-ask-password", false, "never ask for a password")
	flags.BoolVarP(&a.yes, "yes", "y", false, "do not ask before destroying anything")
	flags.StringVar(&a.sprout, "sprout", "", "the sprout meant: `PATH` of its mount point, fsid or object path")
	must(cmd.RegisterFlagCompletionFunc("sprout", a.completeSprouts))
	cmd.AddCommand(
		a.statusCommand(), a.devicesCommand(), a.planCommand(), a.createCommand(),
		a.persistCommand(), a.flattenCommand(), a.releaseCommand(), a.addCommand(), a.removeCommand(), a.resumeCommand(),
		a.jobsCommand(), a.watchCommand(), a.cancelCommand(), a.teardownCommand(), a.resetCommand(), a.seedCommand(), a.completionCommand(),
	)
	return root{cmd}
}

// takes makes a complaint about the number of arguments say how it is right.
func takes(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) == nil {
			return nil
		}
		given := strings.Join(append([]string{cmd.CommandPath()}, args...), " ")
		return fail(usage, "cannot run '%s': the way is '%s'", given, strings.TrimSuffix(cmd.UseLine(), " [flags]"))
	}
}

// must is for errors that only a defect in this program can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// version is set by the linker; see the Makefile.
var version string

func programVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// connect opens the connection of a command.
func (a *app) connect(ctx context.Context) (*client.Client, error) {
	return client.Connect(ctx, client.Options{Interactive: !a.noAskPassword})
}

// with runs f with a connection.
func (a *app) with(ctx context.Context, f func(*client.Client) error) error {
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// choose finds the sprout the user means: the named one, else the only one,
// else the one at /.
func choose(sprouts []client.Sprout, name string) (client.Sprout, error) {
	if name != "" {
		path, _ := filepath.Abs(name)
		for _, sprout := range sprouts {
			if name == sprout.Fsid || name == sprout.Path || path == sprout.MountPoint ||
				(strings.HasSuffix(name, "/sprout/root") && sprout.MountPoint == "/") {
				return sprout, nil
			}
		}
		return client.Sprout{}, fail(client.NoSuchSprout, "there is no sprout %s%s", name, choices(sprouts))
	}
	if len(sprouts) == 1 {
		return sprouts[0], nil
	}
	for _, sprout := range sprouts {
		if sprout.MountPoint == "/" {
			return sprout, nil
		}
	}
	if len(sprouts) == 0 {
		return client.Sprout{}, fail(client.NoSuchSprout, "there is no sprout")
	}
	return client.Sprout{}, fail(whichSprout, "there is more than one sprout%s", choices(sprouts))
}

func choices(sprouts []client.Sprout) string {
	if len(sprouts) == 0 {
		return ""
	}
	names := make([]string, len(sprouts))
	for i, sprout := range sprouts {
		names[i] = sprout.MountPoint
	}
	return "; there is: " + strings.Join(names, ", ")
}

// theSprout reads the sprout the user means.
func (a *app) theSprout(ctx context.Context, c *client.Client) (client.Sprout, error) {
	objects, err := c.Objects(ctx)
	if err != nil {
		return client.Sprout{}, err
	}
	return choose(objects.Sprouts, a.sprout)
}

// absolute makes a path that means the same to the service, which runs in
// another directory. The words the service knows stay as they are.
func absolute(path string) (string, error) {
	if path == "" || path == "zram" || path == "free" || path == "ram" {
		return path, nil
	}
	result, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("cannot find %s: %w", path, err)
	}
	return result, nil
}

// columns is the width of the terminal w, 0 if w is none or has no width.
func columns(w any) int {
	file, ok := w.(*os.File)
	if !ok {
		return 0
	}
	width, _, err := term.GetSize(int(file.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// terminal reports whether w is one.
func terminal(w any) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
