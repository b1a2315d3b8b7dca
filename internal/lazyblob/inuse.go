// SPDX-License-Identifier: Apache-2.0

package lazyblob

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// inUse reports whether anybody has mounted something of the file system that is mounted
// at target: containers get a file by a bind mount in their own mount namespace.
func inUse(target string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Lstat(target, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		return false, fmt.Errorf("looking who uses %s: %w", target, err)
	}
	major, minor := int(unix.Major(st.Dev)), int(unix.Minor(st.Dev))
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return false, err
	}
	seen := map[string]bool{}
	for _, p := range processes {
		namespace, err := os.Readlink(filepath.Join(p, "ns/mnt"))
		if err != nil || seen[namespace] {
			continue // ended since, or looked at
		}
		seen[namespace] = true
		f, err := os.Open(filepath.Join(p, "mountinfo"))
		if err != nil {
			continue
		}
		found, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
			ours := m.Root == "/" && strings.HasSuffix(m.Mountpoint, target) // also seen from a namespace that copied ours
			return m.Major != major || m.Minor != minor || ours, false
		})
		_ = f.Close() // read only
		if err == nil && len(found) > 0 {
			return true, nil
		}
	}
	return false, nil
}
