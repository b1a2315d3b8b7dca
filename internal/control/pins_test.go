// SPDX-License-Identifier: Apache-2.0

package control_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/pins"
)

// pinned notes what it is asked for, and answers.
type pinned struct {
	asked []string
	err   error
}

func (p *pinned) Pins() []pins.Pin { return []pins.Pin{{Name: "a.example/b:c", State: pins.Pinned}} }

func (p *pinned) Pin(names []string) error {
	p.asked = append(p.asked, "pin "+strings.Join(names, " "))
	return p.err
}

func (p *pinned) Unpin(names []string) error {
	p.asked = append(p.asked, "unpin "+strings.Join(names, " "))
	return p.err
}

func TestPins(t *testing.T) {
	p := &pinned{}
	socket, _ := serve(t, &service{Pinning: p})
	c := control.NewClient(socket)
	all, err := c.Pins(t.Context())
	if d := cmp.Diff(p.Pins(), all); d != "" || err != nil {
		t.Errorf("error %v: %s", err, d)
	}
	if err := errors.Join(c.Pin(t.Context(), "a", "b"), c.Unpin(t.Context(), "a")); err != nil {
		t.Error(err)
	}
	if want := []string{"pin a b", "unpin a"}; !slices.Equal(p.asked, want) {
		t.Errorf("asked %q", p.asked)
	}
	p.err = fmt.Errorf("a is %w", pins.ErrConfigured)
	if err := c.Unpin(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), p.err.Error()) {
		t.Errorf("error %v", err)
	}
}
