package seed

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestAFileIsReadBeforeTheRestOfItsExtent cuts a frame off: all but its end is to
// be there for the first files, and for the whole extent with all of it.
func TestAFileIsReadBeforeTheRestOfItsExtent(t *testing.T) {
	f, err := newFrames(9, nil)
	must(t, err)
	rnd := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, maxPacked)
	for i := range buf {
		buf[i] = byte('a' + rnd.IntN(16)) // about half its length
	}
	content := buf[:blocks(10000)+blocks(20000)+blocks(90000)]
	frame, err := f.of([]*entry{{size: 10000}, {size: 20000}, {size: 90000}}, content)
	must(t, err)
	if len(frame) < 50*kib || len(frame) > 70*kib {
		t.Errorf("%d bytes become %d", len(content), len(frame))
	}
	for _, c := range []struct {
		given    int
		complete int // how many bytes must be there
	}{{len(frame), len(content)}, {len(frame) - 1, 32 * kib}, {len(frame) / 4, 12 * kib}} {
		d, err := zstd.NewReader(bytes.NewReader(frame[:c.given]), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxPacked))
		must(t, err)
		got, _ := io.ReadAll(d) // what there is, before the error
		d.Close()
		if len(got) < c.complete || !bytes.Equal(got, buf[:len(got)]) {
			t.Errorf("%d of %d bytes of the frame give %d bytes, want %d at least", c.given, len(frame), len(got), c.complete)
		}
	}
}
