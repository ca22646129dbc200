package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTheConsoleIsTold(t *testing.T) {
	console := filepath.Join(t.TempDir(), "console")
	if err := os.WriteFile(console, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := tellConsole(console, "the stick was unplugged"); err != nil {
		t.Fatal(err)
	}
	if said, err := os.ReadFile(console); err != nil || string(said) != "\r\nsproutd: the stick was unplugged\r\n" {
		t.Errorf("the console says %q, %v", said, err)
	}
	if err := tellConsole(filepath.Join(console, "none"), ""); err == nil {
		t.Error("a console that is not there is no error")
	}
}
