// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/signature"
	istorage "go.podman.io/image/v5/storage"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage"
	"go.podman.io/storage/pkg/reexec"
	storagetypes "go.podman.io/storage/types"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// clientName is the name under which this program is a client: go.podman.io/image
// and storage, the code inside CRI-O. The hook sees it as its parent.
const clientName = "holdfast-bench-client"

const (
	excludedName = "excluded" // the image that the configuration excludes
	plainName    = "plain"    // the one that has no index
)

// pull is one pull by a client, from nothing.
type pull struct {
	Took     time.Duration `json:"took"`
	Requests int64         `json:"requests"` // to the registry
}

// way is a way to pull an image that is left to the runtime.
type way struct {
	name   string
	image  string
	daemon *lab.Daemon // whose hook and store are configured; nil for none
}

// measurePull pulls an image of 30 MB that cannot be lazy: without a hook, and
// with one whose daemon excludes it, or finds no index, or does not run.
func (b *bench) measurePull(ctx context.Context) error {
	image, err := plainImage(ctx)
	if err != nil {
		return err
	}
	refs := map[string]string{}
	for _, name := range []string{excludedName, plainName} {
		if refs[name], err = b.stand.Push(image, name); err != nil {
			return err
		}
	}
	stopped, err := lab.NewDaemon(b.binary, b.stand.Dir("stopped"), "")
	if err != nil {
		return err
	}
	// As on a machine where it has run: its store is there.
	if err := errors.Join(stopped.Start(ctx), stopped.Stop()); err != nil {
		return err
	}
	ways := []way{
		{"none", plainName, nil}, {"excluded", excludedName, b.stand.Daemon},
		{"plain", plainName, b.stand.Daemon}, {"stopped", plainName, stopped},
	}
	b.report.Pulls = map[string][]pull{}
	for i := range b.rounds {
		for k := range ways {
			w := ways[(i+k)%len(ways)]
			p, err := b.pullOnce(ctx, w, refs[w.image])
			if err != nil {
				return fmt.Errorf("pulling, hook %s: %w", w.name, err)
			}
			b.report.Pulls[w.name] = append(b.report.Pulls[w.name], p)
		}
	}
	for name, list := range b.report.Pulls {
		b.log("pull, hook %s: %.3f s", name, median(list, pullTime).Took.Seconds())
	}
	return b.checkHook(refs)
}

// checkHook makes sure that the hook has reached the daemon.
func (b *bench) checkHook(refs map[string]string) error {
	log, err := os.ReadFile(b.stand.Daemon.LogFile())
	if err != nil {
		return err
	}
	for _, ref := range refs {
		if !strings.Contains(string(log), ref) {
			return fmt.Errorf("the daemon has not been asked for %s", ref)
		}
	}
	return nil
}

// plainImage is an image of 30 MB in gzip, without an index.
func plainImage(ctx context.Context) (testimage.Image, error) {
	random := rand.NewChaCha8([32]byte{'p', 'l', 'a', 'i', 'n'})
	image := testimage.Image{Cmd: []string{"/bin/true"}}
	for layer := range 3 {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for file := range 100 {
			data := make([]byte, 100<<10)
			_, _ = random.Read(data) // never fails
			head := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%d-%d", layer, file), Mode: 0o644, Size: int64(len(data))}
			if err := w.WriteHeader(head); err != nil {
				return image, err
			}
			if _, err := w.Write(data); err != nil {
				return image, err
			}
		}
		if err := w.Close(); err != nil {
			return image, err
		}
		l, err := testimage.ConvertBytes(ctx, buf.Bytes(), testimage.Gzip, testimage.Options{})
		if err != nil {
			return image, err
		}
		image.Layers = append(image.Layers, l)
	}
	return image, nil
}

// call is what the process of a client is asked to do.
type call struct {
	Dir            string // its storage, new
	ImageStores    []string
	RegistriesConf string
	Ref            string
}

// answer is what comes back.
type answer struct {
	Took  time.Duration
	Error string
}

// pullOnce pulls an image with a client that has nothing, and removes it all.
func (b *bench) pullOnce(ctx context.Context, w way, ref string) (p pull, err error) {
	q := call{Dir: b.stand.Dir("client"), Ref: ref}
	if err := os.MkdirAll(q.Dir, 0o700); err != nil {
		return p, err
	}
	defer func() { err = joined(err, lab.RemoveAll(q.Dir)) }()
	hook, env := "", os.Environ()
	if w.daemon != nil {
		hook, q.ImageStores = w.daemon.Hook(), []string{w.daemon.Store()}
		env = append(env, "HOLDFAST_CONFIG="+w.daemon.Config())
	}
	q.RegistriesConf = filepath.Join(q.Dir, "registries.conf")
	if err := os.WriteFile(q.RegistriesConf, []byte(b.stand.RegistriesConf(hook)), 0o600); err != nil {
		return p, err
	}
	in, err := json.Marshal(q)
	if err != nil {
		return p, err
	}
	cmd := reexec.CommandContext(ctx, clientName)
	cmd.Stdin, cmd.Env = bytes.NewReader(in), env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b.stand.Registry.ResetCounts()
	out, err := cmd.Output()
	if err != nil {
		return p, fmt.Errorf("client: %w: %s", err, stderr.String())
	}
	var a answer
	if err := json.Unmarshal(out, &a); err != nil {
		return p, fmt.Errorf("client: %w in %q", err, out)
	}
	if a.Error != "" {
		return p, fmt.Errorf("client: %s", a.Error)
	}
	return pull{a.Took, b.stand.Registry.Counts().Total}, nil
}

// clientMain is the process of a client.
func clientMain() {
	var q call
	err := json.NewDecoder(os.Stdin).Decode(&q)
	var a answer
	if err == nil {
		a.Took, err = q.pull(context.Background())
	}
	if err != nil {
		a.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (q call) pull(ctx context.Context) (took time.Duration, err error) {
	options := storagetypes.StoreOptions{
		GraphRoot: filepath.Join(q.Dir, "root"), RunRoot: filepath.Join(q.Dir, "run"), GraphDriverName: "overlay",
	}
	for _, s := range q.ImageStores {
		options.GraphDriverOptions = append(options.GraphDriverOptions, "overlay.imagestore="+s)
	}
	store, err := storage.GetStore(options)
	if err != nil {
		return 0, err
	}
	defer func() {
		_, e := store.Shutdown(true)
		err = joined(err, e)
	}()
	none := filepath.Join(q.Dir, "none")
	sys := &types.SystemContext{
		SystemRegistriesConfPath: q.RegistriesConf, SystemRegistriesConfDirPath: none,
		AuthFilePath: none, BlobInfoCacheDir: filepath.Join(q.Dir, "cache"),
	}
	policy, err := signature.NewPolicyContext(&signature.Policy{
		Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = joined(err, policy.Destroy()) }()
	src, err := docker.ParseReference("//" + q.Ref)
	if err != nil {
		return 0, err
	}
	dst, err := istorage.Transport.ParseStoreReference(store, q.Ref)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	_, err = copy.Image(ctx, policy, dst, src, &copy.Options{SourceCtx: sys, DestinationCtx: sys})
	return time.Since(start), err
}
