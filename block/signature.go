package block

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Signature is one mark that a file system, a partition table or another user
// of a device left on it.
type Signature struct {
	// Type as libblkid names it: "ext4", "gpt", "dos", "crypto_LUKS", "swap", "btrfs".
	Type string
	// Label and UUID, "" where the format has none.
	Label, UUID string
	// Usage: "filesystem", "partition-table", "raid", "crypto" or "other".
	Usage string
	// Offset of the magic bytes from the start of the device.
	Offset uint64
	length uint64
}

// runWipefs asks util-linux what is on f. wipefs is the oracle because a
// signature that goes unnoticed means data destroyed: it knows all of
// libblkid's formats, lists every one of them with its offset where a device
// carries several, and lists those with a bad checksum too. It is given the
// open descriptor, so that it looks at this device and no other, opens that for
// reading only, and changes nothing.
func runWipefs(ctx context.Context, f *os.File) ([]Signature, error) {
	tool, err := lookTool("wipefs")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, tool, "--json", "--no-act", "--output", "TYPE,LABEL,UUID,USAGE,OFFSET,LENGTH", "/dev/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"LC_ALL=C.UTF-8"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("cannot read the signatures on %s: %w %s", f.Name(), err, strings.TrimSpace(stderr.String()))
	}
	list, err := parseWipefs(out)
	if err != nil {
		return nil, fmt.Errorf("cannot read the signatures on %s: %w", f.Name(), err)
	}
	return list, nil
}

// lookTool finds a program of the system also when sbin is not in PATH.
func lookTool(name string) (string, error) {
	for _, path := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(path); err == nil {
			return found, nil
		}
	}
	return "", ErrNoProbeTool
}

func isNoTool(err error) bool { return errors.Is(err, ErrNoProbeTool) }

// parseWipefs reads the JSON that `wipefs --json` prints. Nothing at all is what
// some versions print for a device without a signature.
func parseWipefs(out []byte) ([]Signature, error) {
	if len(bytes.TrimSpace(out)) == 0 {
		return nil, nil
	}
	var report struct {
		Signatures []struct {
			Type, Label, UUID, Usage string
			Offset                   string
			Length                   json.Number
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return nil, fmt.Errorf("cannot understand wipefs: %w", err)
	}
	var list []Signature
	for _, s := range report.Signatures {
		offset, err := strconv.ParseUint(s.Offset, 0, 64)
		if err != nil {
			return nil, fmt.Errorf("cannot understand wipefs: %w", err)
		}
		if s.Type == "" {
			return nil, errors.New("cannot understand wipefs: a signature has no type")
		}
		length, _ := strconv.ParseUint(s.Length.String(), 10, 64)
		list = append(list, Signature{Type: s.Type, Label: s.Label, UUID: s.UUID, Usage: s.Usage, Offset: offset, length: length})
	}
	return list, nil
}
