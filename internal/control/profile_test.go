// SPDX-License-Identifier: Apache-2.0

package control_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/profile"
)

// profiles notes what it is asked for, and answers.
type profiles struct {
	asked  []string
	answer *profile.Profile
	err    error
}

func (p *profiles) Profile(_ context.Context, ref string) (*profile.Profile, error) {
	p.asked = append(p.asked, "show "+ref)
	return p.answer, p.err
}

func (p *profiles) RecordProfile(_ context.Context, req control.RecordRequest) (*profile.Profile, error) {
	p.asked = append(p.asked, "record "+req.Reference+" for "+req.For.String())
	return p.answer, p.err
}

func (p *profiles) PushProfile(_ context.Context, ref string) error {
	p.asked = append(p.asked, "push "+ref)
	return p.err
}

func (p *profiles) DropProfile(_ context.Context, ref string) error {
	p.asked = append(p.asked, "drop "+ref)
	return p.err
}

func TestProfiles(t *testing.T) {
	const ref = "a/b&c=d#e"
	p := &profiles{answer: profile.New(digest.FromString("image"),
		[]profile.Layer{{Digest: digest.FromString("layer"), Size: 100, Runs: 1}},
		[]profile.Touch{{Range: blob.Range{Offset: 7, Length: 3}}})}
	socket, _ := serve(t, &service{Profiles: p})
	c := control.NewClient(socket)
	shown, err := c.Profile(t.Context(), ref)
	if d := cmp.Diff(p.answer, shown); d != "" || err != nil {
		t.Errorf("error %v: %s", err, d)
	}
	recorded, err := c.RecordProfile(t.Context(), control.RecordRequest{Reference: ref, For: time.Minute})
	if d := cmp.Diff(p.answer, recorded); d != "" || err != nil {
		t.Errorf("error %v: %s", err, d)
	}
	if err := errors.Join(c.PushProfile(t.Context(), ref), c.DropProfile(t.Context(), ref)); err != nil {
		t.Error(err)
	}
	if d := cmp.Diff([]string{"show " + ref, "record " + ref + " for 1m0s", "push " + ref, "drop " + ref}, p.asked); d != "" {
		t.Error(d)
	}
	p.err = prepare.ErrNoProfile
	_, showErr := c.Profile(t.Context(), ref)
	for _, err := range []error{showErr, c.DropProfile(t.Context(), ref)} {
		if !errors.Is(err, prepare.ErrNoProfile) || errors.Is(err, prepare.ErrUnknown) {
			t.Errorf("error %v", err)
		}
	}
	p.err = errors.New("boom")
	if _, err := c.RecordProfile(t.Context(), control.RecordRequest{}); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("error %v", err)
	}
	if err := c.PushProfile(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("error %v", err)
	}
}
