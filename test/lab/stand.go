// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// Stand is a place to compare a normal start of the sample image with a lazy
// one: a registry behind a shaped line, and a Podman for each.
type Stand struct {
	Registry *testregistry.Server
	Ref      string // the sample image, through the line
	Daemon   *Daemon
	Normal   *Podman
	Lazy     *Podman

	line     *shape.Proxy
	common   string // settings of every daemon here
	dir      string
	insecure []string
}

// Start is one start of a container, from nothing to its first useful output.
type Start struct {
	Prepare  time.Duration `json:"prepare"` // nanoseconds, as all durations here
	Pull     time.Duration `json:"pull"`
	Run      time.Duration `json:"run"` // podman run until the ready line
	Total    time.Duration `json:"total"`
	Bytes    int64         `json:"bytes"`    // of blobs that the registry sent until then
	Requests int64         `json:"requests"` // to the registry until then
	Output   string        `json:"output"`   // of the program: must be the same for all

	// Of a lazy start only:
	PrepareRequests int64                 `json:"prepareRequests,omitempty"` // until the image was prepared
	Layers          []LayerStart          `json:"layers,omitempty"`
	Served          []testregistry.Served `json:"-"` // what the registry was asked for until ready
}

// LayerStart is what the device of a layer had done when a container was ready,
// in compressed bytes.
type LayerStart struct {
	Digest   digest.Digest `json:"digest"`
	Fetched  int64         `json:"fetched"`  // asked for, on their way included
	Touched  int64         `json:"touched"`  // of the chunks that were read
	Requests int64         `json:"requests"` // to the registry
}

// NewStand sets up a stand in dir with an image; the daemon is not started yet.
func NewStand(dir, binary string, image testimage.Image, line shape.Line, settings string) (_ *Stand, err error) {
	s := &Stand{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close(context.Background()))
		}
	}()
	if s.Registry, err = testregistry.Start(testregistry.Options{Push: testregistry.PushAllowed}); err != nil {
		return nil, err
	}
	if _, err := image.PushTo(s.Registry, "demo", "latest"); err != nil {
		return nil, err
	}
	if s.line, err = shape.Start(s.Registry.Host(), line); err != nil {
		return nil, err
	}
	s.Ref = s.line.Addr() + "/demo:latest"
	insecure := []string{s.line.Addr(), s.Registry.Host()}
	s.insecure = insecure
	lazyDir := filepath.Join(dir, "lazy")
	s.common = fmt.Sprintf("trusted = [%q, %q]\nregistries_conf = %q\nruntime_roots = [%q]\n",
		s.line.Addr(), s.Registry.Host(), filepath.Join(lazyDir, "registries.conf"), filepath.Join(lazyDir, "root"))
	if s.Daemon, err = NewDaemon(binary, filepath.Join(dir, "daemon"), s.Settings(settings)); err != nil {
		return nil, err
	}
	if s.Normal, err = NewPodman(filepath.Join(dir, "normal"), PodmanOptions{Insecure: insecure}); err != nil {
		return nil, err
	}
	s.Lazy, err = NewPodman(lazyDir, PodmanOptions{ImageStore: s.Daemon.Store(), Insecure: insecure})
	return s, err
}

// Push adds an image to the registry and returns its reference, through the line.
func (s *Stand) Push(image testimage.Image, name string) (string, error) {
	if _, err := image.PushTo(s.Registry, name, "latest"); err != nil {
		return "", err
	}
	return s.line.Addr() + "/" + name + ":latest", nil
}

// Unshaped returns the same stand with the line left out. It must not be closed.
func (s *Stand) Unshaped() *Stand {
	direct := *s
	direct.Ref = s.Registry.Host() + strings.TrimPrefix(s.Ref, s.line.Addr())
	return &direct
}

// Settings adds what every daemon of this stand needs to settings.
func (s *Stand) Settings(settings string) string { return settings + s.common }

// Of returns the same stand for another image. It must not be closed.
func (s *Stand) Of(ref string) *Stand {
	other := *s
	other.Ref = ref
	return &other
}

// Host is the registry, through the line.
func (s *Stand) Host() string { return s.line.Addr() }

// Dir is a directory of the stand, for more that belongs to it.
func (s *Stand) Dir(name string) string { return filepath.Join(s.dir, name) }

// RegistriesConf is a registries.conf for one more client of the registry; hook
// is its pull hook, "" for none.
func (s *Stand) RegistriesConf(hook string) string {
	return PodmanOptions{Hook: hook, Insecure: s.insecure}.registriesConf()
}

// Close ends and removes everything.
func (s *Stand) Close(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var err error
	for _, p := range []*Podman{s.Normal, s.Lazy} {
		if p != nil {
			err = errors.Join(err, p.Close(ctx))
		}
	}
	if s.Daemon != nil {
		err = errors.Join(err, s.Daemon.Close())
	}
	if s.line != nil {
		err = errors.Join(err, s.line.Close())
	}
	if s.Registry != nil {
		err = errors.Join(err, s.Registry.Close())
	}
	return errors.Join(err, RemoveAll(s.dir))
}

// StartNormal pulls and runs the image as it is done without us.
func (s *Stand) StartNormal(ctx context.Context) (Start, error) {
	return s.start(ctx, s.Normal, nil)
}

// StartLazy prepares, pulls and runs the image. The daemon runs.
func (s *Stand) StartLazy(ctx context.Context) (Start, error) {
	return s.start(ctx, s.Lazy, s.Daemon)
}

// start starts the image with a Podman, after the daemon, if any, has prepared it.
func (s *Stand) start(ctx context.Context, p *Podman, d *Daemon) (Start, error) {
	s.Registry.ResetCounts()
	begin := time.Now()
	var r Start
	if d != nil {
		if err := d.PrepareAll(ctx, s.Ref); err != nil {
			return r, err
		}
		r.Prepare = time.Since(begin)
		r.PrepareRequests = s.Registry.Counts().Total
	}
	if err := p.Pull(ctx, s.Ref); err != nil {
		return r, err
	}
	r.Pull = time.Since(begin) - r.Prepare
	var statusErr error
	ready := func() {
		r.Total = time.Since(begin)
		c := s.Registry.Counts()
		r.Bytes, r.Requests = c.BlobBytes, c.Total
		if d != nil {
			r.Served = s.Registry.Served()
			r.Layers, statusErr = d.layers(ctx, s.Ref)
		}
	}
	var err error
	r.Run, r.Output, err = p.RunUntil(ctx, ReadyLine, ready, s.Ref)
	return r, errors.Join(err, statusErr)
}

// Rerun runs the image again, with everything that is local by now.
func (s *Stand) Rerun(ctx context.Context, p *Podman) (time.Duration, error) {
	took, _, err := p.RunUntil(ctx, ReadyLine, nil, s.Ref)
	return took, err
}

// Forget makes the next start of both a first one: no image, no cache.
func (s *Stand) Forget(ctx context.Context) error {
	if err := errors.Join(s.Normal.Reset(ctx), s.Lazy.Reset(ctx)); err != nil {
		return err
	}
	images, err := s.Daemon.Client().Images(ctx)
	for _, img := range images {
		for _, ref := range img.References {
			_, e := s.Daemon.CLI(ctx, nil, "remove", ref)
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return err
	}
	return DropPageCache()
}
