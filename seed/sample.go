package seed

import (
	"compress/flate"
	"context"
	"io"
	"math"
)

const (
	sampleSize = 16 * kib
	// fewSamples bounds how many samples are compressed for the estimate.
	fewSamples = 2000
	// noGain is what a sample that does not compress keeps of its size. Zstd
	// does a little better than the deflate that is tried here, and Btrfs
	// saves whole blocks of 4 KiB only: of 128 KiB at least 3%.
	noGain = 0.97
	// denseBits is the entropy, in bits a byte, from where on a sample may be
	// such that deflate has to say.
	denseBits = 7.7
)

// sizes are what examine found.
type sizes struct {
	// content is without holes and copies, need an estimate of what building the
	// image takes with a tenth to spare, virtual how long the filesystem is meanwhile.
	content, need, virtual uint64
	// metadata is room enough for it, with what is written anew meanwhile.
	metadata uint64
}

// examine finds what does not compress and what is equal, and says how large
// the image will be.
func examine(ctx context.Context, src *source) (sizes, error) {
	var size sizes
	if err := findSame(ctx, src); err != nil {
		return size, err
	}
	var large []*entry
	meta := 0.0
	for _, e := range src.entries {
		meta += 700 + 6*float64(len(e.path)-len(dirOf(e.path))) // inode, two names, references
		for _, x := range e.xattrs {
			meta += float64(len(x.name) + len(x.value) + 60)
		}
		if !e.regular() {
			continue
		}
		size.content += uint64(e.data)
		switch {
		case e.inline():
			meta += 0.6 * float64(e.size) // most compress
		case e.same == nil:
			large = append(large, e)
			meta += float64(e.data)/4096*8 + 200
		}
	}
	s := sampler{stride: len(large)/fewSamples + 1, buf: make([]byte, sampleSize)}
	s.zip, _ = flate.NewWriter(nil, flate.BestSpeed) // fails for unknown levels only
	var plain, compressed float64
	for i, e := range large {
		if err := ctx.Err(); err != nil {
			return size, err
		}
		ratio, err := s.examine(src, e, i%s.stride == 0)
		if err != nil {
			return size, err
		}
		if e.stored = ratio >= noGain; e.stored {
			plain += float64(e.data)
		} else {
			compressed += float64(e.data)
		}
	}
	if s.tried > 0 {
		compressed *= s.left / s.tried // about what zstd and whole blocks come to
	}
	size.metadata = uint64(2*meta) + 32*mib
	meta += 16 * mib
	size.need = uint64(1.1 * (plain + compressed + meta))
	if plain+compressed > firstGroup { // the last group is there twice while it is moved
		size.need += groupSize
	}
	// Long enough even if nothing compressed: it costs nothing. A tenth of it
	// has to hold one data group.
	size.virtual = uint64(max(2.75*gib, 1.1*float64(size.content)+2*meta+gib)) / mib * mib
	return size, nil
}

type sampler struct {
	buf    []byte
	zip    *flate.Writer
	stride int
	// Of the files with tried bytes so many were left, as far as samples tell.
	tried, left float64
}

// examine looks at some places of a file: the ratio is that of the place which
// compresses best. Where a look is enough it is 0, but not if always is set.
func (s *sampler) examine(src *source, e *entry, always bool) (float64, error) {
	if !e.dense() || e.flags&flagNoCow != 0 {
		return 0, nil
	}
	f, err := src.open(e)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // only read from
	places := 1
	if e.size > 128*kib {
		places = int(min(3+e.size/(4*mib), 16))
	}
	best := 1.0
	for i := range places {
		p := s.buf[:min(e.size, sampleSize)]
		at := (e.size - int64(len(p))) * int64(i+1) / int64(places+1)
		if err := f.read(p, at); err != nil {
			return 0, err
		}
		ratio := 0.0
		if always || entropy(p) > denseBits {
			ratio = s.compress(p)
		}
		if always && ratio < noGain {
			s.tried += float64(e.size)
			s.left += ratio * float64(e.size)
			always = false // the place after it is only for the kind of file
		}
		if best = min(best, ratio); best < noGain {
			break
		}
	}
	return best, nil
}

func (s *sampler) compress(p []byte) float64 {
	var n length
	s.zip.Reset(&n)
	_, _ = s.zip.Write(p) // neither can fail, as length does not
	_ = s.zip.Close()
	return min(1, float64(n)/float64(len(p)))
}

type length int

func (n *length) Write(p []byte) (int, error) {
	*n += length(len(p))
	return len(p), nil
}

var _ io.Writer = (*length)(nil)

// entropy in bits a byte, as if bytes did not depend on each other.
func entropy(p []byte) float64 {
	var count [256]int
	for _, b := range p {
		count[b]++
	}
	var sum float64
	for _, n := range count {
		if n > 0 {
			f := float64(n) / float64(len(p))
			sum -= f * math.Log2(f)
		}
	}
	return sum
}
