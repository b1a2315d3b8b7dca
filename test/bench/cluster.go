// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// clusterNumbers are those of the controller, at a real API server. The tests that prove what it
// does write them: see figures in test/cluster.
type clusterNumbers struct {
	Nodes         int       `json:"nodes"`
	Objects       int       `json:"objects"`
	Batch         int       `json:"batch"`
	Configured    []float64 `json:"configured_ms"`     // from a change until the pool refers to what was made of it
	FirstBatch    []float64 `json:"first_batch_ms"`    // until the last node of the first batch is told
	RolledOut     []float64 `json:"rolled_out_ms"`     // until all nodes have it, and all objects say so; agents are stand-ins that answer at once
	Resync        int       `json:"resync_writes"`     // objects that are written by a controller that starts anew
	Rewritten     []string  `json:"rewritten_twice"`   // objects that were written more than once for a change
	ControllerMiB float64   `json:"controller_mib"`    // at its most
	Writes        int       `json:"writes_per_change"` // objects that were written for the last change
}

// measureCluster runs the tests that change one of fifty objects for a hundred nodes, and for a
// thousand.
func (b *bench) measureCluster(ctx context.Context) error {
	for test, out := range map[string]*clusterNumbers{"TestHundredNodes": &b.report.Cluster.Hundred, "TestThousandNodes": &b.report.Cluster.Thousand} {
		b.log("cluster: %s", test)
		if err := runFigures(ctx, filepath.Join(b.dir, test+".json"), test, out); err != nil {
			return err
		}
	}
	return nil
}

func runFigures(ctx context.Context, name, test string, out *clusterNumbers) error {
	defer os.Remove(name)                                                                             //nolint:errcheck // the next one replaces it
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-run", "^"+test+"$", "./test/cluster") //nolint:gosec // our own
	cmd.Env = append(os.Environ(), "HOLDFAST_FIGURES="+name)
	said, err := cmd.CombinedOutput()
	text, readErr := os.ReadFile(name)
	if readErr != nil { // a bar that was missed is in the figures, too
		return fmt.Errorf("running %s from the root of the project: %w\n%s", test, errors.Join(err, readErr), said)
	}
	return json.Unmarshal(text, out)
}

// clusterReport is both sizes.
type clusterReport struct {
	Hundred  clusterNumbers `json:"hundred"`
	Thousand clusterNumbers `json:"thousand"`
}

func (r *clusterReport) bars() []bar {
	h, t := r.Hundred, r.Thousand
	if len(h.FirstBatch) == 0 || len(t.FirstBatch) == 0 {
		return nil
	}
	return []bar{
		{What: fmt.Sprintf("change for a pool of %d nodes: first batch told", h.Nodes), Unit: "s", Want: 2, Measured: slices.Max(h.FirstBatch) / 1000,
			Detail: fmt.Sprintf("%d nodes, one of %d objects; the pool refers to it after %.2f s; the worst of %d", h.Batch, h.Objects, slices.Max(h.Configured)/1000, len(h.FirstBatch))},
		{What: "objects written by a resync without a change", Unit: "", Want: 0, Measured: float64(h.Resync + t.Resync), Detail: "a controller that starts anew"},
		{What: "objects written more than once for a change", Unit: "", Want: 0, Measured: float64(len(h.Rewritten) + len(t.Rewritten)),
			Detail: fmt.Sprintf("of %d and %d objects written", h.Writes, t.Writes)},
		{What: "memory of the controller, peak", Unit: "MiB", Want: 100, Measured: t.ControllerMiB, Detail: fmt.Sprintf("%d nodes, %d objects", t.Nodes, t.Objects)},
	}
}
