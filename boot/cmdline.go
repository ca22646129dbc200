package boot

import (
	"encoding/hex"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// Spec names a block device, as mount(8) would: by its label, its UUID, those
// of the partition, or by the path of its node.
type Spec struct {
	By, Value string // By is one of LABEL, UUID, PARTUUID, PARTLABEL and PATH
}

// IsZero reports whether s names nothing.
func (s Spec) IsZero() bool { return s == Spec{} }

// String is how it is written on the kernel command line.
func (s Spec) String() string {
	if s.By == byPath {
		return s.Value
	}
	return s.By + "=" + s.Value
}

const (
	byLabel     = "LABEL"
	byUUID      = "UUID"
	byPartUUID  = "PARTUUID"
	byPartLabel = "PARTLABEL"
	byPath      = "PATH"
)

// Size is that of the zram device: a share of the memory, or bytes.
type Size struct{ Percent, Bytes uint64 }

// of gives the size in bytes on a machine with that much memory.
func (s Size) of(memory uint64) uint64 {
	if s.Bytes != 0 {
		return s.Bytes
	}
	return memory * s.Percent / 100
}

// String is how it is written on the kernel command line.
func (s Size) String() string {
	if s.Bytes != 0 {
		return strconv.FormatUint(s.Bytes, 10)
	}
	return fmt.Sprintf("%d%%", s.Percent)
}

// Request is what the kernel command line asks for.
type Request struct {
	// Media carries the seed: root=sprout:…
	Media Spec
	// Image is the path of the seed on it: rd.sprout.image.
	Image string
	// Zram is the size of the zram device of a volatile session: rd.sprout.zram.
	Zram Size
	// NoPersist: what was kept is left alone: rd.sprout.persist=no. Persist, if
	// not zero, names the only device on which it is looked for.
	NoPersist bool
	Persist   Spec
	// Reset drops what was kept on the media: rd.sprout.reset.
	Reset bool
	// Check reads the seed and compares it with its checksums: rd.sprout.check.
	Check bool
	// RAM has the daemon release the seed to memory, once the system is up:
	// rd.sprout.ram.
	RAM bool
	// Timeout is how long the media are waited for: rd.sprout.timeout.
	Timeout time.Duration
}

// The defaults of a command line that says no more than root=sprout:…
const (
	defaultImage   = "/LiveOS/root.img"
	defaultPercent = 50
	defaultTimeout = 60 * time.Second

	maxPercent = 400 // what RAM compressed four to one has room for
	maxTimeout = 3600
)

// ParseCommandLine reads a kernel command line. Where a parameter comes twice
// the last one counts, as for the kernel. Of each that makes no sense a warning
// says so, and what is done instead. Only root= has no default: Media is zero
// without it.
func ParseCommandLine(line string) (Request, []string) {
	r := Request{Image: defaultImage, Zram: Size{Percent: defaultPercent}, Timeout: defaultTimeout}
	var warnings []string
	instead := func(key, value, problem, done string) {
		warnings = append(warnings, fmt.Sprintf("%s=%s %s: %s.", key, value, problem, done))
	}
	flag := func(key, value string, hasValue bool) bool {
		on, ok := parseBool(value)
		if hasValue && !ok {
			instead(key, value, "is neither yes nor no", "it was ignored")
		}
		return on || !hasValue
	}
	for _, word := range words(line) {
		key, value, hasValue := strings.Cut(word, "=")
		switch key {
		case "root":
			if text, ours := strings.CutPrefix(value, "sprout:"); ours {
				var ok bool
				if r.Media, ok = parseSpec(text); !ok {
					instead(key, value, "names no device", "there are no media to boot from")
				}
			} else {
				r.Media = Spec{} // a later root= takes an earlier one's place
			}
		case "rd.sprout.image":
			r.Image = defaultImage
			if clean := path.Clean("/" + value); clean == "/" {
				instead(key, value, "is no path of a file", defaultImage+" is used")
			} else {
				r.Image = clean
			}
		case "rd.sprout.zram":
			var ok bool
			if r.Zram, ok = parseSize(value); !ok {
				r.Zram = Size{Percent: defaultPercent}
				instead(key, value, fmt.Sprintf("is no size: it takes a share of the memory up to %d%%, or bytes with K, M, G or T after them", maxPercent),
					r.Zram.String()+" is used")
			}
		case "rd.sprout.persist":
			r.Persist, r.NoPersist = Spec{}, false
			if value == "auto" {
				continue
			}
			if on, ok := parseBool(value); ok {
				r.NoPersist = !on
				continue
			}
			var ok bool
			if r.Persist, ok = parseSpec(value); !ok {
				instead(key, value, "is none of auto, no and the name of a device", "auto is used")
			}
		case "rd.sprout.reset":
			r.Reset = flag(key, value, hasValue)
		case "rd.sprout.check":
			r.Check = flag(key, value, hasValue)
		case "rd.sprout.ram":
			r.RAM = flag(key, value, hasValue)
		case "rd.sprout.timeout":
			r.Timeout = defaultTimeout
			if seconds, err := strconv.ParseUint(value, 10, 32); err != nil || seconds > maxTimeout {
				instead(key, value, fmt.Sprintf("is no number of seconds up to %d", maxTimeout), fmt.Sprintf("%d is used", defaultTimeout/time.Second))
			} else {
				r.Timeout = time.Duration(seconds) * time.Second
			}
		default:
			if strings.HasPrefix(key, "rd.sprout.") || key == "rd.sprout" {
				warnings = append(warnings, fmt.Sprintf("%s is no parameter of this version: it was ignored.", word))
			}
		}
	}
	return r, warnings
}

// words splits a command line as the kernel does (lib/cmdline.c, next_arg):
// blanks inside of double quotes belong to the word, the quotes do not.
func words(line string) []string {
	var list []string
	var word strings.Builder
	quoted, any := false, false
	end := func() {
		if any {
			list = append(list, word.String())
		}
		word.Reset()
		any = false
	}
	for _, c := range []byte(line) {
		switch {
		case c == '"':
			quoted, any = !quoted, true
		case !quoted && strings.IndexByte(" \t\r\n\x00", c) >= 0:
			end()
		default:
			word.WriteByte(c)
			any = true
		}
	}
	end()
	return list
}

func parseBool(value string) (on, ok bool) {
	switch strings.ToLower(value) {
	case "1", "y", "yes", "on", "true":
		return true, true
	case "0", "n", "no", "off", "false":
		return false, true
	}
	return false, false
}

// parseSpec reads the name of a device.
func parseSpec(text string) (Spec, bool) {
	if strings.HasPrefix(text, "/dev/") && path.Clean(text) != "/dev" {
		return Spec{By: byPath, Value: path.Clean(text)}, true
	}
	by, value, _ := strings.Cut(text, "=")
	switch by = strings.ToUpper(by); by {
	case byLabel, byUUID, byPartUUID, byPartLabel:
		if value != "" {
			return Spec{By: by, Value: unescape(value)}, true
		}
	}
	return Spec{}, false
}

// unescape reads \x20 as udev writes it, for labels with characters that boot
// loaders do not pass on.
func unescape(text string) string {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if strings.HasPrefix(text[i:], `\x`) && i+4 <= len(text) {
			if c, err := hex.DecodeString(text[i+2 : i+4]); err == nil {
				b.WriteByte(c[0])
				i += 3
				continue
			}
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

// parseSize reads a share of the memory or a number of bytes.
func parseSize(text string) (Size, bool) {
	if number, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.ParseUint(number, 10, 32)
		return Size{Percent: n}, err == nil && n > 0 && n <= maxPercent
	}
	shift := 0
	for i, unit := range []string{"K", "M", "G", "T"} {
		if number, ok := strings.CutSuffix(strings.ToUpper(text), unit); ok {
			text, shift = number, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 || n<<shift>>shift != n {
		return Size{}, false
	}
	return Size{Bytes: n << shift}, true
}
