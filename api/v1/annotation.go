// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"errors"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// annotatedSpec is the part of a spec that an annotation may set.
type annotatedSpec struct {
	ContainerRuntimeConfig struct {
		AdditionalArtifactStores []AdditionalArtifactStore `json:"additionalArtifactStores"`
	} `json:"containerRuntimeConfig"`
	Holdfast *HoldfastConfiguration `json:"holdfast"`
}

// ApplyAnnotation puts what [SpecAnnotation] says into the spec: spec.holdfast,
// if there is none, and the filters of those artifact stores that have none. It
// leaves the object as it is if the annotation is wrong: if it sets anything else,
// or names a store that is not in the spec. What is put in is not validated.
// Applying it again changes nothing.
func (c *ContainerRuntimeConfig) ApplyAnnotation() error {
	text, ok := c.Annotations[SpecAnnotation]
	if !ok {
		return nil
	}
	if err := c.apply(text); err != nil {
		return fmt.Errorf("applying %s: %w", field.NewPath("metadata", "annotations").Key(SpecAnnotation), err)
	}
	return nil
}

func (c *ContainerRuntimeConfig) apply(text string) error {
	if len(text) > maxInput {
		return fmt.Errorf("reading %d bytes: want at most %d", len(text), maxInput)
	}
	raw, err := decodeTree([]byte(text))
	if err != nil || raw == nil {
		return err
	}
	if errs := checkWritten(nil, raw); len(errs) > 0 {
		return errs.ToAggregate()
	}
	var spec annotatedSpec
	if err := decodeStrict(raw, &spec); err != nil {
		return err
	}
	filters, err := c.filtersFor(spec.ContainerRuntimeConfig.AdditionalArtifactStores)
	if err != nil {
		return err
	}
	if c.Spec.Holdfast == nil {
		c.Spec.Holdfast = spec.Holdfast
	}
	for i, filter := range filters {
		if s := &c.Spec.ContainerRuntimeConfig.AdditionalArtifactStores[i]; s.Filter == nil {
			s.Filter = filter.DeepCopy()
		}
	}
	return nil
}

// filtersFor says which filter belongs to which store of the spec.
func (c *ContainerRuntimeConfig) filtersFor(annotated []AdditionalArtifactStore) (map[int]*ArtifactFilter, error) {
	if len(annotated) == 0 {
		return nil, nil
	}
	list := field.NewPath("containerRuntimeConfig", "additionalArtifactStores")
	if errs := tooMany(list, len(annotated), MaxArtifactStores); len(errs) > 0 {
		return nil, errs.ToAggregate()
	}
	indexes := map[string][]int{}
	if c.Spec.ContainerRuntimeConfig != nil {
		for i, s := range c.Spec.ContainerRuntimeConfig.AdditionalArtifactStores {
			key := strings.TrimSuffix(string(s.Path), "/")
			indexes[key] = append(indexes[key], i)
		}
	}
	var errs []error
	filters, seen := map[int]*ArtifactFilter{}, map[string]bool{}
	for i, s := range annotated {
		path, key := list.Index(i).Child("path"), strings.TrimSuffix(string(s.Path), "/")
		switch {
		case seen[key]:
			errs = append(errs, field.Duplicate(path, s.Path))
		case indexes[key] == nil:
			errs = append(errs, field.NotFound(path, s.Path))
		}
		seen[key] = true
		for _, at := range indexes[key] {
			filters[at] = s.Filter
		}
	}
	return filters, errors.Join(errs...)
}
