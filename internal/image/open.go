// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/blob/retry"
)

// Opener opens images by name. It may be used by several goroutines at once.
type Opener struct {
	Registry *registry.Client
	Platform Platform
	// NoMirrors leaves out the mirrors of a registry, for those who write there.
	NoMirrors bool
}

// Opened is an image that can be read. Close releases it.
type Opened struct {
	*Image
	// Name is the name it was opened by.
	Name string
	// Asked is the tag, the digest or the name in a layout that it was asked for by.
	Asked string
	// Repositories are where the registry's image is read from, the one that had
	// the manifest first; none if it is in files.
	Repositories []*registry.Repository

	// Layout is the layout that the image is read from; nil if it is in a registry.
	Layout  *ocidir.Layout
	release func()
}

// Sources are the places where blobs of the image are read from, best first.
func (o *Opened) Sources() []blob.Source {
	if o.Layout != nil {
		return []blob.Source{o.Layout}
	}
	return Sources(o.Repositories)
}

// Reader is what manifests and configurations of the image are read from.
func (o *Opened) Reader() Reader {
	if o.Layout != nil {
		return o.Layout
	}
	return o.Repositories[0]
}

// FullName is the name of the image as references are written, with its registry. In a
// layout it may have none: an error.
func (o *Opened) FullName(ctx context.Context) (string, error) {
	if o.Layout == nil {
		ref, err := reference.ParseNormalizedNamed(strings.TrimPrefix(o.Name, dockerPrefix))
		if err != nil {
			return "", err
		}
		return reference.TagNameOnly(ref).String(), nil
	}
	if full, ok := ocidir.FullName(o.Asked); ok {
		return full, nil
	}
	m, err := o.Layout.Manifest(ctx, o.Asked)
	if err != nil {
		return "", err
	}
	names, err := o.Layout.Names(ctx)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		ref, err := reference.ParseNamed(name)
		if err != nil {
			continue
		}
		if d, err := o.Layout.Resolve(ctx, ref); err == nil && d == m.Digest {
			return name, nil
		}
	}
	return "", fmt.Errorf("%s does not say what it is called: give it a name with --name, such as registry.example.com/team/app:v1", o.Name)
}

// Close ends the reading.
func (o *Opened) Close() error {
	if o.release != nil {
		o.release()
	}
	return nil
}

// Sources makes repositories patient.
func Sources(repositories []*registry.Repository) []blob.Source {
	all := make([]blob.Source, len(repositories))
	for i, r := range repositories {
		all[i] = Patient(r, len(repositories))
	}
	return all
}

// Patient makes a repository, one of so many sources, patient.
func Patient(r *registry.Repository, sources int) blob.Source { return retry.New(r, patience(sources)) }

// patience is how often one of so many sources is asked again. A reader waits
// meanwhile; where there are others they are the better choice.
func patience(sources int) retry.Policy {
	p := retry.Policy{Attempts: 6, Base: 200 * time.Millisecond, Max: 10 * time.Second}
	if sources > 1 {
		p.Attempts, p.Max = 3, time.Second
	}
	return p
}

// The prefixes of names, those of go.podman.io/image.
const (
	dockerPrefix  = "docker://"
	layoutPrefix  = "oci:"
	archivePrefix = "oci-archive:"
)

// ErrName is that a name is none that an image can be opened by.
var ErrName = errors.New("not the name of an image")

// Open opens the image with a name: oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG], a
// directory that is an OCI layout, a file that is an archive of one, docker://NAME
// or just NAME for one in a registry. The error is [ErrName] if it is none of that.
func (o Opener) Open(ctx context.Context, name string) (*Opened, error) {
	return o.open(ctx, name, func(ctx context.Context, from Reader, asked string) (*Image, error) {
		return Load(ctx, from, asked, o.Platform)
	})
}

// Locate is Open for what need not be an image of the platform: the Image of what it
// returns is nil.
func (o Opener) Locate(ctx context.Context, name string) (*Opened, error) {
	return o.open(ctx, name, func(ctx context.Context, from Reader, asked string) (*Image, error) {
		_, err := from.Manifest(ctx, asked)
		return nil, err
	})
}

// load reads what is called so at a place.
type load func(ctx context.Context, from Reader, asked string) (*Image, error)

func (o Opener) open(ctx context.Context, name string, read load) (*Opened, error) {
	p, err := parse(name)
	if err != nil {
		return nil, err
	}
	var img *Opened
	if p.ref != nil {
		img, err = o.openNamed(ctx, p.ref, read)
	} else {
		img, err = openFiles(ctx, p.path, p.in, read)
	}
	if err != nil {
		return nil, fmt.Errorf("reading image %s: %w", name, err)
	}
	img.Name = name
	return img, nil
}

// parsed is a name of an image: a reference, or a path and what it is called there.
type parsed struct {
	ref      reference.Named
	path, in string
}

func parse(name string) (parsed, error) {
	rest, isDocker := strings.CutPrefix(name, dockerPrefix)
	for _, prefix := range []string{layoutPrefix, archivePrefix} {
		if path, ok := strings.CutPrefix(name, prefix); ok {
			if path == "" {
				return parsed{}, fmt.Errorf("%q is %w: there is no path", name, ErrName)
			}
			path, in := splitPath(path)
			return parsed{path: path, in: in}, nil
		}
	}
	if scheme, _, ok := strings.Cut(name, ":"); ok && slices.Contains(otherTransports(), scheme) {
		return parsed{}, fmt.Errorf("%q is %w: of what is not in a registry only oci: and oci-archive: can be read", name, ErrName)
	}
	if !isDocker {
		switch {
		case isLayout(name), isArchive(name):
			return parsed{path: name}, nil
		case filepath.IsAbs(name) || strings.HasPrefix(name, "."):
			return parsed{}, fmt.Errorf("%q is %w: no OCI layout and no archive of one", name, ErrName)
		}
	}
	ref, err := reference.ParseNormalizedNamed(rest)
	if err != nil {
		return parsed{}, fmt.Errorf("%q is %w: %w", name, ErrName, err)
	}
	return parsed{ref: ref}, nil
}

// otherTransports are prefixes that other tools know, and that would be taken for
// names at Docker Hub.
func otherTransports() []string {
	return []string{"containers-storage", "dir", "docker-archive", "docker-daemon", "sif", "tarball"}
}

func isLayout(path string) bool {
	_, err := os.Stat(filepath.Join(path, "oci-layout"))
	return err == nil
}

// isArchive reports whether a file is a tar, which may be compressed with gzip.
func isArchive(path string) bool {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() { // opening a pipe might wait
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close() //nolint:errcheck // read only
	const magicAt = 257
	head := make([]byte, magicAt+5)
	if _, err := io.ReadFull(f, head); err != nil {
		return false
	}
	return string(head[magicAt:]) == "ustar" || string(head[:2]) == "\x1f\x8b"
}

// openNamed asks the endpoints of a reference, mirrors first.
func (o Opener) openNamed(ctx context.Context, ref reference.Named, read load) (*Opened, error) {
	all, err := o.Registry.Endpoints(ref, nil)
	if err != nil {
		return nil, err
	}
	if o.NoMirrors {
		all = all[max(0, len(all)-1):]
	}
	var failed error
	for i, r := range all {
		img, err := read(ctx, r, TagOrDigest(ref))
		if err == nil {
			return &Opened{Image: img, Asked: TagOrDigest(ref), Repositories: slices.Concat(all[i:], all[:i])}, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

// TagOrDigest is what a reference names in its repository.
func TagOrDigest(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := ref.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}
