package boot

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

func TestTheManPageHasEveryParameter(t *testing.T) {
	source, err := os.ReadFile("cmdline.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../docs/sprout.7")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, match := range regexp.MustCompile(`case "(rd\.sprout\.[a-z]+)"`).FindAllSubmatch(source, -1) {
		key := string(match[1])
		known[key] = true
		if !strings.Contains(string(page), ".It Li "+key) {
			t.Errorf("the page lacks %s", key)
		}
	}
	if len(known) < 7 {
		t.Errorf("found only %v", known)
	}
	for _, match := range regexp.MustCompile(`rd\.sprout\.[a-z]+`).FindAllString(string(page), -1) {
		if !known[match] {
			t.Errorf("the page has %s, which is no parameter", match)
		}
	}
	for _, value := range []string{defaultImage, "50%", "400%", "3600", "60"} {
		if !strings.Contains(string(page), value) {
			t.Errorf("the page lacks the value %s", value)
		}
	}
}
