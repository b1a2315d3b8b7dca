// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := OpenStore(filepath.Join(t.TempDir(), "profiles"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	s := openStore(t)
	if _, err := s.Load(image); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	first := New(image, seen(base), []Touch{touch(0, 0, 10, 0)})
	if got, err := s.Add(first); err != nil || got != first {
		t.Errorf("got %+v, error %v", got, err)
	}
	merged, err := s.Add(New(image, seen(base), []Touch{touch(0, 0, 10, 0)}))
	if err != nil || merged.Runs != 2 {
		t.Errorf("got %+v, error %v", merged, err)
	}
	got, err := s.Load(image)
	if d := cmp.Diff(merged, got); d != "" || err != nil {
		t.Errorf("error %v: %s", err, d)
	}
	if err := s.Save(first); err != nil {
		t.Error(err)
	}
	if got, err := s.Load(image); err != nil || got.Runs != 1 {
		t.Errorf("got %+v, error %v", got, err)
	}
	if err := s.Drop(image); err != nil {
		t.Error(err)
	}
	if err := s.Drop(image); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestStoreRefusesNames(t *testing.T) {
	s := openStore(t)
	for _, name := range []digest.Digest{"", "x", "sha256:../x", "sha256:"} {
		if _, err := s.Load(name); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("loading %q: error %v", name, err)
		}
		if err := s.Drop(name); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("dropping %q: error %v", name, err)
		}
		if err := s.Save(New(name, nil, nil)); !errors.Is(err, ErrInvalid) {
			t.Errorf("saving %q: error %v", name, err)
		}
	}
}

// A file that is damaged, or another image's, is none; the next recording
// replaces it.
func TestStoreReplacesWhatIsDamaged(t *testing.T) {
	other := New(top, seen(base), nil)
	for name, data := range map[string][]byte{
		"empty": nil, "damaged": []byte("{"), "another's": encode(t, other), "too long": make([]byte, MaxSize+1),
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			if err := os.WriteFile(s.name(image), data, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Load(image); !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v", err)
			}
			if got, err := s.Add(New(image, seen(base), nil)); err != nil || got.Runs != 1 {
				t.Errorf("got %+v, error %v", got, err)
			}
			if _, err := s.Load(image); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestStoreIsBounded(t *testing.T) {
	s := openStore(t)
	start := time.Now().Add(-time.Hour)
	var names []digest.Digest
	for i := range 5 {
		d := digest.FromString(fmt.Sprint(i))
		names = append(names, d)
		if err := s.Save(New(d, seen(base), nil)); err != nil {
			t.Fatal(err)
		}
		at := start.Add(time.Duration(i) * time.Second)
		if err := os.Chtimes(s.name(d), at, at); err != nil {
			t.Fatal(err)
		}
	}
	left := func() int {
		n := 0
		for _, d := range names {
			if _, err := s.Load(d); err == nil {
				n++
			}
		}
		return n
	}
	info, err := os.Stat(s.name(names[4]))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		files int
		bytes int64
		want  int
	}{{5, 5 * info.Size(), 5}, {4, 5 * info.Size(), 4}, {5, 2*info.Size() + 1, 2}, {5, 0, 0}} {
		if err := s.trim(c.files, c.bytes); err != nil {
			t.Fatal(err)
		}
		if got := left(); got != c.want {
			t.Errorf("%d files, %d bytes: %d are left, want %d", c.files, c.bytes, got, c.want)
		}
		if _, err := s.Load(names[4]); c.want > 0 && err != nil {
			t.Errorf("the newest has gone: %v", err)
		}
	}
}
