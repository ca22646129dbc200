package btrfs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sproutd.org/sproutd/tests/testenv"
)

// The vectors are those of the xxHash reference implementation and of
// `b2sum -l 256`; "abc" for BLAKE2b is also what RFC 7693 computes with 32 bytes.
func TestChecksums(t *testing.T) {
	count := make([]byte, 300)
	for i := range count {
		count[i] = byte(i)
	}
	for _, c := range []struct {
		typ  CsumType
		data string
		want string
	}{
		{CsumCRC32C, "123456789", "839206e3"},
		{CsumXXHash, "", "99e9d85137db46ef"},
		{CsumXXHash, "a", "5b6e8ca9f1c44ed2"},
		{CsumXXHash, "abc", "990977adf52cbc44"},
		{CsumSHA256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
		{CsumBlake2b, "", "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"},
		{CsumBlake2b, "abc", "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"},
		{CsumBlake2b, string(count[:128]), "c3582f71ebb2be66fa5dd750f80baae97554f3b015663c8be377cfcb2488c1d1"},
		{CsumBlake2b, string(count[:129]), "f7f3c46ba2564ff4c4c162da1f5b605f9f1c4aa6a20652a9f9a337c1a2f5b9c9"},
		{CsumBlake2b, string(count), "3a486e3fe3ee414853000269ac020030aeef748cb05cd62ba85939ec298ef25c"},
		{CsumXXHash, "Nobody inspects the spammish repetition", "f18b378a3ca8cefb"},
	} {
		if got := hex.EncodeToString(c.typ.Sum([]byte(c.data))); got != c.want {
			t.Errorf("%s of %d bytes is %s, wanted %s", c.typ, len(c.data), got, c.want)
		}
	}
	if CsumType(9).Sum(count) != nil || CsumType(9).Size() != 0 {
		t.Error("an unknown checksum type has a checksum")
	}
}

// image makes a filesystem in a sparse file of 256 MiB, or of what args say.
func image(t *testing.T, args ...string) string {
	t.Helper()
	testenv.NeedTool(t, "mkfs.btrfs")
	path := filepath.Join(t.TempDir(), "root.img")
	truncate(t, path, 256<<20)
	run(t, "mkfs.btrfs", append([]string{"-q", path}, args...)...)
	return path
}

func truncate(t *testing.T, path string, size int64) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(file.Truncate(size), file.Close()); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func superOf(t *testing.T, path string) (Super, error) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return ReadSuper(file, st.Size())
}

func TestReadSuperOfMkfs(t *testing.T) {
	const fsid = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
	for _, c := range []struct {
		csum, profile string
		typ           CsumType
	}{
		{"crc32c", "single", CsumCRC32C},
		{"xxhash", "dup", CsumXXHash},
		{"sha256", "single", CsumSHA256},
		{"blake2", "dup", CsumBlake2b},
	} {
		t.Run(c.csum, func(t *testing.T) {
			path := image(t, "--csum", c.csum, "-m", c.profile, "-U", fsid, "-L", "live "+c.csum)
			s, err := superOf(t, path)
			if err != nil {
				t.Fatal(err)
			}
			if s.FSID.String() != fsid || s.MetadataUUID != s.FSID || s.DevUUID.IsZero() || s.Label != "live "+c.csum {
				t.Errorf("wrong names: %+v", s)
			}
			if s.Size != 256<<20 || s.DevSize != 256<<20 || s.Used == 0 || s.Used > s.Size || s.DevID != 1 || s.NumDevices != 1 {
				t.Errorf("wrong sizes: %+v", s)
			}
			if s.Seeding || s.CsumType != c.typ || s.NodeSize != 16384 || s.SectorSize != 4096 || s.LogRoot != 0 || s.Generation == 0 {
				t.Errorf("wrong facts: %+v", s)
			}
			if s.MetadataProfile != c.profile {
				t.Errorf("the metadata profile is %q, wanted %q", s.MetadataProfile, c.profile)
			}
		})
	}
}

func TestReadSuperSeesTheSeedFlag(t *testing.T) {
	testenv.NeedTool(t, "btrfstune")
	path := image(t)
	before, err := superOf(t, path)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "btrfstune", "-S", "1", path)
	after, err := superOf(t, path)
	if err != nil || before.Seeding || !after.Seeding || after.FSID != before.FSID {
		t.Errorf("seed flag %v, then %v (%v)", before.Seeding, after.Seeding, err)
	}
}

func TestReadSuperOfDamagedImages(t *testing.T) {
	data, err := os.ReadFile(image(t))
	if err != nil {
		t.Fatal(err)
	}
	read := func(data []byte) error {
		_, err := ReadSuper(bytes.NewReader(data), int64(len(data)))
		return err
	}
	// resum makes the checksum right again, so that the other checks are met.
	resum := func(data []byte) []byte {
		copy(data[superOffset:], CsumCRC32C.Sum(data[superOffset+32:superOffset+superSize]))
		return data
	}
	changed := func(at int, value byte) []byte {
		d := slices.Clone(data[:superOffset+superSize])
		d[superOffset+at] = value
		return d
	}
	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"empty":                  {nil, ErrNotBtrfs},
		"ends in the superblock": {data[:superOffset+superSize-1], ErrNotBtrfs},
		"no magic":               {make([]byte, 1<<20), ErrNotBtrfs},
		"ends after it":          {data[:superOffset+superSize], ErrTruncated},
		"one byte short":         {data[:len(data)-1], ErrTruncated},
		"flipped bit":            {changed(1000, 1), ErrSuperCorrupt},
		"flipped checksum":       {changed(0, data[superOffset]^1), ErrSuperCorrupt},
		"wrong address":          {resum(changed(50, 0)), ErrSuperCorrupt},
		"odd sector size":        {resum(changed(144, 1)), ErrSuperCorrupt},
		"node size 0":            {resum(changed(149, 0)), ErrSuperCorrupt},
		"no devices":             {resum(changed(136, 0)), ErrSuperCorrupt},
		"another fsid":           {resum(changed(32, data[superOffset+32]^1)), ErrSuperCorrupt},
		"huge chunk array":       {resum(changed(163, 0xff)), ErrSuperCorrupt},
		"cut chunk array":        {resum(changed(160, data[superOffset+160]-1)), ErrSuperCorrupt},
	} {
		if err := read(c.data); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, wanted %v", name, err, c.want)
		}
	}
	if err := read(data); err != nil {
		t.Errorf("whole: %v", err)
	}
	if _, err := ReadSuper(bytes.NewReader(data[:100]), 1<<30); !errors.Is(err, ErrNotBtrfs) {
		t.Errorf("shorter than said: %v", err)
	}
	if _, err := ReadSuper(failingReader{}, 1<<30); !errors.Is(err, os.ErrPermission) {
		t.Errorf("a read error became %v", err)
	}
}

type failingReader struct{}

func (failingReader) ReadAt([]byte, int64) (int, error) { return 0, os.ErrPermission }

func TestUnsupported(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "sys/fs/btrfs/features")
	good := Super{SectorSize: 4096, NodeSize: 16384, Incompat: 0x361, CompatRO: 3}
	if got := good.Unsupported(root); len(got) != 1 || !strings.Contains(got[0], "no Btrfs") {
		t.Errorf("without Btrfs: %q", got)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"supported_checksums": "crc32c xxhash64 sha256\n", "supported_sectorsizes": "4096\n",
		"extended_iref": "0\n", "skinny_metadata": "0\n", "no_holes": "0\n", "free_space_tree": "0\n", "metadata_uuid": "0\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := good.Unsupported(root); got != nil {
		t.Errorf("a plain filesystem: %q", got)
	}
	for want, change := range map[string]func(s *Super){
		"checksum blake2b":       func(s *Super) { s.CsumType = CsumBlake2b },
		"checksum type 77":       func(s *Super) { s.CsumType = 77 },
		"sectors of 16384 bytes": func(s *Super) { s.SectorSize = 16384 },
		"feature raid56":         func(s *Super) { s.Incompat |= 1 << 7 },
		"incompat bit 40":        func(s *Super) { s.Incompat |= 1 << 40 },
		"feature verity":         func(s *Super) { s.CompatRO |= 1 << 2 },
		"compat_ro bit 9":        func(s *Super) { s.CompatRO |= 1 << 9 },
		"id was changed":         func(s *Super) { s.Seeding, s.Incompat = true, s.Incompat|incompatMetadataUUID },
		"log to replay":          func(s *Super) { s.LogRoot = 1 << 20 },
	} {
		s := good
		change(&s)
		if got := s.Unsupported(root); len(got) != 1 || !strings.Contains(got[0], want) {
			t.Errorf("wanted one reason with %q, got %q", want, got)
		}
	}
}

func FuzzReadSuper(f *testing.F) {
	block := make([]byte, superSize)
	copy(block[64:], superMagic)
	binary.LittleEndian.PutUint64(block[48:], superOffset)
	binary.LittleEndian.PutUint32(block[144:], 4096)
	binary.LittleEndian.PutUint32(block[148:], 16384)
	binary.LittleEndian.PutUint64(block[112:], 1<<30)
	binary.LittleEndian.PutUint64(block[136:], 1)
	binary.LittleEndian.PutUint64(block[201+8:], 1<<30)
	binary.LittleEndian.PutUint32(block[160:], 97)
	block[811+8] = 228
	block[811+17+44] = 1
	f.Add(block)
	f.Add(block[:100])
	f.Fuzz(func(t *testing.T, block []byte) {
		if len(block) > superSize {
			return
		}
		data := make([]byte, superOffset+superSize)
		copy(data[superOffset:], block)
		// The checksum is made right, or nothing behind it would be tried.
		typ := CsumType(binary.LittleEndian.Uint16(data[superOffset+196:]))
		copy(data[superOffset:superOffset+32], typ.Sum(data[superOffset+32:]))
		s, err := ReadSuper(bytes.NewReader(data), int64(len(data)))
		if err == nil && (s.NodeSize == 0 || s.SectorSize == 0 || s.NumDevices == 0 || s.DevSize > uint64(len(data))) {
			t.Errorf("took an impossible superblock: %+v", s)
		}
		_ = s.Unsupported("/")
	})
}
