package bustest_test

import (
	"os"
	"testing"

	godbus "github.com/godbus/dbus/v5"

	"sproutd.org/sproutd/dbus/bustest"
)

func TestALockIsReleasedWithItsDescriptor(t *testing.T) {
	bus := bustest.Start(t)
	login := bus.StartLogin(t)
	conn := bus.Conn(t)
	inhibit := func(why string) (godbus.UnixFD, error) {
		var fd godbus.UnixFD
		err := conn.Object("org.freedesktop.login1", "/org/freedesktop/login1").
			Call("org.freedesktop.login1.Manager.Inhibit", 0, "shutdown:sleep", "sproutd", why, "block").Store(&fd)
		return fd, err
	}
	kept, err := inhibit("one that is kept")
	if err != nil {
		t.Fatal(err)
	}
	defer os.NewFile(uintptr(kept), "lock").Close()
	fd, err := inhibit("one that is let go")
	if err != nil {
		t.Fatal(err)
	}
	if lock := <-login.Inhibitors(); lock.Why != "one that is kept" || lock.What != "shutdown:sleep" || lock.Who != "sproutd" || lock.Mode != "block" {
		t.Errorf("lock %+v", lock)
	}
	lock := <-login.Inhibitors()
	if err := os.NewFile(uintptr(fd), "lock").Close(); err != nil {
		t.Fatal(err)
	}
	<-lock.Released
	login.Deny()
	if _, err := inhibit("one too many"); err == nil {
		t.Error("a denied lock was given")
	}
}
