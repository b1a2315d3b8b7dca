// SPDX-License-Identifier: Apache-2.0

package apitest

// Nodes are ContainerRuntimeNodes, most with a status.
func Nodes() []Case {
	all := []Case{
		{"nothing", node("{}"), ""},
		{"null", node("null"), "spec: Required value"},
		{"no spec", "apiVersion: holdfast.github.io/v1\nkind: ContainerRuntimeNode\nmetadata: {name: x}\n", "spec: Required value"},
		{"spec", node("{pool: worker, desiredConfig: a, drainedFor: a}"), ""},
		{"pool a number", node("{pool: 1}"), "spec.pool"},
		{"unknown", node("{config: a}"), Dropped},
	}
	for _, c := range [][3]string{
		{"no status", "{}", ""},
		{"unknown status", "{colour: blue}", Dropped},
		{"state working", "{state: Working}", ""},
		{"state done", "{state: Done}", ""},
		{"state degraded", "{state: Degraded}", ""},
		{"state", "{state: done}", `status.state: Unsupported value: "done"`},
		{"state empty", "{state: ''}", `status.state: Unsupported value: ""`},
		{"message most", "{message: '" + long(4096, "") + "'}", ""},
		{"message long", "{message: '" + long(4097, "") + "'}", "status.message: Too long: may not be more than 4096 bytes"},
		{"counts", "{healthyStores: 2147483647, withheldStores: 0}", ""},
		{"count a text", "{healthyStores: '1'}", "status.healthyStores"},
		{"runtime", "{runtime: {up: true, version: '" + long(256, "") + "'}, daemon: {up: false, reason: '" + long(1024, "") + "'}}", ""},
		{"version long", "{runtime: {version: '" + long(257, "") + "'}}", "status.runtime.version: Too long: may not be more than 256 bytes"},
		{"reason long", "{daemon: {reason: '" + long(1025, "") + "'}}", "status.daemon.reason: Too long: may not be more than 1024 bytes"},

		{"stores none", "{stores: []}", ""},
		{"stores null", "{stores: null}", "status.stores" + wantNull},
		{"stores most", "{stores: " + List(64, "{kind: ImageStore, path: /s#, state: Healthy}") + "}", ""},
		{"stores many", "{stores: " + List(65, "{kind: ImageStore, path: /s#, state: Healthy}") + "}", "status.stores: Too many: 65: must have at most 64 items"},
		{"store states", "{stores: [{kind: a, path: /a, state: Withheld}, {kind: a, path: /a, state: Failing}, {kind: a, path: /a, state: Kept}]}", ""},
		{"store state", "{stores: [{kind: a, path: /a, state: Well}]}", `status.stores[0].state: Unsupported value: "Well"`},
		{"store without a kind", "{stores: [{path: /a, state: Kept}]}", "status.stores[0].kind: Required value"},
		{"store without a path", "{stores: [{kind: a, state: Kept}]}", "status.stores[0].path: Required value"},
		{"store without a state", "{stores: [{kind: a, path: /a}]}", "status.stores[0].state: Required value"},
		{"store path most", "{stores: [{kind: a, path: " + long(256, "/") + ", state: Kept}]}", ""},
		{"store path long", "{stores: [{kind: a, path: " + long(257, "/") + ", state: Kept}]}", "path: Too long: may not be more than 256 bytes"},
		{"store reason most", "{stores: [{kind: a, path: /a, state: Kept, reason: " + long(1024, "") + "}]}", ""},
		{"store reason long", "{stores: [{kind: a, path: /a, state: Kept, reason: " + long(1025, "") + "}]}", "reason: Too long: may not be more than 1024 bytes"},

		{"conditions", "{conditions: [" + condition("Applied", "True", "AsExpected") + ", " + condition("StoresAvailable", "Unknown", "Unknown") + "]}", ""},
		{"condition twice", "{conditions: [" + condition("Applied", "True", "A") + ", " + condition("Applied", "False", "B") + "]}", `status.conditions[1]: Duplicate value: {"type":"Applied"}`},
		{"condition status", "{conditions: [" + condition("Applied", "Yes", "A") + "]}", `status.conditions[0].status: Unsupported value: "Yes"`},
		{"condition reason", "{conditions: [" + condition("Applied", "True", "''") + "]}", "status.conditions[0].reason"},
		{"condition time null", "{conditions: [{type: A, status: 'True', reason: A, message: '', lastTransitionTime: null}]}", "status.conditions[0].lastTransitionTime: Required value"},
	} {
		all = append(all, Case{c[0], node("{}") + "status: " + c[1] + "\n", c[2]})
	}
	return all
}

func node(spec string) string {
	return "apiVersion: holdfast.github.io/v1\nkind: ContainerRuntimeNode\nmetadata: {name: x}\nspec: " + spec + "\n"
}

func condition(kind, status, reason string) string {
	return "{type: " + kind + ", status: '" + status + "', reason: " + reason + ", message: '', lastTransitionTime: '2026-01-02T03:04:05Z'}"
}
