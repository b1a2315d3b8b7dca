// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// small is an image that is quick to deal with: a shell, a layer with data, and a
// small top layer, which is left to the runtime. /sums is what the data adds up to,
// as sha256sum --check wants it.
type small struct {
	testimage.Image
	data []testimage.File
}

// checkSums is the script of a container that fails unless it reads right.
const checkSums = "sha256sum --check --quiet /sums"

// newSmall returns a small image with the data layer that convert makes.
func newSmall(t *testing.T, convert func(tar []byte) testimage.Layer) small {
	t.Helper()
	var s small
	var sums bytes.Buffer
	s.data = []testimage.File{{Header: tar.Header{Name: "data/", Typeflag: tar.TypeDir}}}
	for i, size := range []int{10, 5_000, 40_000, 300_000, 1 << 20, 3 << 20, 9 << 20} {
		f := testimage.File{Header: tar.Header{Name: fmt.Sprintf("data/%d", i)}, Content: testimage.Bytes(size, uint64(i))} //nolint:gosec // small
		s.data = append(s.data, f)
		fmt.Fprintf(&sums, "%x  /%s\n", sha256.Sum256(f.Content), f.Name)
	}
	top := testimage.Tar(testimage.File{Header: tar.Header{Name: "sums"}, Content: sums.Bytes()})
	s.Layers = []testimage.Layer{
		convertTo(t, testimage.EStargz)(shell(t)), convert(testimage.Tar(s.data...)), convertTo(t, testimage.Gzip)(top),
	}
	s.Cmd = []string{"sh", "-ec", checkSums}
	return s
}

// convertTo converts tars to a format.
func convertTo(t *testing.T, f testimage.Format) func([]byte) testimage.Layer {
	return func(raw []byte) testimage.Layer {
		t.Helper()
		l, err := testimage.ConvertBytes(t.Context(), raw, f, testimage.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
}

// shell is the part of a Debian with which a shell can read files.
func shell(t *testing.T) []byte {
	t.Helper()
	s := sample(t)
	if _, err := s.Layers(t.Context(), testimage.EStargz); err != nil { // makes the tar
		t.Fatal(err)
	}
	in, err := os.Open(filepath.Join(s.Dir, "debian-"+s.Suite+".tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close() //nolint:errcheck // read only
	wanted := []string{
		"bin", "lib", "lib64", "etc/", "etc/passwd", "etc/group", "usr/", "usr/bin/", "usr/lib/", "usr/lib64/", "usr/lib/x86_64-linux-gnu/",
		"usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/libc.so.6",
		"usr/bin/sh", "usr/bin/dash", "usr/bin/cat", "usr/bin/sha256sum", "usr/bin/sleep",
	}
	files := []testimage.File{{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}}}
	for r := tar.NewReader(in); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return testimage.Tar(files...)
		}
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(wanted, strings.TrimPrefix(h.Name, "./")) {
			continue
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, testimage.File{Header: *h, Content: content})
	}
}

// read reads a file of data below a root, and compares.
func (s small) read(root string, i int) error {
	f := s.data[i+1] // the directory comes first
	got, err := os.ReadFile(filepath.Join(root, f.Name))
	if err == nil && !bytes.Equal(got, f.Content) {
		err = fmt.Errorf("reading %s: %d bytes, which are not those of the image", f.Name, len(got))
	}
	return err
}

// checkData reads the data below a root: each file is right, or fails with EIO. It
// returns how many of each there are.
func (s small) checkData(t *testing.T, root string) (right, failed int) {
	t.Helper()
	for i := range s.data[1:] {
		switch err := s.read(root, i); {
		case err == nil:
			right++
		case errors.Is(err, unix.EIO):
			failed++
		default:
			t.Error(err)
		}
	}
	return right, failed
}

// wantData fails the test unless all data is right.
func (s small) wantData(t *testing.T, root string) {
	t.Helper()
	if _, failed := s.checkData(t, root); failed > 0 {
		t.Errorf("%d files of data cannot be read", failed)
	}
}

// dropPages makes the next reads of a layer's files come from its device.
func (n *node) dropPages(layer digest.Digest, files []testimage.File) {
	n.t.Helper()
	for _, f := range files {
		r, err := os.Open(filepath.Join(n.layerTree(layer), f.Name))
		n.must(err)
		n.must(errors.Join(unix.Fadvise(int(r.Fd()), 0, 0, unix.FADV_DONTNEED), r.Close()))
	}
}

// await waits until something is so, which must not take long.
func (n *node) await(what string, so func() bool) {
	n.t.Helper()
	for start := time.Now(); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			n.t.Fatalf("waiting until %s\n%s", what, n.log())
		}
	}
}

// run runs a script in a new container, which is gone afterwards.
func (n *node) run(p podman, ref, script string, flags ...string) (string, error) {
	args := append([]string{"run"}, lab.ContainerFlags()...)
	return p.Run(untilDone(n.t), append(append(args, flags...), ref, "sh", "-ec", script)...)
}

// reader is a container that reads its data again and again.
type reader struct {
	n    *node
	dir  string
	done chan error
}

// startReader starts a reader of a small image, and waits until it has read all
// of it once. flags are those of podman run.
func (n *node) startReader(p podman, ref string, flags ...string) *reader {
	n.t.Helper()
	r := &reader{n: n, dir: n.path("reader"), done: make(chan error, 1)}
	n.must(os.MkdirAll(r.dir, 0o700))
	args := append(append([]string{"run", "--volume", r.dir + ":/reader"}, flags...), ref, "sh", "-ec",
		"while ! test -e /reader/stop; do "+checkSums+"; echo >> /reader/passes; done")
	go func(ctx context.Context) {
		out, err := p.Run(ctx, args...)
		if err == nil && out != "" {
			err = fmt.Errorf("it printed %q", out)
		}
		r.done <- err
	}(untilDone(n.t))
	r.awaitPass()
	return r
}

func (r *reader) passes() int64 {
	info, err := os.Stat(filepath.Join(r.dir, "passes"))
	if err != nil {
		return 0
	}
	return info.Size()
}

// awaitPass waits until the reader has read everything once more.
func (r *reader) awaitPass() {
	r.n.t.Helper()
	before := r.passes()
	r.n.await("the container has read everything", func() bool {
		select {
		case err := <-r.done:
			r.n.t.Fatalf("the container ended: %v\n%s", err, r.n.log())
		default:
		}
		return r.passes() > before+1 // one that began after the call
	})
}

// stop ends the reader, which must have read nothing wrong.
func (r *reader) stop() {
	r.n.t.Helper()
	r.n.must(os.WriteFile(filepath.Join(r.dir, "stop"), nil, 0o600))
	if err := <-r.done; err != nil {
		r.n.t.Errorf("a container that reads: %v\n%s", err, r.n.log())
	}
}
