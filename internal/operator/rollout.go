// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// target is the configuration that the nodes of a pool are to have: the name of a MachineConfig, or ""
// if none could be rendered yet. One in which there is nothing is handed out as well: a node may have
// something of an earlier time.
type target string

// rollout is how far the nodes of a pool are, and which come next.
type rollout struct {
	next []string // nodes that are given the target now
	wait string   // why no others are, if some have not got it

	updated, ready, unavailable []string
	degraded                    []string // of the nodes that were given the target
	updating                    []string
	silent                      []string // no agent has reported from them
}

// plan decides which nodes are given the target: as many as may be unavailable at once, by
// name, and none any more as soon as one that has been given it is degraded.
func plan(pool *apiv1.MachineConfigPool, t target, members []member) rollout {
	var r rollout
	var redirected, away, candidates []string
	busy, unheardOf := 0, 0
	for _, m := range members {
		name, up := m.node.Name, available(m.node)
		progress := stateOf(m, t)
		switch progress {
		case hasTarget:
			r.updated = append(r.updated, name)
			if up {
				r.ready = append(r.ready, name)
			}
		case failedTarget:
			r.degraded = append(r.degraded, name)
		case takingTarget:
			r.updating = append(r.updating, name)
			busy++
		case takingOther:
			redirected = append(redirected, name)
			busy++
		case unheard:
			busy++
			unheardOf++
		case noAgent:
			r.silent = append(r.silent, name)
		case idle:
			if up {
				candidates = append(candidates, name)
			} else {
				away = append(away, name)
			}
		}
		if !up || progress == takingTarget || progress == takingOther || progress == unheard {
			r.unavailable = append(r.unavailable, name)
		}
	}
	waiting := len(redirected) + len(away) + len(candidates) + unheardOf
	limit := maxUnavailable(pool, len(members))
	switch {
	case waiting == 0:
	case t == "":
		r.wait = "there is no configuration yet"
	case pool.Spec.Paused:
		r.wait = "the pool is paused"
	case len(r.degraded) > 0:
		r.wait = fmt.Sprintf("%s could not be given it", names(r.degraded))
	default:
		// Those on their way to something else are unavailable anyway, and so are those that are
		// not ready; but no more nodes than may be are changed at once.
		r.next = redirected
		take := func(from []string, room int) {
			r.next = append(r.next, from[:max(0, min(len(from), room))]...)
		}
		take(away, limit-busy)
		taken := len(r.next) - len(redirected)
		take(candidates, min(limit-len(r.unavailable), limit-busy-taken))
		if len(r.next) < waiting {
			r.wait = "one node at a time"
			if limit > 1 {
				r.wait = fmt.Sprintf("%d nodes at a time", limit)
			}
		}
	}
	for _, name := range r.next {
		r.updating = append(r.updating, name)
		if !slices.Contains(r.unavailable, name) {
			r.unavailable = append(r.unavailable, name)
		}
	}
	return r
}

// progress is how far a node is.
type progress int

const (
	noAgent      progress = iota
	idle                  // it has something else, and can be given the target
	unheard               // it has something else, or is on its way to it: it has not reported on what it was told last
	takingOther           // it is on its way to something else, and says so
	takingTarget          // it has been given the target
	hasTarget
	failedTarget
)

func stateOf(m member, t target) progress {
	s := m.state
	if s == nil || s.Status.AgentVersion == "" {
		return noAgent
	}
	reported := s.Status.ObservedGeneration == s.Generation
	working := s.Status.State == holdfastv1.NodeWorking
	switch given := s.Spec.DesiredConfig; {
	case given == "":
		return idle
	case given != string(t) && !reported:
		return unheard // of another configuration, or only of another pool
	case given != string(t) && working:
		return takingOther
	case given != string(t):
		return idle
	case !reported || working:
		return takingTarget
	case s.Status.State == holdfastv1.NodeDegraded:
		return failedTarget
	case s.Status.CurrentConfig != given:
		return takingTarget
	}
	return hasTarget
}

// available reports whether a node can be given pods.
func available(node *corev1.Node) bool {
	return !node.Spec.Unschedulable && ready(node)
}

func ready(node *corev1.Node) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// maxUnavailable is how many nodes of a pool may be unavailable at once: as in OpenShift at
// least one, and one if nothing is said.
func maxUnavailable(pool *apiv1.MachineConfigPool, nodes int) int {
	if pool.Spec.MaxUnavailable == nil {
		return 1
	}
	n, err := intstr.GetScaledValueFromIntOrPercent(pool.Spec.MaxUnavailable, nodes, false)
	if err != nil {
		return 1
	}
	return max(n, 1)
}
