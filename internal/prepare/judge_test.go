// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/imagestore"
)

const (
	testGrace = 24 * time.Hour
	testRoot  = "/var/lib/containers/storage"
)

func testNow() time.Time { return time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC) }

// shelf is a stock of images that have been unused for two days; layers are
// called by a letter, an image by its layers.
func shelf(names ...string) *stock {
	s := &stock{claimed: map[digest.Digest]bool{}, used: map[string][]imagestore.Referrer{}}
	old := testNow().Add(-48 * time.Hour)
	for _, name := range names {
		img := Image{References: []string{name}, Digest: digest.FromString(name), Prepared: old, UnusedSince: old.Add(time.Minute)}
		parent := ""
		for _, letter := range name {
			l := LayerResult{Digest: digest.FromString(string(letter)), ChainID: imagestore.ChainID(parent, digest.FromString(string(letter))), Action: Lazy}
			img.Layers = append(img.Layers, l)
			if s.imagesWith[l.ChainID] == 0 {
				s.records = append(s.records, imagestore.Layer{ID: l.ChainID, Parent: parent, BlobDigest: l.Digest, Created: old})
			}
			if s.imagesWith[l.Digest.String()] == 0 {
				s.layers = append(s.layers, stored{digest: l.Digest, created: old, bytes: 100})
			}
			parent = l.ChainID
		}
		s.images = append(s.images, img)
		s.count()
	}
	return s
}

// refer makes the image called name in a runtime refer to a record and to those below.
func (s *stock) refer(name string, chain []string) {
	for _, id := range chain {
		s.used[id] = append(s.used[id], imagestore.Referrer{Kind: "image", Name: name, Root: testRoot})
	}
}

// lose takes an image away, and leaves what it had.
func (s *stock) lose(i int) Image {
	img := s.images[i]
	s.images = append(s.images[:i:i], s.images[i+1:]...)
	s.count()
	return img
}

func TestDecisions(t *testing.T) {
	ago := func(d time.Duration) time.Time { return testNow().Add(-d) }
	for _, test := range []struct {
		name   string
		images []string
		grace  time.Duration // testGrace if 0, none if below
		change func(*stock)
		want   []string // kind, name of images, - or +, reason
		freed  int64
	}{
		{
			name: "unused", images: []string{"ab"},
			want: []string{"image ab - unused for 47h59m, grace period 24h"}, freed: 200,
		},
		{
			name: "within the grace period", images: []string{"ab"},
			change: func(s *stock) { s.images[0].UnusedSince = ago(2 * time.Hour) },
			want:   []string{"image ab + unused for 2h, grace period 24h"},
		},
		{
			name: "the grace period ends", images: []string{"ab"},
			change: func(s *stock) { s.images[0].UnusedSince = ago(testGrace) },
			want:   []string{"image ab - unused for 24h, grace period 24h"}, freed: 200,
		},
		{
			name: "no grace period", images: []string{"a"}, grace: -1,
			change: func(s *stock) { s.images[0].UnusedSince = testNow() },
			want:   []string{"image a - unused for 0s, grace period 0s"}, freed: 100,
		},
		{
			name: "just prepared", images: []string{"a"}, grace: -1,
			change: func(s *stock) { s.images[0].Prepared = ago(time.Minute); s.images[0].UnusedSince = ago(time.Minute) },
			want:   []string{"image a + prepared 1m ago, a runtime may be about to refer to it"},
		},
		{
			name: "prepared and never pulled", images: []string{"a"}, grace: -1,
			change: func(s *stock) { s.images[0].Prepared = ago(pullTime); s.images[0].UnusedSince = ago(pullTime) },
			want:   []string{"image a - unused for 10m, grace period 0s"}, freed: 100,
		},
		{
			name: "the clock went back", images: []string{"a"},
			change: func(s *stock) { s.images[0].UnusedSince = testNow().Add(time.Hour) },
			want:   []string{"image a + unused for 0s, grace period 24h"},
		},
		{
			name: "in use", images: []string{"ab"},
			change: func(s *stock) { s.refer("quay.io/x:1", s.images[0].chain()) },
			want:   []string{"image ab + in use: image quay.io/x:1 in " + testRoot},
		},
		{
			name: "in use by many", images: []string{"a"},
			change: func(s *stock) {
				for i := range 5 {
					s.refer(fmt.Sprint(i), s.images[0].chain())
				}
			},
			want: []string{fmt.Sprintf("image a + in use: image 0 in %s, image 1 in %[1]s, image 2 in %[1]s and 2 more", testRoot)},
		},
		{
			name: "one of two that share", images: []string{"ab", "ac"},
			change: func(s *stock) { s.refer("x", s.images[1].chain()) },
			want: []string{
				"image ab - unused for 47h59m, grace period 24h",
				"image ac + in use: image x in " + testRoot,
			}, freed: 100,
		},
		{
			name: "two that share", images: []string{"ab", "ac"},
			want: []string{
				"image ab - unused for 47h59m, grace period 24h",
				"image ac - unused for 47h59m, grace period 24h",
			}, freed: 300,
		},
		{
			name: "two that share what is in use", images: []string{"ab", "ac"},
			change: func(s *stock) { s.refer("x", s.images[0].chain()[:1]) },
			want: []string{
				"image ab - unused for 47h59m, grace period 24h",
				"image ac + in use: image x in " + testRoot,
			}, freed: 100,
		},
		{
			name: "what another image has left to the runtime", images: []string{"ab", "b"},
			change: func(s *stock) {
				s.images[1].UnusedSince = ago(2 * time.Hour)
				s.images[1].Layers[0].Action, s.images[1].Layers[0].ChainID = Left, ""
				s.records = s.records[:2]
				s.count()
			},
			want: []string{
				"image ab - unused for 47h59m, grace period 24h",
				"image b + unused for 2h, grace period 24h",
			}, freed: 200,
		},
		{
			name: "being prepared", images: []string{"ab"}, grace: -1,
			change: func(s *stock) { s.claimed[digest.FromString("a")] = true },
			want:   []string{"image ab + in use: an image with it is being prepared"},
		},
		{
			name: "not known what is in use", images: []string{"a", "b"}, grace: -1,
			change: func(s *stock) {
				s.unknown = errors.New("cannot read")
				s.lose(1)
			},
			want: []string{"record + cannot read", "image a + cannot read", "layer + cannot read"},
		},
		{
			name: "records and layers of no image", images: []string{"ab"},
			change: func(s *stock) { s.lose(0) },
			want: []string{
				"record - no prepared image has it, made 48h ago, grace period 24h",
				"record - no prepared image has it, made 48h ago, grace period 24h",
				"layer - no prepared image has it, made 48h ago, grace period 24h",
				"layer - no prepared image has it, made 48h ago, grace period 24h",
			}, freed: 200,
		},
		{
			name: "a record of no image in use", images: []string{"ab"},
			change: func(s *stock) { s.refer("x", s.lose(0).chain()[:1]) },
			want: []string{
				"record - no prepared image has it, made 48h ago, grace period 24h",
				"record + in use: image x in " + testRoot,
				"layer + record " + imagestore.ChainID("", digest.FromString("a")) + " leads to it",
				"layer - no prepared image has it, made 48h ago, grace period 24h",
			}, freed: 100,
		},
		{
			name: "a young record on an old one", images: []string{"ab"},
			change: func(s *stock) { s.lose(0); s.records[1].Created = ago(time.Hour) },
			want: []string{
				"record + no prepared image has it, made 1h ago, grace period 24h",
				"record + record " + imagestore.ChainID(imagestore.ChainID("", digest.FromString("a")), digest.FromString("b")) + " is built on it",
				"layer + record " + imagestore.ChainID("", digest.FromString("a")) + " leads to it",
				"layer + record " + imagestore.ChainID(imagestore.ChainID("", digest.FromString("a")), digest.FromString("b")) + " leads to it",
			},
		},
		{
			name: "a layer of a preparation", images: []string{"a"}, grace: -1,
			change: func(s *stock) {
				s.lose(0)
				s.records = nil
				s.count()
				s.claimed[digest.FromString("a")] = true
			},
			want: []string{"layer + in use: an image with it is being prepared"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := shelf(test.images...)
			if test.change != nil {
				test.change(s)
			}
			j := judge{grace: testGrace, now: testNow()}
			if test.grace != 0 {
				j.grace = 0
			}
			var c Collection
			c.add(j.decide(s)...)
			var got []string
			for _, d := range c.Decisions {
				words := []string{d.Kind, d.Name, "+", d.Reason}
				if d.Kind != KindImage {
					words = append(words[:1], words[2:]...)
				}
				line := strings.Join(words, " ")
				if d.Remove {
					line = strings.Replace(line, " + ", " - ", 1)
				}
				got = append(got, line)
			}
			if d := cmp.Diff(test.want, got); d != "" || c.Freed != test.freed {
				t.Errorf("freed %d, want %d (-want +got):\n%s", c.Freed, test.freed, d)
			}
		})
	}
}

func TestNote(t *testing.T) {
	s := shelf("a", "b", "c")
	s.refer("x", s.images[0].chain())
	s.images[1].UnusedSince = time.Time{}
	since := s.images[2].UnusedSince
	changed := s.note(testNow())
	if len(changed) != 2 || !s.images[0].UnusedSince.IsZero() || !s.images[1].UnusedSince.Equal(testNow()) || !s.images[2].UnusedSince.Equal(since) {
		t.Errorf("changed %v, images %v", changed, s.images)
	}
	if again := s.note(testNow().Add(time.Hour)); len(again) != 0 {
		t.Errorf("again %v", again)
	}
	s.unknown = errors.New("cannot read")
	s.used = nil
	if changed := s.note(testNow()); len(changed) != 0 {
		t.Errorf("changed although it is not known: %v", changed)
	}
}

func TestInUseOrder(t *testing.T) {
	s := shelf("a", "b", "c", "d")
	s.images[2].Private = true
	for _, i := range []int{0, 1, 2} {
		s.refer("x", s.images[i].chain())
	}
	var got []string
	for _, img := range s.inUse() {
		got = append(got, img.label())
	}
	if d := cmp.Diff([]string{"c", "a", "b"}, got); d != "" {
		t.Error(d)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 10 * time.Second: "10s", 100 * time.Second: "1m40s", time.Minute: "1m", 20 * time.Minute: "20m",
		time.Hour: "1h", 24 * time.Hour: "24h", time.Hour + 30*time.Second: "1h0m30s", 90 * time.Minute: "1h30m", 1400 * time.Millisecond: "1s",
	} {
		if got := span(d); got != want {
			t.Errorf("%v is written %s, want %s", d, got, want)
		}
	}
}
