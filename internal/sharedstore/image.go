// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/imagestore"
)

const maxConfig = 4 << 20 // bytes of an image configuration

// Image is an image that is to be added.
type Image struct {
	// Names are full names; the first is what it is called in messages.
	Names    []string
	Manifest blob.Manifest
	// List is the multi-platform index that the manifest was found in; Body is nil if
	// there was none.
	List    blob.Manifest
	Config  []byte
	Created time.Time
	// Layers are read from the first of Sources that has them as they should be.
	Layers  []image.Layer
	Sources []blob.Source
	// Signatures are in the form in which containers/storage keeps them.
	Signatures [][]byte
}

// id is the image's id, as runtimes have it: the digest of its configuration.
func (i *Image) id() string { return digest.FromBytes(i.Config).Encoded() }

// Load reads what is to be recorded of an image, under the given full name.
func Load(ctx context.Context, from *image.Opened, name string) (*Image, error) {
	full, ok := ocidir.FullName(name)
	if !ok {
		return nil, fmt.Errorf("name %q: want one with a registry, such as registry.example.com/team/app:v1: runtimes look for nothing else", name)
	}
	img := &Image{Names: []string{full}, Layers: from.Layers, Sources: from.Sources()}
	r := from.Reader()
	var err error
	if img.Manifest, err = r.Manifest(ctx, from.Manifest.Digest.String()); err != nil {
		return nil, err
	}
	if img.Manifest.MediaType == "" {
		img.Manifest.MediaType = from.Manifest.MediaType
	}
	list, err := r.Manifest(ctx, from.Asked)
	if err != nil {
		return nil, err
	}
	if types.MediaType(list.MediaType).IsIndex() {
		img.List = list
	}
	var m v1.Manifest
	if err := json.Unmarshal(img.Manifest.Body, &m); err != nil {
		return nil, fmt.Errorf("parsing manifest %s: %w", img.Manifest.Digest, err)
	}
	if img.Config, err = r.Blob(ctx, blob.Descriptor{Digest: m.Config.Digest, Size: m.Config.Size}, maxConfig); err != nil {
		return nil, err
	}
	var config v1.Image
	if err := json.Unmarshal(img.Config, &config); err != nil {
		return nil, fmt.Errorf("parsing configuration %s: %w", m.Config.Digest, err)
	}
	if config.Created != nil {
		img.Created = *config.Created
	}
	if img.Signatures, err = signatures(ctx, r, full, img.Manifest.Digest); err != nil {
		return nil, fmt.Errorf("reading signatures: %w", err)
	}
	return img, nil
}

// item is a piece of data that goes with an image's record.
type item struct {
	key  string
	data []byte
}

// items is what containers/storage keeps of an image, under its keys:
// go.podman.io/image/v5/storage, storage_dest.go, Commit.
func (i *Image) items() (all []item, metadata string, err error) {
	key := func(m blob.Manifest) string { return "manifest-" + m.Digest.String() }
	if i.List.Body != nil {
		all = append(all, item{key(i.List), i.List.Body})
	}
	all = append(all,
		item{key(i.Manifest), i.Manifest.Body}, item{"manifest", i.Manifest.Body},
		item{digest.FromBytes(i.Config).String(), i.Config})
	var sizes []int
	var signatures []byte
	for _, s := range i.Signatures {
		sizes = append(sizes, len(s))
		signatures = append(signatures, s...)
	}
	notes := struct {
		Sizes  []int                   `json:"signature-sizes,omitempty"`
		ByHash map[digest.Digest][]int `json:"signatures-sizes,omitempty"`
	}{}
	if sizes != nil {
		notes.ByHash = map[digest.Digest][]int{i.Manifest.Digest: sizes}
		all = append(all, item{"signature-" + i.Manifest.Digest.Encoded(), signatures})
	}
	text, err := json.Marshal(notes)
	return all, string(text), err
}

// dataFile is the name of a file with data of an image: go.podman.io/storage,
// store.go, makeBigDataBaseName.
func dataFile(key string) string {
	if strings.Trim(key, ".0123456789abcdefghijklmnopqrstuvwxyz") == "" {
		return key
	}
	return "=" + base64.StdEncoding.EncodeToString([]byte(key))
}

// addImage records an image whose layers are recorded.
func (s *Store) addImage(ctx context.Context, img *Image, top string) error {
	items, metadata, err := img.items()
	if err != nil {
		return err
	}
	record := storage.Image{
		ID: img.id(), Digest: img.Manifest.Digest, Names: img.Names, NamesHistory: img.Names, TopLayer: top,
		Metadata: metadata, Created: img.Created,
		BigDataSizes: map[string]int64{}, BigDataDigests: map[string]digest.Digest{},
	}
	unlock, err := imagestore.Lock(ctx, s.root, imagestore.Images)
	if err != nil {
		return err
	}
	defer unlock()
	images, err := s.images()
	if err != nil {
		return err
	}
	old := slices.IndexFunc(images, func(i storage.Image) bool { return i.ID == record.ID })
	if old >= 0 {
		// The same configuration may come with another manifest, of other compressions: all
		// of them are kept, as containers/storage does.
		record.Names = union(images[old].Names, record.Names)
		record.NamesHistory = record.Names
		record.BigDataNames = images[old].BigDataNames
		record.BigDataSizes, record.BigDataDigests = images[old].BigDataSizes, images[old].BigDataDigests
		if metadata == "{}" {
			record.Metadata = images[old].Metadata
		}
		record.TopLayer = images[old].TopLayer
	}
	dir := s.path(imagesDir, record.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, i := range items {
		if err := atomicfile.Write(filepath.Join(dir, dataFile(i.key)), i.data, 0o600); err != nil {
			return err
		}
		record.BigDataNames = union(record.BigDataNames, []string{i.key})
		record.BigDataSizes[i.key], record.BigDataDigests[i.key] = int64(len(i.data)), digest.FromBytes(i.data)
	}
	if err := atomicfile.SyncDir(s.path(imagesDir)); err != nil {
		return err
	}
	for n := range images {
		images[n].Names = slices.DeleteFunc(images[n].Names, func(name string) bool { return slices.Contains(img.Names, name) })
	}
	if old >= 0 {
		images[old] = record
	} else {
		images = append(images, record)
	}
	return imagestore.WriteList(s.root, imagestore.Images, images)
}

func union(a, b []string) []string {
	all := slices.Clone(a)
	for _, x := range b {
		if !slices.Contains(all, x) {
			all = append(all, x)
		}
	}
	return all
}

// ErrUnknown means that a store has no such image.
var ErrUnknown = errors.New("there is no such image in this store")
