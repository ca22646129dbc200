package client

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/names"
)

// properties reads all properties of one interface of an object.
func (c *Client) properties(ctx context.Context, path, iface string, into any) error {
	var entries map[string]godbus.Variant
	if err := c.call(ctx, path, names.Properties, "GetAll", []any{iface}, &entries); err != nil {
		return err
	}
	return understood(decode(entries, into))
}

func understood(err error) error {
	if err == nil {
		return nil
	}
	return &Error{Code: Internal, Message: "cannot understand the service: " + err.Error(), Err: err}
}

// Version is the version of the service.
func (c *Client) Version(ctx context.Context) (string, error) {
	var version string
	err := c.call(ctx, names.Root, names.Properties, "Get", []any{names.Manager, "Version"}, &version)
	return version, err
}

// Objects reads everything the service shows with one call.
func (c *Client) Objects(ctx context.Context) (Objects, error) {
	var tree map[godbus.ObjectPath]map[string]map[string]godbus.Variant
	if err := c.call(ctx, names.Root, names.ObjectManager, "GetManagedObjects", nil, &tree); err != nil {
		return Objects{}, err
	}
	var objects Objects
	for path, interfaces := range tree {
		if entries, ok := interfaces[names.Sprout]; ok && string(path) != names.RootSprout {
			sprout := Sprout{Path: string(path)}
			if err := understood(decode(entries, &sprout)); err != nil {
				return Objects{}, err
			}
			sprout.settle()
			objects.Sprouts = append(objects.Sprouts, sprout)
		}
		if entries, ok := interfaces[names.Job]; ok {
			job := Job{Path: string(path)}
			if err := understood(decode(entries, &job)); err != nil {
				return Objects{}, err
			}
			objects.Jobs = append(objects.Jobs, job)
		}
		if entries, ok := interfaces[names.Device]; ok {
			device := Device{Object: string(path)}
			if err := understood(decode(entries, &device)); err != nil {
				return Objects{}, err
			}
			objects.Devices = append(objects.Devices, device)
		}
	}
	slices.SortFunc(objects.Sprouts, func(a, b Sprout) int {
		return cmp.Or(cmp.Compare(a.MountPoint, b.MountPoint), cmp.Compare(a.Fsid, b.Fsid))
	})
	slices.SortFunc(objects.Jobs, func(a, b Job) int { return cmp.Compare(a.Number(), b.Number()) })
	slices.SortFunc(objects.Devices, func(a, b Device) int { return cmp.Compare(a.Path, b.Path) })
	return objects, nil
}

// settle turns the bus's way to say "none" into Go's. An older service has no
// warnings.
func (s *Sprout) settle() {
	if s.Warnings == nil {
		s.Warnings = []string{}
	}
	if s.CurrentJob == "/" {
		s.CurrentJob = ""
	}
}

// Sprout reads one sprout.
func (c *Client) Sprout(ctx context.Context, path string) (Sprout, error) {
	sprout := Sprout{Path: path}
	err := c.properties(ctx, path, names.Sprout, &sprout)
	sprout.settle()
	return sprout, err
}

// Job reads one job.
func (c *Client) Job(ctx context.Context, path string) (Job, error) {
	job := Job{Path: path}
	err := c.properties(ctx, path, names.Job, &job)
	return job, err
}

// CreateSprout mounts a seed as a new sprout and gives the sprout's path.
func (c *Client) CreateSprout(ctx context.Context, seed, mountpoint string, options CreateOptions) (string, error) {
	var sprout godbus.ObjectPath
	err := c.call(ctx, names.Root, names.Manager, "CreateSprout",
		[]any{seed, mountpoint, encode(options)}, &sprout)
	return string(sprout), err
}

// LookAtDevices has the service look at the block devices now. What
// [Client.Objects] gives of them is otherwise some seconds old where much changes.
func (c *Client) LookAtDevices(ctx context.Context) error {
	var devices [][]any // as structs; their properties say the same with names
	return c.call(ctx, names.Root, names.Manager, "ListDevices", []any{encode(struct{}{})}, &devices)
}

// InspectSeed looks at a seed without changing anything.
func (c *Client) InspectSeed(ctx context.Context, seed string) (SeedInfo, error) {
	var entries map[string]godbus.Variant
	if err := c.call(ctx, names.Root, names.Manager, "InspectSeed", []any{seed}, &entries); err != nil {
		return SeedInfo{}, err
	}
	var info SeedInfo
	return info, understood(decode(entries, &info))
}

// Plan tells what an operation ("persist", "flatten", "release", "add-device",
// "remove-device", "resume") would do, and changes nothing.
func (c *Client) Plan(ctx context.Context, sprout, operation, target string, options MoveOptions) (Plan, error) {
	var entries map[string]godbus.Variant
	if err := c.call(ctx, sprout, names.Sprout, "Plan",
		[]any{operation, target, encode(options)}, &entries); err != nil {
		return Plan{}, err
	}
	var plan Plan
	return plan, understood(decode(entries, &plan))
}

// Persist moves what is written in RAM to target and gives the job's path.
func (c *Client) Persist(ctx context.Context, sprout, target string, options MoveOptions) (string, error) {
	return c.start(ctx, sprout, "Persist", target, encode(options))
}

// Flatten makes target the only member and gives the job's path.
func (c *Client) Flatten(ctx context.Context, sprout, target string, options MoveOptions) (string, error) {
	return c.start(ctx, sprout, "Flatten", target, encode(options))
}

// Release copies the seed off the stick, to a directory, a block device or with
// "ram" to memory, and gives the job's path.
func (c *Client) Release(ctx context.Context, sprout, destination string, options MoveOptions) (string, error) {
	return c.start(ctx, sprout, "Release", destination, encode(options))
}

// AddDevice adds a device, or with "zram" a new zram device, and gives the job's path.
func (c *Client) AddDevice(ctx context.Context, sprout, device string, options MoveOptions) (string, error) {
	return c.start(ctx, sprout, "AddDevice", device, encode(options))
}

// RemoveDevice moves everything off a member, removes it and gives the job's path.
func (c *Client) RemoveDevice(ctx context.Context, sprout, device string) (string, error) {
	return c.start(ctx, sprout, "RemoveDevice", device, encode(struct{}{}))
}

// Resume finishes what an earlier job left and gives the job's path.
func (c *Client) Resume(ctx context.Context, sprout string) (string, error) {
	return c.start(ctx, sprout, "Resume", encode(struct{}{}))
}

func (c *Client) start(ctx context.Context, sprout, member string, args ...any) (string, error) {
	var job godbus.ObjectPath
	err := c.call(ctx, sprout, names.Sprout, member, args, &job)
	return string(job), err
}

// Teardown unmounts a sprout that CreateSprout made.
func (c *Client) Teardown(ctx context.Context, sprout string) error {
	return c.call(ctx, sprout, names.Sprout, "Teardown", []any{encode(struct{}{})})
}

// Reset makes the next boot drop what the booted stick keeps.
func (c *Client) Reset(ctx context.Context, sprout string, options ResetOptions) error {
	return c.call(ctx, sprout, names.Sprout, "Reset", []any{encode(options)})
}

// Cancel asks a job to stop. It returns when the request was taken, which is
// before the job has ended.
func (c *Client) Cancel(ctx context.Context, job string) error {
	return c.call(ctx, job, names.Job, "Cancel", []any{encode(struct{}{})})
}

// Wait waits for the end of a job, as long as it takes, and gives its result
// or the error it ended with.
func (c *Client) Wait(ctx context.Context, job string) (map[string]any, error) {
	var result map[string]godbus.Variant
	if err := c.call(ctx, job, names.Job, "Wait", nil, &result); err != nil {
		return nil, err
	}
	return plainMap(result), nil
}

// JobPath gives the path of a job from its number or its path.
func JobPath(job string) (string, error) {
	path := job
	if len(job) > 0 && job[0] != '/' {
		path = names.JobsParent + "/" + job
	}
	if JobNumber(path) == 0 || !godbus.ObjectPath(path).IsValid() {
		return "", &Error{Code: InvalidArgs, Message: fmt.Sprintf("%q is not a job: give its number", job)}
	}
	return path, nil
}
