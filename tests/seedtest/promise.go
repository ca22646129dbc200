package seedtest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// promise is a line about one thing that a [Writer] writes. It replaces what
// earlier lines said of the same thing.
type promise struct {
	// One of these says what it is about.
	Log   string `json:"log,omitempty"`
	File  string `json:"file,omitempty"`
	Block *int   `json:"block,omitempty"`

	Sure  uint64 `json:"sure"`
	Maybe uint64 `json:"maybe"`
	// Of a log: its first record, how far it is synced, and whether it may be
	// gone, or is gone.
	First    uint64 `json:"first,omitempty"`
	Synced   uint64 `json:"synced,omitempty"`
	Deleting bool   `json:"deleting,omitempty"`
	Deleted  bool   `json:"deleted,omitempty"`
}

func (w *Writer) promise(p promise) error {
	if w.tell == nil {
		return nil
	}
	line, err := json.Marshal(p)
	if err != nil {
		return err
	}
	// With one write: nobody is to see half a promise.
	if _, err = w.tell.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("cannot tell what is promised: %w", err)
	}
	return nil
}

func (w *Writer) promiseFile(name string) error {
	s := w.files[name]
	return w.promise(promise{File: name, Sure: s.sure, Maybe: s.maybe})
}

func (w *Writer) promiseBlock(i int) error {
	return w.promise(promise{Block: &i, Sure: w.blocks[i].sure, Maybe: w.blocks[i].maybe})
}

func (w *Writer) promiseLog(name string) error {
	l := w.logs[name]
	if l == nil {
		return w.promise(promise{Log: name, Deleted: true})
	}
	return w.promise(promise{Log: name, First: l.first, Synced: l.synced, Deleting: l.deleting})
}

// Promised makes a stopped writer of what another one told (see
// [StartPromising]), for [Writer.Verify]. A last line that is cut off is left
// out: what it was about had not begun, or nobody was told that it had ended.
// It gives nil where the other one had not got to work yet.
func Promised(told io.Reader) (*Writer, error) {
	w := &Writer{cancel: func() {}, done: make(chan struct{}), logs: map[string]*logState{}, files: map[string]*fileState{}}
	close(w.done)
	blocks := map[int]bool{}
	for lines := bufio.NewReader(told); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read what was promised: %w", err)
		}
		var p promise
		if err := json.Unmarshal(line, &p); err != nil {
			return nil, fmt.Errorf("cannot understand the promise %q: %w", line, err)
		}
		state := state{sure: p.Sure, maybe: p.Maybe}
		switch {
		case p.Block != nil:
			w.blocks[*p.Block] = state
			blocks[*p.Block] = true
		case p.File != "":
			w.file(p.File).state = state
		case p.Deleted:
			delete(w.logs, p.Log)
		default:
			w.logs[p.Log] = &logState{first: p.First, synced: p.Synced, deleting: p.Deleting}
		}
	}
	if len(blocks) < tableBlocks { // they are the first that is promised
		return nil, nil
	}
	return w, nil
}
