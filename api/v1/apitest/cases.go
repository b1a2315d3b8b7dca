// SPDX-License-Identifier: Apache-2.0

// Package apitest has objects for tests: at and beyond each border of each rule of the
// definitions, with what is said of them. An API server says it, and so does what takes its place
// where there is none.
package apitest

import (
	"fmt"
	"strings"
)

// Case is an object in YAML, and a part of what is said of it: nothing if it is valid.
type Case struct {
	Name, Document, Want string
}

// Dropped is wanted of an object with a field that an API server drops: it is
// valid there, and an error where nobody would see the warning.
const Dropped = "unknown field"

// Null ends what is wanted of an object with a field that is null and need not be there: an API
// server drops that, too, and says nothing. Of a field that must be there it then says so.
const Null = ": must not be null"

// Admitted reports whether an API server admits the object, or what is left of it.
func (c Case) Admitted() bool { return c.Want == "" || c.Drops() }

// Drops reports whether an API server drops a field of the object.
func (c Case) Drops() bool { return c.Want == Dropped || strings.HasSuffix(c.Want, Null) }

// Object is a ContainerRuntimeConfig with a spec, which is YAML.
func Object(spec string) string {
	return "apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: x}\nspec: " + spec + "\n"
}

// List is n elements that YAML's flow style separates; # is the number of each.
func List(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, strings.ReplaceAll(format, "#", "%[1]d")+", ", i)
	}
	return "[" + b.String() + "]"
}

// long is a text of n characters that starts with another.
func long(n int, start string) string { return start + strings.Repeat("a", n-len(start)) }

// Configs are ContainerRuntimeConfigs.
func Configs() []Case {
	all := objectCases()
	for _, group := range []struct {
		format string
		cases  [][3]string
	}{
		{"{containerRuntimeConfig: {}, machineConfigPoolSelector: {matchExpressions: [{%s}]}}", expressionCases},
		{"{containerRuntimeConfig: {%s}}", settingCases},
		{"{containerRuntimeConfig: {%s}}", storeCases()},
		{"{containerRuntimeConfig: {}, holdfast: {%s}}", holdfastCases()},
		{"{containerRuntimeConfig: {additionalArtifactStores: [{path: /a, filter: {%s}}]}}", filterCases()},
	} {
		for _, c := range group.cases {
			all = append(all, Case{c[0], Object(fmt.Sprintf(group.format, c[1])), c[2]})
		}
	}
	return all
}

func objectCases() []Case {
	return []Case{
		{"settings only", Object("{containerRuntimeConfig: {}}"), ""},
		{"no settings", Object("{}"), "spec.containerRuntimeConfig: Required value"},
		{"settings null", Object("{containerRuntimeConfig: null}"), "spec.containerRuntimeConfig: "},
		{"spec null", Object("null"), "spec: "},
		{"no spec", strings.Replace(Object("{}"), "spec: {}", "", 1), "spec: Required value"},
		{"settings a list", Object("{containerRuntimeConfig: []}"), "spec.containerRuntimeConfig"},
		{"name", strings.Replace(Object("{containerRuntimeConfig: {}}"), "name: x", "name: Not_One", 1), "metadata.name: Invalid value"},
		{"no name", strings.Replace(Object("{containerRuntimeConfig: {}}"), "name: x", "labels: {a: b}", 1), "metadata.name: Required value"},
		{"selector", Object("{containerRuntimeConfig: {}, machineConfigPoolSelector: {matchLabels: {disruption: '', maxSize: x}}}"), ""},
		{"empty selector", Object("{containerRuntimeConfig: {}, machineConfigPoolSelector: {}}"), ""},
		{"selector null", Object("{containerRuntimeConfig: {}, machineConfigPoolSelector: null}"), "machineConfigPoolSelector" + wantNull},
		{"status", Object("{containerRuntimeConfig: {}}\nstatus: {observedGeneration: 3, conditions: [{type: Success, status: 'True', lastTransitionTime: null}]}"), ""},
	}
}

// expressionCases are expressions of selectors.
var expressionCases = [][3]string{
	{"expression", "key: a, operator: In, values: [b]", ""},
	{"expression not in", "key: a, operator: NotIn, values: [b, c]", ""},
	{"expression exists", "key: a, operator: Exists", ""},
	{"expression exists, no values", "key: a, operator: DoesNotExist, values: []", ""},
	{"expression of another operator", "key: a, operator: Maybe, values: [b]", wantSelector},
	{"expression without an operator", "key: a", "matchExpressions[0].operator: Required value"},
	{"expression with an empty operator", "key: a, operator: ''", wantSelector},
	{"expression without a key", "operator: Exists", "matchExpressions[0].key: Required value"},
	{"expression with an empty key", "key: '', operator: Exists", wantSelector},
	{"expression without values", "key: a, operator: In", wantSelector},
	{"expression with no values", "key: a, operator: NotIn, values: []", wantSelector},
	{"expression with values too many", "key: a, operator: Exists, values: [b]", wantSelector},
	{"expression with values null", "key: a, operator: Exists, values: null", "values" + wantNull},
	{"expression that is not the first", "key: a, operator: Exists}, {key: a, operator: Maybe", wantSelector},
}

const (
	wantSelector = "an expression must have a key and an operator: In or NotIn with values, Exists or DoesNotExist without"
	wantPids     = "pidsLimit: Invalid value: %s: invalid PidsLimit, must be 0 or at least 20"
	wantLogSize  = "invalid LogSizeMax, cannot be less than 8kB"
	wantQuantity = "must be a quantity such as 512Mi"
	wantNull     = `: Invalid value: "null"` + Null
	wantElement  = `: Invalid value: "null"` // is no field
)

// settingCases are named settings of the runtime, and what is said of them.
var settingCases = [][3]string{
	{"pids 0", "pidsLimit: 0", ""},
	{"pids 20", "pidsLimit: 20", ""},
	{"pids 20.0", "pidsLimit: 20.0", ""},
	{"pids most", "pidsLimit: 9223372036854775807", ""},
	{"pids 19", "pidsLimit: 19", fmt.Sprintf(wantPids, "19")},
	{"pids 1", "pidsLimit: 1", fmt.Sprintf(wantPids, "1")},
	{"pids -1", "pidsLimit: -1", fmt.Sprintf(wantPids, "-1")},
	{"pids fraction", "pidsLimit: 20.5", "spec.containerRuntimeConfig.pidsLimit: Invalid value"},
	{"pids text", "pidsLimit: '20'", "spec.containerRuntimeConfig.pidsLimit"},
	{"pids null", "pidsLimit: null", "spec.containerRuntimeConfig.pidsLimit" + wantNull},

	{"level none", "logLevel: ''", ""},
	{"level fatal", "logLevel: fatal", ""},
	{"level panic", "logLevel: panic", ""},
	{"level error", "logLevel: error", ""},
	{"level warn", "logLevel: warn", ""},
	{"level info", "logLevel: info", ""},
	{"level debug", "logLevel: debug", ""},
	{"level trace", "logLevel: trace", ""},
	{"level of another", "logLevel: warning", "invalid LogLevel, must be one of error, fatal, panic, warn, info, debug, or trace"},
	{"level case", "logLevel: Info", "spec.containerRuntimeConfig.logLevel: Invalid value"},

	{"log 0", "logSizeMax: 0", ""},
	{"log '0'", "logSizeMax: '0'", ""},
	{"log -1", "logSizeMax: -1", ""},
	{"log -8Ki", "logSizeMax: -8Ki", ""},
	{"log 500m", "logSizeMax: 500m", wantLogSize},
	{"log 1", "logSizeMax: 1", wantLogSize},
	{"log 8192", "logSizeMax: 8192", wantLogSize},
	{"log '8192'", "logSizeMax: '8192'", wantLogSize},
	{"log 8Ki", "logSizeMax: 8Ki", wantLogSize},
	{"log 8k", "logSizeMax: 8k", wantLogSize},
	{"log 8193", "logSizeMax: 8193", ""},
	{"log '8193'", "logSizeMax: '8193'", ""},
	{"log 8192.5", "logSizeMax: '8192.5'", ""},
	{"log 9k", "logSizeMax: 9k", ""},
	{"log 1e4", "logSizeMax: '1e4'", ""},
	{"log 1E", "logSizeMax: 1E", ""},
	{"log 1e999", "logSizeMax: '1e999'", ""},
	{"log 1e3000000000", "logSizeMax: '1e3000000000'", wantQuantity},
	{"log 1e-300000000", "logSizeMax: '1e-300000000'", wantQuantity},
	{"log 1e1.5", "logSizeMax: '1e1.5'", wantQuantity},
	{"log without a digit", "logSizeMax: ''", wantQuantity},
	{"log with a space", "logSizeMax: ' 9Ki'", "logSizeMax: Invalid value: \" 9Ki\""},
	{"log unit", "logSizeMax: 9KB", wantQuantity},
	{"log digits", "logSizeMax: '" + strings.Repeat("9", 32) + "'", ""},
	{"log more digits", "logSizeMax: '" + strings.Repeat("9", 33) + "'", "logSizeMax: Too long: may not be more than 32 bytes"},
	{"log fraction", "logSizeMax: 9000.5", "spec.containerRuntimeConfig.logSizeMax: Invalid value"},
	{"log boolean", "logSizeMax: true", "spec.containerRuntimeConfig.logSizeMax: Invalid value"},
	{"log list", "logSizeMax: [9k]", "spec.containerRuntimeConfig.logSizeMax: Invalid value"},
	{"log object", "logSizeMax: {a: 9k}", "spec.containerRuntimeConfig.logSizeMax: Invalid value"},
	{"log null", "logSizeMax: null", "spec.containerRuntimeConfig.logSizeMax" + wantNull},

	{"overlay 0", "overlaySize: 0", ""},
	{"overlay 8G", "overlaySize: 8G", ""},
	{"overlay -1", "overlaySize: -1", "invalid overlaySize, cannot be less than 0"},
	{"overlay -1Gi", "overlaySize: -1Gi", "invalid overlaySize, cannot be less than 0"},
	{"overlay -1n", "overlaySize: -1n", "invalid overlaySize, cannot be less than 0"},
	{"overlay 1e3000000000", "overlaySize: '1e3000000000'", "overlaySize: Invalid value: \"1e3000000000\": " + wantQuantity},

	{"crun", "defaultRuntime: crun", ""},
	{"runc", "defaultRuntime: runc", ""},
	{"kata", "defaultRuntime: kata", `spec.containerRuntimeConfig.defaultRuntime: Unsupported value: "kata": supported values: "crun", "runc"`},
	{"empty runtime", "defaultRuntime: ''", `spec.containerRuntimeConfig.defaultRuntime: Unsupported value: ""`},
}

// storeCases are lists of stores of each kind.
func storeCases() [][3]string {
	const chars = "path must be absolute and contain only alphanumeric characters, '/', '.', '_', and '-'"
	const own = "path must not be, or be in, the runtime's own storage"
	const slashes = "path must not contain consecutive forward slashes"
	const dots = "path must not contain '.' or '..' segments"
	cases := [][3]string{
		{"same path in two lists", "additionalImageStores: [{path: /a}], additionalArtifactStores: [{path: /a}]", ""},
		{"filter of an image store is dropped", "additionalImageStores: [{path: /a, filter: 1}]", Dropped},
	}
	for field, most := range map[string]int{"additionalLayerStores": 5, "additionalImageStores": 10, "additionalArtifactStores": 10} {
		duplicate := field + " must not contain duplicate paths"
		for _, c := range [][3]string{
			{"none", "[]", "should have at least 1 items"},
			{"null", "null", field + wantNull},
			{"a text", "/a", "spec.containerRuntimeConfig." + field},
			{"most", List(most, "{path: /s#}"), ""},
			{"one more", List(most+1, "{path: /s#}"), fmt.Sprintf("%s: Too many: %d: must have at most %d items", field, most+1, most)},
			{"twice", "[{path: /a}, {path: /b}, {path: /a}]", duplicate},
			{"twice, by a slash", "[{path: /a}, {path: /a/}]", duplicate},
			{"twice, by a slash first", "[{path: /a/}, {path: /a}]", duplicate},
			{"one in the other", "[{path: /a}, {path: /a/a}]", ""},
			{"case", "[{path: /a}, {path: /A}]", ""},
			{"no path", "[{}]", field + "[0].path: Required value"},
			{"path null", "[{path: null}]", field + "[0].path: "},
			{"empty path", "[{path: ''}]", "should be at least 1 chars long"},
			{"path a number", "[{path: 1}]", "path"},
			{"store null", "[null]", field + "[0]" + wantElement},
		} {
			cases = append(cases, [3]string{field + " " + c[0], field + ": " + c[1], c[2]})
		}
		for path, want := range map[string]string{
			"/a": "", "/a/": "", "/.a": "", "/a.": "", "/...": "", "/a/..b": "", "/a/b..": "", "/a/.b/c": "", "/-_.0": "",
			long(256, "/"): "", long(257, "/"): "Too long: may not be more than 256 bytes",
			"/": chars, "a": chars, "./a": chars, "/a:b": chars, "/a:ref": chars, "/a b": chars, "/ä": chars, "/a\\nb": chars, "~/a": chars,
			"//": slashes, "/a//b": slashes, "/a//": slashes,
			"/.": dots, "/..": dots, "/a/.": dots, "/a/..": dots, "/a/./b": dots, "/a/../b": dots, "/./a": dots, "/../a": dots, "/a/../": dots,
			"/var/lib/containers/storage": own, "/var/lib/containers/storage/": own, "/var/lib/containers/storage/overlay": own,
			"/run/containers/storage": own, "/run/containers/storage/a": own, "/var/run/containers/storage": own,
			"/var/lib/containers/storage2": "", "/var/lib/containers": "", "/mnt/var/lib/containers/storage": "",
			"/var/lib/holdfast/store": "", "/var/lib/stargz-store/store": "",
		} {
			cases = append(cases, [3]string{field + " path " + path, fmt.Sprintf(`%s: [{path: "%s"}]`, field, path), want})
		}
	}
	return cases
}

func holdfastCases() [][3]string {
	const source = "source must be registry, the absolute path of an OCI layout, or docker://HOST[/PATH]"
	const place = "place must be registry, the absolute path of a directory, or docker://HOST/REPOSITORY"
	const share = "must be a quantity of bytes such as 100Gi, or a percentage such as 50%"
	const mirrored = "source must be HOST[:PORT][/PATH] or *.DOMAIN"
	const mirror = "mirror must be HOST[:PORT][/PATH]"
	cases := [][3]string{
		{"nothing", "", ""},
		{"unknown", "colour: blue", Dropped},
		{"offline", "offline: true", ""},
		{"offline text", "offline: 'yes'", "offline"},
		{"sources", "sources: [registry, /a, oci:/a, oci-archive:/a/b.tar, docker://h, 'docker://h:5000/team/app']", ""},
		{"source most", "sources: ['" + long(512, "/") + "']", ""},
		{"source long", "sources: ['" + long(513, "/") + "']", "holdfast.sources[0]: Too long: may not be more than 512 bytes"},
		{"sources most", "sources: " + List(32, "/s#"), ""},
		{"sources many", "sources: " + List(33, "/s#"), "sources: Too many: 33: must have at most 32 items"},
		{"sources twice", "sources: [registry, /a, registry]", "sources must not contain duplicates"},
		{"trusted sources", "sources: [/a], trustedSources: [/a]", ""},
		{"trusted sources many", "trustedSources: " + List(33, "/s#"), "trustedSources: Too many: 33: must have at most 32 items"},
		{"trusted source long", "trustedSources: ['" + long(513, "/") + "']", "trustedSources[0]: Too long: may not be more than 512 bytes"},
		{"restart", "disruption: Restart", ""},
		{"reboot", "disruption: Reboot", ""},
		{"restart case", "disruption: restart", `disruption: Unsupported value: "restart": supported values: "R`},
		{"no disruption", "disruption: ''", `disruption: Unsupported value: ""`},
		{"null", "include: null", "holdfast.include" + wantNull},
		{"mirrors most", "registryMirrors: " + List(64, "{source: r#.io, mirrors: [m]}"), ""},
		{"mirrors many", "registryMirrors: " + List(65, "{source: r#.io, mirrors: [m]}"), "registryMirrors: Too many: 65: must have at most 64 items"},
		{"mirrors twice", "registryMirrors: [{source: r.io, mirrors: [a]}, {source: r.io, mirrors: [b]}]", "registryMirrors must not contain duplicate sources"},
		{"mirrors most of one", "registryMirrors: [{source: r.io, mirrors: " + List(16, "m#") + "}]", ""},
		{"mirrors many of one", "registryMirrors: [{source: r.io, mirrors: " + List(17, "m#") + "}]", "mirrors: Too many: 17: must have at most 16 items"},
		{"mirrors none of one", "registryMirrors: [{source: r.io, mirrors: []}]", "should have at least 1 items"},
		{"mirrors missing", "registryMirrors: [{source: r.io}]", "registryMirrors[0].mirrors: Required value"},
		{"mirrored missing", "registryMirrors: [{mirrors: [m]}]", "registryMirrors[0].source: Required value"},
		{"mirrored long", "registryMirrors: [{source: " + long(513, "h") + ", mirrors: [m]}]", "source: Too long: may not be more than 512 bytes"},
		{"mirror long", "registryMirrors: [{source: h, mirrors: [" + long(513, "h") + "]}]", "mirrors[0]: Too long: may not be more than 512 bytes"},
	}
	for list, most := range map[string]int{"include": 128, "exclude": 128, "trusted": 128, "artifacts": 128, "pinned": 256} {
		cases = append(cases, patternCases(list, most)...)
	}
	table := func(format string, wants map[string]string) {
		for value, want := range wants {
			cases = append(cases, [3]string{fmt.Sprintf(format, value), fmt.Sprintf(format, value), want})
		}
	}
	table("sources: ['%s']", map[string]string{"": source, "Registry": source, "a": source, "/": source, "//a": source, "oci:a": source, "oci-archive:": source,
		"dir:/a": source, "http://h/a": source, "docker://": source, "docker:///a": source, "docker://h/": source, "docker:h": source})
	for _, list := range []string{"indexStores", "indexPublish"} {
		table(list+": ['%s']", map[string]string{"registry": "", "/a": "", "/a/b": "", "docker://h/a": "", "docker://h:5000/a/b": "",
			"": place, "a": place, "/": place, "//a": place, "oci:/a": place, "docker://h": place, "docker://h/": place, "docker:///a": place,
			long(512, "/"): "", long(513, "/"): list + "[0]: Too long: may not be more than 512 bytes"})
		cases = append(cases, [3]string{list, list + ": " + list32, ""},
			[3]string{list + " many", list + ": " + list33, list + ": Too many: 33: must have at most 32 items"})
	}

	for _, limit := range []string{"cacheLimit", "artifactLimit"} {
		table(limit+": '%s'", map[string]string{"0": "", "1": "", "100Gi": "", "5k": "", "5M": "", "5T": "", "5Ki": "", "5Mi": "", "5Ti": "",
			"0%": "", "9%": "", "50%": "", "100%": "", "999999999999999": "", "999999999999999Ti": "",
			"": share, "101%": share, "-1%": share, "1.5%": share, "%": share, "50 %": share, "-1": share, "1.5Gi": share, "5K": share,
			"5GB": share, "1e3": share, "half": share, "9999999999999999": share,
			strings.Repeat("9", 32): share, strings.Repeat("9", 33): limit + ": Too long: may not be more than 32 bytes"})
		cases = append(cases, [3]string{limit + " number", limit + ": 100", limit})
	}
	table("registryMirrors: [{source: '%s', mirrors: [m]}]", map[string]string{"h": "", "quay.io": "", "h:5000": "", "h.io/a": "", "h:1/a/b_c/d-e.f": "", "*.example.com": "", long(512, "h"): "",
		"": mirrored, "*": mirrored, "*.": mirrored, "*h": mirrored, "a.*.io": mirrored, "*.example.com/a": mirrored, "*.example.com:5000": mirrored,
		"h/": mirrored, "/a": mirrored, "h/A": mirrored, "h:": mirrored, "h:a": mirrored, "https://h": mirrored, "h/a:tag": mirrored, "-h": mirrored})
	table("registryMirrors: [{source: r.io, mirrors: ['%s']}]", map[string]string{"h": "", "H.example:80/a/b": "", "10.0.0.1:5000": "",
		"": mirror, "*.example.com": mirror, "http://h": mirror, "h/": mirror, "h/a:tag": mirror, "h b": mirror})
	return cases
}

var (
	list32 = List(32, "/s#")
	list33 = List(33, "/s#")
)

// patternCases are lists of patterns.
func patternCases(field string, most int) [][3]string {
	return [][3]string{
		{field + " none", field + ": []", ""},
		{field + " most", field + ": " + List(most, "p#"), ""},
		{field + " many", field + ": " + List(most+1, "p#"), fmt.Sprintf("%s: Too many: %d: must have at most %d items", field, most+1, most)},
		{field + " twice", field + ": [a, a]", ""},
		{field + " long", field + ": [" + long(512, "p") + "]", ""},
		{field + " longer", field + ": [" + long(513, "p") + "]", field + "[0]: Too long: may not be more than 512 bytes"},
		{field + " long by characters", field + ": [" + strings.Repeat("ä", 512) + "]", ""},
		{field + " empty", field + ": ['']", "should be at least 1 chars long"},
		{field + " number", field + ": [1]", field},
		{field + " null", field + ": [null]", field + "[0]" + wantElement},
	}
}

func filterCases() [][3]string {
	return append(append(patternCases("references", 64), patternCases("types", 64)...), [][3]string{
		{"no filter", "", ""},
		{"filter", "references: ['quay.io/*/*', '!*/*:old'], types: [application/vnd.cncf.model.*], maxSize: 20Gi", ""},
		{"unknown in a filter", "reference: [a]", Dropped},
		{"size 0", "maxSize: 0", ""},
		{"size int", "maxSize: 1000", ""},
		{"size negative", "maxSize: -1", "invalid maxSize, cannot be less than 0"},
		{"size exponent", "maxSize: '1e3000000000'", "maxSize: Invalid value: \"1e3000000000\": " + wantQuantity},
		{"size null", "maxSize: null", "filter.maxSize" + wantNull},
	}...)
}
