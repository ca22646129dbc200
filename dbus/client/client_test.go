package client_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"go.uber.org/goleak"

	"sproutd.org/sproutd/dbus/client"
	"sproutd.org/sproutd/dbus/client/clienttest"
	"sproutd.org/sproutd/dbus/names"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type props = clienttest.Props

const fsid = "0b1c2d3e-0000-4000-8000-00000000beef"

var (
	sproutPath = string(names.SproutPath(fsid))
	jobPath    = string(names.JobPath(3))
)

// start gives a service with one sprout and one running job, and a client.
func start(t *testing.T, options client.Options) (*clienttest.Service, *client.Client) {
	t.Helper()
	service := clienttest.Start(t, clienttest.StartBus(t))
	service.Put(sproutPath, names.Sprout, props{
		"Fsid": fsid, "SeedFsid": "seed", "Label": "live", "MountPoint": "/mnt", "State": "volatile",
		"Members": []props{
			{"devid": uint64(1), "path": "/dev/loop0", "size": uint64(10), "used": uint64(7), "role": "seed", "writable": false},
			{"devid": uint64(2), "path": "/dev/zram1", "size": uint64(20), "used": uint64(3), "role": "zram", "writable": true},
		},
		"Size": uint64(20), "Free": uint64(17), "LowSpace": false, "Intent": props{"operation": "persist", "job": uint32(2)},
		"CurrentJob": godbus.ObjectPath(jobPath), "SafeToUnplug": false, "MediaHolders": []string{"loop /dev/loop0"}, "Warnings": []string{"careful"},
	})
	service.Put(jobPath, names.Job, props{
		"Operation": "flatten", "Sprout": godbus.ObjectPath(sproutPath), "StartedByUid": uint32(1000), "StartTime": uint64(5),
		"State": "running", "Step": "moving", "StepNumber": uint32(1), "StepCount": uint32(2), "Progress": 0.25,
		"BytesDone": uint64(1), "BytesTotal": uint64(4), "Rate": uint64(1), "ExpectedEndTime": uint64(0), "Cancelable": true,
		"ErrorName": "", "ErrorMessage": "", "Result": props{},
	})
	service.Put(string(names.DevicePath("sda")), names.Device, props{
		"Path": "/dev/sda", "Size": uint64(1 << 30), "Model": "Disk", "Serial": "1", "Removable": true, "ReadOnly": false,
		"Signatures": []string{"ext4"}, "Holders": []string{}, "Role": "", "EligibleFor": []string{"persist"},
		"Reasons": map[string]string{"flatten": "too small"},
	})
	c, err := client.Connect(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return service, c
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if got := client.CodeOf(err); got != code {
		t.Fatalf("error %v has the code %q, want %q", err, got, code)
	}
}

func TestEverythingShownArrivesWithItsType(t *testing.T) {
	_, c := start(t, client.Options{})
	objects, err := c.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := client.Objects{
		Sprouts: []client.Sprout{{
			Path: sproutPath, Fsid: fsid, SeedFsid: "seed", Label: "live", MountPoint: "/mnt", State: "volatile",
			Members: []client.Member{
				{DevID: 1, Path: "/dev/loop0", Size: 10, Used: 7, Role: "seed"},
				{DevID: 2, Path: "/dev/zram1", Size: 20, Used: 3, Role: "zram", Writable: true},
			},
			Size: 20, Free: 17, Intent: map[string]any{"operation": "persist", "job": uint32(2)},
			CurrentJob: jobPath, MediaHolders: []string{"loop /dev/loop0"}, Warnings: []string{"careful"},
		}},
		Jobs: []client.Job{{
			Path: jobPath, Operation: "flatten", Sprout: sproutPath, StartedByUID: 1000, StartTime: 5, State: "running",
			Step: "moving", StepNumber: 1, StepCount: 2, Progress: 0.25, BytesDone: 1, BytesTotal: 4, Rate: 1, Cancelable: true,
			Result: map[string]any{},
		}},
		Devices: []client.Device{{
			Object: string(names.DevicePath("sda")), Path: "/dev/sda", Size: 1 << 30, Model: "Disk", Serial: "1", Removable: true,
			Signatures: []string{"ext4"}, Holders: []string{}, EligibleFor: []string{"persist"},
			Reasons: map[string]string{"flatten": "too small"},
		}},
	}
	if !reflect.DeepEqual(objects, want) {
		t.Errorf("got  %+v\nwant %+v", objects, want)
	}
	if sprout, err := c.Sprout(t.Context(), sproutPath); err != nil || !reflect.DeepEqual(sprout, want.Sprouts[0]) {
		t.Errorf("the sprout alone is %+v, %v", sprout, err)
	}
	if job, err := c.Job(t.Context(), jobPath); err != nil || !reflect.DeepEqual(job, want.Jobs[0]) {
		t.Errorf("the job alone is %+v, %v", job, err)
	}
	if version, err := c.Version(t.Context()); err != nil || version != "1.2.3" {
		t.Errorf("the version is %q, %v", version, err)
	}
}

func TestCallsSendTheArgumentsOfTheContract(t *testing.T) {
	service, c := start(t, client.Options{})
	job := func(clienttest.Call) ([]any, error) { return []any{godbus.ObjectPath(jobPath)}, nil }
	for _, member := range []string{"Persist", "Flatten", "Release", "AddDevice", "RemoveDevice", "Resume"} {
		service.Handle(names.Sprout, member, job)
	}
	nothing := func(clienttest.Call) ([]any, error) { return nil, nil }
	service.Handle(names.Sprout, "Teardown", nothing)
	service.Handle(names.Sprout, "Reset", nothing)
	service.Handle(names.Job, "Cancel", nothing)
	service.Handle(names.Manager, "CreateSprout", func(clienttest.Call) ([]any, error) {
		return []any{godbus.ObjectPath(sproutPath)}, nil
	})
	service.Handle(names.Manager, "InspectSeed", func(clienttest.Call) ([]any, error) {
		return []any{clienttest.Variants(props{"seeding": true, "size": uint64(9), "reasons": []string{"x"}})}, nil
	})
	service.Handle(names.Sprout, "Plan", func(clienttest.Call) ([]any, error) {
		return []any{clienttest.Variants(props{
			"steps":    []props{{"kind": "add", "device": "/dev/sda", "bytes": uint64(1), "text": "add it"}},
			"problems": []props{{"error": names.ErrorPrefix + "Busy", "message": "job 1 runs"}},
		})}, nil
	})

	ctx := t.Context()
	options := client.MoveOptions{Wipe: true, Label: "x"}
	check := func(got string, err error) {
		t.Helper()
		if err != nil || (got != jobPath && got != sproutPath) {
			t.Errorf("got %q, %v", got, err)
		}
	}
	check(c.Persist(ctx, sproutPath, "/dev/sda", options))
	check(c.Flatten(ctx, sproutPath, "/dev/sda", client.MoveOptions{Bootloader: "none", Compress: "zstd", ReleaseFirst: true}))
	check(c.Release(ctx, sproutPath, "ram", client.MoveOptions{}))
	check(c.AddDevice(ctx, sproutPath, "zram", client.MoveOptions{Size: 4 << 30}))
	check(c.RemoveDevice(ctx, sproutPath, "/dev/zram1"))
	check(c.Resume(ctx, sproutPath))
	check(c.CreateSprout(ctx, "/img", "/mnt", client.CreateOptions{ZramSize: 1 << 30, MountOptions: "noatime"}))
	if err := c.Teardown(ctx, sproutPath); err != nil {
		t.Error(err)
	}
	if err := c.Reset(ctx, sproutPath, client.ResetOptions{Undo: true}); err != nil {
		t.Error(err)
	}
	if err := c.Cancel(ctx, jobPath); err != nil {
		t.Error(err)
	}
	service.Handle(names.Manager, "ListDevices", func(clienttest.Call) ([]any, error) { return []any{[][]any{}}, nil })
	if err := c.LookAtDevices(ctx); err != nil {
		t.Error(err)
	}
	if info, err := c.InspectSeed(ctx, "/img"); err != nil || !info.Seeding || info.Size != 9 || info.Reasons[0] != "x" {
		t.Errorf("the seed is %+v, %v", info, err)
	}
	plan, err := c.Plan(ctx, sproutPath, "persist", "/dev/sda", options)
	if err != nil || len(plan.Steps) != 1 || plan.Steps[0].Text != "add it" {
		t.Errorf("the plan is %+v, %v", plan, err)
	}
	wantCode(t, plan.Err(), "Busy")

	type call struct {
		path, member string
		args         []any
	}
	move := clienttest.Variants(props{"wipe": true, "label": "x"})
	none := clienttest.Variants(props{})
	var got []call
	for _, c := range service.Calls() {
		got = append(got, call{c.Path, c.Member, c.Args})
	}
	want := []call{
		{sproutPath, "Persist", []any{"/dev/sda", move}},
		{sproutPath, "Flatten", []any{"/dev/sda", clienttest.Variants(props{"bootloader": "none", "compress": "zstd", "release_first": true})}},
		{sproutPath, "Release", []any{"ram", none}},
		{sproutPath, "AddDevice", []any{"zram", clienttest.Variants(props{"size": uint64(4 << 30)})}},
		{sproutPath, "RemoveDevice", []any{"/dev/zram1", none}},
		{sproutPath, "Resume", []any{none}},
		{names.Root, "CreateSprout", []any{"/img", "/mnt", clienttest.Variants(props{"zram_size": uint64(1 << 30), "mount_options": "noatime"})}},
		{sproutPath, "Teardown", []any{none}},
		{sproutPath, "Reset", []any{clienttest.Variants(props{"undo": true})}},
		{jobPath, "Cancel", []any{none}},
		{names.Root, "ListDevices", []any{none}},
		{names.Root, "InspectSeed", []any{"/img"}},
		{sproutPath, "Plan", []any{"persist", "/dev/sda", move}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestOnlyAnInteractiveClientLetsPolkitAsk(t *testing.T) {
	for _, interactive := range []bool{true, false} {
		service, c := start(t, client.Options{Interactive: interactive})
		service.Handle(names.Job, "Cancel", func(clienttest.Call) ([]any, error) { return nil, nil })
		if err := c.Cancel(t.Context(), jobPath); err != nil {
			t.Fatal(err)
		}
		if got := service.Calls()[0].Interactive; got != interactive {
			t.Errorf("the flag arrived as %v, want %v", got, interactive)
		}
	}
}

func TestErrorsHaveTheCodeOfWhatHappened(t *testing.T) {
	service, c := start(t, client.Options{})
	service.Handle(names.Sprout, "Persist", func(call clienttest.Call) ([]any, error) {
		name := call.Text(0)
		if short, ok := strings.CutPrefix(name, "*"); ok {
			return nil, godbus.NewError(standard+short, []any{"no"})
		}
		return nil, clienttest.Error(name, "no")
	})
	for target, want := range map[string]string{
		"TargetTooSmall": "TargetTooSmall", "*InvalidArgs": "InvalidArgs", "*AccessDenied": "AccessDenied",
		"*InteractiveAuthorizationRequired": "InteractiveAuthorizationRequired", "*LimitsExceeded": "Busy", "*Failed": "Internal",
	} {
		_, err := c.Persist(t.Context(), sproutPath, target, client.MoveOptions{})
		wantCode(t, err, want)
		if err.Error() != "no" {
			t.Errorf("the message is %q", err)
		}
	}
	_, err := c.Resume(t.Context(), sproutPath) // not scripted, as in an older service
	wantCode(t, err, client.NotSupported)
	wantCode(t, c.Cancel(t.Context(), string(names.JobPath(99))), client.NoSuchJob)
	wantCode(t, c.Teardown(t.Context(), string(names.SproutPath("gone"))), client.NoSuchSprout)
	wantCode(t, c.Cancel(t.Context(), "no path"), client.InvalidArgs)
}

const standard = "org.freedesktop.DBus.Error."

func TestWithoutAServiceOrABusTheErrorSaysSo(t *testing.T) {
	clienttest.StartBus(t)
	c, err := client.Connect(t.Context(), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Objects(t.Context())
	wantCode(t, err, client.Unavailable)

	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
	_, err = client.Connect(t.Context(), client.Options{})
	wantCode(t, err, client.Unavailable)
}

func TestConnectEndsWithItsContextButTheConnectionDoesNot(t *testing.T) {
	service := clienttest.Start(t, clienttest.StartBus(t))
	_ = service
	ctx, cancel := context.WithCancel(t.Context())
	c, err := client.Connect(ctx, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	if _, err := c.Version(t.Context()); err != nil {
		t.Errorf("the connection ended with the context: %v", err)
	}
	if _, err := client.Connect(ctx, client.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("connecting with an ended context gave %v", err)
	}
}

func TestWaitRepliesAtTheEndAndNotBefore(t *testing.T) {
	service, c := start(t, client.Options{})
	called, end := make(chan struct{}), make(chan error)
	service.Handle(names.Job, "Wait", func(clienttest.Call) ([]any, error) {
		called <- struct{}{}
		err := <-end
		return []any{clienttest.Variants(props{"bytes": uint64(7)})}, err
	})
	type reply struct {
		result map[string]any
		err    error
	}
	replies := make(chan reply)
	wait := func() {
		result, err := c.Wait(t.Context(), jobPath)
		replies <- reply{result, err}
	}
	go wait()
	<-called
	end <- nil
	if got := <-replies; got.err != nil || got.result["bytes"] != uint64(7) {
		t.Errorf("got %+v", got)
	}
	go wait()
	<-called
	end <- clienttest.Error("IOError", "the stick failed")
	wantCode(t, (<-replies).err, "IOError")

	// The service dies while the call waits.
	go wait()
	<-called
	service.Stop()
	wantCode(t, (<-replies).err, client.Unavailable)
	end <- nil
}

func TestACallEndsWithItsContext(t *testing.T) {
	service, c := start(t, client.Options{})
	called, end := make(chan struct{}), make(chan struct{})
	service.Handle(names.Job, "Wait", func(clienttest.Call) ([]any, error) {
		close(called)
		<-end
		return nil, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-called; cancel() }()
	if _, err := c.Wait(ctx, jobPath); !errors.Is(err, context.Canceled) {
		t.Errorf("the call gave %v", err)
	}
	close(end)
}

func watch(t *testing.T, c *client.Client) *client.JobWatch {
	t.Helper()
	w, err := c.WatchJob(t.Context(), jobPath)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func TestAWatchShowsEveryChangeInOrderUntilTheEnd(t *testing.T) {
	service, c := start(t, client.Options{})
	w := watch(t, c)
	if first := <-w.Updates(); first.Progress != 0.25 || first.Step != "moving" {
		t.Errorf("it begins with %+v", first)
	}
	for i := range 100 {
		service.Change(jobPath, names.Job, props{"BytesDone": uint64(i)})
	}
	service.Change(jobPath, names.Job, props{"State": "done", "Progress": 1.0, "Result": props{"moved": uint64(4)}})
	for i := range 100 {
		if next := <-w.Updates(); next.BytesDone != uint64(i) || next.Finished() {
			t.Fatalf("change %d is %+v", i, next)
		}
	}
	last := <-w.Updates()
	if last.State != client.Done || last.Progress != 1 || last.Result["moved"] != uint64(4) || last.Err() != nil {
		t.Errorf("it ends with %+v", last)
	}
	if _, more := <-w.Updates(); more || w.Err() != nil {
		t.Errorf("after the end: more %v, error %v", more, w.Err())
	}
}

func TestAWatchOfAFinishedJobEndsAtOnce(t *testing.T) {
	service, c := start(t, client.Options{})
	service.Change(jobPath, names.Job, props{"State": "failed", "ErrorName": names.ErrorPrefix + "IOError", "ErrorMessage": "bad stick"})
	w := watch(t, c)
	wantCode(t, (<-w.Updates()).Err(), "IOError")
	if _, more := <-w.Updates(); more {
		t.Error("there is more after the end")
	}
}

func TestAnEndThatComesWhileAWatchBeginsIsNotMissed(t *testing.T) {
	service, c := start(t, client.Options{})
	for range 50 {
		service.Change(jobPath, names.Job, props{"State": "running"})
		go service.Change(jobPath, names.Job, props{"State": "cancelled"})
		w := watch(t, c)
		var last client.Job
		for last = range w.Updates() {
		}
		if last.State != client.Cancelled {
			t.Fatalf("the watch ended with %+v, %v", last, w.Err())
		}
	}
}

func TestAWatchEndsWhenTheServiceTheBusOrTheCallerLeaves(t *testing.T) {
	t.Run("service", func(t *testing.T) {
		service, c := start(t, client.Options{})
		w := watch(t, c)
		<-w.Updates()
		service.Stop()
		for range w.Updates() {
		}
		wantCode(t, w.Err(), client.Unavailable)
	})
	t.Run("bus", func(t *testing.T) {
		_, c := start(t, client.Options{})
		w := watch(t, c)
		<-w.Updates()
		c.Close() // what the client sees of a bus that is gone
		for range w.Updates() {
		}
		wantCode(t, w.Err(), client.Unavailable)
	})
	t.Run("caller", func(t *testing.T) {
		_, c := start(t, client.Options{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		w, err := c.WatchJob(ctx, jobPath)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		<-w.Updates()
		cancel()
		for range w.Updates() {
		}
		if !errors.Is(w.Err(), context.Canceled) {
			t.Errorf("it ended with %v", w.Err())
		}
	})
	t.Run("no job", func(t *testing.T) {
		_, c := start(t, client.Options{})
		_, err := c.WatchJob(t.Context(), string(names.JobPath(99)))
		wantCode(t, err, client.NoSuchJob)
	})
}

func TestAJobIsNamedByItsNumberOrItsPath(t *testing.T) {
	for _, name := range []string{"3", jobPath} {
		if path, err := client.JobPath(name); err != nil || path != jobPath {
			t.Errorf("job %q is %q, %v", name, path, err)
		}
	}
	for _, name := range []string{"", "0", "x", "-1", "3/../4", "/"} {
		if path, err := client.JobPath(name); err == nil {
			t.Errorf("job %q is %q", name, path)
		}
	}
}
