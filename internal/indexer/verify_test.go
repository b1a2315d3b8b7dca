// SPDX-License-Identifier: Apache-2.0

package indexer_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/indexer"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/internal/testregistry"
)

func verdicts(all []indexer.VerifyResult) string {
	var list []string
	for _, r := range all {
		list = append(list, string(r.Verdict))
	}
	return strings.Join(list, ", ")
}

// found checks what List shows of layers: kind, worth and error of each index.
func found(t *testing.T, n node, name string, want ...string) {
	t.Helper()
	got, err := n.open(t, name).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, l := range got {
		var all []string
		for _, f := range l.Indexes {
			text := strings.TrimSpace(string(f.Kind) + " " + f.Trust.String())
			if f.Error != "" {
				text += " unusable"
			}
			all = append(all, text)
		}
		have = append(have, strings.Join(all, ", "))
	}
	if strings.Join(have, "\n") != strings.Join(want, "\n") {
		t.Errorf("found %q, want %q", have, want)
	}
}

func TestList(t *testing.T) {
	s := start(t, testregistry.Options{})
	ref := push(t, s, "app", layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Gzip), layer(t, tree(3), testimage.EStargz))
	shared := t.TempDir()
	n := newNode(t, s, index.Place(shared), index.RegistryPlace)
	found(t, n, ref, "", "", "estargz bound")
	n.build(t, ref, indexer.Built, indexer.Built, indexer.Carried)
	if _, err := n.open(t, ref).Push(t.Context(), index.Place(shared)); err != nil {
		t.Fatal(err)
	}
	img := n.open(t, ref).Image
	if err := os.Truncate(filepath.Join(shared, img.Layers[1].Digest.Encoded()+".ztoc"), 100); err != nil {
		t.Fatal(err)
	}
	found(t, n, ref, "soci verified, soci found", "soci verified, found unusable", "estargz bound")

	// Of an index that everybody has, the node's own comes first.
	forced, err := n.open(t, ref).Build(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	checkOutcomes(t, forced, indexer.Built, indexer.Built, indexer.Built)
	found(t, n, ref, "soci verified, soci found", "soci verified, found unusable", "soci verified, estargz bound")

	all, err := indexer.Contents(n.finder.Own())
	if err != nil || len(all) != 3 {
		t.Fatalf("%+v, error %v", all, err)
	}
	for _, k := range all {
		if len(k.Kinds) != 2 || k.Kinds[0] != "digests" || k.Kinds[1] != "ztoc" || k.Size < 1000 || k.Used.IsZero() {
			t.Errorf("%+v", k)
		}
	}
}

// The index that is made of a layer, and the one that it carries, are right.
func TestVerify(t *testing.T) {
	for _, c := range append(testimage.Corpus(), testimage.Case{Name: "spans", Tar: tree(1), Formats: testimage.Formats()}) {
		t.Run(c.Name, func(t *testing.T) {
			var layers []testimage.Layer
			for _, f := range c.Formats {
				layers = append(layers, layer(t, c.Tar, f))
			}
			n, name := newNode(t, nil), layout(t, layers...)
			built, err := n.open(t, name).Build(t.Context(), false)
			if err != nil && !errors.Is(err, indexer.ErrNone) {
				t.Fatalf("%+v, error %v", built, err)
			}
			got, err := n.open(t, name).Verify(t.Context(), "")
			if err != nil && !errors.Is(err, indexer.ErrNone) && !c.RawNames {
				t.Fatalf("%+v, error %v", got, err)
			}
			for i, r := range got {
				want := indexer.Right
				switch {
				case built[i].Outcome == indexer.None:
					want = indexer.NoIndex
				case built[i].Outcome == indexer.Carried && c.RawNames:
					want = indexer.Differs // the decoder says so
				}
				if r.Verdict != want {
					t.Errorf("%s: %+v, want %s", c.Formats[i], r, want)
				}
			}
		})
	}
}

// Whatever is wrong with an index is found, and named.
func TestVerifyDiffers(t *testing.T) {
	l := layer(t, tree(1), testimage.Gzip)
	n, name := newNode(t, nil), layout(t, l)
	n.build(t, name, indexer.Built)
	read := func(kind string) []byte {
		p, err := os.ReadFile(filepath.Join(n.finder.Config.Own, l.Descriptor.Digest.Encoded()+kind))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	ztoc, digests := read(".ztoc"), read(".digests")
	replaced := func(p []byte, old, new string) []byte {
		if bytes.Count(p, []byte(old)) == 0 {
			t.Fatalf("there is no %q", old)
		}
		return bytes.Replace(p, []byte(old), []byte(new), 1)
	}
	flipped := func(p []byte, at int) []byte {
		p = append([]byte(nil), p...)
		p[at] ^= 1
		return p
	}
	// signed is what somebody writes who knows what he does.
	signed := func(ztoc []byte) []byte {
		sum := sha256.Sum256(ztoc)
		return slices.Concat(digests[:8+64], sum[:], digests[8+96:])
	}
	span := strings.Index(string(ztoc), "sha256:") + len("sha256:")
	for name, c := range map[string]struct {
		ztoc, digests []byte
		want          string
	}{
		"damaged":        {flipped(ztoc, len(ztoc)-1), digests, "its zTOC has digest"},
		"another name":   {ztoc: replaced(ztoc, "etc/passwd", "etc/passwx"), want: "another tree"},
		"another link":   {ztoc: replaced(ztoc, "etc/passwd", "etd/passwd"), want: "another tree"},
		"another time":   {ztoc: replaced(ztoc, "2023-11-14", "2023-11-15"), want: "another tree"},
		"span digest":    {ztoc: flipped(ztoc, span), want: "span "},
		"window":         {ztoc: flipped(ztoc, len(ztoc)-1), want: "other bytes before it"},
		"file digest":    {ztoc, flipped(digests, len(digests)-1), "file 2 at"},
		"fewer files":    {ztoc, digests[:len(digests)-32], "digests of 2 files, and 3"},
		"not sound":      {ztoc: ztoc[:1000], want: "reading zTOC"},
		"another layer":  {ztoc, flipped(digests, 8), "digests of layer"},
		"another diffID": {ztoc, flipped(digests, 40), "diff ID"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.digests == nil {
				c.digests = signed(c.ztoc)
			}
			dir := t.TempDir()
			file := filepath.Join(dir, l.Descriptor.Digest.Encoded())
			if err := errors.Join(os.WriteFile(file+".ztoc", c.ztoc, 0o600), os.WriteFile(file+".digests", c.digests, 0o600)); err != nil {
				t.Fatal(err)
			}
			got, err := n.open(t, layout(t, l)).Verify(t.Context(), index.Place(dir))
			if !errors.Is(err, indexer.ErrDiffers) || verdicts(got) != "differs" {
				t.Fatalf("%+v, error %v", got, err)
			}
			if !strings.Contains(got[0].Reason, c.want) || got[0].Index.Trust != index.Found {
				t.Errorf("%+v, want %q", got[0], c.want)
			}
		})
	}
}

// A layer that cannot be read says nothing about its index.
func TestVerifyUnreadable(t *testing.T) {
	l, other := layer(t, tree(1), testimage.Gzip), layer(t, tree(2), testimage.Gzip)
	n, name := newNode(t, nil), layout(t, l, other)
	n.build(t, name, indexer.Built, indexer.Built)
	broken := l
	broken.Bytes = append([]byte(nil), l.Bytes...)
	broken.Bytes[len(broken.Bytes)/2] ^= 1
	got, err := n.open(t, layout(t, broken, other)).Verify(t.Context(), "")
	if err == nil || errors.Is(err, indexer.ErrDiffers) || verdicts(got) != "unknown, ok" {
		t.Errorf("%+v, error %v", got, err)
	}
	if got, err := newNode(t, nil).open(t, name).Verify(t.Context(), ""); !errors.Is(err, indexer.ErrNone) || verdicts(got) != "no index, no index" {
		t.Errorf("without an index: %+v, error %v", got, err)
	}
	if _, err := n.open(t, name).Verify(t.Context(), index.RegistryPlace); err == nil {
		t.Error("an image in files has a registry")
	}
}
