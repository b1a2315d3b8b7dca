// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"slices"
	"strings"
	"testing"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// TestMove moves all nodes of a pool to another at once: also there no more are changed at once
// than may be.
func TestMove(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(4)...)
	c.changePool(t, "worker", maxUnavailable(4))
	startController(t, c.server)
	c.config(t, "all", workerLabel, "containerRuntimeConfig: {pidsLimit: 100}")
	c.updated(t, "worker", "all")
	c.fleet.hold(numbered(4)...) // couriers take their time
	for _, node := range numbered(4) {
		c.label(t, node, map[string]string{"gpu": "yes"})
	}
	c.config(t, "gpus", "pool-gpu", "containerRuntimeConfig: {pidsLimit: 200}")
	c.configSays(t, "gpus", apiv1.ContainerRuntimeConfigFailure, "could not find any") // so it is known before the pool
	c.Apply(t, []byte(strings.ReplaceAll(gpuPool, "100%", "1")))
	for _, node := range numbered(4) {
		c.inPool(t, node, "gpu")
	}
	c.poolSays(t, "gpu", apiv1.PoolUpdating, "True", "")
	name := c.pool(t, "gpu").Spec.Configuration.Name
	still(t, "one node was told", func() bool { return slices.Equal(c.told(t, name), numbered(1)) })
	c.fleet.release(t, numbered(4)...)
	c.updated(t, "gpu", "gpus", "all")
}
