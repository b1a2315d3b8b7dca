// SPDX-License-Identifier: Apache-2.0

package render

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// The reasons of problems.
const (
	ReasonConflict = "Conflict"      // objects want different values
	ReasonLimit    = "LimitExceeded" // more stores than there may be
)

// Problem is something in several objects that cannot all be had. The rest of them
// counts.
type Problem struct {
	Objects []string `json:"objects"` // the names of all that are involved
	Reason  string   `json:"reason"`
	Message string   `json:"message"`
}

// Merge makes one configuration of all objects that select a pool, and of those that it
// inherits from another. The order is that of their creation, the pool's own first: lists
// are put one after another, without duplicates, and of values that differ the oldest
// object's counts, so that a new object does not change what nodes have. That an own value
// takes the place of an inherited one is no problem.
func Merge(own []apiv1.ContainerRuntimeConfig, inherited ...apiv1.ContainerRuntimeConfig) (apiv1.ContainerRuntimeConfigSpec, []Problem) {
	m := merger{owners: map[string]string{}, own: map[string]bool{}, excess: map[string]excess{}}
	for _, o := range ByAge(own) {
		m.own[o.Name] = true
		m.add(&o)
	}
	m.inheriting = true
	for _, o := range ByAge(inherited) {
		if !m.own[o.Name] {
			m.add(&o)
		}
	}
	return apiv1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &m.config, Holdfast: m.holdfast}, m.problems
}

// ByAge returns objects in the order in which they count: the oldest first.
func ByAge(objects []apiv1.ContainerRuntimeConfig) []apiv1.ContainerRuntimeConfig {
	return slices.SortedStableFunc(slices.Values(objects), func(a, b apiv1.ContainerRuntimeConfig) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
}

// maxObjects is more than may be parsed at once.
const maxObjects = 2 << 20

// Objects reads valid objects from a file; name is what errors call it.
func Objects(name string, in io.Reader) ([]apiv1.ContainerRuntimeConfig, error) {
	data, err := io.ReadAll(io.LimitReader(in, maxObjects))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	objects, err := apiv1.ParseContainerRuntimeConfigs(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	for i := range objects {
		if errs := objects[i].Validate(); len(errs) > 0 {
			return nil, fmt.Errorf("%s: ContainerRuntimeConfig %s is not valid: %w", name, objects[i].Name, errs.ToAggregate())
		}
	}
	return objects, nil
}

// Select returns the objects that select a pool with labels: as in OpenShift, an
// empty selector selects none.
func Select(objects []apiv1.ContainerRuntimeConfig, pool map[string]string) ([]apiv1.ContainerRuntimeConfig, error) {
	var all []apiv1.ContainerRuntimeConfig
	for i := range objects {
		s := objects[i].Spec.MachineConfigPoolSelector
		selector, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			return nil, fmt.Errorf("reading machineConfigPoolSelector of %s: %w", objects[i].Name, err)
		}
		if !selector.Empty() && selector.Matches(labels.Set(pool)) {
			all = append(all, objects[i])
		}
	}
	return all, nil
}

// Condition is what a problem, or that there is none, says on an object.
func Condition(object string, problems []Problem, now metav1.Time) apiv1.ContainerRuntimeConfigCondition {
	c := apiv1.ContainerRuntimeConfigCondition{
		Type: apiv1.ContainerRuntimeConfigSuccess, Status: metav1.ConditionTrue, LastTransitionTime: now, Message: "Success",
	}
	var messages []string
	for _, p := range problems {
		if slices.Contains(p.Objects, object) {
			messages = append(messages, p.Message)
			c.Type, c.Reason = apiv1.ContainerRuntimeConfigFailure, cmp.Or(c.Reason, p.Reason)
		}
	}
	if len(messages) > 0 {
		c.Message = strings.Join(messages, "; ")
	}
	return c
}

type merger struct {
	config   apiv1.ContainerRuntimeConfiguration
	holdfast *apiv1.HoldfastConfiguration
	problems []Problem
	mirrored []string // the sources of registryMirrors

	object     string            // whose turn it is
	owners     map[string]string // of a field, or a store: whose value counts
	own        map[string]bool   // objects that select the pool itself
	inheriting bool              // it is the turn of the others
	excess     map[string]excess // by list and object
}

func (m *merger) add(o *apiv1.ContainerRuntimeConfig) {
	m.object = o.Name
	if c := o.Spec.ContainerRuntimeConfig; c != nil {
		m.configuration(c)
	}
	if h := o.Spec.Holdfast; h != nil {
		if m.holdfast == nil {
			m.holdfast = &apiv1.HoldfastConfiguration{}
		}
		m.section(h)
	}
}

func (m *merger) configuration(c *apiv1.ContainerRuntimeConfiguration) {
	scalar(m, "pidsLimit", &m.config.PidsLimit, c.PidsLimit)
	scalar(m, "logLevel", &m.config.LogLevel, c.LogLevel)
	scalar(m, "logSizeMax", &m.config.LogSizeMax, c.LogSizeMax)
	scalar(m, "overlaySize", &m.config.OverlaySize, c.OverlaySize)
	scalar(m, "defaultRuntime", &m.config.DefaultRuntime, c.DefaultRuntime)
	stores(m, "additionalLayerStores", apiv1.MaxLayerStores, &m.config.AdditionalLayerStores, c.AdditionalLayerStores,
		func(s *apiv1.AdditionalLayerStore) string { return clean(s.Path) }, nil)
	stores(m, "additionalImageStores", apiv1.MaxImageStores, &m.config.AdditionalImageStores, c.AdditionalImageStores,
		func(s *apiv1.AdditionalImageStore) string { return clean(s.Path) }, nil)
	stores(m, "additionalArtifactStores", apiv1.MaxArtifactStores, &m.config.AdditionalArtifactStores, c.AdditionalArtifactStores,
		func(s *apiv1.AdditionalArtifactStore) string { return clean(s.Path) },
		func(field string, old, s *apiv1.AdditionalArtifactStore) {
			scalar(m, field+".filter", &old.Filter, s.Filter)
		})
}

func (m *merger) section(h *apiv1.HoldfastConfiguration) {
	out := m.holdfast
	union(m, "holdfast.include", 128, &out.Include, h.Include)
	union(m, "holdfast.exclude", 128, &out.Exclude, h.Exclude)
	union(m, "holdfast.trusted", 128, &out.Trusted, h.Trusted)
	union(m, "holdfast.sources", 32, &out.Sources, h.Sources)
	union(m, "holdfast.trustedSources", 32, &out.TrustedSources, h.TrustedSources)
	union(m, "holdfast.pinned", 256, &out.Pinned, h.Pinned)
	union(m, "holdfast.artifacts", 128, &out.Artifacts, h.Artifacts)
	union(m, "holdfast.indexStores", 32, &out.IndexStores, h.IndexStores)
	union(m, "holdfast.indexPublish", 32, &out.IndexPublish, h.IndexPublish)
	for _, mirror := range h.RegistryMirrors {
		i := slices.IndexFunc(out.RegistryMirrors, func(o apiv1.RegistryMirror) bool { return o.Source == mirror.Source })
		if i < 0 {
			i = len(out.RegistryMirrors)
			if union(m, "holdfast.registryMirrors", 64, &m.mirrored, []string{mirror.Source}); len(m.mirrored) == i {
				continue
			}
			out.RegistryMirrors = append(out.RegistryMirrors, apiv1.RegistryMirror{Source: mirror.Source})
		}
		union(m, "holdfast.registryMirrors "+mirror.Source, 16, &out.RegistryMirrors[i].Mirrors, mirror.Mirrors)
	}
	scalar(m, "holdfast.offline", &out.Offline, h.Offline)
	scalar(m, "holdfast.cacheLimit", &out.CacheLimit, h.CacheLimit)
	scalar(m, "holdfast.artifactLimit", &out.ArtifactLimit, h.ArtifactLimit)
	scalar(m, "holdfast.disruption", &out.Disruption, h.Disruption)
}

// scalar takes a value if nobody has set one, and reports one that differs.
func scalar[T any](m *merger, field string, out *T, v T) {
	switch {
	case reflect.ValueOf(&v).Elem().IsZero():
	case reflect.ValueOf(out).Elem().IsZero():
		*out, m.owners[field] = v, m.object
	case m.inheriting && m.own[m.owners[field]]:
	case !same(*out, v):
		m.problem(ReasonConflict, fmt.Sprintf("%s: %s wants %s, %s wants %s: that of %s counts, which comes first",
			field, m.owners[field], text(*out), m.object, text(v), m.owners[field]), m.owners[field], m.object)
	}
}

func same(a, b any) bool {
	if qa, ok := a.(*resource.Quantity); ok {
		return qa.Cmp(*b.(*resource.Quantity)) == 0
	}
	return reflect.DeepEqual(a, b)
}

// text is a value for people to read.
func text(v any) string {
	switch v := v.(type) {
	case *int64:
		return fmt.Sprint(*v)
	case *bool:
		return fmt.Sprint(*v)
	case *resource.Quantity:
		return v.String()
	case *apiv1.ArtifactFilter:
		if data, err := json.Marshal(v); err == nil {
			return string(data)
		}
	}
	return fmt.Sprintf("%v", v)
}

// stores adds stores that are not there yet, up to a limit. What is there already
// goes to again.
func stores[T any](m *merger, field string, limit int, out *[]T, more []T, path func(*T) string, again func(field string, old, s *T)) {
	for i := range more {
		p := path(&more[i])
		key := field + " " + p
		if at := slices.IndexFunc(*out, func(s T) bool { return path(&s) == p }); at >= 0 {
			if again != nil {
				again(key, &(*out)[at], &more[i])
			}
			continue
		}
		if len(*out) >= limit {
			m.tooMany(field, limit, p)
			continue
		}
		m.owners[key] = m.object
		m.owners[key+".filter"] = m.object
		*out = append(*out, more[i])
	}
}

// contributors are the objects that have given a list its stores.
func (m *merger) contributors(field string) []string {
	var all []string
	for key, object := range m.owners {
		if strings.HasPrefix(key, field+" ") {
			all = append(all, object)
		}
	}
	return all
}

func (m *merger) problem(reason, message string, objects ...string) {
	slices.Sort(objects)
	m.problems = append(m.problems, Problem{Objects: slices.Compact(objects), Reason: reason, Message: message})
}

// union adds what is not there yet, as far as a list may be long (package api/v1): what is
// merged is valid, too.
func union[T ~string](m *merger, field string, limit int, out *[]T, more []T) {
	for _, v := range more {
		switch {
		case slices.Contains(*out, v):
		case len(*out) >= limit:
			m.tooMany(field, limit, string(v))
		default:
			*out = append(*out, v)
			m.owners[field+" "+string(v)] = m.object
		}
	}
}

// tooMany reports that something has no room in a list: one problem for all that an object
// names in vain.
func (m *merger) tooMany(field string, limit int, what string) {
	const text = "%s: all objects together name more than %d: %s of %s is left out"
	key := field + " " + m.object
	e, again := m.excess[key]
	if !again {
		e = excess{first: what, at: len(m.problems)}
		m.problem(ReasonLimit, fmt.Sprintf(text, field, limit, what, m.object), append(m.contributors(field), m.object)...)
	} else {
		e.more++
		m.problems[e.at].Message = fmt.Sprintf(text, field, limit, fmt.Sprintf("%s, with %d more,", e.first, e.more), m.object)
	}
	m.excess[key] = e
}

// excess is what an object names beyond what a list may have.
type excess struct {
	first string
	more  int
	at    int // the problem that says so
}
