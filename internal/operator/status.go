// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// The longest message of a condition, and of an event (whose limit is 1024 bytes).
const (
	maxMessage = 8 << 10
	maxEvent   = 1000
)

// poolStatus sums up a pool. What is the same as before keeps its time.
func poolStatus(pool *apiv1.MachineConfigPool, t target, r rollout, members []member, problems []render.Problem) apiv1.MachineConfigPoolStatus {
	s := apiv1.MachineConfigPoolStatus{
		ObservedGeneration:      pool.Generation,
		Configuration:           pool.Status.Configuration,
		MachineCount:            int32(len(members)),
		UpdatedMachineCount:     int32(len(r.updated)),
		ReadyMachineCount:       int32(len(r.ready)),
		UnavailableMachineCount: int32(len(r.unavailable)),
		DegradedMachineCount:    int32(len(r.degraded)),
	}
	done := len(r.updated) == len(members)
	if done {
		s.Configuration = pool.Spec.Configuration
	}
	c := poolConditions{pool: pool}
	c.set(apiv1.PoolUpdated, done, pick(done, "AllNodesUpdated", "NodesToUpdate"), pick(done, fmt.Sprintf("All nodes have %s", t), missing(t, r)))
	switch {
	case done:
		c.set(apiv1.PoolUpdating, false, "AllNodesUpdated", "")
	case t == "":
		c.set(apiv1.PoolUpdating, false, "NoConfiguration", "There is no configuration yet")
	case pool.Spec.Paused:
		c.set(apiv1.PoolUpdating, false, "Paused", fmt.Sprintf("Pool is paused; will not update to %s", t))
	case len(r.degraded) > 0 && len(r.updating) == 0 && r.wait != "":
		c.set(apiv1.PoolUpdating, false, "NodeDegraded", "The rest of the nodes waits: "+r.wait)
	case len(r.degraded) > 0 && len(r.updating) == 0:
		c.set(apiv1.PoolUpdating, false, "NodeDegraded", missing(t, r))
	case len(r.updating) == 0 && r.wait == "":
		c.set(apiv1.PoolUpdating, false, "NoAgent", missing(t, r))
	default:
		c.set(apiv1.PoolUpdating, true, "NodesUpdating", updatingMessage(r))
	}
	renders, nodes, stores := messages(problems), degradedMessage(r, members), withheld(members)
	degraded := join(renders, nodes)
	c.set(apiv1.PoolDegraded, degraded != "", pick(degraded != "", "Degraded", asExpected), degraded)
	c.set(apiv1.PoolNodeDegraded, nodes != "", pick(nodes != "", "NodeDegraded", asExpected), nodes)
	c.set(apiv1.PoolRenderDegraded, renders != "", cmp.Or(reasonOf(problems), asExpected), renders)
	c.set(apiv1.PoolStoresAvailable, stores == "", pick(stores == "", asExpected, "StoresWithheld"), stores)
	s.Conditions = c.all
	return s
}

// asExpected is the reason of a condition that is as one would have it.
const asExpected = "AsExpected"

// poolConditions are the conditions of a pool that are being put together.
type poolConditions struct {
	pool *apiv1.MachineConfigPool
	all  []apiv1.MachineConfigPoolCondition
}

func (c *poolConditions) set(kind apiv1.MachineConfigPoolConditionType, is bool, reason, message string) {
	n := apiv1.MachineConfigPoolCondition{
		Type: kind, Status: metav1.ConditionFalse, ObservedGeneration: c.pool.Generation,
		LastTransitionTime: now(), Reason: reason, Message: bounded(message),
	}
	if is {
		n.Status = metav1.ConditionTrue
	}
	for _, old := range c.pool.Status.Conditions {
		if old.Type == kind && old.Status == n.Status {
			n.LastTransitionTime = old.LastTransitionTime
		}
	}
	c.all = append(c.all, n)
}

func missing(t target, r rollout) string {
	text := fmt.Sprintf("%d nodes have %s", len(r.updated), cmp.Or(string(t), "what they are to have"))
	if len(r.silent) > 0 {
		text += fmt.Sprintf("; no agent has reported from %s: is the DaemonSet's pod there?", names(r.silent))
	}
	return text
}

func updatingMessage(r rollout) string {
	var parts []string
	if len(r.updating) > 0 {
		parts = append(parts, fmt.Sprintf("%s being updated", names(r.updating)))
	}
	if r.wait != "" {
		parts = append(parts, "the rest waits: "+r.wait)
	}
	if others := subtract(r.unavailable, r.updating); len(others) > 0 && r.wait != "" {
		parts = append(parts, fmt.Sprintf("not ready or not schedulable: %s", names(others)))
	}
	return strings.Join(parts, "; ")
}

func subtract(all, what []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(what, s) })
}

func degradedMessage(r rollout, members []member) string {
	var parts []string
	for _, m := range members {
		if slices.Contains(r.degraded, m.node.Name) && len(parts) < maxNames {
			parts = append(parts, fmt.Sprintf("node %s: %s", m.node.Name, m.state.Status.Message))
		}
	}
	if more := len(r.degraded) - len(parts); more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, "; ")
}

// withheld says which stores nodes do without. It does not say how many nodes, which would
// change with each of them.
func withheld(members []member) string {
	found := map[string]bool{}
	for _, m := range members {
		if m.state == nil {
			continue
		}
		for _, s := range m.state.Status.Stores {
			if s.State != holdfastv1.StoreHealthy && s.State != holdfastv1.StoreKept {
				found[s.Path] = true
			}
		}
	}
	if len(found) == 0 {
		return ""
	}
	return fmt.Sprintf("nodes do without %s: `kubectl get ctrnode` says which, `kubectl describe ctrnode` why",
		names(slices.Sorted(maps.Keys(found))))
}

// maxNames is how many names a message has at most.
const maxNames = 5

// names lists names for people to read.
func names(all []string) string {
	if len(all) <= maxNames {
		return strings.Join(all, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(all[:maxNames], ", "), len(all)-maxNames)
}

func messages(problems []render.Problem) string {
	var all []string
	for _, p := range problems {
		all = append(all, p.Message)
	}
	return strings.Join(all, "; ")
}

func reasonOf(problems []render.Problem) string {
	if len(problems) == 0 {
		return ""
	}
	return problems[0].Reason
}

func join(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "; ")
}

func bounded(s string) string { return cut(s, maxMessage) }

func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + " ..."
}

// said is what was said last of something by an event, where there is no status to tell.
type said map[string]string

// news reports whether a message about something is another than the last. "" is none.
func (s said) news(about, message string) bool {
	if message == "" {
		delete(s, about)
		return false
	}
	before := s[about]
	s[about] = message
	return before != message
}

// now is the time as objects have it.
func now() metav1.Time { return metav1.Now().Rfc3339Copy() }

// involved is a pool that an object has a part in.
type involved struct {
	pool     *apiv1.MachineConfigPool
	problems []render.Problem
	refused  bool // it stays with an earlier configuration
}

// configStatus sums up an object over the pools that it has a part in. It says nothing that
// changes with each node, so that a change costs an object two writes: when it has been
// rendered, and when all nodes have it.
func configStatus(o *apiv1.ContainerRuntimeConfig, own []render.Problem, pools []involved) apiv1.ContainerRuntimeConfigStatus {
	problems := slices.Clone(own)
	var updating, degraded, stores []string
	for _, p := range pools {
		problems = append(problems, p.problems...)
		if p.refused {
			updating = append(updating, p.pool.Name)
		}
		for _, c := range p.pool.Status.Conditions {
			switch {
			case c.Type == apiv1.PoolUpdated && c.Status != metav1.ConditionTrue && !p.refused:
				updating = append(updating, p.pool.Name)
			case c.Type == apiv1.PoolNodeDegraded && c.Status == metav1.ConditionTrue:
				degraded = append(degraded, p.pool.Name)
			case c.Type == apiv1.PoolStoresAvailable && c.Status != metav1.ConditionTrue:
				stores = append(stores, p.pool.Name+": "+c.Message)
			}
		}
	}
	s := apiv1.ContainerRuntimeConfigStatus{ObservedGeneration: o.Generation}
	add := func(kind apiv1.ContainerRuntimeConfigStatusConditionType, yes bool, reason, message string) {
		c := apiv1.ContainerRuntimeConfigCondition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: bounded(message)}
		if yes {
			c.Status = metav1.ConditionTrue
		}
		s.Conditions = append(s.Conditions, c)
	}
	if len(pools) > 0 {
		add(apiv1.ContainerRuntimeConfigUpdated, len(updating) == 0, pick(len(updating) == 0, "AllNodesUpdated", "NodesToUpdate"),
			pick(len(updating) == 0, "", "pools with nodes to update: "+names(updating)))
		add(apiv1.ContainerRuntimeConfigDegraded, len(degraded) > 0, pick(len(degraded) > 0, "NodeDegraded", asExpected),
			pick(len(degraded) > 0, "pools with degraded nodes: "+names(degraded), ""))
		add(apiv1.ContainerRuntimeConfigStoresAvailable, len(stores) == 0, pick(len(stores) == 0, asExpected, "StoresWithheld"),
			strings.Join(stores, "; "))
	}
	// Last, where OpenShift's users, and printer columns, look for it.
	last := render.Condition(o.Name, problems, now())
	last.Message = bounded(last.Message)
	s.Conditions = append(s.Conditions, last)
	for i := range s.Conditions {
		c := &s.Conditions[i]
		c.LastTransitionTime = now()
		for _, old := range o.Status.Conditions {
			if old.Type == c.Type && old.Status == c.Status {
				c.LastTransitionTime = old.LastTransitionTime
			}
		}
	}
	return s
}

func pick(yes bool, a, b string) string {
	if yes {
		return a
	}
	return b
}

// same reports whether a status says what another does.
func same[T any](a, b T) bool { return equality.Semantic.DeepEqual(a, b) }
