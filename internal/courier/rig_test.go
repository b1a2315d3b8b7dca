// SPDX-License-Identifier: Apache-2.0

package courier_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/courier"
	"github.com/holdfast/holdfast/internal/render"
)

const (
	nodeName  = "worker-1"
	forbidden = "rendered-worker-forbidden" // a MachineConfig that the courier may not read
)

// rig is a courier between an API server and a node. Both are stand-ins, and time is synctest's.
type rig struct {
	t    *testing.T
	root string
	api  client.WithWatch
	stop func() // the courier

	writes  atomic.Int32           // of the status, that succeeded
	fetched record                 // MachineConfigs that were asked for
	log     record                 // the courier's
	fails   atomic.Pointer[error]  // of each request
	update  atomic.Pointer[func()] // what happens before a status is written
}

// record is what was said, which may be asked at any time.
type record struct {
	mu  sync.Mutex // protects the field below
	all strings.Builder
}

// Write adds to it.
func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.Write(p)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.String()
}

// inTime runs a test with a courier whose API server has some objects.
func inTime(t *testing.T, test func(r *rig), objects ...client.Object) {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"etc/holdfast", "var/lib/holdfast-agent"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, root: root}
		scheme, err := courier.Scheme()
		if err != nil {
			t.Fatal(err)
		}
		r.api = fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&nodev1.ContainerRuntimeNode{}).WithObjects(objects...).Build()
		test(r)
		if r.stop != nil {
			r.stop()
		}
	})
}

// client is what the courier has of the API server.
func (r *rig) client() client.WithWatch {
	return interceptor.NewClient(r.api, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if _, ok := o.(*apiv1.MachineConfig); ok {
				fmt.Fprintf(&r.fetched, "%s ", key.Name)
				if key.Name == forbidden {
					return apierrors.NewForbidden(schema.GroupResource{Resource: "machineconfigs"}, forbidden, nil)
				}
			}
			if err := r.fails.Load(); err != nil {
				return *err
			}
			return c.Get(ctx, key, o, opts...)
		},
		Watch: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) (watch.Interface, error) {
			if err := r.fails.Load(); err != nil {
				return nil, *err
			}
			return c.Watch(ctx, list, opts...)
		},
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
			if err := r.fails.Load(); err != nil {
				return *err
			}
			if update := r.update.Load(); update != nil {
				(*update)()
			}
			err := c.SubResource(sub).Update(ctx, o, opts...)
			if err == nil {
				r.writes.Add(1)
			}
			return err
		},
	})
}

// start starts a courier, in place of the one before.
func (r *rig) start(change ...func(*courier.Options)) {
	r.t.Helper()
	if r.stop != nil {
		r.stop()
	}
	o := courier.Options{
		Client: r.client(), Node: nodeName, Root: r.root, StateDir: "/var/lib/holdfast-agent", Version: "v1.2.3",
		Log: slog.New(slog.NewTextHandler(&r.log, nil)),
	}
	for _, f := range change {
		f(&o)
	}
	c, err := courier.New(o)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan struct{})
	go func() {
		c.Run(ctx)
		close(ended)
	}()
	r.stop = func() {
		cancel()
		<-ended
	}
	r.after(time.Second)
}

// after lets time pass.
func (r *rig) after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (r *rig) object() *nodev1.ContainerRuntimeNode {
	r.t.Helper()
	o := &nodev1.ContainerRuntimeNode{}
	if err := r.api.Get(r.t.Context(), client.ObjectKey{Name: nodeName}, o); err != nil {
		r.t.Fatal(err)
	}
	return o
}

// want changes what the node is to have, as the controller does.
func (r *rig) want(change func(*nodev1.ContainerRuntimeNodeSpec)) {
	r.t.Helper()
	o := r.object()
	change(&o.Spec)
	o.Generation++
	if err := r.api.Update(r.t.Context(), o); err != nil {
		r.t.Fatal(err)
	}
	r.after(time.Second)
}

func (r *rig) wantConfig(name string) {
	r.t.Helper()
	r.want(func(s *nodev1.ContainerRuntimeNodeSpec) { s.DesiredConfig = name })
}

func (r *rig) path(p string) string { return filepath.Join(r.root, p) }

// file is what a file of the node holds, "" if there is none.
func (r *rig) file(p string) string {
	r.t.Helper()
	data, err := os.ReadFile(r.path(p))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.t.Fatal(err)
	}
	return string(data)
}

const reportFile = "/var/lib/holdfast-agent/" + agent.ReportName

// agentReports is what the agent does when it has read its files.
func (r *rig) agentReports(change func(*agent.Report)) {
	r.t.Helper()
	d, _ := agent.Source{Files: []string{r.path(render.ObjectsDir)}}.Load() //nolint:errcheck // it reports then, too
	report := &agent.Report{Desired: d.Digest, Outcome: agent.Applied, Applied: "files", Runtime: agent.RuntimeStatus{Up: true, Version: "1.37.0"}}
	if change != nil {
		change(report)
	}
	text, err := json.Marshal(report)
	if err != nil {
		r.t.Fatal(err)
	}
	r.writeReport(string(text))
}

func (r *rig) writeReport(text string) {
	r.t.Helper()
	next := r.path(reportFile + ".next")
	if err := errors.Join(os.WriteFile(next, []byte(text), 0o600), os.Rename(next, r.path(reportFile))); err != nil {
		r.t.Fatal(err)
	}
	r.after(time.Second)
}

// expect compares the status, and how often it was written until now.
func (r *rig) expect(writes int, state nodev1.NodeState, current, message string) *nodev1.ContainerRuntimeNodeStatus {
	r.t.Helper()
	o := r.object()
	s := &o.Status
	if int(r.writes.Load()) != writes || s.State != state || s.CurrentConfig != current || !strings.Contains(s.Message, message) || (message == "") != (s.Message == "") {
		r.t.Fatalf("%d writes: %s, current %s, %q; want %d: %s, current %s, %q\n%s", r.writes.Load(), s.State, s.CurrentConfig, s.Message, writes, state, current, message, r.log.String())
	}
	if state != "" && s.ObservedGeneration != o.Generation {
		r.t.Fatalf("the status is about generation %d of %d", s.ObservedGeneration, o.Generation)
	}
	return s
}

// node is the node's object.
func node(desired string) *nodev1.ContainerRuntimeNode {
	return &nodev1.ContainerRuntimeNode{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName, UID: "1", Generation: 1},
		Spec:       nodev1.ContainerRuntimeNodeSpec{Pool: "worker", DesiredConfig: desired},
	}
}

func pids(n int64) apiv1.ContainerRuntimeConfigSpec {
	return apiv1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &apiv1.ContainerRuntimeConfiguration{PidsLimit: &n}}
}

func objectFile(t *testing.T, spec apiv1.ContainerRuntimeConfigSpec) render.File {
	t.Helper()
	file, err := render.Object("worker", spec, false)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// rendered is the MachineConfig of a configuration.
func rendered(t *testing.T, name string, files ...render.File) *apiv1.MachineConfig {
	t.Helper()
	mc, err := render.MachineConfig("worker", files)
	if err != nil {
		t.Fatal(err)
	}
	mc.Name = name
	return mc
}

func (r *rig) create(objects ...client.Object) {
	r.t.Helper()
	for _, o := range objects {
		if err := r.api.Create(r.t.Context(), o); err != nil {
			r.t.Fatal(err)
		}
	}
}

// condition is one of a status, as text.
func condition(s *nodev1.ContainerRuntimeNodeStatus, kind string) string {
	i := slices.IndexFunc(s.Conditions, func(c metav1.Condition) bool { return c.Type == kind })
	if i < 0 {
		return "none"
	}
	c := s.Conditions[i]
	return string(c.Status) + " " + c.Reason + ": " + c.Message
}

// startNode starts a courier of another node, with a root directory of its own.
func (r *rig) startNode(name string) {
	r.t.Helper()
	r.mkdir("/nodes/" + name)
	r.start(func(o *courier.Options) { o.Node, o.Root = name, r.path("/nodes/"+name) })
}
