// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
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
