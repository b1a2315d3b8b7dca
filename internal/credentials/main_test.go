// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

func TestMain(m *testing.M) {
	if os.Getenv(writerVariable) != "" {
		writeForever()
	}
	goleak.VerifyTestMain(m)
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o755); err != nil { //nolint:gosec // plugins are run
		t.Fatal(err)
	}
}

// login is credentials whose secret tests look for where it must not be.
func login(n int) registry.Credentials {
	return registry.Credentials{Username: fmt.Sprintf("user%d", n), Password: fmt.Sprintf("hunter2-%d", n)}
}

// password is what the tests compare: credentials hide theirs.
func password(c registry.Credentials) string { return c.Username + ":" + c.Password + c.IdentityToken }

func assertClean(t *testing.T, text string) {
	t.Helper()
	if strings.Contains(text, "hunter2") || strings.Contains(text, "\n") {
		t.Errorf("%q has a secret, or more than a line", text)
	}
}

// fifo is a file that whoever reads from it waits for.
func fifo(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
