package dbus

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/daemon"
	"sproutd.org/sproutd/daemon/plan"
	"sproutd.org/sproutd/dbus/names"
)

type variants = map[string]godbus.Variant

// object is one object of the tree. It stands for at most one of a sprout, a
// job and a device; the root object stands for none.
type object struct {
	path   godbus.ObjectPath
	iface  string // the one interface of ours that it has
	props  variants
	sprout *daemon.SproutView
	job    *daemon.JobView
}

// tree is every object made from one view. It is never changed.
type tree struct {
	view    *daemon.View
	objects map[godbus.ObjectPath]*object
	// managed lists the objects below the root, without the alias.
	managed []*object
	// children of every path that has any, sorted.
	children map[godbus.ObjectPath][]string
}

// newTree makes the tree of a view.
func newTree(v *daemon.View, version string) *tree {
	t := &tree{view: v, objects: map[godbus.ObjectPath]*object{}, children: map[godbus.ObjectPath][]string{}}
	sprouts := []godbus.ObjectPath{}
	for i := range v.Sprouts {
		s := &v.Sprouts[i]
		o := &object{path: names.SproutPath(s.FSID), iface: names.Sprout, props: sproutProperties(s), sprout: s}
		if !t.manage(o) {
			continue
		}
		sprouts = append(sprouts, o.path)
		if s.MountPoint == "/" {
			alias := *o
			alias.path = names.RootSprout
			t.objects[alias.path] = &alias
		}
	}
	for i := range v.Jobs {
		j := &v.Jobs[i]
		t.manage(&object{path: names.JobPath(j.Number), iface: names.Job, props: jobProperties(j), job: j})
	}
	for i := range v.Devices {
		d := &v.Devices[i]
		t.manage(&object{path: names.DevicePath(d.Name), iface: names.Device, props: deviceProperties(d)})
	}
	t.objects[names.Root] = &object{path: names.Root, iface: names.Manager, props: variants{
		"Version": godbus.MakeVariant(text(version)),
		"Sprouts": godbus.MakeVariant(sprouts),
	}}
	t.link()
	return t
}

// manage adds an object. A name that cannot be shown, or is there already, is
// left out: it must not take the rest with it.
func (t *tree) manage(o *object) bool {
	if !o.path.IsValid() || t.objects[o.path] != nil {
		return false
	}
	t.objects[o.path] = o
	t.managed = append(t.managed, o)
	return true
}

// link fills in children: every path on the way from / to an object, and to
// the parents of objects that may come.
func (t *tree) link() {
	paths := append(slices.Collect(maps.Keys(t.objects)), names.SproutsParent, names.JobsParent, names.DevicesParent)
	seen := map[godbus.ObjectPath]bool{"/": true}
	for _, path := range paths {
		for path != "/" && !seen[path] {
			seen[path] = true
			cut := strings.LastIndexByte(string(path), '/')
			parent, label := path[:cut], string(path[cut+1:])
			if cut == 0 {
				parent = "/"
			}
			t.children[parent] = append(t.children[parent], label)
			path = parent
		}
	}
	for _, labels := range t.children {
		slices.Sort(labels)
	}
	for _, leaf := range []godbus.ObjectPath{names.SproutsParent, names.JobsParent, names.DevicesParent} {
		if t.children[leaf] == nil {
			t.children[leaf] = []string{}
		}
	}
}

func sproutProperties(s *daemon.SproutView) variants {
	members := make([]variants, len(s.Members))
	for i, m := range s.Members {
		members[i] = variants{
			"devid":    godbus.MakeVariant(m.DevID),
			"path":     godbus.MakeVariant(text(m.Path)),
			"size":     godbus.MakeVariant(m.Size),
			"used":     godbus.MakeVariant(m.Used),
			"role":     godbus.MakeVariant(text(string(m.Role))),
			"writable": godbus.MakeVariant(m.Writable),
		}
	}
	intent := variants{}
	if s.Intent != nil {
		intent = variants{
			"job":       godbus.MakeVariant(s.Intent.Job),
			"operation": godbus.MakeVariant(text(string(s.Intent.Operation))),
			"target":    godbus.MakeVariant(text(s.Intent.Target)),
			"state":     godbus.MakeVariant(text(string(s.Intent.State))),
		}
	}
	job := godbus.ObjectPath("/")
	if s.CurrentJob != 0 {
		job = names.JobPath(s.CurrentJob)
	}
	return variants{
		"Fsid":         godbus.MakeVariant(text(s.FSID)),
		"SeedFsid":     godbus.MakeVariant(text(s.SeedFSID)),
		"Label":        godbus.MakeVariant(text(s.Label)),
		"MountPoint":   godbus.MakeVariant(text(s.MountPoint)),
		"State":        godbus.MakeVariant(text(string(s.State))),
		"Members":      godbus.MakeVariant(members),
		"Size":         godbus.MakeVariant(s.Size),
		"Free":         godbus.MakeVariant(s.Free),
		"LowSpace":     godbus.MakeVariant(s.LowSpace),
		"Intent":       godbus.MakeVariant(intent),
		"CurrentJob":   godbus.MakeVariant(job),
		"SafeToUnplug": godbus.MakeVariant(s.SafeToUnplug),
		"MediaHolders": godbus.MakeVariant(texts(s.MediaHolders)),
		"Warnings":     godbus.MakeVariant(texts(s.Warnings)),
	}
}

func jobProperties(j *daemon.JobView) variants {
	sprout := names.SproutPath(j.Sprout)
	if !sprout.IsValid() {
		sprout = "/"
	}
	var errorName, errorMessage string
	if j.Err != nil {
		errorName, errorMessage = ErrorName(j.Err.Code), j.Err.Text()
	}
	return variants{
		"Operation":       godbus.MakeVariant(text(string(j.Operation))),
		"Sprout":          godbus.MakeVariant(sprout),
		"StartedByUid":    godbus.MakeVariant(j.StartedByUID),
		"StartTime":       godbus.MakeVariant(micros(j.StartTime)),
		"State":           godbus.MakeVariant(text(string(j.State))),
		"Step":            godbus.MakeVariant(text(j.Step)),
		"StepNumber":      godbus.MakeVariant(j.StepNumber),
		"StepCount":       godbus.MakeVariant(j.StepCount),
		"Progress":        godbus.MakeVariant(j.Progress),
		"BytesDone":       godbus.MakeVariant(j.BytesDone),
		"BytesTotal":      godbus.MakeVariant(j.BytesTotal),
		"Rate":            godbus.MakeVariant(j.Rate),
		"ExpectedEndTime": godbus.MakeVariant(micros(j.ExpectedEnd)),
		"Cancelable":      godbus.MakeVariant(j.Cancelable),
		"ErrorName":       godbus.MakeVariant(errorName),
		"ErrorMessage":    godbus.MakeVariant(text(errorMessage)),
		"Result":          godbus.MakeVariant(result(j.Result)),
	}
}

func deviceProperties(d *daemon.DeviceView) variants {
	return variants{
		"Path":        godbus.MakeVariant(text(d.Path)),
		"Size":        godbus.MakeVariant(d.Size),
		"Model":       godbus.MakeVariant(text(d.Model)),
		"Serial":      godbus.MakeVariant(text(d.Serial)),
		"Removable":   godbus.MakeVariant(d.Removable),
		"ReadOnly":    godbus.MakeVariant(d.ReadOnly),
		"Signatures":  godbus.MakeVariant(signatures(d)),
		"Holders":     godbus.MakeVariant(holders(d)),
		"Role":        godbus.MakeVariant(text(d.Role)),
		"EligibleFor": godbus.MakeVariant(texts(d.EligibleFor)),
		"Reasons":     godbus.MakeVariant(reasons(d)),
	}
}

// deviceFacts are the facts of ListDevices: the properties under the names
// that dictionary keys have, without what ListDevices gives before them.
func deviceFacts(d *daemon.DeviceView) variants {
	p := deviceProperties(d)
	return variants{
		"model": p["Model"], "serial": p["Serial"], "removable": p["Removable"], "read_only": p["ReadOnly"],
		"signatures": p["Signatures"], "holders": p["Holders"], "role": p["Role"],
		"eligible_for": p["EligibleFor"], "reasons": p["Reasons"],
	}
}

func signatures(d *daemon.DeviceView) []string {
	out := make([]string, len(d.Signatures))
	for i, s := range d.Signatures {
		out[i] = text(s.Type)
		if s.Label != "" {
			out[i] += text(fmt.Sprintf(" %q", s.Label))
		}
	}
	return out
}

func holders(d *daemon.DeviceView) []string {
	out := make([]string, len(d.Holders))
	for i, h := range d.Holders {
		out[i] = text(h.Kind + " " + h.Name)
	}
	return out
}

func reasons(d *daemon.DeviceView) map[string]string {
	out := make(map[string]string, len(d.Reasons))
	for operation, why := range d.Reasons {
		out[text(operation)] = text(why)
	}
	return out
}

func result(in map[string]any) variants {
	out := make(variants, len(in))
	for key, value := range in {
		switch value := value.(type) {
		case bool, uint32, uint64, float64:
			out[text(key)] = godbus.MakeVariant(value)
		case []string:
			out[text(key)] = godbus.MakeVariant(texts(value))
		default:
			out[text(key)] = godbus.MakeVariant(text(fmt.Sprint(value)))
		}
	}
	return out
}

// planDict is the reply of Plan.
func planDict(p plan.Plan) variants {
	steps := make([]variants, len(p.Steps))
	for i, s := range p.Steps {
		steps[i] = variants{
			"kind":   godbus.MakeVariant(text(string(s.Kind))),
			"device": godbus.MakeVariant(text(s.Device.Path)),
			"bytes":  godbus.MakeVariant(s.Bytes),
			"text":   godbus.MakeVariant(text(s.Text)),
		}
	}
	problems := make([]variants, len(p.Problems))
	for i, f := range p.Problems {
		problems[i] = variants{
			"error":   godbus.MakeVariant(ErrorName(f.Code)),
			"message": godbus.MakeVariant(text(f.Text())),
		}
	}
	return variants{
		"steps":           godbus.MakeVariant(steps),
		"bytes_to_move":   godbus.MakeVariant(p.BytesToMove),
		"target_size":     godbus.MakeVariant(p.TargetSize),
		"min_target_size": godbus.MakeVariant(p.MinTargetSize),
		"destroys":        godbus.MakeVariant(texts(p.Destroys)),
		"problems":        godbus.MakeVariant(problems),
		"resumes":         godbus.MakeVariant(p.Resumes),
	}
}

// seedDict is the reply of InspectSeed.
func seedDict(r daemon.SeedReport) variants {
	return variants{
		"seeding":          godbus.MakeVariant(r.Seeding),
		"fsid":             godbus.MakeVariant(text(r.FSID)),
		"label":            godbus.MakeVariant(text(r.Label)),
		"size":             godbus.MakeVariant(r.Size),
		"used":             godbus.MakeVariant(r.Used),
		"csum_type":        godbus.MakeVariant(text(r.CsumType)),
		"metadata_profile": godbus.MakeVariant(text(r.MetadataProfile)),
		"supported":        godbus.MakeVariant(r.Supported),
		"reasons":          godbus.MakeVariant(texts(r.Reasons)),
	}
}

// micros gives t in µs since the epoch, 0 for the zero time.
func micros(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixMicro())
}
