// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/index"
	"github.com/holdfast/holdfast/internal/testregistry"
	"github.com/holdfast/holdfast/test/lab"
)

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		items []float64
		want  float64
	}{
		{[]float64{3}, 3}, {[]float64{4, 3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{1, 9, 2, 8}, 2},
	} {
		if got := median(tc.items, func(v float64) float64 { return v }); got != tc.want {
			t.Errorf("median of %v is %v, want %v", tc.items, got, tc.want)
		}
	}
}

func TestBesides(t *testing.T) {
	layer, config := digest.FromString("layer"), digest.FromString("config")
	tocs := map[digest.Digest]int64{layer: 1000}
	for _, tc := range []struct {
		served testregistry.Served
		want   int64
	}{
		{testregistry.Served{Digest: config, Length: 70}, 70},
		{testregistry.Served{Digest: layer, Length: 1000}, 0},
		{testregistry.Served{Digest: layer, Offset: 990, Length: 10}, 0},
		{testregistry.Served{Digest: layer, Offset: 990, Length: 30}, 20},
		{testregistry.Served{Digest: layer, Offset: 1000, Length: 30}, 30},
		{testregistry.Served{Digest: layer, Offset: 1020, Length: 30}, 30},
	} {
		if got := besides([]testregistry.Served{tc.served}, tocs); got != tc.want {
			t.Errorf("besides %+v: %d, want %d", tc.served, got, tc.want)
		}
	}
}

// good is a report in which every bar is just reached.
func good() *report {
	r := &report{Line: line{20 * time.Millisecond, 125e6}, Touched: 100, PeakRSS: []int64{1 << 20, 80 << 20}}
	r.Shaped = starts{
		Normal: []lab.Start{{Pull: 19 * time.Second, Run: time.Second, Total: 20 * time.Second}},
		Lazy: []lazyStart{{Data: 130, Start: lab.Start{
			Prepare: 500 * time.Millisecond, Total: 2 * time.Second, PrepareRequests: 10,
			Layers: []lab.LayerStart{{Touched: 120}},
		}}},
	}
	r.Unshaped = r.Shaped
	r.Read.Mount = []transfer{{Bytes: 85 * 125e4, Took: time.Second}}
	r.Read.HTTP = []transfer{{Bytes: 125e6, Took: time.Second}}
	r.Local.Run = both{Normal: []time.Duration{1000}, Lazy: []time.Duration{1050}}
	r.Local.Read = both{Normal: []time.Duration{1000}, Lazy: []time.Duration{1050}}
	r.Local.Stat = both{Normal: []time.Duration{2000}, Lazy: []time.Duration{1000}}
	r.Pulls = map[string][]pull{"none": {{Took: time.Second}}}
	for _, hook := range []string{"excluded", "plain", "stopped"} {
		r.Pulls[hook] = []pull{{Took: 1200 * time.Millisecond}}
	}
	return r
}

func TestBarsAreThoseOfTheTable(t *testing.T) {
	r := good()
	bars := r.judge()
	if len(bars) != 12 {
		t.Errorf("%d bars, want 12", len(bars))
	}
	for _, b := range bars {
		if !b.Reached {
			t.Errorf("%s: %v missed with %v", b.What, b.Want, b.Measured)
		}
	}
	if got := new(report).judge(); got != nil {
		t.Errorf("bars without measurements: %+v", got)
	}
}

func TestBarsAreMissed(t *testing.T) {
	for name, spoil := range map[string]func(*report){
		"ready":     func(r *report) { r.Shaped.Lazy[0].Total++ },
		"bytes":     func(r *report) { r.Shaped.Lazy[0].Data++ },
		"prepare,":  func(r *report) { r.Shaped.Lazy[0].Prepare++ },
		"requests":  func(r *report) { r.Shaped.Lazy[0].PrepareRequests++ },
		"read of a": func(r *report) { r.Read.Mount[0].Bytes-- },
		"warm run":  func(r *report) { r.Local.Run.Lazy[0]++ },
		"warm read": func(r *report) { r.Local.Read.Lazy[0]++ },
		"stat":      func(r *report) { r.Local.Stat.Lazy[0]++ },
		"memory":    func(r *report) { r.PeakRSS[1]++ },
		"excluded":  func(r *report) { r.Pulls["excluded"][0].Took++ },
		"cannot be": func(r *report) { r.Pulls["plain"][0].Took++ },
		"down":      func(r *report) { r.Pulls["stopped"][0].Took++ },
	} {
		r := good()
		spoil(r)
		var missed []string
		for _, b := range r.judge() {
			if !b.Reached {
				missed = append(missed, b.What)
			}
		}
		if len(missed) != 1 || !strings.Contains(missed[0], name) {
			t.Errorf("%s: missed %q", name, missed)
		}
	}
}

func TestReportIsPrintedSavedAndDrawn(t *testing.T) {
	r := good()
	r.Bars = r.judge()
	r.Shaped.Normal[0].Output = "<&>"
	var out strings.Builder
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 15 { // an empty line, the head, twelve bars, the other line
		t.Errorf("%d lines:\n%s", n, out.String())
	}
	name := filepath.Join(t.TempDir(), "report.json")
	if err := r.save(name); err != nil {
		t.Fatal(err)
	}
	again, err := load(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, again, cmp.Exporter(func(reflect.Type) bool { return true })); diff != "" {
		t.Errorf("saved and loaded: %s", diff)
	}
	pictureIsSound(t, again.picture(), 4*3+3+1)
	pictureIsSound(t, new(report).picture(), 3+1)
}

func pictureIsSound(t *testing.T, svg []byte, wantRects int) {
	t.Helper()
	rects := 0
	for d := xml.NewDecoder(bytes.NewReader(svg)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in %s", err, svg)
		}
		if start, ok := token.(xml.StartElement); ok && start.Name.Local == "rect" {
			rects++
		}
	}
	if rects != wantRects {
		t.Errorf("%d rectangles, want %d", rects, wantRects)
	}
}

func TestWalkCountsAndReads(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"a": "12345", "d/b": "", "d/e/c": "1"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "d", "link")); err != nil {
		t.Fatal(err)
	}
	want := tree{Entries: 6, Files: 3, Bytes: 6}
	for _, walk := range []func() (tree, error){
		func() (tree, error) { return statTree(t.Context(), dir) },
		func() (tree, error) { return readTree(t.Context(), dir) },
	} {
		if got, err := walk(); err != nil || got != want {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
	}
}

func TestPlainImageCannotBeLazy(t *testing.T) {
	image, err := plainImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	for _, l := range image.Layers {
		size += l.Descriptor.Size
		if index.Annotated(l.Descriptor.Annotations) {
			t.Errorf("layer with the annotations %v", l.Descriptor.Annotations)
		}
	}
	if size < 30e6 || size > 33e6 {
		t.Errorf("%d bytes", size)
	}
}
