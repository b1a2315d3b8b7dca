// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// The pools that every OpenShift cluster has. Others are custom ones.
const (
	masterPool = "master"
	workerPool = "worker"
)

// member is a node of a pool.
type member struct {
	node  *corev1.Node
	state *holdfastv1.ContainerRuntimeNode // nil if there is none yet
}

// membership is which node is in which pool.
type membership struct {
	members   map[string][]member // by pool, in the order of their names
	contested map[string][]string // by pool: nodes that other custom pools select, too
	invalid   map[string]error    // pools whose selectors cannot be read
	pools     map[string]string   // by node
	states    []holdfastv1.ContainerRuntimeNode
}

// problems are what keeps nodes out of a pool.
func (m *membership) problems(pool string) []render.Problem {
	var all []render.Problem
	if err := m.invalid[pool]; err != nil {
		all = append(all, render.Problem{Reason: reasonSelector, Message: err.Error()})
	}
	if nodes := m.contested[pool]; len(nodes) > 0 {
		all = append(all, render.Problem{
			Reason: reasonSeveral, Message: fmt.Sprintf("another custom pool selects %s, too: they stay as they are until one does", names(nodes)),
		})
	}
	return all
}

// assign finds the pool of each node, as the Machine Config Operator does
// (pkg/helpers/helpers.go, GetPoolsForNode): a custom pool counts before master, and that
// before worker. A node that two custom pools select is in none.
func assign(pools []apiv1.MachineConfigPool, nodes []corev1.Node, states []holdfastv1.ContainerRuntimeNode) membership {
	m := membership{members: map[string][]member{}, contested: map[string][]string{}, invalid: map[string]error{}, pools: map[string]string{}, states: states}
	selectors := map[string]labels.Selector{}
	for _, p := range pools {
		s, err := metav1.LabelSelectorAsSelector(p.Spec.NodeSelector)
		if err != nil {
			m.invalid[p.Name] = fmt.Errorf("reading nodeSelector: %w", err)
			continue
		}
		if !s.Empty() {
			selectors[p.Name] = s
		}
	}
	byName := map[string]*holdfastv1.ContainerRuntimeNode{}
	for i := range states {
		byName[states[i].Name] = &states[i]
	}
	for i := range nodes {
		node := &nodes[i]
		var custom []string
		builtin := ""
		for name, s := range selectors {
			switch {
			case !s.Matches(labels.Set(node.Labels)):
			case name != masterPool && name != workerPool:
				custom = append(custom, name)
			case builtin != masterPool:
				builtin = name
			}
		}
		// What a pool whose selector cannot be read selects is not known: what was in it stays there.
		if s := byName[node.Name]; s != nil && m.invalid[s.Spec.Pool] != nil {
			custom = []string{s.Spec.Pool}
		}
		if len(custom) > 1 {
			for _, name := range custom {
				m.contested[name] = append(m.contested[name], node.Name)
			}
			continue
		}
		if pool := append(custom, builtin)[0]; pool != "" {
			m.pools[node.Name] = pool
			m.members[pool] = append(m.members[pool], member{node, byName[node.Name]})
		}
	}
	for _, all := range m.members {
		slices.SortFunc(all, func(a, b member) int { return strings.Compare(a.node.Name, b.node.Name) })
	}
	for _, all := range m.contested {
		slices.Sort(all)
	}
	return m
}

// inherits reports whether a pool inherits the configuration of another one. As in OpenShift,
// its machineConfigSelector says so: it selects the MachineConfigs of the other one.
func inherits(pool, other *apiv1.MachineConfigPool) (bool, error) {
	if pool.Name == other.Name {
		return false, nil
	}
	if pool.Spec.MachineConfigSelector == nil {
		return other.Name == workerPool && pool.Name != masterPool, nil
	}
	s, err := metav1.LabelSelectorAsSelector(pool.Spec.MachineConfigSelector)
	if err != nil {
		return false, fmt.Errorf("reading machineConfigSelector: %w", err)
	}
	return !s.Empty() && s.Matches(labels.Set{apiv1.RoleLabel: other.Name}), nil
}
