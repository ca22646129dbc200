package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"sproutd.org/sproutd/block"
	"sproutd.org/sproutd/daemon/fault"
	"sproutd.org/sproutd/daemon/plan"
)

// journal keeps, below one directory, what was intended. It never says what
// is: that the kernel says. A record is one file, written to a temporary file,
// fsynced and renamed, so that a crash leaves the old or the new one.
//
//	jobs/<number>.json     one job: what was asked, how it ended
//	sprouts/<key>.json     what serves a sprout and was made for it; the key is
//	                       the fsid, once there is one
//	reset                  a mark: the early boot is to drop the sprout
type journal struct {
	dir  string
	lock *os.File
}

// jobRecord is a job in the journal.
type jobRecord struct {
	Number    uint32
	FSID      string
	Request   plan.Request
	UID       uint32
	Start     time.Time
	End       time.Time `json:",omitzero"`
	State     JobState
	BytesDone uint64
	Steps     uint32
	ErrorCode fault.Code `json:",omitempty"`
	Error     string     `json:",omitempty"`
	Result    jobResult
}

// jobResult is what a job leaves to know.
type jobResult struct {
	// Notes are things done otherwise than planned, in the user's terms.
	Notes []string `json:",omitempty"`
	// Files that could not be read, where the job failed for that.
	Files        []string `json:",omitempty"`
	SafeToUnplug bool     `json:",omitempty"`
	// Way says whether a writable member was copied or moved; "" for neither.
	Way string `json:",omitempty"`
	// ReadAhead says whether the seed was read ahead, or why not; "" where no
	// seed left.
	ReadAhead      string   `json:",omitempty"`
	ReadAheadBytes uint64   `json:",omitempty"`
	MediaHolders   []string `json:",omitempty"`
	// Copy is the path of the seed's copy, or "ram"; "" where none was made.
	Copy      string `json:",omitempty"`
	CopyBytes uint64 `json:",omitempty"`
}

// sproutRecord is what the kernel cannot tell about a sprout.
type sproutRecord struct {
	Key  string
	FSID string
	// Creating is true until CreateSprout has finished. After a crash such a
	// sprout is taken down again: nobody was told of it.
	Creating bool `json:",omitempty"`
	// Created is true for a sprout that CreateSprout made.
	Created    bool `json:",omitempty"`
	MountPoint string
	// Seed is the block device of the seed; Loop is true if it is a loop device.
	Seed block.ID
	Loop bool
	// Zrams are the zram devices made for the sprout, and the loop over a file in
	// memory that the early boot makes where there is no zram.
	Zrams []block.ID
	// Media the seed lies on. NoMedia is true for a sprout that was mounted
	// without a seed in this boot.
	Media   Media
	NoMedia bool `json:",omitempty"`
	// Asked is true once the wish of the early boot was looked at, see fulfil.
	Asked bool `json:",omitempty"`
	// BootID of the boot for which the devices above are right.
	BootID string
}

// openJournal opens the journal in dir for one daemon: a second one would take
// the first one's jobs for interrupted.
func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the state directory: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the state directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		err = fmt.Errorf("cannot lock the state directory %s, another sproutd uses it: %w", dir, err)
		return nil, errors.Join(err, lock.Close())
	}
	j := &journal{dir: dir, lock: lock}
	for _, sub := range []string{j.path("jobs"), j.path("sprouts")} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("cannot make the state directory: %w", err), j.close())
		}
	}
	return j, nil
}

// close lets another daemon use the journal.
func (j *journal) close() error { return j.lock.Close() }

func (j *journal) path(elem ...string) string {
	return filepath.Join(append([]string{j.dir}, elem...)...)
}

func (j *journal) saveJob(r jobRecord) error {
	return j.save(j.path("jobs", fmt.Sprintf("%d.json", r.Number)), r)
}

func (j *journal) saveSprout(r sproutRecord) error {
	return j.save(j.path("sprouts", r.Key+".json"), r)
}

// save writes one record. It is on stable storage when save returns.
func (j *journal) save(path string, record any) error {
	data, err := json.MarshalIndent(record, "", "\t")
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", path, err)
	}
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(filepath.Dir(path))); err != nil {
		return fmt.Errorf("cannot write the journal: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename in dir lasting.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("cannot fsync %s: %w", dir, err)
	}
	return nil
}

func (j *journal) removeSprout(key string) error { return remove(j.path("sprouts", key+".json")) }

func (j *journal) removeJob(number uint32) error {
	return remove(j.path("jobs", fmt.Sprintf("%d.json", number)))
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove from the journal: %w", err)
	}
	return nil
}

// load reads all records. A file that cannot be read or understood is left
// alone and named in bad: a damaged intent must not keep the daemon from
// showing what is.
func (j *journal) load() (jobs []jobRecord, sprouts []sproutRecord, bad []error) {
	jobs, badJobs := loadAll[jobRecord](j.path("jobs"))
	sprouts, badSprouts := loadAll[sproutRecord](j.path("sprouts"))
	slices.SortFunc(jobs, func(a, b jobRecord) int { return int(a.Number) - int(b.Number) })
	return jobs, sprouts, append(badJobs, badSprouts...)
}

func loadAll[T any](dir string) (records []T, bad []error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, []error{err}
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if !strings.HasSuffix(entry.Name(), ".json") || strings.HasPrefix(entry.Name(), ".") {
			_ = os.Remove(path) // a record that was never finished
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		var record T
		if err := json.Unmarshal(data, &record); err != nil {
			bad = append(bad, fmt.Errorf("cannot read %s: %w", path, err))
			continue
		}
		records = append(records, record)
	}
	return records, bad
}
