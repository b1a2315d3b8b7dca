// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"slices"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// sample is an image with a layer that carries no index, and one that does.
func sample(ts *testscript.TestScript) testimage.Image {
	img := testimage.Image{Cmd: []string{"/app"}}
	for i, f := range []testimage.Format{testimage.Gzip, testimage.EStargz} {
		p := testimage.Tar(testimage.File{Header: tar.Header{Name: fmt.Sprint("file", i)}, Content: testimage.Bytes(1<<20, uint64(i))}) //nolint:gosec // small
		l, err := testimage.ConvertBytes(context.Background(), p, f, testimage.Options{})
		ts.Check(err)
		img.Layers = append(img.Layers, l)
	}
	return img
}

func makeLayout(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(sample(ts).WriteLayout(ts.MkAbs(args[0]), "v1"))
}

func startRegistry(ts *testscript.TestScript, _ bool, args []string) {
	o := testregistry.Options{Private: true, Push: testregistry.PushAllowed, NoReferrers: slices.Contains(args, "old")}
	if slices.Contains(args, "denied") {
		o.Push = testregistry.PushDenied
	}
	s, err := testregistry.Start(o)
	ts.Check(err)
	ts.Defer(func() { ts.Check(s.Close()) })
	_, err = sample(ts).PushTo(s, "app", "v1")
	ts.Check(err)
	account := base64.StdEncoding.EncodeToString([]byte("user:secret"))
	for name, text := range map[string]string{
		"registries.conf": fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", s.Host()),
		"auth.json":       fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, s.Host(), account),
		"registry.toml": fmt.Sprintf("root = %q\nregistries_conf = %q\nregistries_conf_dir = %q\nauth_file = %q\nauth_files = []\n",
			ts.MkAbs("lib"), ts.MkAbs("registries.conf"), ts.MkAbs("none"), ts.MkAbs("auth.json")),
	} {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o600))
	}
	ts.Setenv("IMAGE", s.Host()+"/app:v1")
	ts.Setenv("REGISTRY", s.Host())
}
