// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCheckJSON(t *testing.T) {
	name := filepath.Join(t.TempDir(), "list.json")
	for text, good := range map[string]bool{
		"[]": true, "{\"a\":[1]}\n": true, "": false, " ": false, "[": false, "[{]": false, "x": false, "\x00": false, "null": true,
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkJSON(name); (err == nil) != good {
			t.Errorf("%q: %v", text, err)
		}
	}
	// A stick may have anything.
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", name); err != nil {
		t.Fatal(err)
	}
	if err := checkJSON(name); err == nil {
		t.Error("/dev/zero is JSON")
	}
}
