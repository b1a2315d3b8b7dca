// SPDX-License-Identifier: Apache-2.0

package toc_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/index/toc"
)

const sum = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

func decode(t testing.TB, r io.Reader) (*index.Index, toc.Facts, error) {
	t.Helper()
	b := index.NewBuilder(1000, index.DefaultLimits())
	facts, err := toc.Decode(r, b)
	if err != nil {
		return nil, facts, err
	}
	idx, err := b.Finish(index.EStargz, index.Gzip)
	return idx, facts, err
}

func document(entries ...string) string {
	return `{"version":1,"entries":[` + strings.Join(entries, ",") + `]}`
}

func TestDecode(t *testing.T) {
	text := document(
		`{"name":"d/","type":"dir","mode":493}`,
		`{"name":"d/f","type":"reg","size":30,"offset":100,"chunkSize":20,"chunkDigest":"`+sum+`"}`,
		`{"name":"d/f","type":"chunk","offset":200,"chunkOffset":20,"chunkDigest":"`+sum+`"}`,
		`{"name":"g","type":"reg","size":5,"offset":200,"innerOffset":512,"digest":"`+sum+`","unknown":[{}]}`,
		`{"name":"z","type":"reg","size":7,"offset":400,"chunkType":"zeros"}`,
		`{"name":"empty","type":"reg"}`,
		`{"name":".prefetch.landmark","type":"reg","size":1,"offset":300,"digest":"`+sum+`"}`,
	)
	for name, r := range map[string]io.Reader{
		"at once": strings.NewReader(text),
		"bytes":   iotest.OneByteReader(strings.NewReader(text)),
		"spaces":  strings.NewReader("\n " + strings.ReplaceAll(text, ",", " ,\n") + " \n"),
	} {
		idx, facts, err := decode(t, r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if want := (toc.Facts{HasLandmark: true, Prefetch: 300, Last: toc.Position{Offset: 300, End: 1, FileSize: 1}}); facts != want {
			t.Errorf("%s: facts are %+v, want %+v", name, facts, want)
		}
		var got []string
		for _, c := range idx.Chunks {
			got = append(got, fmt.Sprintf("%d+%d@%d+%d/%d", c.Offset, c.Size, c.BlobOffset, c.BlobSize, c.InnerOffset))
		}
		want := "0+20@100+100/0 20+10@200+100/0 4096+5@200+100/512 12288+1@300+700/0"
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: chunks are %s, want %s", name, s, want)
		}
	}
}

func TestDecodeNothing(t *testing.T) {
	for _, text := range []string{`{"version":1}`, `{"entries":null,"version":1}`, document()} {
		if idx, _, err := decode(t, strings.NewReader(text)); err != nil || len(idx.Inodes) != 1 {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	reg := func(fields string) string { return document(`{"name":"f","type":"reg","size":30,` + fields + `}`) }
	ok := `"chunkDigest":"` + sum + `"`
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"nothing":               {"", index.ErrInvalid},
		"no object":             {"[]", index.ErrInvalid},
		"no version":            {`{"entries":[]}`, index.ErrInvalid},
		"another version":       {`{"version":2,"entries":[]}`, index.ErrInvalid},
		"no array":              {`{"version":1,"entries":{}}`, index.ErrInvalid},
		"cut off":               {document()[:20], index.ErrInvalid},
		"cut off in an entry":   {`{"version":1,"entries":[{"name":"a"`, index.ErrInvalid},
		"type of a field":       {document(`{"name":7}`), index.ErrInvalid},
		"not base64":            {document(`{"name":"a","type":"dir","xattrs":{"user.a":"***"}}`), index.ErrInvalid},
		"time":                  {document(`{"name":"a","type":"dir","modtime":"yesterday"}`), index.ErrInvalid},
		"unknown type":          {document(`{"name":"a","type":"socket"}`), index.ErrInvalid},
		"no type":               {document(`{"name":"a"}`), index.ErrInvalid},
		"replaced name":         {document(`{"name":"a\ufffd","type":"dir"}`), index.ErrInvalid},
		"lone surrogate":        {document(`{"name":"a\ud800","type":"dir"}`), index.ErrInvalid},
		"not UTF-8":             {document("{\"name\":\"a\xff\",\"type\":\"dir\"}"), index.ErrInvalid},
		"negative owner":        {document(`{"name":"a","type":"dir","uid":-1}`), index.ErrInvalid},
		"large owner":           {document(`{"name":"a","type":"dir","gid":4294967296}`), index.ErrInvalid},
		"device":                {document(`{"name":"a","type":"char","devMajor":4096}`), index.ErrInvalid},
		"number overflows":      {document(`{"name":"a","type":"reg","size":99999999999999999999}`), index.ErrInvalid},
		"negative size":         {reg(`"size":-1`), index.ErrTooLarge},
		"chunk without file":    {document(`{"name":"f","type":"chunk","chunkOffset":1}`), index.ErrInvalid},
		"chunk of another file": {document(`{"name":"f","type":"reg","size":3,`+ok+`,"chunkSize":1}`, `{"name":"g","type":"chunk","chunkOffset":1}`), index.ErrInvalid},
		"no digest":             {reg(`"offset":1`), index.ErrInvalid},
		"digest of the file":    {reg(`"digest":"` + sum + `","chunkSize":10`), index.ErrInvalid},
		"another digest":        {reg(`"digest":"sha512:` + strings.Repeat("0", 128) + `"`), index.ErrInvalid},
		"digest is no hex":      {reg(`"digest":"sha256:` + strings.Repeat("x", 64) + `"`), index.ErrInvalid},
		"gap":                   {reg(`"chunkOffset":1,` + ok), index.ErrInvalid},
		"too short":             {reg(`"chunkSize":29,` + ok), index.ErrInvalid},
		"too long":              {reg(`"chunkSize":31,` + ok), index.ErrInvalid},
		"negative chunk":        {reg(`"chunkSize":-1,` + ok), index.ErrInvalid},
		"overlap":               {document(`{"name":"f","type":"reg","size":3,"chunkSize":2,`+ok+`}`, `{"name":"f","type":"chunk","chunkOffset":1,`+ok+`}`), index.ErrInvalid},
		"outside of the blob":   {reg(`"offset":1000,` + ok), index.ErrInvalid},
		"before the blob":       {reg(`"offset":-1,` + ok), index.ErrInvalid},
		"inner offset":          {reg(`"innerOffset":9223372036854775807,` + ok), index.ErrInvalid},
		"negative inner offset": {reg(`"innerOffset":-1,` + ok), index.ErrInvalid},
		"type of chunk":         {reg(`"chunkType":"ones",` + ok), index.ErrInvalid},
		"large chunk":           {reg(`"size":1073741824,` + ok), index.ErrTooLarge},
		"large entry":           {document(`{"name":"a","type":"dir","x":"` + strings.Repeat("x", 2<<20) + `"}`), index.ErrTooLarge},
		"spaces":                {`{"version":1,"entries":[` + strings.Repeat(" ", 2<<20) + `]}`, index.ErrTooLarge},
		"deep":                  {`{"version":1,"x":` + strings.Repeat("[", 100_000), index.ErrInvalid},
		"dot-dot":               {document(`{"name":"a/../b","type":"dir"}`), index.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := decode(t, strings.NewReader(c.text)); !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
			}
		})
	}
}

var errBroken = errors.New("broken")

// The reader's error is returned wherever it strikes, not called a broken TOC.
func TestDecodeBrokenReader(t *testing.T) {
	text := document(`{"name":"d/","type":"dir"}`, `{"name":"e/","type":"dir"}`)
	for n := range len(text) {
		r := io.MultiReader(strings.NewReader(text[:n]), iotest.ErrReader(errBroken))
		if _, _, err := decode(t, r); !errors.Is(err, errBroken) || errors.Is(err, index.ErrInvalid) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// An endless TOC ends at the limit of entries, whatever it holds.
func TestDecodeEndless(t *testing.T) {
	r, w := io.Pipe()
	go func() {
		_, _ = io.WriteString(w, `{"version":1,"entries":[`)
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(w, `{"name":"%d","type":"dir"},`, i); err != nil {
				return
			}
		}
	}()
	_, _, err := decode(t, r)
	_ = r.Close()
	if !errors.Is(err, index.ErrTooLarge) {
		t.Errorf("error is %v", err)
	}
}

func BenchmarkDecode(b *testing.B) {
	var text strings.Builder
	text.WriteString("{\n\t\"version\": 1,\n\t\"entries\": [\n")
	for i := range 30_000 {
		fmt.Fprintf(&text, "\t\t{\n\t\t\t\"name\": \"usr/lib/python3/dist-packages/torch/include/ATen/ops/file_%d.h\",\n\t\t\t\"type\": \"reg\",\n\t\t\t\"size\": 3000,\n\t\t\t\"modtime\": \"2024-01-02T03:04:05Z\",\n\t\t\t\"mode\": 33188,\n\t\t\t\"offset\": %d,\n\t\t\t\"NumLink\": 0,\n\t\t\t\"digest\": %q,\n\t\t\t\"chunkDigest\": %q\n\t\t},\n", i, i, sum, sum)
	}
	text.WriteString("{\"name\":\"last\",\"type\":\"dir\"}]}")
	b.SetBytes(int64(text.Len()))
	for b.Loop() {
		bld := index.NewBuilder(1<<30, index.DefaultLimits())
		if _, err := toc.Decode(strings.NewReader(text.String()), bld); err != nil {
			b.Fatal(err)
		}
		if _, err := bld.Finish(index.EStargz, index.Gzip); err != nil {
			b.Fatal(err)
		}
	}
}
