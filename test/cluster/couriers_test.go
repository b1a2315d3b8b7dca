// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/courier"
	"github.com/holdfast/holdfast/internal/render"
)

const stateDir = "/var/lib/holdfast-agent"

// reportAlways does what an agent does as far as couriers see it: it reports on the files that are
// there.
func reportAlways(ctx context.Context, root string) error {
	name := filepath.Join(root, stateDir, agent.ReportName)
	for last := ""; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		d, err := agent.Source{Files: []string{filepath.Join(root, render.ObjectsDir)}}.Load()
		if err != nil || d.Digest == last {
			continue // it is being written
		}
		text, err := json.Marshal(&agent.Report{Desired: d.Digest, Outcome: agent.Applied, Applied: d.Digest, Runtime: agent.RuntimeStatus{Up: true, Version: "1.37.0"}})
		if err == nil {
			err = errors.Join(os.WriteFile(name+".next", text, 0o600), os.Rename(name+".next", name))
		}
		if err != nil {
			return err
		}
		last = d.Digest
	}
	return nil
}

// startCourier starts a courier in this process, and what reports, until the test ends.
func (c *cluster) startCourier(t testing.TB, node string) {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{render.ObjectsDir, stateDir} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	api, err := courier.NewClient(c.courierConfig(t, node))
	if err != nil {
		t.Fatal(err)
	}
	one, err := courier.New(courier.Options{Client: api, Node: node, Root: root, StateDir: stateDir, Version: "test", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var group sync.WaitGroup
	t.Cleanup(func() { cancel(); group.Wait() })
	group.Go(func() { one.Run(ctx) })
	group.Go(func() {
		if err := reportAlways(ctx, root); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	})
}

// watches is how many clients follow objects of a kind.
func (s *server) watches(t testing.TB, resource string) int {
	t.Helper()
	text, err := client(t, s.Config).Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range regexp.MustCompile(`(?m)^apiserver_longrunning_requests\{.*resource="`+resource+`".*verb="WATCH".*\} (\d+)$`).FindAllSubmatch(text, -1) {
		some, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		n += some
	}
	return n
}

// TestManyCouriers: each follows its own object only, with one watch, and writes once for a change. They
// come back when the API server does, which they do not all ask at once.
func TestManyCouriers(t *testing.T) {
	t.Parallel()
	const nodes = 24
	c := newEmptyCluster(t, "kubernetes")
	makeNodes(t, c.client, linux, numbered(nodes)...)
	for _, name := range numbered(nodes) {
		c.startCourier(t, name)
	}
	c.changePool(t, "worker", maxUnavailable(nodes))
	controller := startController(t, c.server)
	c.updated(t, "worker")
	followed := func() {
		t.Helper()
		c.eventually(t, "couriers and the controller follow", func(context.Context) error {
			if n := c.watches(t, "containerruntimenodes"); n != nodes+1 {
				return fmt.Errorf("there are %d watches, want %d", n, nodes+1)
			}
			return nil
		})
	}
	followed()
	roll := func(pids int) {
		t.Helper()
		l := newLedger(t, c.client, &holdfastv1.ContainerRuntimeNodeList{})
		c.config(t, "limit", workerLabel, fmt.Sprintf("containerRuntimeConfig: {pidsLimit: %d}", pids))
		name := c.updated(t, "worker", "limit")
		time.Sleep(500 * time.Millisecond) // for what should not come
		if writes := l.since(); len(writes) != 2*nodes || len(rewrittenTwice(t, writes)) > 0 {
			t.Errorf("written:\n%s", show(writes))
		}
		for _, n := range numbered(nodes) {
			if s := c.state(t, n).Status; s.State != holdfastv1.NodeDone || s.CurrentConfig != name {
				t.Errorf("%s: %+v", n, s)
			}
		}
	}
	roll(100)
	c.Stop(t)
	c.Start(t)
	if !controller.running() { // it may have lost its lease
		startController(t, c.server)
	}
	followed()
	roll(200)
}
