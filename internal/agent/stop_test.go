// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/render"
)

// An agent that is stopped while it looks at stores does not take them for dead.
func TestStoppedAtLooks(t *testing.T) {
	n := newNode(t)
	layer := n.ImageStore(t, "/mnt/s", "quay.io/s:1")
	n.startCRIO(t)
	n.sync(t, images(t, "/mnt/s"), agent.Applied, 1)
	n.Refer(t, layer, "quay.io/app:1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := n.SyncAndReport(ctx, images(t, "/mnt/s")); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := agent.LastReport(n.options); !errors.Is(err, agent.ErrNeverRan) {
		t.Errorf("a report: %+v, %v", r, err)
	}
	if n.listed(t) != "/mnt/s" {
		t.Error(n.listed(t))
	}
}

// An agent that is stopped while CRI-O is to start with the old files leaves that to the
// next one.
func TestStoppedWhileItGoesBack(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Behave(t, agenttest.Behaviour{Never: true})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for n.Read(t, render.PidsLimitConf) == "" {
			time.Sleep(time.Millisecond)
		}
		for n.Read(t, render.PidsLimitConf) != "" {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n")
	if r, err := n.Sync(ctx, d); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", r, err)
	}
	n.Behave(t, agenttest.Behaviour{})
	n.Systemd.Do("stop", "crio.service")
	n.Systemd.Calls()
	n.sync(t, d, agent.RolledBack, 1)
	if _, err := n.Images(t); err != nil {
		t.Error(err)
	}
}

// A file that cannot be written says nothing about the configuration: it is tried again.
func TestCannotWrite(t *testing.T) {
	n := newNode(t)
	n.startCRIO(t)
	n.Write(t, "/etc/crio/crio.conf.d/x", "")
	d := want(t, "  containerRuntimeConfig: {pidsLimit: 40}\n")
	t.Run("full", func(t *testing.T) {
		readOnly(t, n.Path("/etc/crio"))
		if r, err := n.Sync(t.Context(), d); err == nil || r.Outcome != agent.Failed || r.Restarts > 0 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	n.sync(t, d, agent.Applied, 1)
}
