// SPDX-License-Identifier: Apache-2.0

package indexer_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func pushOutcomes(t *testing.T, got *indexer.Pushed, want ...indexer.PushOutcome) {
	t.Helper()
	var have []indexer.PushOutcome
	for _, r := range got.Layers {
		have = append(have, r.Outcome)
	}
	if fmt.Sprint(have) != fmt.Sprint(want) {
		t.Errorf("outcomes %v, want %v: %+v", have, want, got)
	}
}

// What one node publishes another one finds, wherever both are told to look. The
// image stays as it is.
func TestPush(t *testing.T) {
	for name, o := range map[string]testregistry.Options{
		"plain": {}, "no referrers": {NoReferrers: true}, "private": {Private: true}, "tokens": {Manner: testregistry.GHCR, Private: true},
	} {
		o.Push = testregistry.PushAllowed
		t.Run(name, func(t *testing.T) {
			s := start(t, o)
			name := push(t, s, "team/app", layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Zstd), layer(t, tree(3), testimage.EStargz))
			other := index.Place(index.RepositoryPlace + s.Host() + "/indexes")
			for _, place := range []index.Place{index.RegistryPlace, other, index.Place(filepath.Join(t.TempDir(), "shared"))} {
				first, second := newNode(t, s), newNode(t, s, place)
				before := first.open(t, name).Image.Manifest.Digest
				first.build(t, name, indexer.Built, indexer.Built, indexer.Carried)
				got, err := first.open(t, name).Push(t.Context(), place)
				if err != nil {
					t.Fatal(err)
				}
				pushOutcomes(t, got, indexer.Published, indexer.Published, indexer.Unneeded)
				if (got.Digest != "") != (place == index.RegistryPlace) || got.Place == "" {
					t.Errorf("published to %q as %q", got.Place, got.Digest)
				}
				again, err := first.open(t, name).Push(t.Context(), place)
				if err != nil || again.Digest != got.Digest {
					t.Errorf("again: %+v, error %v", again, err)
				}
				if after := second.open(t, name).Image.Manifest.Digest; after != before {
					t.Errorf("image %s has become %s", before, after)
				}
				found(t, second, name, "soci found", "soci found", "estargz bound")
				if got, err := second.open(t, name).Verify(t.Context(), place); err != nil || verdicts(got) != "ok, ok, no index" {
					t.Errorf("%+v, error %v", got, err)
				}
			}
		})
	}
}

func TestPushRefused(t *testing.T) {
	l := layer(t, tree(1), testimage.Gzip)
	for name, o := range map[string]testregistry.Options{
		"read only":             {},
		"denied":                {Push: testregistry.PushDenied, Private: true},
		"tokens for reading":    {Push: testregistry.PushDenied, Private: true, Manner: testregistry.Quay},
		"tokens, public images": {Push: testregistry.PushDenied, Manner: testregistry.GHCR},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, o)
			n, ref := newNode(t, s), push(t, s, "app", l)
			n.build(t, ref, indexer.Built)
			if got, err := n.open(t, ref).Push(t.Context(), index.RegistryPlace); got != nil || !errors.Is(err, blob.ErrUnauthorized) {
				t.Errorf("%+v, error %v", got, err)
			}
		})
	}
}

func TestPushWithout(t *testing.T) {
	s := start(t, testregistry.Options{Push: testregistry.PushAllowed})
	made, other := layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Gzip)
	ref := push(t, s, "app", made, other)
	n := newNode(t, s)
	got, err := n.open(t, ref).Push(t.Context(), index.RegistryPlace)
	if !errors.Is(err, indexer.ErrNone) || got == nil {
		t.Fatalf("nothing made: %+v, error %v", got, err)
	}
	pushOutcomes(t, got, indexer.Missing, indexer.Missing)

	local := layout(t, made)
	n.build(t, local, indexer.Built)
	if got, err = n.open(t, ref).Push(t.Context(), index.RegistryPlace); err != nil {
		t.Fatal(err)
	}
	pushOutcomes(t, got, indexer.Published, indexer.Missing)

	if _, err := n.open(t, local).Push(t.Context(), index.RegistryPlace); err == nil || !strings.Contains(err.Error(), "not in a registry") {
		t.Errorf("an image in files: %v", err)
	}
	dir := index.Place(t.TempDir())
	if _, err := n.open(t, local).Push(t.Context(), dir); err != nil {
		t.Errorf("an image in files, to a directory: %v", err)
	}

	// What is not sound is not published.
	n.build(t, ref, indexer.There, indexer.Built)
	if err := os.Truncate(filepath.Join(n.finder.Config.Own, made.Descriptor.Digest.Encoded()+".ztoc"), 1000); err != nil {
		t.Fatal(err)
	}
	if got, err = n.open(t, ref).Push(t.Context(), index.RegistryPlace); err != nil {
		t.Fatal(err)
	}
	pushOutcomes(t, got, indexer.Unusable, indexer.Published)
}
