// SPDX-License-Identifier: Apache-2.0

package courier_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/courier"
	"github.com/holdfast/holdfast/internal/render"
)

// A courier and an agent, on a node whose CRI-O reads what they bring.
func TestWithAgent(t *testing.T) {
	n := agenttest.New(t)
	if out, code := n.Systemd.Do("start", "crio.service"); code != 0 {
		t.Fatal(out)
	}
	broken := pids(50)
	broken.ContainerRuntimeConfig.DefaultRuntime = "runc" // of which the stand-in for CRI-O has none
	scheme, err := courier.Scheme()
	if err != nil {
		t.Fatal(err)
	}
	api := fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&nodev1.ContainerRuntimeNode{}).WithObjects(
		node(""), rendered(t, "rendered-worker-1", objectFile(t, pids(50))), rendered(t, "rendered-worker-2", objectFile(t, broken)),
		rendered(t, "rendered-worker-3", objectFile(t, apiv1.ContainerRuntimeConfigSpec{})),
	).Build()
	c, err := courier.New(courier.Options{
		Client: api, Node: nodeName, Root: n.Root, StateDir: n.Options().StateDir, Version: "v1.2.3", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	n.Write(t, render.ObjectsDir+"/README", "A package makes the directory.\n")
	a, err := agent.New(n.Options())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{}, 2)
	go func() {
		a.Run(ctx, agent.Source{Files: []string{n.Path(render.ObjectsDir)}}, func() {})
		ended <- struct{}{}
	}()
	go func() {
		c.Run(ctx)
		ended <- struct{}{}
	}()
	defer func() {
		cancel()
		<-ended
		<-ended
	}()
	o := &nodev1.ContainerRuntimeNode{}
	becomes := func(desired string, state nodev1.NodeState, current, message string) {
		t.Helper()
		if err := api.Get(ctx, client.ObjectKey{Name: nodeName}, o); err != nil {
			t.Fatal(err)
		}
		before := o.DeepCopy()
		o.Spec.DesiredConfig, o.Generation = desired, o.Generation+1
		if err := api.Patch(ctx, o, client.MergeFrom(before)); err != nil {
			t.Fatal(err)
		}
		generation := o.Generation
		for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			if err := api.Get(ctx, client.ObjectKey{Name: nodeName}, o); err != nil {
				t.Fatal(err)
			}
			s := o.Status
			if s.ObservedGeneration == generation && s.State == state && s.CurrentConfig == current && strings.Contains(s.Message, message) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", desired, s)
			}
		}
	}
	becomes("", nodev1.NodeDone, "", "")
	becomes("rendered-worker-1", nodev1.NodeDone, "rendered-worker-1", "")
	if !strings.Contains(n.Read(t, render.PidsLimitConf), "50") || o.Status.Runtime.Version != "1.37.0" {
		t.Errorf("%+v", o.Status)
	}
	becomes("rendered-worker-2", nodev1.NodeDegraded, "rendered-worker-1", "crio.service")
	becomes("rendered-worker-3", nodev1.NodeDone, "rendered-worker-3", "")
	if n.Read(t, render.PidsLimitConf) != "" {
		t.Error("the setting is still there")
	}
}
