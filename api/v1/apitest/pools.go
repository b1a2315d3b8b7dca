// SPDX-License-Identifier: Apache-2.0

package apitest

import "fmt"

const wantMaxUnavailable = "maxUnavailable must be a number of nodes, or a percentage such as 10%"

// Pools are MachineConfigPools.
func Pools() []Case {
	var all []Case
	for _, c := range [][3]string{
		{"nothing", "{}", ""},
		{"null", "null", "spec: Required value"},
		{"unknown", "{osImageURL: a}", Dropped},
		{"paused", "{paused: true}", ""},
		{"paused text", "{paused: 'true'}", "spec.paused"},
		{"configuration", "{configuration: {name: a, source: [{name: b, generation: 3}]}}", ""},
		{"configuration null", "{configuration: null}", "spec.configuration" + wantNull},
		{"labels", "{nodeSelector: {matchLabels: {a: b}}, machineConfigSelector: {}}", ""},
		{"selector null", "{nodeSelector: null}", "nodeSelector" + wantNull},

		{"unavailable 0", "{maxUnavailable: 0}", ""},
		{"unavailable 1", "{maxUnavailable: 1}", ""},
		{"unavailable many", "{maxUnavailable: 2147483647}", ""},
		{"unavailable -1", "{maxUnavailable: -1}", wantMaxUnavailable},
		{"unavailable 0%", "{maxUnavailable: 0%}", ""},
		{"unavailable 9%", "{maxUnavailable: 9%}", ""},
		{"unavailable 99%", "{maxUnavailable: 99%}", ""},
		{"unavailable 100%", "{maxUnavailable: 100%}", ""},
		{"unavailable 101%", "{maxUnavailable: 101%}", wantMaxUnavailable},
		{"unavailable -1%", "{maxUnavailable: -1%}", wantMaxUnavailable},
		{"unavailable 1.5%", "{maxUnavailable: 1.5%}", wantMaxUnavailable},
		{"unavailable '10'", "{maxUnavailable: '10'}", wantMaxUnavailable},
		{"unavailable %", "{maxUnavailable: '%'}", wantMaxUnavailable},
		{"unavailable nothing", "{maxUnavailable: ''}", wantMaxUnavailable},
		{"unavailable long", "{maxUnavailable: '" + long(16, "") + "'}", wantMaxUnavailable},
		{"unavailable too long", "{maxUnavailable: '" + long(17, "") + "'}", "maxUnavailable: Too long: may not be more than 16 bytes"},
		{"unavailable fraction", "{maxUnavailable: 1.5}", "spec.maxUnavailable: Invalid value"},
		{"unavailable boolean", "{maxUnavailable: true}", "spec.maxUnavailable: Invalid value"},
		{"unavailable null", "{maxUnavailable: null}", "spec.maxUnavailable" + wantNull},
	} {
		all = append(all, Case{c[0], pool(c[1]), c[2]})
	}
	for _, selector := range []string{"nodeSelector", "machineConfigSelector"} {
		for _, c := range expressionCases {
			all = append(all, Case{selector + ", " + c[0], pool(fmt.Sprintf("{%s: {matchExpressions: [{%s}]}}", selector, c[1])), c[2]})
		}
	}
	return append(all,
		Case{"no spec", "apiVersion: machineconfiguration.openshift.io/v1\nkind: MachineConfigPool\nmetadata: {name: x}\n", "spec: Required value"},
		Case{"status", pool("{}") + "status: {machineCount: 1, conditions: [{type: Updated, status: 'True', lastTransitionTime: null}]}\n", ""},
		Case{"counts missing", pool("{}") + "status: {}\n", ""},
		Case{"condition without a type", pool("{}") + "status: {conditions: [{status: 'True'}]}\n", "status.conditions[0].type: Required value"},
	)
}

func pool(spec string) string {
	return "apiVersion: machineconfiguration.openshift.io/v1\nkind: MachineConfigPool\nmetadata: {name: x}\nspec: " + spec + "\n"
}
