// Package guest is what the tests can ask of a system in a virtual machine. The
// agent serves it on a virtio port; the tests call it with net/rpc.
//
// It is one process that stays: its code is locked in memory and it keeps its
// connection to D-Bus, so it goes on to answer when the stick it was started
// from is gone and no program can be started any more.
package guest

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/tests/seedtest"
)

// The virtio ports: calls, and the promises of the writer.
const (
	CallPort    = "/dev/virtio-ports/org.sproutd.test.0"
	PromisePort = "/dev/virtio-ports/org.sproutd.promise.0"
)

// Service is the name that net/rpc has for a [Guest].
const Service = "Guest"

// None is an argument or a reply that says nothing.
type None struct{}

// Guest answers calls. All its methods have the form that net/rpc wants.
type Guest struct {
	promises io.Writer
	bus      bus

	mu     sync.Mutex
	writer *seedtest.Writer
	reader *seedtest.Reader
}

// New gives a guest that writes promises to where it is told.
func New(promises io.Writer) *Guest { return &Guest{promises: promises} }

// Boot says which boot this is.
func (g *Guest) Boot(_ None, id *string) error {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	*id = strings.TrimSpace(string(raw))
	return err
}

// Command is a program to run.
type Command struct {
	Args    []string
	Stdin   []byte
	Timeout time.Duration
}

// Output is what a program printed and how it ended.
type Output struct {
	Text string // of both outputs, in the order in which it came
	Code int
}

// Run runs a program to its end. That it ends with a code is no error.
func (g *Guest) Run(c Command, out *Output) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// What the program left running goes too, and nobody waits for its output.
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	cmd.Stdin = bytes.NewReader(c.Stdin)
	text, err := cmd.CombinedOutput()
	*out = Output{Text: string(text), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s did not end in %v; so far it said: %s", strings.Join(c.Args, " "), c.Timeout, text)
	case errors.As(err, &exit):
		return nil
	}
	return err
}

// Read reads a file.
func (g *Guest) Read(path string, data *[]byte) error {
	var err error
	*data, err = os.ReadFile(path)
	return err
}

// Write writes a file and syncs it.
func (g *Guest) Write(f File, _ *None) error {
	file, err := os.OpenFile(f.Path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, f.Mode)
	if err != nil {
		return err
	}
	_, err = file.Write(f.Data)
	return errors.Join(err, file.Sync(), file.Close())
}

// File is a file to write.
type File struct {
	Path string
	Data []byte
	Mode os.FileMode
}

// KernelLog reads the kernel's messages since the boot.
func (g *Guest) KernelLog(_ None, text *string) error {
	size, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
	if err != nil {
		return err
	}
	buffer := make([]byte, size)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buffer)
	*text = string(buffer[:max(n, 0)])
	return err
}

// Mount is a mount that is there.
type Mount struct{ Point, Type, Source, Options string }

// Mounts lists what is mounted, in the order in which it was.
func (g *Guest) Mounts(_ None, mounts *[]Mount) error {
	all, err := mountinfo.GetMounts(nil)
	for _, m := range all {
		*mounts = append(*mounts, Mount{m.Mountpoint, m.FSType, m.Source, m.Options})
	}
	return err
}

// DropCaches has everything read from the devices again.
func (g *Guest) DropCaches(_ None, _ *None) error {
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// SyncFS writes out what is in memory of the filesystem at a path.
func (g *Guest) SyncFS(path string, _ *None) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// Place gives where a file begins on what its filesystem is on, in bytes; of a
// Btrfs, in its own logical addresses.
func (g *Guest) Place(path string, at *uint64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct fiemap with room for one extent; linux/fiemap.h.
	const fsIocFiemap = 0xc020660b
	extents := struct {
		Start, Length                  uint64
		Flags, Mapped, Count, Reserved uint32
		Logical, Physical, Size        uint64
		_                              [32]byte
	}{Length: ^uint64(0), Count: 1}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&extents)))
	if errno == 0 && extents.Mapped > 0 {
		*at = extents.Physical
		return nil
	}
	// FIBMAP, for filesystems that know no extents; linux/fs.h.
	const fibmap, figetbsz = 1, 2
	block, size := int32(0), int32(0)
	for request, value := range map[uintptr]*int32{fibmap: &block, figetbsz: &size} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(value))); errno != 0 {
			return fmt.Errorf("cannot find the blocks of %s: %w", path, errno)
		}
	}
	*at = uint64(block) * uint64(size)
	return nil
}

// Tree names a directory, and paths in it that are of no interest.
type Tree struct {
	Dir     string
	Without []string
	// Reference is what the tree is compared with.
	Reference Files
}

// Files are a manifest on its way: attributes may be what JSON has no strings for.
type Files []byte

// Pack packs a manifest.
func Pack(m seedtest.Manifest) (Files, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(m)
	return b.Bytes(), err
}

func (f Files) unpack() (m seedtest.Manifest, err error) {
	return m, gob.NewDecoder(bytes.NewReader(f)).Decode(&m)
}

// Manifest reads every file of a tree.
func (g *Guest) Manifest(tree Tree, files *Files) error {
	all, err := seedtest.TakeManifest(context.Background(), tree.Dir, tree.Without...)
	if err != nil {
		return err
	}
	*files, err = Pack(all)
	return err
}

// Compare reads every file of a tree and gives what differs from the reference.
func (g *Guest) Compare(tree Tree, lines *[]string) error {
	before, err := tree.Reference.unpack()
	if err != nil {
		return err
	}
	now, err := seedtest.TakeManifest(context.Background(), tree.Dir, tree.Without...)
	// Not nil: an answer that is null is none.
	*lines = append([]string{}, seedtest.Diff(before, now, tree.Without...)...)
	return err
}

// StartWriter starts a writer in a directory, which is made.
func (g *Guest) StartWriter(dir string, _ *None) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var err error
	if g.writer != nil {
		return errors.New("there is a writer already")
	}
	g.writer, err = seedtest.StartPromising(dir, g.promises)
	return err
}

// AwaitFsyncs waits until the writer has made n more fsyncs.
func (g *Guest) AwaitFsyncs(n uint64, _ *None) error {
	g.mu.Lock()
	writer := g.writer
	g.mu.Unlock()
	return writer.AwaitFsyncs(context.Background(), n)
}

// StopWriter stops the writer and compares what it wrote with what is there.
func (g *Guest) StopWriter(_ None, stats *seedtest.WriterStats) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	writer := g.writer
	g.writer = nil
	if err := writer.Stop(); err != nil {
		return err
	}
	*stats = writer.Stats()
	return writer.Verify(writer.Dir())
}

// Promises are what a writer told before the power failed.
type Promises struct {
	Dir  string
	Told []byte
}

// Verify compares a writer's directory with what it promised.
func (g *Guest) Verify(p Promises, _ *None) error {
	writer, err := seedtest.Promised(bytes.NewReader(p.Told))
	if err != nil || writer == nil {
		return err
	}
	return writer.Verify(p.Dir)
}

// StartReader starts to read the files of a tree over and over, and compares
// them with the reference.
func (g *Guest) StartReader(tree Tree, _ *None) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.reader != nil {
		return errors.New("there is a reader already")
	}
	reference, err := tree.Reference.unpack()
	if err != nil {
		return err
	}
	g.reader, err = seedtest.StartReader(tree.Dir, reference)
	return err
}

// StopReader stops the reader and gives the number of files it found right.
func (g *Guest) StopReader(_ None, files *uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	reader := g.reader
	g.reader = nil
	err := reader.Stop()
	*files, _ = reader.Stats()
	return err
}

// Complaints are the lines of the kernel's log that tell of a device or a
// filesystem in trouble.
func Complaints(log string) []string {
	lines := strings.Split(log, "\n")
	return slices.DeleteFunc(lines, func(line string) bool {
		// The kernel remembers a seed that was unmounted without its number.
		if strings.Contains(line, "maj:min changed from 0:0") {
			return true
		}
		return !slices.ContainsFunc([]string{"I/O error", "BTRFS error", "BTRFS critical", "BTRFS warning", "csum failed", "forced readonly", "BUG:", "WARNING:", "Oops"},
			func(trouble string) bool { return strings.Contains(line, trouble) })
	})
}
