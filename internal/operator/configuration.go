// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"errors"
	"fmt"
	"slices"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// The reasons of problems, beyond those of merging.
const (
	reasonInvalid  = "Invalid"             // an object cannot be applied
	reasonGate     = "FeatureGateDisabled" // it asks for what the feature set does not have
	reasonNoPool   = "NoPool"              // it selects no pool
	reasonForeign  = "NotOurs"             // a MachineConfig belongs to somebody else
	reasonRender   = "RenderFailed"        // files could not be made of it
	reasonSelector = "InvalidSelector"     // of a pool
	reasonSeveral  = "SeveralPools"        // custom pools that select the same node
)

// configuration is what the nodes of a pool are to have.
type configuration struct {
	spec     apiv1.ContainerRuntimeConfigSpec
	refs     []apiv1.ObjectReference // the objects that it was made of, in the order in which they count
	own      bool                    // objects select the pool itself
	problems []render.Problem
	err      error // why it is not known what the pool inherits
}

// involves reports whether an object is part of the configuration, or would be if it could.
func (c *configuration) involves(object string) bool { return slices.Contains(c.sources(), object) }

// sources are the names of the objects that it was made of.
func (c *configuration) sources() []string {
	var all []string
	for _, r := range c.refs {
		all = append(all, r.Name)
	}
	return all
}

// refuse says, before all else, why the configuration cannot be applied at all.
func (c *configuration) refuse(reason string, err error) {
	c.problems = append([]render.Problem{{Objects: c.sources(), Reason: reason, Message: err.Error()}}, c.problems...)
}

// refused is the problem for which a pool stays with what it has, nil if there is none.
func refused(pool *apiv1.MachineConfigPool) *render.Problem {
	for _, c := range pool.Status.Conditions {
		if c.Type == apiv1.PoolRenderDegraded && c.ObservedGeneration == pool.Generation && (c.Reason == reasonForeign || c.Reason == reasonRender) {
			return &render.Problem{Reason: c.Reason, Message: c.Message}
		}
	}
	return nil
}

// configure merges what selects a pool, and what it inherits.
func configure(pool *apiv1.MachineConfigPool, pools []apiv1.MachineConfigPool, objects []apiv1.ContainerRuntimeConfig) configuration {
	var c configuration
	own := selecting(objects, pool)
	var inherited []apiv1.ContainerRuntimeConfig
	for i := range pools {
		yes, err := inherits(pool, &pools[i])
		if err != nil {
			c.err = err
			break
		}
		if yes {
			inherited = append(inherited, selecting(objects, &pools[i])...)
		}
	}
	c.own = len(own) > 0
	for _, o := range append(render.ByAge(own), render.ByAge(inherited)...) {
		if !c.involves(o.Name) {
			c.refs = append(c.refs, apiv1.ObjectReference{
				APIVersion: apiv1.GroupVersion.String(), Kind: "ContainerRuntimeConfig", Name: o.Name, Generation: o.Generation,
			})
		}
	}
	c.spec, c.problems = render.Merge(own, inherited...)
	return c
}

// selecting returns the objects that select a pool.
func selecting(objects []apiv1.ContainerRuntimeConfig, pool *apiv1.MachineConfigPool) []apiv1.ContainerRuntimeConfig {
	found, err := render.Select(objects, pool.Labels)
	if err != nil {
		return nil // judge leaves no such objects
	}
	return found
}

// judged are objects that can be applied, and what cannot be of others.
type judged struct {
	objects  []apiv1.ContainerRuntimeConfig
	problems []render.Problem
}

// judge reads annotations, and takes out what must not be applied. An API server has
// refused most of that already, but not OpenShift's definition, nor what was there before a
// feature set was changed.
func judge(objects []apiv1.ContainerRuntimeConfig, features FeatureSet) judged {
	var j judged
	for i := range objects {
		o := *objects[i].DeepCopy()
		if o.DeletionTimestamp != nil {
			continue
		}
		refuse := func(reason string, err error) {
			j.problems = append(j.problems, render.Problem{Objects: []string{o.Name}, Reason: reason, Message: err.Error()})
		}
		err := o.ApplyAnnotation()
		if err == nil {
			if errs := o.Validate(); len(errs) > 0 {
				err = errs.ToAggregate()
			}
		}
		if err == nil {
			_, err = render.Select([]apiv1.ContainerRuntimeConfig{o}, nil)
		}
		if err != nil {
			refuse(reasonInvalid, err)
			continue
		}
		if features == Off && withoutStores(&o) {
			refuse(reasonGate, errGate)
		}
		j.objects = append(j.objects, o)
	}
	return j
}

var errGate = errors.New("additional stores and spec.holdfast are not applied: the feature gate AdditionalStorageConfig is off in this cluster")

// withoutStores takes out what the feature gate is about, and reports whether there was any.
func withoutStores(o *apiv1.ContainerRuntimeConfig) bool {
	c := o.Spec.ContainerRuntimeConfig
	any := o.Spec.Holdfast != nil || len(c.AdditionalLayerStores)+len(c.AdditionalImageStores)+len(c.AdditionalArtifactStores) > 0
	o.Spec.Holdfast = nil
	c.AdditionalLayerStores, c.AdditionalImageStores, c.AdditionalArtifactStores = nil, nil, nil
	return any
}

// FeatureSet is a feature set of OpenShift's. Additional stores are in all but Off.
type FeatureSet string

// The feature sets.
const (
	Default     FeatureSet = "Default"
	TechPreview FeatureSet = "TechPreviewNoUpgrade" // whoever uses them is warned
	Off         FeatureSet = "Off"                  // objects with them are refused
)

// ParseFeatureSet reads the name of a feature set.
func ParseFeatureSet(s string) (FeatureSet, error) {
	if f := FeatureSet(s); slices.Contains([]FeatureSet{Default, TechPreview, Off}, f) {
		return f, nil
	}
	return "", fmt.Errorf("there is no feature set %q: want %s, %s or %s", s, Default, TechPreview, Off)
}
