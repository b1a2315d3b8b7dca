// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// nodes are members of a pool, described by words: "has" the target, "takes" it, "failed" with it,
// says that it is on its way to "another", has "old" or "oldfailed" before it, was "moved" to this pool or
// told something else and has not reported since, has had "nothing", or is "silent"; each with "!" if the
// node is not ready, and "#" if it is cordoned.
func nodes(words string) []member {
	var all []member
	for i, w := range strings.Fields(words) {
		name := fmt.Sprintf("n%d", i)
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		node.Spec.Unschedulable = strings.HasSuffix(w, "#")
		if !strings.HasSuffix(w, "!") {
			node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		}
		state := func(desired, current string, s holdfastv1.NodeState, observed int64) *holdfastv1.ContainerRuntimeNode {
			return &holdfastv1.ContainerRuntimeNode{
				ObjectMeta: metav1.ObjectMeta{Name: name, Generation: 2},
				Spec:       holdfastv1.ContainerRuntimeNodeSpec{DesiredConfig: desired},
				Status:     holdfastv1.ContainerRuntimeNodeStatus{AgentVersion: "v", ObservedGeneration: observed, CurrentConfig: current, State: s},
			}
		}
		m := member{node: node}
		switch strings.TrimRight(w, "!#") {
		case "has":
			m.state = state("new", "new", holdfastv1.NodeDone, 2)
		case "takes":
			m.state = state("new", "old", holdfastv1.NodeDone, 1)
		case "works":
			m.state = state("new", "old", holdfastv1.NodeWorking, 2)
		case "failed":
			m.state = state("new", "old", holdfastv1.NodeDegraded, 2)
		case "another":
			m.state = state("other", "old", holdfastv1.NodeWorking, 2)
		case "old":
			m.state = state("old", "old", holdfastv1.NodeDone, 2)
		case "moved":
			m.state = state("old", "old", holdfastv1.NodeDone, 1)
		case "oldfailed":
			m.state = state("old", "older", holdfastv1.NodeDegraded, 2)
		case "nothing":
			m.state = state("", "", holdfastv1.NodeDone, 2)
		case "silent":
		default:
			panic(w)
		}
		all = append(all, m)
	}
	return all
}

func TestPlan(t *testing.T) {
	for _, c := range []struct {
		name, nodes, max string
		paused           bool
		next, wait       string
	}{
		{name: "all have it", nodes: "has has"},
		{name: "one at once, if nothing is said", nodes: "old old old", next: "n0", wait: "one node at a time"},
		{name: "the next", nodes: "has takes old", wait: "one node at a time"},
		{name: "then the next", nodes: "has has old", next: "n2"},
		{name: "working is not done", nodes: "has works old", wait: "one node at a time"},
		{name: "two", nodes: "old old old", max: "2", next: "n0 n1", wait: "2 nodes at a time"},
		{name: "a percentage, rounded down", nodes: "old old old old old", max: "50%", next: "n0 n1", wait: "2 nodes at a time"},
		{name: "at least one", nodes: "old old old", max: "0", next: "n0", wait: "one node at a time"},
		{name: "all", nodes: "old old old", max: "100%", next: "n0 n1 n2"},
		{name: "paused", nodes: "old old", paused: true, wait: "the pool is paused"},
		{name: "a failure stops the rest", nodes: "failed old old", max: "3", wait: "n0 could not be given it"},
		{name: "but not those that have been told", nodes: "failed takes old", max: "3", wait: "n0 could not be given it"},
		{name: "an earlier failure does not", nodes: "oldfailed old", next: "n0", wait: "one node at a time"},
		{name: "nothing yet", nodes: "nothing nothing", next: "n0", wait: "one node at a time"},
		{name: "no agent", nodes: "silent old", next: "n1"},
		{name: "those on another way go on to this one", nodes: "another old", next: "n0", wait: "one node at a time"},
		{name: "even more than may be", nodes: "another another old", next: "n0 n1", wait: "one node at a time"},
		{name: "those that have not reported are waited for", nodes: "moved moved old", wait: "one node at a time"},
		{name: "and count", nodes: "moved old old", max: "2", next: "n1", wait: "2 nodes at a time"},
		{name: "a node that is away leaves no room for others", nodes: "has! old old", wait: "one node at a time"},
		{name: "but for itself", nodes: "old old! old", next: "n1", wait: "one node at a time"},
		{name: "one at once of these, too", nodes: "old! old! old", next: "n0", wait: "one node at a time"},
		{name: "cordoned ones are away", nodes: "has# old", wait: "one node at a time"},
		{name: "room beside one that is away", nodes: "has! old old", max: "2", next: "n1", wait: "2 nodes at a time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pool := &apiv1.MachineConfigPool{Spec: apiv1.MachineConfigPoolSpec{Paused: c.paused}}
			if c.max != "" {
				v := intstr.Parse(c.max)
				pool.Spec.MaxUnavailable = &v
			}
			r := plan(pool, "new", nodes(c.nodes))
			if got := strings.Join(r.next, " "); got != c.next || r.wait != c.wait {
				t.Errorf("next %q, waits for %q; want %q, %q", got, r.wait, c.next, c.wait)
			}
		})
	}
}

// A pool for which nothing could be rendered yet takes nothing from its nodes.
func TestPlanWithoutConfiguration(t *testing.T) {
	r := plan(&apiv1.MachineConfigPool{}, "", nodes("old nothing another"))
	if len(r.next) > 0 || len(r.updated) > 0 || r.wait == "" {
		t.Errorf("%+v", r)
	}
}

func TestPoolUpdating(t *testing.T) {
	for _, c := range []struct{ nodes, target, status, reason string }{
		{"has has", "new", "False", "AllNodesUpdated"},
		{"has takes", "new", "True", "NodesUpdating"},
		{"failed old", "new", "False", "NodeDegraded"},
		{"has failed", "new", "False", "NodeDegraded"},
		{"has silent", "new", "False", "NoAgent"},
		{"old", "", "False", "NoConfiguration"},
	} {
		pool, to, members := &apiv1.MachineConfigPool{}, target(c.target), nodes(c.nodes)
		s := poolStatus(pool, to, plan(pool, to, members), members, nil)
		got := s.Conditions[slices.IndexFunc(s.Conditions, func(o apiv1.MachineConfigPoolCondition) bool { return o.Type == apiv1.PoolUpdating })]
		if string(got.Status) != c.status || got.Reason != c.reason {
			t.Errorf("%s: %+v, want %s, %s", c.nodes, got, c.status, c.reason)
		}
	}
}

// Whatever the nodes do, no more of them than may be are unavailable because of us, and in the
// end all have it, if none fails.
func TestPlanComesToAnEnd(t *testing.T) {
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 0))
		limit := 1 + random.IntN(4)
		v := intstr.FromInt(limit)
		pool := &apiv1.MachineConfigPool{Spec: apiv1.MachineConfigPoolSpec{MaxUnavailable: &v}}
		members := nodes("old old nothing old oldfailed old old nothing old old")
		for step := 0; ; step++ {
			r := plan(pool, "new", members)
			if len(r.updated) == len(members) {
				break
			}
			if step > 1000 {
				t.Fatalf("seed %d: it does not come to an end: %+v", seed, r)
			}
			for _, m := range members {
				if slices.Contains(r.next, m.node.Name) {
					m.state.Spec.DesiredConfig, m.state.Generation = "new", m.state.Generation+1
				}
			}
			busy := slices.DeleteFunc(slices.Clone(members), func(m member) bool { return stateOf(m, "new") != takingTarget })
			if len(busy) > limit {
				t.Fatalf("seed %d: %d at once: want at most %d", seed, len(busy), limit)
			}
			if len(busy) > 0 && random.IntN(2) == 0 {
				m := busy[random.IntN(len(busy))]
				m.state.Status.ObservedGeneration, m.state.Status.CurrentConfig, m.state.Status.State = m.state.Generation, "new", holdfastv1.NodeDone
			}
		}
	}
}

func TestAssign(t *testing.T) {
	pool := func(name string, selector *metav1.LabelSelector) apiv1.MachineConfigPool {
		return apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: apiv1.MachineConfigPoolSpec{NodeSelector: selector}}
	}
	is := func(label string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{label: "yes"}}
	}
	pools := []apiv1.MachineConfigPool{
		pool("worker", is("worker")), pool("master", is("master")), pool("gpu", is("gpu")), pool("big", is("big")),
		pool("none", nil), pool("empty", &metav1.LabelSelector{}),
		pool("bad", &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Maybe"}}}),
	}
	var nodes []corev1.Node
	for _, labels := range []string{"worker", "worker master", "worker gpu", "master gpu", "worker gpu big", ""} {
		node := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: labels, Labels: map[string]string{}}}
		for _, l := range strings.Fields(labels) {
			node.Labels[l] = "yes"
		}
		nodes = append(nodes, node)
	}
	m := assign(pools, nodes, nil)
	want := map[string]string{"worker": "worker", "worker master": "master", "worker gpu": "gpu", "master gpu": "gpu"}
	if diff := cmp.Diff(want, m.pools); diff != "" {
		t.Error(diff)
	}
	for _, p := range []string{"gpu", "big"} {
		if got := m.problems(p); len(got) != 1 || !strings.Contains(got[0].Message, "worker gpu big") {
			t.Errorf("%s: %v", p, got)
		}
	}
	if got := m.problems("bad"); len(got) != 1 || !strings.Contains(got[0].Message, "Maybe") {
		t.Errorf("%v", got)
	}
}

func TestInherits(t *testing.T) {
	role := func(roles ...string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: apiv1.RoleLabel, Operator: metav1.LabelSelectorOpIn, Values: roles}}}
	}
	for _, c := range []struct {
		pool, other string
		selector    *metav1.LabelSelector
		want        bool
	}{
		{"gpu", "worker", nil, true}, {"gpu", "master", nil, false}, {"gpu", "gpu", nil, false}, {"master", "worker", nil, false}, {"worker", "worker", nil, false},
		{"gpu", "worker", role("worker", "gpu"), true}, {"gpu", "worker", role("gpu"), false}, {"gpu", "big", role("big", "gpu"), true},
		{"gpu", "worker", &metav1.LabelSelector{}, false},
	} {
		pool := &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: c.pool}, Spec: apiv1.MachineConfigPoolSpec{MachineConfigSelector: c.selector}}
		got, err := inherits(pool, &apiv1.MachineConfigPool{ObjectMeta: metav1.ObjectMeta{Name: c.other}})
		if err != nil || got != c.want {
			t.Errorf("%s of %s by %v: %v, %v", c.pool, c.other, c.selector, got, err)
		}
	}
}

func TestRenderedFor(t *testing.T) {
	for name, want := range map[string]string{
		"rendered-worker-0123": "worker", "rendered-gpu-large-0123": "gpu-large", "rendered-0123": "", "99-worker-generated-containerruntime": "", "": "",
	} {
		if got := renderedFor(name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}
