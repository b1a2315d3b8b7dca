// SPDX-License-Identifier: Apache-2.0

package indexstore_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/indexstore"
	"github.com/holdfast/holdfast/internal/testregistry"
)

// hostileLayers are lists of layers in manifests by somebody who means no good.
func hostileLayers(server *testregistry.Server) map[string]struct {
	layers  string
	is      error // nil: any
	missing bool  // it is as if there was nothing
} {
	good, other := server.AddBlob([]byte("good")), digest.FromString("other bytes")
	server.AddBlobAs(other, []byte("evil"))
	ztoc := func(d string, size any, layer digest.Digest) string {
		return fmt.Sprintf(`{"mediaType":"application/octet-stream","digest":%q,"size":%v,"annotations":{"com.amazon.soci.image-layer-digest":%q}}`, d, size, layer)
	}
	one := layer(1).Digest
	return map[string]struct {
		layers  string
		is      error
		missing bool
	}{
		"no list":              {`{}`, nil, false},
		"null":                 {`null`, nil, true},
		"empty":                {`[]`, nil, true},
		"no descriptors":       {`[1,2]`, nil, false},
		"empty descriptors":    {`[{},{}]`, nil, true},
		"other layer":          {`[` + ztoc(good.String(), 4, layer(2).Digest) + `]`, nil, true},
		"layer of no name":     {`[` + ztoc(good.String(), 4, "") + `]`, nil, true},
		"other media type":     {`[` + strings.Replace(ztoc(good.String(), 4, one), "octet-stream", "x", 1) + `]`, nil, true},
		"digest that is none":  {`[` + ztoc("sha256:../../x", 4, one) + `]`, nil, false},
		"negative size":        {`[` + ztoc(good.String(), -1, one) + `]`, nil, false},
		"huge size":            {`[` + ztoc(good.String(), math.MaxInt64, one) + `]`, nil, false},
		"size beyond integers": {`[` + ztoc(good.String(), "1e30", one) + `]`, nil, false},
		"too small a size":     {`[` + ztoc(good.String(), 3, one) + `]`, blob.ErrCorrupt, false},
		"too large a size":     {`[` + ztoc(good.String(), 5, one) + `]`, nil, false},
		"other bytes":          {`[` + ztoc(other.String(), 4, one) + `]`, blob.ErrCorrupt, false},
		"blob that is gone":    {`[` + ztoc(digest.FromString("gone").String(), 4, one) + `]`, nil, true},
		"most":                 {`[` + strings.Repeat("{},", 1023) + `{}]`, nil, true},
		"too many":             {`[` + strings.Repeat("{},", 1024) + `{}]`, nil, false},
		"far too many":         {`[` + strings.Repeat("{},", 1_300_000) + `{}]`, nil, false},
		"deep":                 {strings.Repeat(`[`, 100_000), nil, false},
	}
}

func TestHostileManifests(t *testing.T) {
	server, repo := connect(t, testregistry.Options{NoReferrers: true})
	for name, tt := range hostileLayers(server) {
		t.Run(name, func(t *testing.T) {
			subject := indexstore.Subject{MediaType: manifestType, Digest: digest.FromString(name), Size: 1}
			body := fmt.Sprintf(`{"config":{"mediaType":%q},"layers":%s,"subject":{"digest":%q}}`, sociV1, tt.layers, subject.Digest)
			d := server.AddManifest(repositoryPath, "layer-sha256-"+layer(1).Digest.Encoded(), manifestType, []byte(body))
			// The registry itself lists only what it can decode.
			list := fmt.Appendf(nil, `{"manifests":[{"digest":%q,"artifactType":%q}]}`, d, sociV1)
			server.AddManifest(repositoryPath, "sha256-"+subject.Digest.Encoded(), manifestType, list)
			for _, place := range []indexstore.Place{indexstore.NewRepository(repo), indexstore.NewImage(repo, subject, "")} {
				text, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC)
				if err == nil || errors.Is(err, fs.ErrNotExist) != tt.missing || tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("%s: %q, error %v", place, text, err)
				}
				if err != nil && len(err.Error()) > 1000 {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
			}
		})
	}
}

// The list of referrers may name anything, itself included. It is read with few
// requests and little memory, and what is of use is found.
func TestHostileReferrers(t *testing.T) {
	entry := func(d digest.Digest, artifactType, more string) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":1,"artifactType":%q%s}`, manifestType, d, artifactType, more)
	}
	junk := func(n int, artifactType, more string) string {
		var list []string
		for i := range n {
			list = append(list, entry(digest.FromString(fmt.Sprint(i)), artifactType, more))
		}
		return strings.Join(list, ",")
	}
	for _, tt := range []struct {
		name string
		// list, with GOOD for an index of use, LIST for the list itself, IMAGE for
		// the image, OTHER for an index of another image.
		list  string
		want  string
		fails bool
		most  int64 // manifests that are read, the list included
	}{
		{"empty", ``, "", false, 1},
		{"of use", entry("GOOD", sociV1, ""), "good", false, 2},
		{"type not told", entry("GOOD", "", ""), "good", false, 2},
		{"type not told, by others neither", entry("OTHER", "", "") + `,` + entry("IMAGE", "", "") + `,` + entry("GOOD", "", ""), "good", false, 4},
		{"of use after 10,000 signatures", junk(10_000, "application/x", "") + `,` + entry("GOOD", sociV1, ""), "good", false, 2},
		{"of use after what is gone", junk(3, sociV1, "") + `,` + entry("GOOD", sociV1, ""), "good", false, 5},
		{"10,000 that are gone", junk(10_000, sociV1, ""), "", false, 5},
		{"of another image", entry("OTHER", sociV1, ""), "", true, 2},
		{"of another image, before one of use", entry("OTHER", sociV1, "") + `,` + entry("GOOD", sociV1, ""), "good", false, 3},
		{"the list itself", entry("LIST", sociV1, ""), "", true, 2},
		{"the image", entry("IMAGE", sociV1, ""), "", true, 2},
		{"no digests", entry("../../x", sociV1, "") + `,{},` + entry("GOOD", sociV1, ""), "good", false, 2},
		{"strange annotations", entry("GOOD", sociV1, `,"annotations":{"x":[1],"org.opencontainers.image.created":""}`), "good", false, 2},
		{"annotations that are none", entry("GOOD", sociV1, `,"annotations":[]`), "", true, 1},
		{"no descriptors", `1,2`, "", true, 1},
		{"too many", strings.Repeat(`{},`, 1<<15) + `{}`, "", true, 1},
		{"far too many", strings.Repeat(`{},`, 1_300_000) + `{}`, "", true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, repo := connect(t, testregistry.Options{NoReferrers: true})
			img := image()
			img.Digest = server.AddManifest(repositoryPath, "", manifestType, []byte(`{"config":{"mediaType":"application/vnd.oci.image.config.v1+json"}}`))
			good := add(server, sociV1, "good", "", img.Digest)
			other := add(server, sociV1, "other", "", digest.FromString("other"))
			// The list cannot have its own digest in it; a manifest that is like it does.
			self := server.AddManifest(repositoryPath, "", manifestType, fmt.Appendf(nil, `{"manifests":[%s]}`, entry(good, sociV1, "")))
			list := strings.NewReplacer("GOOD", good.String(), "OTHER", other.String(), "IMAGE", img.Digest.String(), "LIST", self.String()).Replace(tt.list)
			server.AddManifest(repositoryPath, "sha256-"+img.Digest.Encoded(), manifestType, []byte(`{"manifests":[`+list+`]}`))

			place := indexstore.NewImage(repo, img, "")
			text, err := tryFetch(t.Context(), place, layer(1).Digest, indexstore.ZTOC)
			missing := tt.want == "" && !tt.fails
			if text != tt.want || (err == nil) != (tt.want != "") || errors.Is(err, fs.ErrNotExist) != missing {
				t.Errorf("%q, error %v", text, err)
			}
			if c := server.Counts(); c.Manifest > tt.most {
				t.Errorf("%d manifests were read; want at most %d", c.Manifest, tt.most)
			}
		})
	}
}

// A list of the largest size takes little more memory than its bytes.
func TestMemory(t *testing.T) {
	server, repo := connect(t, testregistry.Options{NoReferrers: true})
	for name, list := range map[string]string{
		"referrers":   `{"manifests":[` + strings.Repeat(`{"x":1},`, 500_000) + `{}]}`,
		"annotations": `{"manifests":[{"annotations":{` + strings.Repeat(`"a":"",`, 590_000) + `"b":""}}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			if len(list) > registry.MaxManifestSize || len(list) < registry.MaxManifestSize*9/10 {
				t.Fatalf("%d bytes", len(list))
			}
			server.AddManifest(repositoryPath, "sha256-"+image().Digest.Encoded(), manifestType, []byte(list))
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := tryFetch(t.Context(), indexstore.NewImage(repo, image(), ""), layer(1).Digest, indexstore.ZTOC)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Error("no error")
			}
			// All that was ever allocated: buffers that grow count several times.
			if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > 64 {
				t.Errorf("%d MiB were allocated for %d", n, len(list)>>20)
			}
		})
	}
}
