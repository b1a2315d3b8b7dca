// SPDX-License-Identifier: Apache-2.0

package prepare_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/credentials"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// keeping is a node that has prepared a private image, and what it keeps.
func keeping(t *testing.T) (n *node, ref string, res *prepare.Result) {
	t.Helper()
	s := start(t, testregistry.Options{Manner: testregistry.Quay, Private: true})
	n = newNode(t, trusting(), s)
	n.shut(t)
	var err error
	if n.memory, err = credentials.NewMemfd(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.memory.Close() })
	n.start(t)
	ref = push(t, s, "team/app", convert(t, tree(1), testimage.EStargz))
	return n, ref, n.login(t, ref)
}

// login prepares an image with the credentials of the registries' account.
func (n *node) login(t *testing.T, ref string) *prepare.Result {
	t.Helper()
	res, err := n.Prepare(t.Context(), prepare.Request{
		Reference: parse(t, ref), Credentials: &registry.Credentials{Username: "user", Password: "secret"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// keeps reports whether the next process would have credentials for an image.
func (n *node) keeps(t *testing.T, ref string) bool {
	t.Helper()
	kept, err := credentials.OpenKept(n.memory)
	if err != nil {
		t.Fatal(err)
	}
	_, ok := kept.Get(ref)
	return ok
}

func (n *node) restart(t *testing.T) {
	t.Helper()
	n.shut(t)
	n.start(t)
	if err := n.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestCredentialsOutliveTheProcess(t *testing.T) {
	n, _, res := keeping(t)
	n.restart(t)
	n.compare(t, res.Layers[0], tree(1))
	if log := n.log.String(); strings.Contains(log, "secret") {
		t.Errorf("the log holds the password: %s", log)
	}
}

// After a boot nothing is kept: the layer's state says so, until a pull or the
// node's own credentials help.
func TestCredentialsAreGoneAfterABoot(t *testing.T) {
	n, ref, res := keeping(t)
	memory := n.memory
	n.memory = nil
	n.restart(t)
	l := res.Layers[0]
	if _, err := os.ReadFile(filepath.Join(n.store.Root(), "overlay", l.ChainID, "diff", "file-1-2")); err == nil {
		t.Error("a private layer could be read without credentials")
	}
	have, ok := n.layers.Get(l.Digest)
	if !ok {
		t.Fatal("the layer is gone")
	}
	if said := have.Device().Stats().LastError; !strings.Contains(said, "no credentials of a pull are known for "+strings.TrimSuffix(ref, ":v1")) {
		t.Errorf("the layer's last error is %q", said)
	}
	n.login(t, ref)
	n.compare(t, l, tree(1))
	n.memory = memory
}

func TestCredentialsGoWithTheImage(t *testing.T) {
	n, ref, res := keeping(t)
	byDigest := strings.TrimSuffix(ref, ":v1") + "@" + res.Digest.String()
	n.login(t, byDigest) // is the same image, and needs no second entry
	if !n.keeps(t, ref) || n.keeps(t, byDigest) {
		t.Error("the credentials are not kept under the image's name")
	}
	n.prepare(t, byDigest) // without credentials
	if !n.keeps(t, ref) {
		t.Error("a preparation without credentials forgot some")
	}
	if err := n.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if n.keeps(t, ref) {
		t.Error("the credentials of an image that was removed are kept")
	}
}
