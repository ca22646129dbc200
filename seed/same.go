package seed

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
)

// findSame finds equal files: same size, same holes, same SHA-256. Only files
// of a size that others have are read. Those without copy-on-write cannot share.
func findSame(ctx context.Context, src *source) error {
	bySize := map[int64]int{}
	candidate := func(e *entry) bool {
		return e.regular() && !e.inline() && e.data > 0 && e.flags&flagNoCow == 0
	}
	for _, e := range src.entries {
		if candidate(e) {
			bySize[e.size]++
		}
	}
	first := map[[sha256.Size]byte]*entry{}
	h, buf := sha256.New(), make([]byte, mib)
	for _, e := range src.entries {
		if !candidate(e) || bySize[e.size] < 2 {
			continue
		}
		sum, err := sumUp(ctx, src, e, h, buf)
		if err != nil {
			return err
		}
		if e.same = first[sum]; e.same == nil {
			first[sum] = e
		}
	}
	return nil
}

func sumUp(ctx context.Context, src *source, e *entry, h hash.Hash, buf []byte) (sum [sha256.Size]byte, err error) {
	f, err := src.open(e)
	if err != nil {
		return sum, err
	}
	defer func() { _ = f.Close() }() // only read from
	h.Reset()
	_ = binary.Write(h, binary.LittleEndian, e.size) // a hash takes everything
	err = e.pieces(f, func(start, end int64) error {
		_ = binary.Write(h, binary.LittleEndian, [2]int64{start, end})
		for at := start; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := buf[:min(end-at, int64(len(buf)))]
			if err := f.read(p, at); err != nil {
				return err
			}
			_, _ = h.Write(p)
			at += int64(len(p))
		}
		return nil
	})
	return [sha256.Size]byte(h.Sum(nil)), err
}
