// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// newClient is an administrator's client for all types that the tests look at.
func newClient(t testing.TB, s *server) kube.WithWatch {
	t.Helper()
	return clientFor(t, s.Config)
}

// clientFor is the same for another user.
func clientFor(t testing.TB, config *rest.Config) kube.WithWatch {
	t.Helper()
	ctrllog.SetLogger(logr.Discard()) // it warns if nobody says where to
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, apiv1.AddToScheme, holdfastv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c, err := kube.NewWithWatch(config, kube.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fleet is nodes with stand-ins for their agents, which report as couriers do: once for each
// generation of their object, and what a test has them say.
type fleet struct {
	client kube.WithWatch

	mu     sync.Mutex
	answer map[string]func(*holdfastv1.ContainerRuntimeNode) // by node: what it reports instead
	held   map[string]bool                                   // nodes that do not report
	busy   map[string]bool                                   // nodes that have not reported what they were told
	most   int                                               // of them at once
}

// makeNodes makes nodes that are ready, with labels.
func makeNodes(t testing.TB, c kube.Client, labels map[string]string, names ...string) {
	t.Helper()
	for _, name := range names {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: maps.Clone(labels)}}
		if err := c.Create(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		change(t, c.Status(), c, node, func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
			n.Status.Images = kubeletImages // as a kubelet reports them, which is most of a node's size
		})
	}
}

// kubeletImages are as many as a kubelet reports, with names as long.
var kubeletImages = func() []corev1.ContainerImage {
	var all []corev1.ContainerImage
	for i := range 50 {
		all = append(all, corev1.ContainerImage{SizeBytes: 1 << 30, Names: []string{
			fmt.Sprintf("registry.example.com/namespace/image-%d@sha256:%064d", i, i), fmt.Sprintf("registry.example.com/namespace/image-%d:v1.2.3", i),
		}})
	}
	return all
}()

func setReady(t testing.TB, c kube.Client, name string, status corev1.ConditionStatus) {
	t.Helper()
	change(t, c.Status(), c, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	})
}

// numbered are the names node-00 and so on.
func numbered(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("node-%02d", i))
	}
	return all
}

// writer writes an object, or its status.
type writer interface {
	Update(context.Context, kube.Object, ...kube.UpdateOption) error
}

type statusWriter struct{ kube.SubResourceWriter }

func (w statusWriter) Update(ctx context.Context, o kube.Object, _ ...kube.UpdateOption) error {
	return w.SubResourceWriter.Update(ctx, o)
}

// change reads an object, changes it and writes it, until nobody else was faster.
func change[T kube.Object](t testing.TB, w any, c kube.Client, o T, f func(T)) {
	t.Helper()
	to, ok := w.(writer)
	if s, isStatus := w.(kube.SubResourceWriter); isStatus {
		to, ok = statusWriter{s}, true
	}
	if !ok {
		t.Fatalf("%T writes nothing", w)
	}
	for {
		err := c.Get(t.Context(), kube.ObjectKeyFromObject(o), o)
		if err == nil {
			f(o)
			err = to.Update(t.Context(), o)
		}
		if err == nil {
			return
		}
		if !apierrors.IsConflict(err) {
			t.Fatal(err)
		}
	}
}

// newFleet starts stand-ins, which end with the test.
func newFleet(t testing.TB, c kube.WithWatch) *fleet {
	t.Helper()
	f := &fleet{client: c, answer: map[string]func(*holdfastv1.ContainerRuntimeNode){}, held: map[string]bool{}, busy: map[string]bool{}}
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(func() { cancel(); group.Wait() })
	group.Go(func() {
		for ctx.Err() == nil {
			w, err := c.Watch(ctx, &holdfastv1.ContainerRuntimeNodeList{})
			if err != nil {
				time.Sleep(20 * time.Millisecond)
				continue
			}
			for e := range w.ResultChan() {
				if s, ok := e.Object.(*holdfastv1.ContainerRuntimeNode); ok && e.Type != watch.Deleted {
					group.Go(func() { f.report(ctx, s) })
				}
			}
		}
	})
	return f
}

// report says what a node has, if that is not what its object says.
func (f *fleet) report(ctx context.Context, s *holdfastv1.ContainerRuntimeNode) {
	f.mu.Lock()
	answer := f.answer[s.Name]
	var waits bool
	if settled := s.Status.ObservedGeneration == s.Generation; settled {
		delete(f.busy, s.Name)
	} else {
		f.busy[s.Name] = true
	}
	f.most = max(f.most, len(f.busy))
	waits = f.held[s.Name] || s.Status.ObservedGeneration == s.Generation
	f.mu.Unlock()
	if waits {
		return
	}
	s.Status.ObservedGeneration, s.Status.AgentVersion = s.Generation, "test"
	s.Status.State, s.Status.CurrentConfig, s.Status.Message = holdfastv1.NodeDone, s.Spec.DesiredConfig, ""
	s.Status.Runtime = holdfastv1.Program{Up: true, Version: "1.37.0"}
	if answer != nil {
		answer(s)
	}
	// If it was changed meanwhile, that is the next event.
	for err := f.client.Status().Update(ctx, s); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && ctx.Err() == nil; err = f.client.Status().Update(ctx, s) {
		time.Sleep(20 * time.Millisecond)
	}
}

// hold keeps a node from reporting, until it is let go.
func (f *fleet) hold(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range names {
		f.held[n] = true
	}
}

func (f *fleet) release(t testing.TB, names ...string) {
	t.Helper()
	f.mu.Lock()
	for _, n := range names {
		delete(f.held, n)
	}
	f.mu.Unlock()
	for _, n := range names {
		s := &holdfastv1.ContainerRuntimeNode{}
		if err := f.client.Get(t.Context(), kube.ObjectKey{Name: n}, s); err != nil {
			t.Fatal(err)
		}
		f.report(t.Context(), s)
	}
}

// say has a node report something of its own, nil for what is normal.
func (f *fleet) say(name string, answer func(*holdfastv1.ContainerRuntimeNode)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer[name] = answer
}

// mostAtOnce is how many nodes were on their way at once since the last call.
func (f *fleet) mostAtOnce() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.most
	f.most = len(f.busy)
	return n
}

// ledger counts what is written.
type ledger struct {
	mu     sync.Mutex
	writes map[string]int // by kind and name, and "spec" or "status"
	last   map[string]kube.Object
}

// newLedger follows kinds of objects until the test ends.
func newLedger(t testing.TB, c kube.WithWatch, lists ...kube.ObjectList) *ledger {
	t.Helper()
	l := &ledger{writes: map[string]int{}, last: map[string]kube.Object{}}
	for _, list := range lists {
		// From what is there on: what is there is not counted.
		if err := c.List(t.Context(), list); err != nil {
			t.Fatal(err)
		}
		items, err := meta.ExtractList(list)
		if err != nil {
			t.Fatal(err)
		}
		for _, item := range items {
			if o, ok := item.(kube.Object); ok {
				l.last[key(o)] = o
			}
		}
		w, err := c.Watch(t.Context(), list, &kube.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: list.GetResourceVersion()}})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for e := range w.ResultChan() {
				if o, ok := e.Object.(kube.Object); ok {
					l.note(e.Type, o)
				}
			}
		}()
		t.Cleanup(w.Stop)
	}
	return l
}

func key(o kube.Object) string {
	return strings.TrimPrefix(fmt.Sprintf("%T %s", o, o.GetName()), "*v1.")
}

func (l *ledger) note(kind watch.EventType, o kube.Object) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k, before := key(o), l.last[key(o)]
	switch {
	case before == nil:
		l.writes[k+" created"]++
	case kind == watch.Deleted:
		l.writes[k+" deleted"]++
		delete(l.last, k)
		return
	case before.GetGeneration() != o.GetGeneration():
		l.writes[k+" spec"]++
	default:
		l.writes[k+" status"]++
	}
	l.last[k] = o
}

// since returns what was written since the last call.
func (l *ledger) since() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.writes
	l.writes = map[string]int{}
	return w
}

// show is what was written, for people.
func show(writes map[string]int) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(writes)) {
		fmt.Fprintf(&b, "%s: %d\n", k, writes[k])
	}
	return b.String()
}
