// SPDX-License-Identifier: Apache-2.0

// Package profile is what a workload reads of its image until it is ready, and
// in which order: so that another node can fetch just that before it is asked.
//
// A [Profile] speaks of bytes of blobs, compressed as the registry has them, so
// that it fits every node, whatever index that has of a layer. It is only a hint
// about what to fetch first: what is fetched is verified as always, and a profile
// that is wrong costs time and nothing else. It comes from other machines, so
// [Decode] takes nothing that is not sound, within bounds.
//
// [New] makes one of a recording, [Merge] adds a recording to what is known, and
// a [Store] keeps them on a node.
package profile

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

// MediaType is that of the document which [Profile.Encode] returns.
const MediaType = "application/vnd.holdfast.profile.v1+json"

// Bounds of a profile. A document at all of the others is still below MaxSize.
const (
	MaxSize    = 4 << 20 // bytes of the document
	MaxTouches = 90_000
	MaxLayers  = 1000
	// MaxRuns is how many recordings count: later ones displace the oldest bit by bit.
	MaxRuns = 8

	maxLayerSize = int64(1) << 50
	version      = 1
)

// ErrInvalid means that a document is not a sound profile.
var ErrInvalid = errors.New("invalid profile")

// Profile is what an image's workload reads until it is ready. The document is
// its JSON. It is not changed once it is made.
type Profile struct {
	Version int           `json:"version"`
	Image   digest.Digest `json:"image"` // the manifest of one platform
	Created time.Time     `json:"created"`
	Runs    int           `json:"runs"` // recordings that it is made of
	Layers  []Layer       `json:"layers"`
	// Touches are in the order in which they are wanted. No two have a byte in common.
	Touches []Touch `json:"touches"`
}

// Layer is a layer of the image.
type Layer struct {
	Digest digest.Digest `json:"digest"` // of the blob
	Size   int64         `json:"size"`   // of the blob, in bytes
	// Runs is how many recordings saw what is read of this layer. One in which it
	// was on the node already did not: the kernel answers then, from its memory.
	Runs int `json:"runs"`
}

// Touch is bytes of a blob that readers asked for. In the document it is an
// array: layer, offset, length, runs.
type Touch struct {
	Layer int // index into Profile.Layers
	blob.Range
	Runs int // recordings in which it was read
}

// MarshalJSON writes the array.
func (t Touch) MarshalJSON() ([]byte, error) {
	return json.Marshal([]int64{int64(t.Layer), t.Offset, t.Length, int64(t.Runs)})
}

// UnmarshalJSON reads the array.
func (t *Touch) UnmarshalJSON(data []byte) error {
	const longest = 100 // four numbers
	var fields []int64
	if len(data) > longest {
		return fmt.Errorf("touch of %d characters: %w", len(data), ErrInvalid)
	}
	if err := json.Unmarshal(data, &fields); err != nil || len(fields) != 4 {
		return fmt.Errorf("touch %s: want [layer, offset, length, runs]: %w", data, ErrInvalid)
	}
	*t = Touch{int(fields[0]), blob.Range{Offset: fields[1], Length: fields[2]}, int(fields[3])}
	return nil
}

// UnmarshalJSON refuses at once what is no layer: many of them in a document would
// take more memory than text.
func (l *Layer) UnmarshalJSON(data []byte) error {
	type plain Layer
	if err := strict(data, (*plain)(l)); err != nil {
		return err
	}
	return l.check()
}

func (l *Layer) check() error {
	switch {
	case l.Digest.Validate() != nil || l.Digest.Algorithm() != digest.SHA256:
		return fmt.Errorf("layer %q: want a sha256 digest: %w", clip(string(l.Digest)), ErrInvalid)
	case l.Size < 0 || l.Size > maxLayerSize:
		return fmt.Errorf("layer %s has %d bytes: %w", l.Digest, l.Size, ErrInvalid)
	case l.Runs < 0 || l.Runs > MaxRuns:
		return fmt.Errorf("layer %s was seen in %d runs: %w", l.Digest, l.Runs, ErrInvalid)
	}
	return nil
}

// Decode reads a document. Its errors are [ErrInvalid].
func Decode(data []byte) (*Profile, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%d bytes, at most %d are read: %w", len(data), MaxSize, ErrInvalid)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	if head.Version != version {
		return nil, fmt.Errorf("version %d, only %d is known: %w", head.Version, version, ErrInvalid)
	}
	p := &Profile{}
	if err := strict(data, p); err != nil {
		return nil, err
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return p, nil
}

// strict reads one JSON value that has no fields but those of v.
func strict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the value")
		}
	}
	if err != nil && !errors.Is(err, ErrInvalid) {
		err = fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	return err
}

func (p *Profile) check() error {
	switch {
	case p.Image.Validate() != nil || p.Image.Algorithm() != digest.SHA256:
		return fmt.Errorf("image %q: want a sha256 digest: %w", clip(string(p.Image)), ErrInvalid)
	case p.Runs < 1 || p.Runs > MaxRuns:
		return fmt.Errorf("%d runs: %w", p.Runs, ErrInvalid)
	case len(p.Layers) > MaxLayers:
		return fmt.Errorf("%d layers, at most %d are read: %w", len(p.Layers), MaxLayers, ErrInvalid)
	case len(p.Touches) > MaxTouches:
		return fmt.Errorf("%d touches, at most %d are read: %w", len(p.Touches), MaxTouches, ErrInvalid)
	}
	seen := map[digest.Digest]bool{}
	for _, l := range p.Layers {
		if err := l.check(); err != nil {
			return err
		}
		if seen[l.Digest] {
			return fmt.Errorf("layer %s occurs twice: %w", l.Digest, ErrInvalid)
		}
		if seen[l.Digest] = true; l.Runs > p.Runs {
			return fmt.Errorf("layer %s was seen in %d of %d runs: %w", l.Digest, l.Runs, p.Runs, ErrInvalid)
		}
	}
	return p.checkTouches()
}

func (p *Profile) checkTouches() error {
	for i, t := range p.Touches {
		if t.Layer < 0 || t.Layer >= len(p.Layers) {
			return fmt.Errorf("touch %d is of layer %d of %d: %w", i, t.Layer, len(p.Layers), ErrInvalid)
		}
		l := p.Layers[t.Layer]
		if t.Offset < 0 || t.Length < 1 || t.Offset > l.Size || t.Length > l.Size-t.Offset {
			return fmt.Errorf("touch %d: %d bytes at %d of layer %s, which has %d: %w", i, t.Length, t.Offset, l.Digest, l.Size, ErrInvalid)
		}
		if t.Runs < 1 || t.Runs > l.Runs {
			return fmt.Errorf("touch %d was seen in %d of %d runs: %w", i, t.Runs, l.Runs, ErrInvalid)
		}
	}
	sorted := slices.SortedFunc(slices.Values(p.Touches), byPlace)
	for i := 1; i < len(sorted); i++ {
		if a, b := sorted[i-1], sorted[i]; a.Layer == b.Layer && b.Offset < a.End() {
			return fmt.Errorf("layer %s: bytes at %d occur twice: %w", p.Layers[a.Layer].Digest, b.Offset, ErrInvalid)
		}
	}
	return nil
}

// byPlace orders touches by where their bytes lie.
func byPlace(a, b Touch) int {
	return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Length, b.Length))
}

// Encode returns the document.
func (p *Profile) Encode() ([]byte, error) {
	data, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encoding profile of %s: %w", p.Image, err)
	}
	return append(data, '\n'), nil
}

// Wanted are the touches to fetch, in order: those that at least half of the
// recordings have which could see them.
func (p *Profile) Wanted() []Touch {
	var wanted []Touch
	for _, t := range p.Touches {
		if 2*t.Runs >= p.Layers[t.Layer].Runs {
			wanted = append(wanted, t)
		}
	}
	return wanted
}

// Bytes is how many bytes of the layer are wanted.
func (p *Profile) Bytes(layer int) int64 {
	var n int64
	for _, t := range p.Wanted() {
		if t.Layer == layer {
			n += t.Length
		}
	}
	return n
}

// clip shortens what a stranger has written, for messages.
func clip(s string) string { return s[:min(len(s), 80)] }
