// SPDX-License-Identifier: Apache-2.0

package indexstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// places are all there are; each function returns a place of the same content.
func places(t *testing.T) map[string]func() indexstore.Place {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "new", "index")
	all := map[string]func() indexstore.Place{
		"directory": func() indexstore.Place { return indexstore.NewDir(dir) },
	}
	for name, opts := range map[string]testregistry.Options{
		"with referrers API":    {Manner: testregistry.Quay, Private: true, Push: testregistry.PushAllowed},
		"without referrers API": {Push: testregistry.PushAllowed, NoReferrers: true},
	} {
		_, repo := connect(t, opts)
		all["image "+name] = func() indexstore.Place { return indexstore.NewImage(repo, image(), "") }
	}
	_, repo := connect(t, testregistry.Options{Manner: testregistry.GHCR, Push: testregistry.PushAllowed})
	all["repository"] = func() indexstore.Place { return indexstore.NewRepository(repo) }
	return all
}

func TestPlaces(t *testing.T) {
	type documents = map[indexstore.Kind]string
	extended := about(3, "zstd", "")
	extended.Layer.MediaType, extended.Extended = zstdLayer, true
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			want(t, open(), nil, image().Digest)
			want(t, open(), nil, layer(1).Digest)

			publish(t, open(), indexstore.Publication{})
			want(t, open(), nil, layer(1).Digest)

			publish(t, open(), indexstore.Publication{
				Image:   image(),
				Layers:  []indexstore.LayerDocuments{about(1, "one", "digests"), about(2, "two", ""), extended, about(4, "", "four"), about(5, "", "")},
				Profile: []byte("profile"),
				Created: time.Unix(1000, 0),
			})
			for range 2 { // in the same place twice
				place := open()
				want(t, place, documents{indexstore.Profile: "profile"}, image().Digest)
				want(t, place, documents{indexstore.ZTOC: "one", indexstore.Digests: "digests"}, layer(1).Digest)
				want(t, place, documents{indexstore.ZTOC: "two"}, layer(2).Digest)
				want(t, place, documents{indexstore.ZTOC: "zstd"}, layer(3).Digest)
				want(t, place, documents{indexstore.Digests: "four"}, layer(4).Digest)
				want(t, place, nil, layer(5).Digest)
			}

			// Newer ones replace older ones, and what there is none of stays.
			publish(t, open(), indexstore.Publication{
				Image: image(), Layers: []indexstore.LayerDocuments{about(1, "1", "new")}, Created: time.Unix(2000, 0),
			})
			want(t, open(), documents{indexstore.ZTOC: "1", indexstore.Digests: "new"}, layer(1).Digest)
			want(t, open(), documents{indexstore.Profile: "profile"}, image().Digest)
			publish(t, open(), indexstore.Publication{Image: image(), Profile: []byte("2"), Created: time.Unix(2000, 0)})
			want(t, open(), documents{indexstore.Profile: "2"}, image().Digest)
			want(t, open(), documents{indexstore.ZTOC: "1", indexstore.Digests: "new"}, layer(1).Digest)
			publish(t, open(), indexstore.Publication{Image: image(), Profile: []byte{}, Created: time.Unix(3000, 0)})
			if text, err := tryFetch(t.Context(), open(), image().Digest, indexstore.Profile); text != "" || err != nil {
				t.Errorf("an empty profile: %q, error %v", text, err)
			}
		})
	}
}

func TestLimit(t *testing.T) {
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			publish(t, open(), indexstore.Publication{Image: image(), Layers: []indexstore.LayerDocuments{about(1, "12345", "")}})
			for limit, ok := range map[int64]bool{0: false, 4: false, 5: true, 6: true} {
				var b bytes.Buffer
				err := open().Fetch(t.Context(), layer(1).Digest, indexstore.ZTOC, limit, &b)
				if (err == nil) != ok || errors.Is(err, fs.ErrNotExist) || int64(b.Len()) > limit {
					t.Errorf("limit %d: %q, error %v", limit, &b, err)
				}
			}
		})
	}
}

func TestStrangeNames(t *testing.T) {
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			for _, d := range []digest.Digest{"", "sha256:", "sha256:../x", "../../x", "md5:d41d8cd98f00b204e9800998ecf8427e", digest.SHA512.FromString("x")} {
				for _, kind := range []indexstore.Kind{indexstore.ZTOC, indexstore.Digests, indexstore.Profile} {
					if text, err := tryFetch(t.Context(), open(), d, kind); err == nil {
						t.Errorf("%s of %q is %q", kind, d, text)
					}
				}
				strange := about(1, "x", "")
				strange.Layer.Digest = d
				if err := open().Publish(t.Context(), indexstore.Publication{Layers: []indexstore.LayerDocuments{strange}}); err == nil {
					t.Errorf("publishing about layer %q: no error", d)
				}
				err := open().Publish(t.Context(), indexstore.Publication{Image: indexstore.Subject{MediaType: "x", Digest: d}, Profile: []byte("x")})
				if err == nil {
					t.Errorf("publishing a profile of %q: no error", d)
				}
			}
			if _, err := tryFetch(t.Context(), open(), layer(1).Digest, "../x"); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a strange kind: error = %v", err)
			}
		})
	}
}

// What somebody else's code is told about a place names it and no secret.
func TestString(t *testing.T) {
	for name, open := range places(t) {
		kind, _, _ := strings.Cut(strings.Replace(name, "image", "registry", 1), " ")
		if got := open().String(); !strings.HasPrefix(got, kind+" ") || strings.Contains(got, "secret") {
			t.Errorf("%s is called %q", name, got)
		}
	}
}

func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := indexstore.Publication{Image: image(), Layers: []indexstore.LayerDocuments{about(1, "x", "")}}
			publish(t, open(), p)
			if _, err := tryFetch(ctx, open(), layer(1).Digest, indexstore.ZTOC); !errors.Is(err, context.Canceled) {
				t.Errorf("fetching: error = %v", err)
			}
			p.Layers = []indexstore.LayerDocuments{about(2, "y", "")}
			if err := open().Publish(ctx, p); !errors.Is(err, context.Canceled) {
				t.Errorf("publishing: error = %v", err)
			}
			want(t, open(), nil, layer(2).Digest)
		})
	}
}

// full is a disk that is.
type full struct{}

var errFull = errors.New("no space")

func (full) Write([]byte) (int, error) { return 0, errFull }

// unreadable is content whose disk is broken.
type unreadable struct{ size int64 }

var errBroken = errors.New("broken disk")

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, errBroken }
func (u unreadable) Size() int64                     { return u.size }

// short is content that has shrunk.
type short struct{ io.ReaderAt }

func (short) Size() int64 { return 10 }

func TestContentFails(t *testing.T) {
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			publish(t, open(), indexstore.Publication{Image: image(), Layers: []indexstore.LayerDocuments{about(1, "12345", "")}})
			if err := open().Fetch(t.Context(), layer(1).Digest, indexstore.ZTOC, limit, full{}); !errors.Is(err, errFull) {
				t.Errorf("fetching to a full disk: error = %v", err)
			}
			for _, tt := range []struct {
				content indexstore.Content
				want    error
			}{
				{unreadable{10}, errBroken},
				{short{strings.NewReader("12345")}, nil},
			} {
				l := about(2, "", "")
				l.Digests = tt.content
				err := open().Publish(t.Context(), indexstore.Publication{Image: image(), Layers: []indexstore.LayerDocuments{l}})
				if err == nil || tt.want != nil && !errors.Is(err, tt.want) || blob.IsTemporary(err) {
					t.Errorf("publishing %T: error = %v", tt.content, err)
				}
				want(t, open(), nil, layer(2).Digest)
			}
		})
	}
}
