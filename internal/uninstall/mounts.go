// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/holdfast/holdfast/internal/mount"
)

// unmountBelow ends the mounts that a daemon has left below its run directory,
// and makes sure that nothing is mounted below any of the directories.
func unmountBelow(runRoot string, dirs []string, dryRun bool) ([]string, error) {
	unmounted := []string{}
	all, err := mountsBelow(dirs)
	if err != nil {
		return nil, err
	}
	for _, m := range slices.Backward(all) { // what lies on top came last
		if !below(runRoot, m.Mountpoint) || m.FSType != "erofs" && !strings.HasPrefix(m.FSType, "fuse") {
			return nil, fmt.Errorf("something that is not a layer is mounted at %s (%s): unmount it first", m.Mountpoint, m.FSType)
		}
	}
	for _, m := range slices.Backward(all) {
		if !dryRun {
			if err := mount.Unbind(m.Mountpoint); err != nil {
				return nil, err
			}
		}
		unmounted = append(unmounted, m.Mountpoint)
	}
	if dryRun {
		return unmounted, nil
	}
	if all, err = mountsBelow(dirs); err == nil && len(all) > 0 {
		err = fmt.Errorf("something is still mounted at %s", all[0].Mountpoint)
	}
	return unmounted, err
}

func mountsBelow(dirs []string) ([]*mountinfo.Info, error) {
	all, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(dirs, func(dir string) bool { return below(dir, m.Mountpoint) }), false
	})
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	return all, nil
}

func isMountPoint(dir string) (bool, error) {
	is, err := mountinfo.Mounted(dir)
	if err != nil {
		return false, fmt.Errorf("listing mounts: %w", err)
	}
	return is, nil
}
