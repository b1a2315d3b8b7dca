// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// bdis is where the kernel lists its backing devices, one for each super block
// or block device that is read ahead.
const bdis = "/sys/class/bdi"

// erofsBDIs lists the backing devices of file-backed mounts. Their names are
// numbered in the order they were made, with no link to their mount.
func erofsBDIs() []string {
	names, err := filepath.Glob(filepath.Join(bdis, "erofs-*"))
	if err != nil {
		return nil // only a bad pattern fails
	}
	return names
}

// setReadAhead sets the read-ahead of a mount that was made after the list
// before was taken. Of a file-backed mount the backing device is the one that
// has appeared since. Should another EROFS mount have been made in the same
// instant, it gets the same read-ahead, which does it no harm.
func (m *Mounter) setReadAhead(root *os.File, before []string) error {
	if m.ReadAheadKB == 0 {
		return nil
	}
	var found []string
	if m.method == Loop {
		var st unix.Stat_t
		if err := unix.Fstat(int(root.Fd()), &st); err != nil {
			return fmt.Errorf("finding the loop device: %w", err)
		}
		found = []string{fmt.Sprintf("%s/%d:%d", bdis, unix.Major(st.Dev), unix.Minor(st.Dev))}
	} else {
		found = slices.DeleteFunc(erofsBDIs(), func(name string) bool { return slices.Contains(before, name) })
	}
	if len(found) == 0 {
		return errors.New("the mount's backing device is not in " + bdis)
	}
	for _, name := range found {
		if err := writeAttribute(filepath.Join(name, "read_ahead_kb"), strconv.Itoa(m.ReadAheadKB)); err != nil {
			return err
		}
	}
	return nil
}

// writeAttribute writes to a file of sysfs, which never creates one.
func writeAttribute(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
