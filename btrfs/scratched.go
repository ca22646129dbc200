package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// Where a superblock has its magic and its device item, which is all that differs
// between the members after a commit, but for the checksum.
const (
	superMagicAt = 64
	superDevItem = 201
)

// Unscratch gives the superblock as which a block of 4096 bytes at byte at of a
// device was written, before the kernel let go of the device: of that it clears
// the magic and nothing else. The checksum stays what it was, and so proves with
// the magic that nothing else was changed; otherwise there is an error. Source:
// fs/btrfs/volumes.c, btrfs_scratch_superblock; seen on 6.18.
func Unscratch(block []byte, at uint64) ([]byte, Super, error) {
	if len(block) != superSize || !bytes.Equal(block[superMagicAt:][:len(superMagic)], make([]byte, len(superMagic))) {
		return nil, Super{}, fmt.Errorf("%w: no magic was wiped there", ErrNotBtrfs)
	}
	whole := bytes.Clone(block)
	copy(whole[superMagicAt:], superMagic)
	s, err := parseSuper(whole, at)
	if err == nil && s.CsumType.Size() == 0 {
		err = errors.New("its checksum cannot be verified")
	}
	if err != nil {
		return nil, Super{}, fmt.Errorf("%w: %w", ErrSuperCorrupt, err)
	}
	return whole, s, nil
}

// ReadScratched reads the primary superblock of a device of size bytes that has
// lost its magic and nothing else.
func ReadScratched(r io.ReaderAt, size int64) (Super, error) {
	raw, err := superBlock(r, size)
	if err != nil {
		return Super{}, err
	}
	_, s, err := Unscratch(raw, superOffset)
	if err == nil && s.DevSize > uint64(size) {
		err = fmt.Errorf("%w: %d of %d bytes", ErrTruncated, size, s.DevSize)
	}
	return s, err
}

// ErrNotCutOff says that what looked like a replace cut off at its end is none.
var ErrNotCutOff = errors.New("it is no replace that was cut off at its end")

// ReadCutOff lists the devices of an unmounted filesystem, as [ReadDevItems] does,
// if the power was cut at the very end of a replace of member by target. The
// kernel wipes the superblocks of the member first, and the commit after that is
// what makes the target the member; in between there is none to mount. Source:
// fs/btrfs/dev-replace.c, btrfs_dev_replace_finishing.
//
// So it was if the member lacks its magic and nothing else, if the target is still
// one, written by the same commit, and if the trees of that commit say that the
// member is one and is being copied. All else is [ErrNotCutOff], above all a
// replace that came to its end: its target has the devid of the member.
func ReadCutOff(member, target io.ReaderAt, open func(device UUID) io.ReaderAt) ([]DevItem, error) {
	raw, err := superBlock(member, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	source, super, err := Unscratch(raw, superOffset)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotCutOff, err)
	}
	to, raw, err := readSuper(target, math.MaxInt64)
	switch {
	case err != nil:
		return nil, err
	case to.DevID != replaceDevID || !sameCommit(source, raw):
		return nil, fmt.Errorf("%w: the target is none, or of another time", ErrNotCutOff)
	}
	t := newTrees(super, raw, open)
	items, err := t.devItems(raw)
	if err != nil {
		return nil, fmt.Errorf("cannot read the list of devices: %w", err)
	}
	status, err := t.replace(raw)
	if err != nil {
		return nil, fmt.Errorf("cannot read the state of the replace: %w", err)
	}
	if devid := status.DevID; devid != super.DevID || !slices.ContainsFunc(items, func(i DevItem) bool { return i.DevID == devid && i.UUID == super.DevUUID && i.FSID == super.FSID }) {
		return nil, fmt.Errorf("%w: it is not this member that was replaced", ErrNotCutOff)
	}
	return items, nil
}

// sameCommit reports whether two superblocks were written by one commit.
func sameCommit(a, b []byte) bool {
	return bytes.Equal(a[32:superDevItem], b[32:superDevItem]) && bytes.Equal(a[superDevItem+devItem:], b[superDevItem+devItem:])
}

// ReadReplace reads the state of the running or last replace of an unmounted
// filesystem, as of the last commit that r, one of its devices, had a part in; r
// may have lost its magic. open is as for [ReadDevItems].
func ReadReplace(r io.ReaderAt, open func(device UUID) io.ReaderAt) (ReplaceStatus, error) {
	raw, err := superBlock(r, math.MaxInt64)
	if err != nil {
		return ReplaceStatus{}, err
	}
	whole, super, err := Unscratch(raw, superOffset)
	if err != nil {
		super, whole, err = readSuper(r, math.MaxInt64)
	}
	if err != nil {
		return ReplaceStatus{}, err
	}
	status, err := newTrees(super, whole, open).replace(whole)
	if err != nil {
		return ReplaceStatus{}, fmt.Errorf("cannot read the state of the replace: %w", err)
	}
	return status, nil
}

// replace reads the item of the replace in the tree of devices.
func (t *trees) replace(raw []byte) (status ReplaceStatus, err error) {
	chunks, err := t.allChunks(raw)
	if err != nil {
		return status, err
	}
	t.chunks = append(t.chunks, chunks...)
	dev, err := t.rootOf(raw, treeDev)
	if err != nil || dev == (root{}) {
		return status, err
	}
	at := key{0, typeDevReplace, 0}
	err = t.walk(dev, at, at, func(_ key, item []byte) error {
		status = replaceItem(item)
		return nil
	})
	return status, err
}

// replaceItem reads a struct btrfs_dev_replace_item: what is copied, and when that
// began. Its states are those of the ioctl.
func replaceItem(item []byte) ReplaceStatus {
	if len(item) < 48 {
		return ReplaceStatus{}
	}
	s := ReplaceStatus{
		State:   ReplaceState(binary.LittleEndian.Uint64(item[32:])),
		Started: unixTime(binary.LittleEndian.Uint64(item[40:])),
	}
	if !s.Over() {
		s.DevID = binary.LittleEndian.Uint64(item)
	}
	return s
}
