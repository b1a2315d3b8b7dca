// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/unpack"
)

// Image returns an image of this store, to be added to another one. Its layers are the
// tars that they were made of, put together again: their diff IDs are verified, while
// nobody knows any more what their blobs were.
func (s *Store) Image(name string) (*Image, error) {
	img, err := s.image(name)
	if err != nil {
		return nil, fmt.Errorf("reading %s of %s: %w", name, s.root, err)
	}
	return img, nil
}

func (s *Store) image(name string) (*Image, error) {
	images, err := s.images()
	if err != nil {
		return nil, err
	}
	n := find(images, name)
	if n < 0 {
		return nil, ErrUnknown
	}
	record := images[n]
	img := &Image{Names: record.Names, Created: record.Created, Sources: []blob.Source{tars{s}}}
	read := func(key string, want digest.Digest) ([]byte, error) {
		data, err := os.ReadFile(s.dataPath(record.ID, key))
		if err == nil && digest.FromBytes(data) != want {
			err = fmt.Errorf("its %s is damaged: %w", key, blob.ErrCorrupt)
		}
		return data, err
	}
	if img.Config, err = read("sha256:"+record.ID, digest.NewDigestFromEncoded(digest.SHA256, record.ID)); err != nil {
		return nil, err
	}
	img.Manifest.Digest = record.Digest
	if img.Manifest.Body, err = read("manifest-"+record.Digest.String(), record.Digest); err != nil {
		return nil, err
	}
	var notes struct {
		ByHash map[digest.Digest][]int `json:"signatures-sizes"`
	}
	if err := json.Unmarshal([]byte(record.Metadata), &notes); err != nil {
		return nil, fmt.Errorf("parsing its metadata: %w", err)
	}
	if sizes := notes.ByHash[record.Digest]; sizes != nil {
		key := "signature-" + record.Digest.Encoded()
		data, err := read(key, record.BigDataDigests[key])
		if err != nil {
			return nil, err
		}
		for _, n := range sizes {
			if n < 0 || n > len(data) {
				return nil, fmt.Errorf("its signatures are damaged: %w", blob.ErrCorrupt)
			}
			img.Signatures, data = append(img.Signatures, data[:n]), data[n:]
		}
	}
	img.Layers, err = s.chain(record.TopLayer)
	return img, err
}

// chain describes the layers of an image as tars, base first.
func (s *Store) chain(top string) ([]image.Layer, error) {
	records, err := s.layers()
	if err != nil {
		return nil, err
	}
	byID := map[string]imagestore.Layer{}
	for _, l := range records {
		byID[l.ID] = l
	}
	var all []image.Layer
	for id := top; id != ""; id = byID[id].Parent {
		l, ok := byID[id]
		if !ok || len(all) > len(records) {
			return nil, fmt.Errorf("layer %s is not recorded", id)
		}
		all = append(all, image.Layer{Descriptor: v1.Descriptor{Digest: l.DiffID, Size: l.DiffSize}, DiffID: l.DiffID})
	}
	slices.Reverse(all)
	return all, nil
}

// tars is a store as a source of its layers' tars, from their beginnings to their ends.
type tars struct{ s *Store }

func (t tars) String() string { return t.s.root }

// Open puts the tar with that diff ID together.
func (t tars) Open(ctx context.Context, desc blob.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if offset != 0 || length != desc.Size {
		return nil, fmt.Errorf("reading a part of layer %s: %w", desc.Digest, blob.ErrNoRange)
	}
	records, err := t.s.layers()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(records, func(l imagestore.Layer) bool { return l.DiffID == desc.Digest && layerID.MatchString(l.ID) })
	if i < 0 {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, blob.ErrNotFound)
	}
	split, err := os.Open(t.s.splitFile(records[i].ID))
	if err != nil {
		return nil, fmt.Errorf("layer %s has no tar-split: add the image from where it came from: %w", desc.Digest, err)
	}
	pr, pw := io.Pipe()
	go func() {
		err := unpack.Join(t.s.path(driverDir, records[i].ID, unpack.Diff), split, pw)
		pw.CloseWithError(errors.Join(err, split.Close(), ctx.Err()))
	}()
	return pr, nil
}
