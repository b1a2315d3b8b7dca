// SPDX-License-Identifier: Apache-2.0

package artifactstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob"
)

// FileOptions says what files become.
type FileOptions struct {
	// Type is the artifact's type; "" is none, as Podman has it.
	Type string
	// FileType is the media type of each file; "" is DefaultFileType.
	FileType string
	// FollowLinks follows links that lead out of their directory, as those of caches do
	// that keep content elsewhere.
	FollowLinks bool
	Progress    func(name string, done, total int64)
}

// DefaultFileType is the media type of files that are what they are.
const DefaultFileType = "application/octet-stream"

// local is a file that is to be added.
type local struct {
	name string   // in the artifact
	root *os.Root // nil if a link led out of it
	path string   // in root
	size int64
}

// AddFiles makes an artifact of files on this machine, or of all files in directories,
// and adds it. The same files make the same artifact. A name that is there moves.
func (s *Store) AddFiles(ctx context.Context, name string, paths []string, o FileOptions) (*Summary, error) {
	added, err := s.addFiles(ctx, name, paths, o)
	if err != nil {
		return nil, fmt.Errorf("adding artifact %s to %s: %w", name, s.path, err)
	}
	return added, nil
}

func (s *Store) addFiles(ctx context.Context, name string, paths []string, o FileOptions) (*Summary, error) {
	if ref, err := CheckName(name); err != nil {
		return nil, err
	} else if _, digested := ref.(reference.Digested); digested {
		return nil, fmt.Errorf("files make a digest of their own: %w", ErrName)
	}
	files, done, err := collect(paths, o.FollowLinks)
	defer done()
	if err != nil {
		return nil, err
	}
	var total int64
	for _, f := range files {
		total += f.size
	}
	if err := s.roomFor(total); err != nil {
		return nil, err
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		ArtifactType: o.Type, Config: v1.DescriptorEmptyJSON, Layers: []v1.Descriptor{},
	}
	m.Config.Data = nil // as libartifact reads and writes it
	if o.FileType == "" {
		o.FileType = DefaultFileType
	}
	for _, f := range files {
		desc, err := s.addFile(ctx, f, o.Progress)
		if err != nil {
			return nil, fmt.Errorf("file %s: %w", f.name, err)
		}
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: o.FileType, Digest: desc.Digest, Size: desc.Size, Annotations: map[string]string{v1.AnnotationTitle: f.name},
		})
	}
	return s.addManifest(ctx, name, m)
}

// addManifest stores a manifest whose files are there, and lists it.
func (s *Store) addManifest(ctx context.Context, name string, m v1.Manifest) (*Summary, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	desc := v1.Descriptor{
		MediaType: m.MediaType, Digest: digest.FromBytes(body), Size: int64(len(body)), Annotations: map[string]string{v1.AnnotationRefName: name},
	}
	a, err := Parse(blob.Manifest{MediaType: m.MediaType, Digest: desc.Digest, Body: body})
	if err != nil {
		return nil, err
	}
	for _, small := range [][]byte{v1.DescriptorEmptyJSON.Data, body} {
		d := blob.Descriptor{Digest: digest.FromBytes(small), Size: int64(len(small))}
		if err := s.Put(ctx, d, bytes.NewReader(small)); err != nil {
			return nil, err
		}
	}
	if err := s.need(append(a.Blobs(), blob.Descriptor{Digest: desc.Digest})); err != nil {
		return nil, err
	}
	err = s.List(ctx, func(list []v1.Descriptor) ([]v1.Descriptor, error) {
		list = slices.DeleteFunc(list, func(d v1.Descriptor) bool { return d.Annotations[v1.AnnotationRefName] == name })
		return append(list, desc), nil
	})
	if err != nil {
		return nil, err
	}
	if err := s.note(ctx); err != nil {
		return nil, err
	}
	return s.find(ctx, name)
}

// collect finds the files at paths, in the order of their names. done closes what it
// has opened.
func collect(paths []string, follow bool) (files []local, done func(), err error) {
	var roots []*os.Root
	done = func() {
		for _, r := range roots {
			_ = r.Close() // read only
		}
	}
	seen := map[string]string{}
	for _, p := range paths {
		info, err := os.Stat(p)
		if err != nil {
			return nil, done, err
		}
		dir, only := p, ""
		if !info.IsDir() {
			dir, only = filepath.Dir(p), filepath.Base(p)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return nil, done, err
		}
		roots = append(roots, root)
		var some []local
		if only != "" {
			some, err = inspect(some, root, only, follow)
		} else {
			some, err = walk(root, follow)
		}
		if err != nil {
			return nil, done, fmt.Errorf("%s: %w", p, err)
		}
		for _, f := range some {
			if other, twice := seen[f.name]; twice {
				return nil, done, fmt.Errorf("%s and %s would both be the file %s", other, p, f.name)
			}
			seen[f.name] = p
		}
		files = append(files, some...)
	}
	slices.SortFunc(files, func(a, b local) int { return strings.Compare(a.name, b.name) })
	switch {
	case len(files) == 0:
		return nil, done, errors.New("there are no files")
	case len(files) > maxFiles:
		return nil, done, fmt.Errorf("there are more than %d files", maxFiles)
	}
	return files, done, nil
}

func walk(root *os.Root, follow bool) (files []local, err error) {
	err = fs.WalkDir(root.FS(), ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		files, err = inspect(files, root, p, follow)
		return err
	})
	return files, err
}

// inspect adds a file. Links that stay in the directory are followed to files, others
// only if the user says so: a stick could have one to any file of this machine.
func inspect(files []local, root *os.Root, p string, follow bool) ([]local, error) {
	within := root
	info, err := root.Stat(p)
	if err != nil {
		var outside error
		info, outside = os.Stat(filepath.Join(root.Name(), p))
		switch {
		case outside != nil:
			return files, fmt.Errorf("%s: %w", p, err)
		case !follow:
			return files, fmt.Errorf("%s is a link that leads out of its directory: allow that with --follow-links: %w", p, err)
		}
		within = nil
	}
	if !info.Mode().IsRegular() {
		return files, fmt.Errorf("%s is no regular file", p)
	}
	name := filepath.ToSlash(p)
	if strings.ContainsAny(name, "\n\x00") || !utf8.ValidString(name) { // JSON would make another one of it
		return files, fmt.Errorf("%q cannot be the name of a file in an artifact", name)
	}
	if within == nil {
		p = filepath.Join(root.Name(), p)
	}
	return append(files, local{name: name, root: within, path: p, size: info.Size()}), nil
}

// addFile copies a file into the store. It may not change meanwhile.
func (s *Store) addFile(ctx context.Context, f local, progress func(string, int64, int64)) (blob.Descriptor, error) {
	open := os.OpenFile
	if f.root != nil {
		open = f.root.OpenFile
	}
	file, err := open(f.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return blob.Descriptor{}, err
	}
	defer file.Close() //nolint:errcheck // read only
	before, err := file.Stat()
	if err != nil {
		return blob.Descriptor{}, err
	}
	desc, err := s.Ingest(ctx, &told{r: file, f: f, progress: progress})
	if err != nil {
		return blob.Descriptor{}, err
	}
	after, err := file.Stat()
	if err == nil && (after.Size() != desc.Size || !after.ModTime().Equal(before.ModTime())) {
		err = errors.New("it changed while it was read; try again when nobody writes to it")
	}
	return desc, err
}

// told tells what is read through it.
type told struct {
	r        io.Reader
	f        local
	done     int64
	progress func(string, int64, int64)
}

func (t *told) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.done += int64(n)
	if t.progress != nil {
		t.progress(t.f.name, t.done, t.f.size)
	}
	return n, err
}
