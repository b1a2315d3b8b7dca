// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/testimage"
)

// firstID is where the ids of a user namespace start on the host.
const firstID = 100_000

// topLayer changes what lies below it in every way a layer can.
func topLayer(t *testing.T, f testimage.Format) testimage.Layer {
	t.Helper()
	header := func(name string, kind byte, mode int64, uid int) tar.Header {
		return tar.Header{Name: name, Typeflag: kind, Mode: mode, Uid: uid, Gid: uid}
	}
	raw := testimage.Tar(
		testimage.File{Header: header("etc/", tar.TypeDir, 0o755, 0)},
		testimage.File{Header: header("etc/.wh.fstab", tar.TypeReg, 0o644, 0)},
		testimage.File{Header: header("etc/top", tar.TypeReg, 0o640, 33), Content: []byte("top\n")},
		testimage.File{Header: header("srv/", tar.TypeDir, 0o2775, 1000)},
		testimage.File{Header: header("srv/.wh..wh..opq", tar.TypeReg, 0o644, 0)},
		testimage.File{Header: header("srv/setuid", tar.TypeReg, 0o4755, 1000), Content: []byte("s")},
	)
	l, err := testimage.ConvertBytes(t.Context(), raw, f, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// application is an image of a Debian, a layer with a program, and a small top
// layer, which is left to the runtime.
func application(t *testing.T, f testimage.Format) testimage.Image {
	t.Helper()
	img, err := sample(t).Image(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	img.Layers = append(slices.Clone(img.Layers), topLayer(t, testimage.Gzip))
	img.Cmd = []string{"python3", "/app/serve.py", "1000000"}
	return img
}

// ofContainer takes out what a container's root is not told by its image: the
// time of its own root directory.
func ofContainer(name string, f *file) {
	if name == "" {
		f.modTime = time.Time{}
	}
}

// TestCopyImage pulls with the code inside CRI-O, the hook doing everything.
func TestCopyImage(t *testing.T) {
	for _, f := range indexed() {
		t.Run(string(f), func(t *testing.T) {
			n := newNode(t, nodeOptions{})
			img := application(t, f)
			ref := n.push("app", img)
			normal, lazy := n.newClient("normal", false), n.newClient("client", true)
			want := normal.pull(ref)

			n.start()
			n.resetRequests()
			got := lazy.pull(ref)
			if got.ID != want.ID {
				t.Errorf("image ID %s, a normal pull's is %s", got.ID, want.ID)
			}
			if got.Size < want.Size*9/10 || got.Size > want.Size*11/10 {
				t.Errorf("image size %d, a normal pull's is %d", got.Size, want.Size)
			}
			n.wantPulled(img.Layers, img.Layers[2])
			for _, first := range []int{0, firstID} {
				t.Run(fmt.Sprintf("ids from %d", first), func(t *testing.T) {
					normal, lazy := normal.in(t), lazy.in(t)
					wantTree := readTree(t, normal.mount(want.ID, first))
					gotTree := readTree(t, lazy.mount(got.ID, first))
					if f := gotTree["etc/top"]; f.uid != uint32(33+first) {
						t.Errorf("owner of /etc/top is %d", f.uid)
					}
					compareTrees(t, wantTree, gotTree, precision(f), ofContainer)
				})
			}
			t.Run("image mount", func(t *testing.T) {
				compareTrees(t, readTree(t, normal.in(t).mountImage(want.ID)), readTree(t, lazy.in(t).mountImage(got.ID)), precision(f), ofContainer)
			})
			lazy.remove(got.ID)
			if _, err := n.daemon.CLI(t.Context(), nil, "remove", ref); err != nil {
				t.Errorf("removing an image that nobody uses: %v", err)
			}
		})
	}
}

// in is the client in a subtest.
func (c *client) in(t *testing.T) *client {
	inner := *c
	inner.node = c.node.in(t)
	return &inner
}

// TestCopyImageWithoutDaemon pulls while no daemon runs, and while one does not
// answer: normal pulls.
func TestCopyImageWithoutDaemon(t *testing.T) {
	const patience = 3 * time.Second
	for name, hang := range map[string]bool{"stopped": false, "hanging": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nodeOptions{settings: fmt.Sprintf("hook_timeout = %q\n", patience)})
			img := application(t, testimage.EStargz)
			ref := n.push("app", img)
			normal, lazy := n.newClient("normal", false), n.newClient("client", true)
			want := normal.pull(ref)
			n.start()
			if hang {
				pid := n.info().PID
				n.must(syscall.Kill(pid, unix.SIGSTOP))
				t.Cleanup(func() { n.must(syscall.Kill(pid, unix.SIGCONT)) })
			} else {
				n.must(n.daemon.Stop())
			}
			n.resetRequests()
			got := lazy.pull(ref)
			if got.ID != want.ID {
				t.Errorf("image ID %s, a normal pull's is %s", got.ID, want.ID)
			}
			if hang && got.Took < patience || got.Took > 3*want.Took+patience+10*time.Second {
				t.Errorf("the pull took %s, a normal one %s, with a hook_timeout of %s", got.Took, want.Took, patience)
			}
			n.wantPulled(img.Layers, img.Layers...)
			compareTrees(t, readTree(t, normal.mount(want.ID, 0)), readTree(t, lazy.mount(got.ID, 0)), ofContainer)
		})
	}
}
