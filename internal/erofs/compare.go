// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"time"

	goerofs "github.com/erofs/go-erofs"

	"github.com/holdfast/holdfast/internal/index"
)

// ErrTreeDiffers means that an index shows another tree than its layer has.
var ErrTreeDiffers = errors.New("the index shows another tree than the layer has")

// CompareTree compares the tree of an image that was written under a name, and whose
// device has deviceSize bytes, with that of an index which was made of the layer's
// very tar. The error wraps
// [ErrTreeDiffers] and names the first difference if there is one. Times may differ
// by less than a second: some indexes round them. The times of idx are changed, and
// scratch, an empty file, is written to.
func CompareTree(have *os.File, name string, deviceSize int64, idx *index.Index, scratch *os.File) error {
	// Most trees are the same to the byte, with times as they are or rounded.
	for _, round := range []time.Duration{0, time.Second} {
		for i := range idx.Inodes {
			idx.Inodes[i].ModTime = idx.Inodes[i].ModTime.Round(round)
		}
		if err := Write(scratch, idx, name); err != nil {
			return err
		}
		if same, err := SameTree(have, scratch); err != nil || same {
			return err
		}
	}
	a, err := openImage(have, deviceSize)
	if err != nil {
		return err
	}
	b, err := openImage(scratch, idx.DeviceSize)
	if err != nil {
		return err
	}
	if err := compareTrees(a, b); err != nil {
		return err
	}
	return compareTrees(b, a) // what is only in the other
}

// image is the tree of an image whose data is not looked at.
type image struct {
	fs.FS
	origin int64 // where its device starts, in the addresses of files
}

func openImage(f *os.File, deviceSize int64) (t image, err error) {
	if t.origin, _, err = Device(f); err != nil {
		return image{}, err
	}
	var devices []goerofs.OpenOpt
	if deviceSize > 0 {
		devices = append(devices, goerofs.WithExtraDevices(io.NewSectionReader(noData{}, 0, deviceSize)))
	}
	tree, err := goerofs.Open(f, devices...)
	if err != nil {
		return image{}, err
	}
	t.FS, err = fs.Sub(tree, "diff")
	return t, err
}

type noData struct{}

func (noData) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }

// compareTrees compares everything in a with what b has under the same name.
func compareTrees(a, b image) error {
	links := map[int64]int64{} // inodes of a to those of b
	return fs.WalkDir(a.FS, ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		x, err := lstat(a, name)
		if err != nil {
			return err
		}
		y, err := lstat(b, name)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: only one of them has %.256q", ErrTreeDiffers, name)
		}
		if err != nil {
			return err
		}
		if what := difference(x, y); what != "" {
			return fmt.Errorf("%w: %s of %.256q", ErrTreeDiffers, what, name)
		}
		if other, ok := links[x.Ino]; ok && other != y.Ino {
			return fmt.Errorf("%w: hard links of %.256q", ErrTreeDiffers, name)
		}
		links[x.Ino] = y.Ino
		return nil
	})
}

// entry is what there is to compare.
type entry struct {
	*goerofs.Stat
	target string
	start  int64 // of the content in the device
}

func (e entry) time() time.Time { return time.Unix(int64(e.Mtime), int64(e.MtimeNs)) } //nolint:gosec // as it was written

func lstat(tree image, name string) (entry, error) {
	info, err := fs.Lstat(tree.FS, name)
	if err != nil {
		return entry{}, err
	}
	e := entry{}
	var ok bool
	if e.Stat, ok = info.Sys().(*goerofs.Stat); !ok {
		return entry{}, fmt.Errorf("%.256q has no attributes", name)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		e.target, err = fs.ReadLink(tree.FS, name)
	}
	if placed, ok := info.(interface{ DataRange() []goerofs.DataRange }); ok && info.Mode().IsRegular() && info.Size() > 0 {
		ranges := placed.DataRange()
		if len(ranges) != 1 {
			return entry{}, fmt.Errorf("%.256q lies in %d pieces", name, len(ranges))
		}
		e.start = ranges[0].Offset - tree.origin
	}
	return e, err
}

func difference(a, b entry) string {
	switch {
	case a.Mode != b.Mode:
		return "mode"
	case a.UID != b.UID || a.GID != b.GID:
		return "owner"
	case a.Size != b.Size && a.Mode.IsRegular():
		return "size"
	case a.time().Sub(b.time()).Abs() >= time.Second:
		return "time"
	case a.Rdev != b.Rdev:
		return "device number"
	case a.Nlink != b.Nlink:
		return "number of links"
	case a.target != b.target:
		return "target"
	case !maps.Equal(a.Xattrs, b.Xattrs):
		return "extended attributes"
	case a.start != b.start:
		return "content"
	default:
		return ""
	}
}
