// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/agent"
)

// CRI-O reads what is in directories below that of its drop-ins; those below that of
// registries are nobody's.
func TestDirectoriesOfDropIns(t *testing.T) {
	n := newNode(t)
	n.Write(t, "/etc/crio/crio.conf.d/sub/x", "[crio.runtime]\npids_limit = 7\n")
	n.Write(t, "/etc/containers/registries.conf.d/old.conf/x", "")
	n.startCRIO(t)
	n.sync(t, want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n"), agent.Applied, 0)
}

// Others edit their own files: CRI-O is not restarted because of it, the less as an editor
// has just opened one.
func TestForeignEdits(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n")
	n.sync(t, d, agent.Applied, 1)
	n.Write(t, "/etc/crio/crio.conf.d/.99-admin.swp", "b0VIM\x00")
	n.sync(t, d, agent.Unchanged, 0)
}

// CRI-O is not restarted on a file of others that it would not start with.
func TestUnreadableDropIn(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Write(t, "/etc/crio/crio.conf.d/.99-admin.swp", "b0VIM\x00")
	r, err := n.Sync(t.Context(), want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n"))
	if err != nil || r.Outcome != agent.Waiting || r.Restarts > 0 || !strings.Contains(r.Error, ".99-admin.swp") {
		t.Errorf("%+v %v", r, err)
	}
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
}
