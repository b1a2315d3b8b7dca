// SPDX-License-Identifier: Apache-2.0

package control_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/control"
)

// artifactService has another name than its method.
type artifactService = control.Artifacts

// composed notes what it is asked for, and answers.
type composed struct {
	asked []string
	err   error
}

func (c *composed) Artifacts() artifacts.All {
	return artifacts.All{Directories: []string{"/d"}, Stores: []artifacts.StoreStatus{{Path: "/s", Artifacts: 1}}, Artifacts: []artifacts.Status{{Name: "a.example/b:c", State: artifacts.InStore}}}
}

func (c *composed) PrepareArtifact(_ context.Context, req control.ArtifactRequest) error {
	c.asked = append(c.asked, fmt.Sprintf("prepare %s %s %t", req.Reference, req.Credentials.Username, req.Wait))
	return c.err
}

func (c *composed) RemoveArtifacts(_ context.Context, names []string) error {
	c.asked = append(c.asked, "remove "+strings.Join(names, " "))
	return c.err
}

func TestArtifacts(t *testing.T) {
	s := &composed{}
	socket, _ := serve(t, &service{artifactService: s})
	c := control.NewClient(socket)
	all, err := c.Artifacts(t.Context())
	want := s.Artifacts()
	if d := cmp.Diff(&want, all, cmpopts.IgnoreUnexported(artifacts.StoreStatus{})); d != "" || err != nil {
		t.Errorf("error %v: %s", err, d)
	}
	req := control.ArtifactRequest{Reference: "a.example/b:c", Credentials: &control.Credentials{Username: "u"}, Wait: true}
	if err := errors.Join(c.PrepareArtifact(t.Context(), req), c.RemoveArtifacts(t.Context(), "a", "b")); err != nil {
		t.Error(err)
	}
	if want := []string{"prepare a.example/b:c u true", "remove a b"}; !slices.Equal(s.asked, want) {
		t.Errorf("asked %q", s.asked)
	}
	s.err = fmt.Errorf("a is %w", artifacts.ErrConfigured)
	if err := c.RemoveArtifacts(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), s.err.Error()) {
		t.Errorf("error %v", err)
	}
}
