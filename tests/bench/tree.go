package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// tree is what the images are made of.
type tree struct {
	Kind  string `json:"kind"`
	Bytes int64  `json:"bytes"`
	Files int64  `json:"files"`
}

// kinds say which files are taken, by their size.
func kinds() map[string]func(size int64) bool {
	const kib, mib = 1 << 10, 1 << 20
	return map[string]func(int64) bool{
		"mixed": func(int64) bool { return true },
		"small": func(size int64) bool { return size <= 32*kib },
		"large": func(size int64) bool { return size >= mib },
	}
}

// folder is a directory with what lies directly in it.
type folder struct {
	path  string
	names []string
	bytes int64
	hash  uint64
}

// makeTree copies files of this machine to dir until so many bytes are there:
// whole directories, in the order of a hash of their names, so that a small
// tree is like a large one and the same machine gives the same tree. Where the
// machine has too little, it is taken again with each file a little different.
func makeTree(ctx context.Context, dir, kind string, limit int64) (tree, error) {
	t := tree{Kind: kind}
	keep, ok := kinds()[kind]
	if !ok {
		return t, fmt.Errorf("there is no tree of the kind %q", kind)
	}
	folders, err := listFolders(keep, limit/8)
	if err != nil {
		return t, err
	}
	for round := 0; t.Bytes < limit; round++ {
		before := t.Bytes
		top := dir
		if round > 0 {
			top = filepath.Join(dir, fmt.Sprintf("again-%d", round))
		}
		for _, f := range folders {
			if err := context.Cause(ctx); err != nil {
				return t, err
			}
			if t.Bytes >= limit {
				break
			}
			if err := t.copyFolder(f, top, round); err != nil {
				return t, fmt.Errorf("cannot copy %s: %w", f.path, err)
			}
		}
		if t.Bytes == before {
			return t, errors.New("this machine has no files of the kind " + kind)
		}
	}
	return t, nil
}

func listFolders(keep func(int64) bool, largest int64) ([]folder, error) {
	var list []folder
	at := map[string]int{}
	for _, top := range []string{"/usr", "/opt"} {
		err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it may be deleted at any moment, and /opt need not be there
			}
			if err != nil {
				return err
			}
			info, err := entry.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			link := info.Mode().Type() == fs.ModeSymlink
			if !link && (!info.Mode().IsRegular() || info.Size() > largest || !keep(info.Size())) {
				return nil
			}
			parent := filepath.Dir(path)
			i, ok := at[parent]
			if !ok {
				i = len(list)
				at[parent] = i
				h := fnv.New64a()
				_, _ = io.WriteString(h, parent) // a hash takes everything
				list = append(list, folder{path: parent, hash: h.Sum64()})
			}
			list[i].names = append(list[i].names, entry.Name())
			if !link {
				list[i].bytes += info.Size()
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	// Those with nothing but links are of no use, and one that is large would
	// make two trees unlike.
	list = slices.DeleteFunc(list, func(f folder) bool { return f.bytes == 0 || f.bytes > 2*largest })
	slices.SortFunc(list, func(a, b folder) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.path, b.path)) })
	return list, nil
}

func (t *tree) copyFolder(f folder, top string, round int) error {
	to := filepath.Join(top, f.path)
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, name := range f.names {
		n, err := copyOne(filepath.Join(to, name), filepath.Join(f.path, name), round)
		if err != nil {
			return err
		}
		t.Bytes += n
		if n >= 0 {
			t.Files++
		}
	}
	return nil
}

// copyOne copies a file or a symbolic link with its attributes.
func copyOne(to, from string, round int) (n int64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return 0, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		target, err := os.Readlink(from)
		if err != nil {
			return 0, err
		}
		return 0, cmp.Or(os.Symlink(target, to), os.Lchown(to, int(st.Uid), int(st.Gid)))
	}
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if round > 0 { // so no tool finds that it has this already
		n, err := fmt.Fprintf(out, "%d %s\n", round, from)
		if err != nil {
			return int64(n), err
		}
	}
	if n, err = io.Copy(out, in); err != nil {
		return n, err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	return n, cmp.Or(out.Chown(int(st.Uid), int(st.Gid)), unix.Fchmod(int(out.Fd()), st.Mode&0o7777),
		unix.UtimesNanoAt(unix.AT_FDCWD, to, times, 0))
}

// countFiles counts what is in a directory, directories left out, and stays on
// its file system.
func countFiles(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			n++
		}
		return err
	})
	return n, err
}
