// SPDX-License-Identifier: Apache-2.0

package indexstore

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast/holdfast/internal/blob"
)

// seeds are an index, a profile, and a list of referrers, for the fuzz targets.
func seeds(tb testing.TB) (index, profile, list []byte) {
	tb.Helper()
	desc := blob.Descriptor{Digest: digest.FromString("x"), Size: 1}
	l := LayerDocuments{Layer: Subject{MediaType: "m", Digest: digest.FromString("layer")}, SpanSize: 1 << 20}
	subject := &v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: 1}
	index, err := encodeIndex([]v1.Descriptor{ztocDescriptor(l, desc), besideDescriptor(digestsType, l, desc)}, subject, time.Unix(0, 0))
	if err != nil {
		tb.Fatal(err)
	}
	profile, err = encodeProfile(v1.Descriptor{MediaType: profileType, Digest: desc.Digest, Size: desc.Size}, nil, time.Time{})
	if err != nil {
		tb.Fatal(err)
	}
	return index, profile, []byte(`{"manifests":[{"mediaType":"m","digest":"` + desc.Digest.String() + `","size":1,"artifactType":"` + sociIndexV1 +
		`","annotations":{"org.opencontainers.image.created":"2026-01-01T00:00:00Z"}},{"digest":"` + desc.Digest.String() + `"}]}`)
}

func TestSeedsAreOfUse(t *testing.T) {
	index, profile, referrers := seeds(t)
	m, err := decodeManifest(index)
	if err != nil || len(m.documents) != 2 || m.is != sociIndexV1 || m.subject != digest.FromString("image") {
		t.Errorf("index: %+v, error %v", m, err)
	}
	m, err = decodeManifest(profile)
	if err != nil || len(m.documents) != 1 || m.is != profileType || m.subject != "" {
		t.Errorf("profile: %+v, error %v", m, err)
	}
	list, err := decodeReferrers(referrers)
	if err != nil || len(list) != 2 || list[0].created().IsZero() || len(newest(list, sociIndexV1)) != 2 || len(newest(list, profileType)) != 1 {
		t.Errorf("referrers: %+v, error %v", list, err)
	}
}

func FuzzDecodeManifest(f *testing.F) {
	index, profile, _ := seeds(f)
	f.Add(index)
	f.Add(profile)
	f.Add([]byte(`{"layers":null}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := decodeManifest(body)
		if err != nil {
			return
		}
		if len(m.documents) > maxDocuments {
			t.Errorf("%d documents", len(m.documents))
		}
		for key, desc := range m.documents {
			if !key.kind.known() || desc.Size < 0 || desc.Digest.Validate() != nil {
				t.Errorf("%v is %v", key, desc)
			}
		}
	})
}

func FuzzDecodeReferrers(f *testing.F) {
	_, _, list := seeds(f)
	f.Add(list)
	f.Add([]byte(`{"manifests":[{}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		all, err := decodeReferrers(body)
		if err != nil {
			return
		}
		list := newest(all, profileType)
		if len(all) > maxReferrers || len(list) > maxTried || len(list) > len(all) {
			t.Errorf("%d of %d", len(list), len(all))
		}
		for i, d := range list {
			if d.Digest.Validate() != nil || d.ArtifactType != "" && d.ArtifactType != profileType {
				t.Errorf("%d is %v", i, d)
			}
		}
	})
}

// The first of several documents of a kind about a layer counts.
func TestFirstCounts(t *testing.T) {
	layer := digest.FromString("layer")
	entry := func(mediaType, of string) string {
		return `{"mediaType":"` + mediaType + `","digest":"` + digest.FromString(of).String() + `","size":1,"annotations":{"` +
			layerDigest + `":"` + layer.String() + `","` + sociLayerDigest + `":"` + layer.String() + `"}}`
	}
	for _, tt := range []struct {
		layers []string
		want   map[document]string
	}{
		{[]string{entry(sociZTOC, "a"), entry(ztocType, "b")}, map[document]string{{ZTOC, layer}: "a"}},
		{[]string{entry(ztocType, "b"), entry(sociZTOC, "a")}, map[document]string{{ZTOC, layer}: "b"}},
		{[]string{entry(digestsType, "a"), entry(digestsType, "b"), entry(sociZTOC, "c")}, map[document]string{{Digests, layer}: "a", {ZTOC, layer}: "c"}},
		{[]string{entry(profileType, "a"), entry(profileType, "b")}, map[document]string{{Profile, ""}: "a"}},
		{[]string{entry("application/vnd.amazon.soci.prefetch.v1+json", "a")}, map[document]string{}},
	} {
		m, err := decodeManifest([]byte(`{"layers":[` + strings.Join(tt.layers, ",") + `]}`))
		if err != nil {
			t.Fatal(err)
		}
		want := map[document]blob.Descriptor{}
		for key, of := range tt.want {
			want[key] = blob.Descriptor{Digest: digest.FromString(of), Size: 1}
		}
		if diff := cmp.Diff(want, m.documents, cmp.AllowUnexported(document{})); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.layers, diff)
		}
	}
}
