// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
)

var (
	image = digest.FromString("image")
	base  = digest.FromString("base")
	top   = digest.FromString("top")
)

func touch(layer int, offset, length int64, runs int) Touch {
	return Touch{layer, blob.Range{Offset: offset, Length: length}, runs}
}

// seen are layers that a recording could see, of 1 GiB each.
func seen(layers ...digest.Digest) []Layer {
	var all []Layer
	for _, l := range layers {
		all = append(all, Layer{Digest: l, Size: 1 << 30, Runs: 1})
	}
	return all
}

func encode(t testing.TB, p *Profile) []byte {
	t.Helper()
	data, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestDocument(t *testing.T) {
	p := New(image, seen(base, top), []Touch{touch(1, 5<<20, 100, 0), touch(0, 0, 4096, 0)})
	data := encode(t, p)
	if !strings.Contains(string(data), `"touches":[[1,5242880,100,1],[0,0,4096,1]]`) {
		t.Errorf("document %s", data)
	}
	back, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(p, back); d != "" {
		t.Error(d)
	}
}

// A document at all bounds is one that is read.
func TestLargestDocument(t *testing.T) {
	p := &Profile{Version: version, Image: image, Created: now(), Runs: MaxRuns}
	for i := range MaxLayers {
		p.Layers = append(p.Layers, Layer{Digest: digest.FromString(fmt.Sprint(i)), Size: maxLayerSize, Runs: MaxRuns})
	}
	const length = maxLayerSize / 10 / MaxTouches
	for i := range MaxTouches {
		p.Touches = append(p.Touches, touch(MaxLayers-1, maxLayerSize-length*int64(i+1), length, MaxRuns))
	}
	data := encode(t, p)
	if back, err := Decode(data); err != nil || len(back.Touches) != MaxTouches {
		t.Errorf("%d bytes: %v", len(data), err)
	}
}

const sound = `{"version":1,"image":"IMAGE","created":"2026-01-01T00:00:00Z","runs":2,` +
	`"layers":[{"digest":"BASE","size":1000,"runs":2},{"digest":"TOP","size":0,"runs":0}],"touches":[[0,0,500,2],[0,500,500,1]]}`

func document(from, to string) []byte {
	return []byte(strings.NewReplacer("IMAGE", string(image), "BASE", string(base), "TOP", string(top)).
		Replace(strings.Replace(sound, from, to, 1)))
}

func TestHostileDocuments(t *testing.T) {
	if _, err := Decode(document("", "")); err != nil {
		t.Fatal(err)
	}
	many := func(s string, n int) string { return strings.TrimSuffix(strings.Repeat(s+",", n), ",") }
	for _, c := range []struct{ name, from, to, want string }{
		{"not JSON", sound, "profile", "invalid character"},
		{"nothing", sound, "", "unexpected end"},
		{"null", sound, "null", "version 0"},
		{"cut off", `]]}`, `]]`, "unexpected end"},
		{"something behind it", `]]}`, `]]} {}`, "after top-level value"},
		{"other version", `"version":1`, `"version":2`, "version 2, only 1 is known"},
		{"unknown field", `"runs":2,"layers"`, `"runs":2,"x":1,"layers"`, `unknown field "x"`},
		{"unknown field of a layer", `"size":1000`, `"x":1,"size":1000`, `unknown field "x"`},
		{"too long", `"version":1`, `"version":1` + strings.Repeat(" ", MaxSize), "at most 4194304 are read"},
		{"image", "IMAGE", "../../etc/passwd", `image "../../etc/passwd"`},
		{"long name", "IMAGE", strings.Repeat("x", 1000), `image "` + strings.Repeat("x", 80) + `"`},
		{"other algorithm", "IMAGE", "sha512:" + strings.Repeat("0", 128), "want a sha256 digest"},
		{"layer", "BASE", "sha256:../../x", "want a sha256 digest"},
		{"layer twice", "TOP", string(base), "occurs twice"},
		{"empty layers", `"layers":[`, `"layers":[` + many("{}", 1_000_000) + `,`, "want a sha256 digest"},
		{"no runs", `"runs":2`, `"runs":0`, "0 runs"},
		{"too many runs", `"runs":2`, `"runs":9`, "9 runs"},
		{"layer with more runs", `"size":1000,"runs":2`, `"size":1000,"runs":3`, "3 of 2 runs"},
		{"layer with negative runs", `"size":0,"runs":0`, `"size":0,"runs":-1`, "-1 runs"},
		{"negative layer", `"size":0`, `"size":-1`, "-1 bytes"},
		{"huge layer", `"size":0`, `"size":9223372036854775807`, "9223372036854775807 bytes"},
		{"touch of a layer that is not there", `[0,0,500,2]`, `[2,0,500,2]`, "layer 2 of 2"},
		{"touch of layer -1", `[0,0,500,2]`, `[-1,0,500,2]`, "layer -1 of 2"},
		{"touch before the blob", `[0,0,500,2]`, `[0,-1,500,2]`, "500 bytes at -1"},
		{"touch behind the blob", `[0,500,500,1]`, `[0,500,501,1]`, "501 bytes at 500"},
		{"touch far behind", `[0,500,500,1]`, `[0,9223372036854775807,9223372036854775807,1]`, "at 9223372036854775807"},
		{"touch whose end overflows", `[0,500,500,1]`, `[0,500,9223372036854775807,1]`, "9223372036854775807 bytes at 500"},
		{"empty touch", `[0,0,500,2]`, `[0,0,0,2]`, "0 bytes at 0"},
		{"touch of an empty layer", `[0,0,500,2]`, `[1,0,1,1]`, "which has 0"},
		{"bytes twice", `[0,500,500,1]`, `[0,499,500,1]`, "bytes at 499 occur twice"},
		{"touch without runs", `[0,0,500,2]`, `[0,0,500,0]`, "0 of 2 runs"},
		{"touch with too many runs", `[0,0,500,2]`, `[0,0,500,3]`, "3 of 2 runs"},
		{"short touch", `[0,0,500,2]`, `[0,0,500]`, "want [layer, offset, length, runs]"},
		{"long touch", `[0,0,500,2]`, `[0,0,500,2,1]`, "want [layer, offset, length, runs]"},
		{"endless touch", `[0,0,500,2]`, `[` + many("0", 1_000_000) + `]`, "touch of 2000001 characters"},
		{"touch that is null", `[0,0,500,2]`, `null`, "want [layer, offset, length, runs]"},
		{"touch of fractions", `[0,0,500,2]`, `[0,0,0.5,2]`, "want [layer, offset, length, runs]"},
		{"too many touches", `[[0,0,500,2]`, `[` + many("[0,0,1,1]", MaxTouches), "90001 touches"},
		{"deep", `[[0,0,500,2]`, strings.Repeat("[", 1_000_000), "exceeded max depth"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := Decode(document(c.from, c.to))
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 1000 {
				t.Errorf("got %+v, error %.300v, want %q", p, err, c.want)
			}
		})
	}
}

func TestCheckTakesTheImagesOnly(t *testing.T) {
	if _, err := Check(document("", ""), image); err != nil {
		t.Error(err)
	}
	if _, err := Check(document("", ""), base); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), string(image)) {
		t.Errorf("error %v", err)
	}
}

// FuzzDecode: whatever a stranger writes, what is taken is sound, can be merged
// and written again.
func FuzzDecode(f *testing.F) {
	f.Add(document("", ""))
	f.Add(document(`[0,0,500,2]`, `[0,499,500,1]`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Decode(data)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v", err)
			}
			return
		}
		back, err := Decode(encode(t, p))
		if err != nil || !slices.Equal(p.Touches, back.Touches) {
			t.Fatalf("written again: %v", err)
		}
		var total, sizes int64
		for i, l := range p.Layers {
			total, sizes = total+p.Bytes(i), sizes+l.Size
		}
		if total > sizes {
			t.Errorf("%d bytes are wanted of %d", total, sizes)
		}
		again := slices.Clone(p.Layers)
		for i := range again {
			again[i].Runs = min(again[i].Runs, 1)
		}
		for _, recorded := range []*Profile{New(p.Image, again, p.Touches), New(p.Image, seen(base), []Touch{touch(0, 1, 2, 0)})} {
			m := Merge(p, recorded)
			if err := m.check(); err != nil {
				t.Errorf("merged: %v", err)
			}
		}
	})
}
