// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"os"
	"testing"

	"github.com/holdfast/holdfast/internal/agent/agenttest"
)

func TestMain(m *testing.M) {
	agenttest.Main() // the program is also CRI-O of a node, and its systemctl
	os.Exit(m.Run())
}
