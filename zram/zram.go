// Package zram makes and removes compressed RAM disks. It touches none but
// those that it made, or that it was told belong to this daemon.
//
// It follows Documentation/admin-guide/blockdev/zram.rst.
package zram

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
)

// ErrNotOurs says that the zram device was made by somebody else, or its number means
// another device now.
var ErrNotOurs = errors.New("the zram device is not one of ours")

// UnknownAlgorithmError says that the kernel has no such compression.
type UnknownAlgorithmError struct {
	Name string
	// Known are those that it has.
	Known []string
}

func (e *UnknownAlgorithmError) Error() string {
	return fmt.Sprintf("the kernel has no zram compression %q, but %s", e.Name, strings.Join(e.Known, ", "))
}

const (
	// busyGrace is how long Remove waits for passing openers such as udev.
	busyGrace = 5 * time.Second
	// nodeGrace is how long Create waits for the device node.
	nodeGrace = 5 * time.Second
	tick      = 20 * time.Millisecond
)

// Manager makes zram devices and remembers which are its own. It is safe for
// concurrent use.
type Manager struct {
	root string
	sys  *block.System

	mu    sync.Mutex
	owned map[block.DevNum]block.ID
}

// New returns a Manager on the running kernel that owns nothing yet.
func New() *Manager { return NewAt("/") }

// NewAt returns a Manager that uses /sys and /dev below root.
func NewAt(root string) *Manager {
	return &Manager{root: root, sys: block.NewAt(root), owned: map[block.DevNum]block.ID{}}
}

// Config of a zram device.
type Config struct {
	// Size in bytes as the device shows it. It costs memory only as far as it
	// is written. The kernel rounds up to whole pages.
	Size uint64
	// Algorithm of compression, "" for the kernel's default.
	Algorithm string
	// MemLimit is the most memory that it may take, in bytes; 0 for no limit.
	// A write beyond it fails.
	MemLimit uint64
	// Record, if not nil, is told which device it will be, by Path alone, before
	// the kernel is asked for one; and all about the device before it gets its
	// size. So that whoever dies meanwhile can take it over: see [Manager.Adopt].
	Record func(block.ID) error
}

// Device is a zram device.
type Device struct {
	block.ID
	// Name is the kernel's, "zram1".
	Name string
}

// Stats is what a zram device holds and costs, in bytes unless said otherwise
// (mm_stat in zram.rst).
type Stats struct {
	// OrigDataSize is what was written, ComprDataSize what became of it.
	OrigDataSize, ComprDataSize uint64
	// MemUsed is the memory taken, all told; MemUsedMax the most it ever was;
	// MemLimit the most it may be, 0 for no limit.
	MemUsed, MemLimit, MemUsedMax uint64
	// SamePages counts the pages of one repeated value, which cost nothing;
	// HugePages those that did not compress.
	SamePages, HugePages uint64
}

func (m *Manager) path(elem ...string) string {
	return filepath.Join(append([]string{m.root}, elem...)...)
}

func (m *Manager) write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// Algorithms lists the compression algorithms of the kernel.
func (m *Manager) Algorithms() ([]string, error) {
	files, err := filepath.Glob(m.path("sys/block/zram*/comp_algorithm"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the zram devices: %w", err)
	}
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil {
			return parseAlgorithms(string(b)), nil
		}
	}
	// Only a device tells. Make one for the question.
	name, err := m.hotAdd()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(m.path("sys/block", name, "comp_algorithm"))
	if e := m.hotRemove(context.Background(), name); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the zram compression algorithms: %w", err)
	}
	return parseAlgorithms(string(b)), nil
}

// parseAlgorithms reads "lzo [lzo-rle] zstd", where the brackets mark the one
// in use.
func parseAlgorithms(text string) []string {
	return strings.Fields(strings.NewReplacer("[", " ", "]", " ").Replace(text))
}

// hotAdd makes the kernel add a device. It is the act of reading that does it,
// so this reads exactly once.
func (m *Manager) hotAdd() (string, error) {
	f, err := os.Open(m.path("sys/class/zram-control/hot_add"))
	if err != nil {
		return "", fmt.Errorf("cannot make a zram device: %w", err)
	}
	defer func() { _ = f.Close() }()
	buf := make([]byte, 64)
	n, err := f.Read(buf)
	if err != nil {
		return "", fmt.Errorf("cannot make a zram device: %w", err)
	}
	number, err := strconv.ParseUint(strings.TrimSpace(string(buf[:n])), 10, 32)
	if err != nil {
		return "", fmt.Errorf("cannot make a zram device: the kernel answered %w", err)
	}
	return fmt.Sprintf("zram%d", number), nil
}

// Create makes a zram device and waits for its node. If anything fails the
// device is removed again. An algorithm that the kernel has not is an
// [*UnknownAlgorithmError].
func (m *Manager) Create(ctx context.Context, c Config) (Device, error) {
	if c.Size == 0 {
		return Device{}, errors.New("cannot make a zram device of no size")
	}
	if err := ctx.Err(); err != nil {
		return Device{}, fmt.Errorf("cannot make a zram device: %w", err)
	}
	if c.Record != nil {
		if err := c.Record(block.ID{Path: "/dev/" + m.nextName(), Size: wholePages(c.Size)}); err != nil {
			return Device{}, err
		}
	}
	name, err := m.hotAdd()
	if err != nil {
		return Device{}, err
	}
	id, err := m.setUp(ctx, name, c)
	if err != nil {
		// It goes also when ctx is why it failed.
		if e := m.hotRemove(context.WithoutCancel(ctx), name); e != nil {
			err = errors.Join(err, e)
		}
		return Device{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owned[id.Num] = id
	return Device{ID: id, Name: name}, nil
}

func (m *Manager) setUp(ctx context.Context, name string, c Config) (block.ID, error) {
	dir := m.path("sys/block", name)
	if c.Record != nil {
		id, err := m.identify(name)
		if err != nil {
			return block.ID{}, err
		}
		id.Size = wholePages(c.Size)
		if err := c.Record(id); err != nil {
			return block.ID{}, err
		}
	}
	if c.Algorithm != "" { // before the size: it is fixed from then on
		if err := m.write(filepath.Join(dir, "comp_algorithm"), c.Algorithm); err != nil {
			known, e := os.ReadFile(filepath.Join(dir, "comp_algorithm"))
			list := parseAlgorithms(string(known))
			if e == nil && !slices.Contains(list, c.Algorithm) {
				return block.ID{}, &UnknownAlgorithmError{Name: c.Algorithm, Known: list}
			}
			return block.ID{}, fmt.Errorf("cannot set the compression of %s: %w", name, err)
		}
	}
	if err := m.write(filepath.Join(dir, "disksize"), strconv.FormatUint(c.Size, 10)); err != nil {
		return block.ID{}, fmt.Errorf("cannot set the size of %s: %w", name, err)
	}
	if c.MemLimit != 0 {
		if err := m.write(filepath.Join(dir, "mem_limit"), strconv.FormatUint(c.MemLimit, 10)); err != nil {
			return block.ID{}, fmt.Errorf("cannot set the memory limit of %s: %w", name, err)
		}
	}
	id, err := m.identify(name)
	if err != nil {
		return block.ID{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, nodeGrace)
	defer cancel()
	for {
		_, err := os.Stat(m.path("dev", name))
		if err == nil {
			return id, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return block.ID{}, fmt.Errorf("cannot find the node of %s: %w", name, err)
		}
		if err := pause(ctx); err != nil {
			return block.ID{}, fmt.Errorf("cannot find the node of %s: %w", name, err)
		}
	}
}

func (m *Manager) identify(name string) (block.ID, error) {
	b, err := os.ReadFile(m.path("sys/block", name, "dev"))
	if err != nil {
		return block.ID{}, fmt.Errorf("cannot find %s: %w", name, err)
	}
	var num block.DevNum
	if _, err := fmt.Sscanf(string(b), "%d:%d", &num.Major, &num.Minor); err != nil {
		return block.ID{}, fmt.Errorf("cannot read the device number of %s: %w", name, err)
	}
	return m.sys.Identify(num)
}

// pause waits a moment, or gives the error of ctx when that ends first.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(tick):
		return nil
	}
}

// Stat reads the memory use of a zram device by its kernel name. Anybody's may
// be read.
func (m *Manager) Stat(name string) (Stats, error) {
	b, err := os.ReadFile(m.path("sys/block", name, "mm_stat"))
	if err != nil {
		return Stats{}, fmt.Errorf("cannot read the memory use of %s: %w", name, err)
	}
	s, err := parseStats(string(b))
	if err != nil {
		return Stats{}, fmt.Errorf("cannot read the memory use of %s: %w", name, err)
	}
	return s, nil
}

func parseStats(text string) (Stats, error) {
	var s Stats
	var compacted uint64
	fields := strings.Fields(text)
	// Kernels add columns at the end: huge_pages came with 4.18.
	columns := []*uint64{&s.OrigDataSize, &s.ComprDataSize, &s.MemUsed, &s.MemLimit, &s.MemUsedMax, &s.SamePages, &compacted, &s.HugePages}
	if len(fields) < len(columns)-1 {
		return Stats{}, fmt.Errorf("%d columns where 7 or more were expected", len(fields))
	}
	for i, column := range columns[:min(len(columns), len(fields))] {
		var err error
		if *column, err = strconv.ParseUint(fields[i], 10, 64); err != nil {
			return Stats{}, err
		}
	}
	return s, nil
}

// Remove frees a device of ours and its memory. While somebody has it open it
// tries again, until ctx ends and for five seconds at most; the error wraps
// EBUSY then. [ErrNotOurs] for every other device. A device of ours that is
// gone already is no error.
func (m *Manager) Remove(ctx context.Context, id block.ID) error {
	m.mu.Lock()
	mine, ok := m.owned[id.Num]
	m.mu.Unlock()
	if !ok || !mine.Same(id) {
		return fmt.Errorf("cannot remove %s: %w", id.Path, ErrNotOurs)
	}
	now, err := m.sys.Identify(id.Num)
	switch {
	case errors.Is(err, os.ErrNotExist):
		m.disown(id)
		return nil
	case err != nil:
		return err
	case !same(now, id):
		m.disown(id)
		return fmt.Errorf("cannot remove %s: %w", id.Path, ErrNotOurs)
	}
	if err := m.hotRemove(ctx, filepath.Base(now.Path)); err != nil {
		return err
	}
	m.disown(id)
	return nil
}

func (m *Manager) disown(id block.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.owned, id.Num)
}

// hotRemove resets and removes a device in one step of the kernel
// (zram_remove in drivers/block/zram/zram_drv.c).
func (m *Manager) hotRemove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, busyGrace)
	defer cancel()
	for {
		err := m.write(m.path("sys/class/zram-control/hot_remove"), strings.TrimPrefix(name, "zram"))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || pause(ctx) != nil {
			return fmt.Errorf("cannot remove %s: %w", name, err)
		}
	}
}

// nextName gives the name that the kernel will give the next device: it has the
// lowest number that is free. Source: drivers/block/zram/zram_drv.c, zram_add.
func (m *Manager) nextName() string {
	for n := 0; ; n++ {
		name := fmt.Sprintf("zram%d", n)
		if _, err := os.Stat(m.path("sys/block", name)); err != nil {
			return name
		}
	}
}

func wholePages(size uint64) uint64 {
	page := uint64(os.Getpagesize()) //nolint:gosec // a page is never negative
	return (size + page - 1) / page * page
}

// same reports whether now is the device that was recorded as id, be it before
// it got its size.
func same(now, id block.ID) bool {
	now.Size = cmp.Or(now.Size, id.Size)
	return now.Same(id)
}

// Adopt takes over a device that an earlier life of this daemon made, and gives
// it. Number, disk sequence number and size must be what they were, but for the
// size of one that was not given one yet. Of one that was about to be made only
// the name is known: the device of that name is taken if it has no size yet, for
// nobody leaves one like that. [ErrNotOurs] otherwise, and when it is no zram
// device at all.
func (m *Manager) Adopt(id block.ID) (block.ID, error) {
	var now block.ID
	var err error
	expected := id.Num.IsZero()
	if expected {
		now, err = m.identify(filepath.Base(id.Path))
	} else {
		now, err = m.sys.Identify(id.Num)
	}
	if err != nil {
		return block.ID{}, fmt.Errorf("cannot take over %s: %w", id.Path, err)
	}
	name := filepath.Base(now.Path)
	_, err = os.Stat(m.path("sys/block", name, "mm_stat"))
	if err != nil || expected && now.Size != 0 || !expected && !same(now, id) {
		return block.ID{}, fmt.Errorf("cannot take over %s: %w", id.Path, ErrNotOurs)
	}
	now.Size = id.Size
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owned[now.Num] = now
	return now, nil
}

// Owned lists the devices of ours, by number.
func (m *Manager) Owned() []block.ID {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]block.ID, 0, len(m.owned))
	for _, id := range m.owned {
		list = append(list, id)
	}
	slices.SortFunc(list, func(a, b block.ID) int { return int(a.Num.Minor) - int(b.Num.Minor) })
	return list
}
