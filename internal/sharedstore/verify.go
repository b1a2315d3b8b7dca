// SPDX-License-Identifier: Apache-2.0

package sharedstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/unpack"
)

// Summary is an image in a store.
type Summary struct {
	Names    []string      `json:"names"`
	ID       string        `json:"id"`
	Digest   digest.Digest `json:"digest"`
	Platform string        `json:"platform,omitempty"`
	Created  time.Time     `json:"created,omitzero"`
	Size     int64         `json:"size"` // bytes of all of its layers, uncompressed
	Layers   int           `json:"layers"`
}

// List returns the images in the store, in the order in which they were added.
func (s *Store) List() ([]Summary, error) {
	images, err := s.images()
	if err != nil {
		return nil, err
	}
	layers, err := s.layers()
	if err != nil {
		return nil, err
	}
	byID := map[string]imagestore.Layer{}
	for _, l := range layers {
		byID[l.ID] = l
	}
	all := make([]Summary, 0, len(images))
	for _, i := range images {
		sum := Summary{Names: i.Names, ID: i.ID, Digest: i.Digest, Created: i.Created}
		for id := i.TopLayer; id != "" && sum.Layers <= len(layers); id = byID[id].Parent {
			sum.Layers++
			sum.Size += byID[id].DiffSize
		}
		var config v1.Image
		if data, err := os.ReadFile(s.dataPath(i.ID, "sha256:"+i.ID)); err == nil && json.Unmarshal(data, &config) == nil {
			sum.Platform = strings.TrimSuffix(config.OS+"/"+config.Architecture+"/"+config.Variant, "/")
		}
		all = append(all, sum)
	}
	return all, nil
}

// dataPath is the file with data of an image.
func (s *Store) dataPath(id, key string) string {
	return filepath.Join(s.path(imagesDir, filepath.Base(id)), dataFile(key))
}

// Problem is what is wrong with something, and what to do.
type Problem struct {
	What   string `json:"what"` // image or layer, and which; or a path
	Wrong  string `json:"wrong"`
	Remedy string `json:"remedy"`
}

func (p Problem) String() string { return fmt.Sprintf("%s: %s; %s", p.What, p.Wrong, p.Remedy) }

// Report is what Verify has found.
type Report struct {
	Images   int       `json:"images"`
	Layers   int       `json:"layers"`
	Bytes    int64     `json:"bytes"` // of the layers' tars that were put together
	Problems []Problem `json:"problems"`
	// Notes are what is no harm: leftovers, layers that can only be checked in part.
	Notes []string `json:"notes"`
}

// verification is one Verify.
type verification struct {
	*Store
	progress Progress
	layers   map[string]imagestore.Layer

	mu     sync.Mutex // protects the fields below, and calls of progress
	report Report
}

func (v *verification) wrong(what, remedy, format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Problems = append(v.report.Problems, Problem{what, fmt.Sprintf(format, args...), remedy})
}

func (v *verification) note(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Notes = append(v.report.Notes, fmt.Sprintf(format, args...))
}

// Verify compares everything in the store with its digest: the layers with their diff
// IDs, by putting their tars together again, and their trees with what these describe;
// manifests, configurations and signatures; records with directories. It writes nothing
// and takes no lock. The error is that the store cannot be read at all.
func (s *Store) Verify(ctx context.Context, progress Progress) (*Report, error) {
	images, err := s.images()
	if err != nil {
		return nil, fmt.Errorf("verifying %s: %w", s.root, err)
	}
	layers, err := s.layers()
	if err != nil {
		return nil, fmt.Errorf("verifying %s: %w", s.root, err)
	}
	v := &verification{Store: s, progress: progress, layers: map[string]imagestore.Layer{}}
	v.report = Report{Images: len(images), Layers: len(layers), Problems: []Problem{}, Notes: []string{}}
	for _, l := range layers {
		v.layers[l.ID] = l
	}
	v.files()
	names := map[string]bool{}
	for _, i := range images {
		v.image(i, names)
	}
	var g errgroup.Group
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	for _, l := range layers {
		g.Go(func() error {
			if ctx.Err() == nil {
				v.layer(ctx, l)
			}
			return nil
		})
	}
	_ = g.Wait() // problems are in the report
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	slices.SortFunc(v.report.Problems, func(a, b Problem) int { return strings.Compare(a.String(), b.String()) })
	return &v.report, nil
}

// files looks whether there is what runtimes open, and what should not be there.
func (v *verification) files() {
	for _, name := range []string{"overlay-layers/layers.lock", "overlay-images/images.lock", "overlay/l"} {
		if _, err := os.Stat(v.path(name)); err != nil {
			v.wrong(name, "run holdfast store create on it again, where it can be written", "runtimes need it: %v", err)
		}
	}
	entries, err := os.ReadDir(v.path(driverDir))
	if err != nil {
		v.wrong(driverDir, "see whether the disk is damaged", "%v", err)
	}
	for _, e := range entries {
		if _, known := v.layers[e.Name()]; !known && e.Name() != "l" {
			v.wrong("overlay/"+e.Name(), "run holdfast store prune, which removes it", "no record leads to it, and runtimes may take it for their own")
		}
	}
	staged, err := os.ReadDir(v.path(stagingDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.wrong(stagingDir, "see whether the disk is damaged", "%v", err)
	}
	if len(staged) > 0 {
		v.note("%d leftovers of a writer that was interrupted, or the work of one that runs: harmless, the next add or prune tidies up", len(staged))
	}
}

func (v *verification) image(i storage.Image, names map[string]bool) {
	what := "image " + i.ID
	if len(i.Names) > 0 {
		what = "image " + i.Names[0]
	}
	remedy := "remove it and add it again (holdfast store remove, holdfast store add)"
	for _, n := range i.Names {
		if names[n] {
			v.wrong(what, remedy, "another image has the name %s, too: runtimes cannot read such a store", n)
		}
		names[n] = true
	}
	for _, key := range i.BigDataNames {
		data, err := os.ReadFile(v.dataPath(i.ID, key))
		switch {
		case err != nil:
			v.wrong(what, remedy, "reading its %s: %v", key, err)
		case int64(len(data)) != i.BigDataSizes[key] || digest.FromBytes(data) != i.BigDataDigests[key]:
			v.wrong(what, remedy, "its %s is not what was recorded: %d bytes, %s", key, len(data), digest.FromBytes(data))
		case key == "sha256:"+i.ID && digest.FromBytes(data).Encoded() != i.ID, key == "manifest" && digest.FromBytes(data) != i.Digest && len(i.BigDataNames) <= 4:
			v.wrong(what, remedy, "its %s has digest %s", key, digest.FromBytes(data))
		}
	}
	for _, key := range []string{"manifest", "sha256:" + i.ID} {
		if !slices.Contains(i.BigDataNames, key) {
			v.wrong(what, remedy, "there is no %s", key)
		}
	}
	seen := 0
	for id := i.TopLayer; id != ""; id = v.layers[id].Parent {
		if _, ok := v.layers[id]; !ok || seen > len(v.layers) {
			v.wrong(what, remedy, "layer %s is not recorded", id)
			return
		}
		seen++
	}
}

func (v *verification) layer(ctx context.Context, l imagestore.Layer) {
	what := "layer " + l.ID
	remedy := "it cannot be repaired while images need it: remove them (holdfast store remove), let it go (holdfast store prune --grace 0s), and add them again"
	if !layerID.MatchString(l.ID) || l.ID != imagestore.ChainID(l.Parent, l.DiffID) {
		v.wrong(what, remedy, "its id is not that of its chain")
		return
	}
	dir := v.path(driverDir, l.ID)
	if _, err := os.Stat(dir); err != nil {
		v.wrong(what, "run holdfast store prune, which finishes what was interrupted, and verify again; if it is still missing, remove its images and add them again", "its directory is missing: %v", err)
		return
	}
	want := map[string]string{"link": linkName(l.ID)}
	var lower []string
	for p := l.Parent; p != ""; p = v.layers[p].Parent {
		lower = append(lower, "l/"+linkName(p))
	}
	if lower != nil {
		want["lower"] = strings.Join(lower, ":")
	}
	for name, text := range want {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			v.wrong(what, remedy, "its file %s is wrong", name)
		}
	}
	if to, err := os.Readlink(v.path(driverDir, "l", linkName(l.ID))); err != nil || to != filepath.Join("..", l.ID, unpack.Diff) {
		v.wrong(what, remedy, "the link overlay/l/%s is wrong", linkName(l.ID))
	}
	v.content(ctx, l, what, remedy)
}

// content puts the layer's tar together again.
func (v *verification) content(ctx context.Context, l imagestore.Layer, what, remedy string) {
	split, err := os.Open(v.splitFile(l.ID))
	if errors.Is(err, fs.ErrNotExist) {
		v.note("%s has no tar-split: its files cannot be compared with its digest", what)
		return
	}
	if err != nil {
		v.wrong(what, remedy, "reading its tar-split: %v", err)
		return
	}
	defer split.Close() //nolint:errcheck // read only
	got, differences, err := unpack.Verify(ctx, v.path(driverDir, l.ID, unpack.Diff), split, l.DiffSize, v.state.Keeps)
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		v.wrong(what, remedy, "%v", err)
		return
	case got != l.DiffID:
		v.wrong(what, remedy, "its content has digest %s, not %s", got, l.DiffID)
	}
	for _, d := range differences {
		v.wrong(what, remedy, "%s", d)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Bytes += l.DiffSize
	v.progress(l.BlobDigest, l.DiffSize, l.DiffSize)
}
