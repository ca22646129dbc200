package block

import (
	"slices"
	"strings"
	"testing"
)

const wipefsReport = `{
   "signatures": [
      {"type": "ext4", "label": null, "uuid": "d9bb432e-cf05-44e0-b168-8eb70f6b2483", "usage": "filesystem", "offset": "0x438", "length": 2},
      {"type": "gpt", "label": null, "uuid": null, "usage": "partition-table", "offset": "0x3fffe00", "length": 8}
   ]
}`

func TestParseWipefs(t *testing.T) {
	got, err := parseWipefs([]byte(wipefsReport))
	want := []Signature{
		{Type: "ext4", UUID: "d9bb432e-cf05-44e0-b168-8eb70f6b2483", Usage: "filesystem", Offset: 0x438, length: 2},
		{Type: "gpt", Usage: "partition-table", Offset: 0x3fffe00, length: 8},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, empty := range []string{"", "\n", `{"signatures": []}`} {
		if got, err := parseWipefs([]byte(empty)); err != nil || len(got) != 0 {
			t.Errorf("%q gave %v, %v", empty, got, err)
		}
	}
	for _, bad := range []string{"{", `{"signatures":[{"type":"ext4"}]}`, `{"signatures":[{"offset":"0x1"}]}`} {
		if _, err := parseWipefs([]byte(bad)); err == nil {
			t.Errorf("%q was taken for a report", bad)
		}
	}
}

func FuzzParseWipefs(f *testing.F) {
	f.Add([]byte(wipefsReport))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, out []byte) {
		list, err := parseWipefs(out)
		for _, s := range list {
			if err != nil || s.Type == "" {
				t.Errorf("%q gave %+v, %v", out, s, err)
			}
		}
	})
}

func TestParseSwaps(t *testing.T) {
	text := "Filename\t\t\t\tType\t\tSize\n/dev/vda2                               partition\t1020\n/swap\\040file\tfile\t1020\n"
	if got, want := parseSwaps(text), []string{"/dev/vda2", "/swap file"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParseSwaps(f *testing.F) {
	f.Add("Filename\n/dev/vda2   partition\t1\n/a\\040b\tfile\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, path := range parseSwaps(text) {
			if !strings.HasPrefix(path, "/") {
				t.Errorf("%q gave the path %q", text, path)
			}
		}
	})
}

func FuzzParseIOStat(f *testing.F) {
	f.Add("100 0 2048 10 7 0 16 1 3 12 13")
	f.Fuzz(func(_ *testing.T, text string) { _, _ = parseIOStat(text) })
}

const loopEvent = "change@/devices/virtual/block/loop3\x00ACTION=change\x00DEVPATH=/devices/virtual/block/loop3\x00SUBSYSTEM=block\x00DISK_MEDIA_CHANGE=1\x00MAJOR=7\x00MINOR=3\x00DEVNAME=loop3\x00DEVTYPE=disk\x00DISKSEQ=14\x00SEQNUM=1234\x00"

func TestParseUevent(t *testing.T) {
	got, ok := parseUevent([]byte(loopEvent))
	if want := (Event{Action: "change", Name: "loop3", DevType: "disk", Num: DevNum{7, 3}, DiskSeq: 14}); !ok || got != want {
		t.Errorf("got %+v, %v, want %+v", got, ok, want)
	}
	for _, other := range []string{"", "libudev\x00\xfe\xed", "add@/devices/x\x00ACTION=add\x00SUBSYSTEM=net\x00", strings.Replace(loopEvent, "MAJOR=7", "MAJOR=x", 1)} {
		if e, ok := parseUevent([]byte(other)); ok {
			t.Errorf("%q was taken for %+v", other, e)
		}
	}
}

func FuzzParseUevent(f *testing.F) {
	f.Add([]byte(loopEvent))
	f.Add([]byte("add@\x00=\x00"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		if e, ok := parseUevent(msg); ok && (e.Action == "" || e.Name == "") {
			t.Errorf("%q gave %+v", msg, e)
		}
	})
}
