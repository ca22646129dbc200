package btrfs

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeFS is an open filesystem on which every ioctl answers the same.
func fakeFS(t *testing.T, r1 uintptr, errno unix.Errno) *FS {
	t.Helper()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := &FS{dir: dir, path: "/media", sys: t.TempDir(), dev: "/dev"}
	f.ioctl = func(uintptr, uint32, unsafe.Pointer) (uintptr, unix.Errno) { return r1, errno }
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestPositiveResultsAreErrors(t *testing.T) {
	for code := KernelCode(1); code <= 10; code++ {
		f := fakeFS(t, uintptr(code), 0)
		for name, err := range map[string]error{
			"add": f.Add("/dev/loop0"), "remove": f.Remove(2), "resize": f.Resize(2, 0), "cancel": f.CancelRemove(),
		} {
			var got KernelCode
			if !errors.As(err, &got) || got != code {
				t.Errorf("%s with result +%d: %v", name, code, err)
			}
			if strings.Contains(err.Error(), "error ") {
				t.Errorf("code %d has no text: %v", code, err)
			}
		}
	}
	if err := fakeFS(t, 7, 0).Remove(2); !errors.Is(err, ErrOnlyWritable) {
		t.Errorf("+7 is %v, not ErrOnlyWritable", err)
	}
	if err := fakeFS(t, 8, 0).Add("/dev/loop0"); !errors.Is(err, ErrExclusiveRunning) {
		t.Errorf("+8 is %v, not ErrExclusiveRunning", err)
	}
}

func TestErrnosStayReachable(t *testing.T) {
	err := fakeFS(t, ^uintptr(0), unix.ENOSPC).Remove(3)
	var op *OpError
	if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &op) || op.DevID != 3 || op.Path != "/media" {
		t.Errorf("ENOSPC became %#v", err)
	}
	if got, want := err.Error(), "cannot remove the device (device 3 of /media): no space left on device"; got != want {
		t.Errorf("the message is %q, wanted %q", got, want)
	}
	err = fakeFS(t, ^uintptr(0), unix.ECANCELED).Remove(3)
	if !errors.Is(err, ErrCancelled) || !errors.Is(err, unix.ECANCELED) {
		t.Errorf("ECANCELED became %v", err)
	}
}

func TestCancellingCallTurnsItsErrnosRound(t *testing.T) {
	if err := fakeFS(t, ^uintptr(0), unix.ECANCELED).CancelRemove(); err != nil {
		t.Errorf("ECANCELED means that it worked, got %v", err)
	}
	err := fakeFS(t, ^uintptr(0), unix.ENOTCONN).CancelRemove()
	if !errors.Is(err, ErrNotRunning) || !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("ENOTCONN became %v", err)
	}
}

func TestReplaceHasResultsOfItsOwn(t *testing.T) {
	if err := fakeFS(t, 2, 0).Replace(2, "/dev/loop0"); !errors.Is(err, ErrExclusiveRunning) {
		t.Errorf("result 2 of a replace means that one runs already, got %v", err)
	}
	f := fakeFS(t, 0, 0)
	f.ioctl = func(_ uintptr, _ uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		args := (*replaceStartArgs)(arg)
		if args.cmd == replaceCmdCancel {
			args.result = replaceNotStarted
		} else {
			args.result = replaceScrubRunning
		}
		return 0, 0
	}
	if err := f.Replace(2, "/dev/loop0"); !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("a running scrub gave %v", err)
	}
	if err := f.CancelReplace(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("cancelling nothing gave %v", err)
	}
}

func TestRequestsNameTheDevice(t *testing.T) {
	f := fakeFS(t, 0, 0)
	var name string
	f.ioctl = func(_ uintptr, req uint32, arg unsafe.Pointer) (uintptr, unix.Errno) {
		switch req {
		case iocResize, iocAddDev:
			name = getString((*volArgs)(arg).name[:])
		case iocRmDevV2:
			args := (*volArgsV2)(arg)
			name = getString(args.name[:])
			if args.flags == specByID {
				name = "by id"
			}
		}
		return 0, 0
	}
	for want, do := range map[string]func() error{
		"4:max":     func() error { return f.Resize(4, 0) },
		"4:1048576": func() error { return f.Resize(4, 1<<20) },
		"/dev/sda1": func() error { return f.Add("/dev/sda1") },
		"by id":     func() error { return f.Remove(4) },
	} {
		if err := do(); err != nil || name != want {
			t.Errorf("the kernel was asked about %q, wanted %q (%v)", name, want, err)
		}
	}
}

func TestNamesThatDoNotFitAreRefused(t *testing.T) {
	f := fakeFS(t, 0, 0)
	long := strings.Repeat("x", 5000)
	for name, err := range map[string]error{
		"add": f.Add(long), "label": f.SetLabel(long[:256]), "replace": f.Replace(1, long), "scan": Scan(long),
	} {
		if !errors.Is(err, unix.ENAMETOOLONG) {
			t.Errorf("%s with a long name: %v", name, err)
		}
	}
	if err := f.Add("/dev/sda1\x00/dev/sdb1"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a zero byte in a path: %v", err)
	}
	if err := Forget(""); !errors.Is(err, unix.ENOENT) {
		t.Errorf("forgetting no device in particular: %v", err)
	}
}

func TestConvertMetadataRefusesOtherProfilesAndEndedContexts(t *testing.T) {
	f := fakeFS(t, 0, 0)
	if err := f.ConvertMetadata(t.Context(), "raid0"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("raid0: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.ConvertMetadata(ctx, "dup"); !errors.Is(err, ErrCancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
}

func TestCallsAfterCloseFail(t *testing.T) {
	f := fakeFS(t, 0, 0)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("sync after close: %v", err)
	}
}

func TestOpenRefusesOtherFilesystems(t *testing.T) {
	if _, err := Open("/proc"); !errors.Is(err, ErrNotBtrfs) {
		t.Errorf("/proc: %v", err)
	}
	if _, err := Open("/does/not/exist"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}

func TestUUID(t *testing.T) {
	const text = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
	u, err := ParseUUID(strings.ToUpper(text))
	if err != nil || u.String() != text || u.IsZero() {
		t.Errorf("%s became %s (%v)", text, u, err)
	}
	for _, bad := range []string{"", text[1:], text + "0", strings.ReplaceAll(text, "-", "0"), "g" + text[1:]} {
		if _, err := ParseUUID(bad); err == nil {
			t.Errorf("%q was taken for a UUID", bad)
		}
	}
}
