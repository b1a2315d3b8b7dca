// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// TestLeaderChange kills the controller that works, amid a rollout. The other goes on: no node is
// told twice, and no more at once than may be.
func TestLeaderChange(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(6)...)
	c.changePool(t, "worker", maxUnavailable(2))
	leader := startController(t, c.server)
	c.config(t, "cache", workerLabel, "containerRuntimeConfig: {pidsLimit: 20}")
	c.updated(t, "worker", "cache")
	c.configSays(t, "cache", apiv1.ContainerRuntimeConfigSuccess, "Success")
	standby := startController(t, c.server)
	c.eventually(t, "the second waits for the lease", func(context.Context) error { return logged(standby, "Attempting to acquire leader lease") })

	c.fleet.mostAtOnce()
	ledger := newLedger(t, c.client, &holdfastv1.ContainerRuntimeNodeList{}, &apiv1.MachineConfigList{})
	c.fleet.hold(numbered(6)...)
	c.config(t, "cache", workerLabel, "containerRuntimeConfig: {pidsLimit: 30}")
	c.eventually(t, "two nodes are told", func(context.Context) error {
		if now := c.told(t, c.pool(t, "worker").Spec.Configuration.Name); !slices.Equal(now, numbered(2)) {
			return fmt.Errorf("%v", now)
		}
		return nil
	})
	leader.end(t) // it does not give its lease back
	c.fleet.release(t, numbered(6)...)
	still(t, "the second waits", func() bool {
		return len(c.told(t, c.pool(t, "worker").Spec.Configuration.Name)) == 2
	})
	c.updated(t, "worker", "cache")
	if most := c.fleet.mostAtOnce(); most > 2 {
		t.Errorf("%d nodes at once", most)
	}
	if again := rewrittenTwice(t, ledger.since()); len(again) > 0 {
		t.Errorf("written more than once: %v", again)
	}
}

// logged returns an error unless a process has printed a text.
func logged(p *process, text string) error {
	data, err := os.ReadFile(p.log)
	if err == nil && !strings.Contains(string(data), text) {
		return fmt.Errorf("it does not say %q", text)
	}
	return err
}
