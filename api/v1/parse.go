// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"
)

// maxInput is the most bytes that are parsed at once.
const maxInput = 1 << 20

// kind is the kind of the objects that are parsed.
const kind = "ContainerRuntimeConfig"

// ParseContainerRuntimeConfigs reads objects from YAML or JSON: documents that
// are separated by ---, each an object or a list of them. Names of fields and
// their case must be right; fields that OpenShift has and this package has not are
// ignored. [ContainerRuntimeConfig.ApplyAnnotation] has been called on
// what it returns, [ContainerRuntimeConfig.Validate] has not.
//
// An error names the document, counted from 1 without empty ones, the object
// and the field. There are no objects beside an error.
func ParseContainerRuntimeConfigs(data []byte) ([]ContainerRuntimeConfig, error) {
	if len(data) > maxInput {
		return nil, fmt.Errorf("reading %d bytes of objects: want at most %d", len(data), maxInput)
	}
	var configs []ContainerRuntimeConfig
	n := 0
	for _, document := range splitDocuments(data) {
		tree, err := decodeTree(document)
		if err == nil && tree == nil {
			continue
		}
		n++
		if err == nil {
			configs, err = appendObjects(configs, tree)
		}
		if err != nil {
			return nil, fmt.Errorf("reading document %d: %w", n, err)
		}
	}
	return configs, nil
}

// appendObjects decodes the object of a document, or those of its list.
func appendObjects(configs []ContainerRuntimeConfig, tree any) ([]ContainerRuntimeConfig, error) {
	object, ok := tree.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("decoding an object: want a mapping, have %s", typeName(tree))
	}
	if !isList(object) {
		c, err := decodeObject(object)
		if err != nil {
			return nil, err
		}
		return append(configs, *c), nil
	}
	for key := range object {
		if !slices.Contains([]string{"apiVersion", "kind", "metadata", "items"}, key) {
			return nil, fmt.Errorf("decoding a list: unknown field %q", key)
		}
	}
	items, ok := object["items"].([]any)
	if !ok {
		return nil, fmt.Errorf("decoding a list: items: want a list, have %s", typeName(object["items"]))
	}
	for i, item := range items {
		object, ok := item.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("decoding items[%d]: want a mapping, have %s", i, typeName(item))
		}
		c, err := decodeObject(object)
		if err != nil {
			return nil, fmt.Errorf("decoding items[%d]: %w", i, err)
		}
		configs = append(configs, *c)
	}
	return configs, nil
}

func isList(object map[string]any) bool {
	return object["kind"] == "List" && object["apiVersion"] == "v1" ||
		object["kind"] == kind+"List" && object["apiVersion"] == GroupVersion.String()
}

func decodeObject(object map[string]any) (*ContainerRuntimeConfig, error) {
	if object["kind"] != kind || object["apiVersion"] != GroupVersion.String() {
		return nil, fmt.Errorf("decoding kind %q of apiVersion %q: want %s of %s",
			textOf(object["kind"]), textOf(object["apiVersion"]), kind, GroupVersion)
	}
	metadata, _ := object["metadata"].(map[string]any)
	name := textOf(metadata["name"])
	c, err := decodeNamed(object)
	if err == nil {
		err = c.ApplyAnnotation()
	}
	if err != nil {
		return nil, fmt.Errorf("decoding %s %q: %w", kind, name, err)
	}
	return c, nil
}

func decodeNamed(object map[string]any) (*ContainerRuntimeConfig, error) {
	if spec, ok := object["spec"].(map[string]any); ok {
		if settings, ok := spec["containerRuntimeConfig"].(map[string]any); ok {
			delete(settings, "containerGomaxprocsBehavior") // OpenShift's, behind a feature gate
		}
	}
	if _, ok := object["spec"]; !ok {
		return nil, field.Required(field.NewPath("spec"), "")
	}
	if errs := checkWritten(field.NewPath("spec"), object["spec"]); len(errs) > 0 {
		return nil, errs.ToAggregate()
	}
	c := &ContainerRuntimeConfig{}
	if err := decodeStrict(object, c); err != nil {
		return nil, err
	}
	if c.Name == "" {
		return nil, field.Required(field.NewPath("metadata", "name"), "")
	}
	return c, nil
}

// decodeStrict decodes a tree of which each field must be known.
func decodeStrict(tree, into any) error {
	data, err := json.Marshal(tree)
	if err != nil {
		return err
	}
	strict, err := kjson.UnmarshalStrict(data, into)
	if err != nil {
		return err
	}
	return errors.Join(strict[:min(len(strict), maxErrors)]...)
}

// typeName is what YAML calls a value.
func typeName(value any) string {
	switch value.(type) {
	case nil:
		return "nothing"
	case map[string]any:
		return "a mapping"
	case []any:
		return "a list"
	}
	return "a single value"
}

// textOf is a value that should be a text; what is not is none.
func textOf(value any) string {
	s, _ := value.(string)
	return s
}

// splitDocuments splits at the lines that begin or end a YAML document, so that
// what follows them is not lost: a decoder reads the first document only.
func splitDocuments(data []byte) [][]byte {
	var documents [][]byte
	start := 0
	for at := 0; at < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		line := data[at:end]
		if isMarker(line, "---") {
			documents = append(documents, data[start:at])
			start = at
		} else if isMarker(line, "...") {
			documents = append(documents, data[start:at])
			start = at + len("...")
		}
		at = end
	}
	return append(documents, data[start:])
}

// isMarker reports whether a line starts with a marker, which a space or the
// end of the line must follow.
func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0])))
}
