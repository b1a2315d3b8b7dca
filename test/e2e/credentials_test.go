// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/testimage"
)

// TestCredentials reads an image of a private registry: with the credentials of
// its pull, past the death of a worker; not after a boot, which ends them; and
// again when the node has some.
func TestCredentials(t *testing.T) {
	const patience = 20 * time.Second
	n := newNode(t, nodeOptions{private: true, settings: fmt.Sprintf("fill = \"off\"\nread_timeout = %q\n", patience)})
	login, kubelet := n.path("login.json"), n.path("kubelet.json")
	n.configure(fmt.Sprintf("auth_file = %q\nauth_files = [%q]\n", login, kubelet))
	img := newSmall(t, convertTo(t, testimage.EStargz))
	ref := n.push("team/small", img.Image)
	lazy := n.newClient("client", true)
	n.start()
	if _, err := lazy.try(func(q *call) { q.Op, q.Ref = "pull", ref }); err == nil {
		t.Fatal("a stranger pulls from a private registry")
	}
	lazy.base.Username, lazy.base.Password = "user", "secret"
	image := lazy.pull(ref).ID
	n.wantPulled(img.Layers, img.Layers[2])
	root, unmount := lazy.mountFor(image, 0)
	n.must(img.read(root, 0))
	_, err := n.daemon.KillWorker(t.Context())
	n.must(err)
	n.must(img.read(root, 4))
	unmount()

	n.reboot("client")
	n.start()
	root, unmount = lazy.mountFor(image, 0)
	defer unmount()
	n.must(img.read(root, 4))
	began := time.Now()
	if err := img.read(root, 6); !errors.Is(err, unix.EIO) || time.Since(began) > patience/2 {
		t.Errorf("a read without credentials: %v, after %s; want EIO at once", err, time.Since(began))
	}
	out, err := n.daemon.CLI(t.Context(), nil, "status", ref)
	n.must(err)
	for _, want := range []string{strings.TrimSuffix(ref, ":1"), login + " (does not exist)", kubelet + " (does not exist)", "podman login " + n.registry.Host()} {
		if !strings.Contains(out, want) {
			t.Errorf("the status does not name %q:\n%s", want, out)
		}
	}

	auth := base64.StdEncoding.EncodeToString([]byte("user:secret"))
	n.must(os.WriteFile(kubelet, fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, n.registry.Host(), auth), 0o600))
	img.wantData(t, root)
	if s := n.status(ref).Layers[1].Device; s.LastError != "" || len(s.Troubles) > 0 {
		t.Errorf("all is well, and the status speaks of %q and %+v", s.LastError, s.Troubles)
	}
}
