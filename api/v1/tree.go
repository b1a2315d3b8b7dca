// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	yamlv3 "go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// maxDepth is how deep a document may be nested; an object is not half as deep.
const maxDepth = 100

// maxErrors is how many errors of a kind are reported of a document: each may be
// as long as its path, and there may be one for every few bytes.
const maxErrors = 10

// decodeTree decodes one document of YAML or JSON, nil if there is nothing in it.
func decodeTree(document []byte) (any, error) {
	document = bytes.TrimPrefix(document, []byte("\ufeff"))
	data := bytes.TrimSpace(document)
	// Of JSON, YAML reads most but not all.
	if !bytes.HasPrefix(data, []byte("{")) || !json.Valid(data) {
		if err := checkYAML(document); err != nil {
			return nil, fmt.Errorf("decoding YAML: %w", err)
		}
		var err error
		if data, err = yaml.YAMLToJSONStrict(document); err != nil {
			return nil, fmt.Errorf("decoding YAML: %w", shorten(err))
		}
	}
	var tree any
	strict, err := kjson.UnmarshalStrict(data, &tree)
	if err == nil {
		err = errors.Join(strict[:min(len(strict), maxErrors)]...)
	}
	if err != nil {
		return nil, fmt.Errorf("decoding JSON: %w", err)
	}
	return tree, nil
}

// shorten cuts an error that has a line for each key that is there twice.
func shorten(err error) error {
	lines := strings.SplitN(err.Error(), "\n", maxErrors+1)
	if len(lines) <= maxErrors {
		return err
	}
	return errors.New(strings.Join(lines[:maxErrors], "\n"))
}

// checkYAML refuses what would grow beyond bounds when it is decoded, and a
// second document, which would be lost.
func checkYAML(document []byte) error {
	decoder := yamlv3.NewDecoder(bytes.NewReader(document))
	var node yamlv3.Node
	if err := decoder.Decode(&node); err != nil {
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	size := 0
	if err := measure(&node, 0, &size); err != nil {
		return err
	}
	if err := decoder.Decode(&yamlv3.Node{}); !errors.Is(err, io.EOF) {
		return errors.Join(errors.New("looking for the end: there is another document"), err)
	}
	return nil
}

// measure adds up what a node has in it once its aliases are replaced.
func measure(node *yamlv3.Node, depth int, size *int) error {
	if depth > maxDepth {
		return fmt.Errorf("line %d: nested more than %d deep", node.Line, maxDepth)
	}
	if *size += len(node.Value) + 1; *size > maxInput {
		return fmt.Errorf("line %d: more than %d bytes", node.Line, maxInput)
	}
	if node.Alias != nil {
		return measure(node.Alias, depth+1, size)
	}
	for _, n := range node.Content {
		if err := measure(n, depth+1, size); err != nil {
			return err
		}
	}
	return nil
}

// checkWritten checks of a spec that is not yet decoded what cannot be seen of it
// later: the empty text, which an API server takes for a value, and fractions; null,
// which is a value that somebody forgot: an API server drops it, as it does fields
// that it does not know; and that its quantities are not ones that take long to decode.
func checkWritten(path *field.Path, spec any) field.ErrorList {
	tree, ok := spec.(map[string]any)
	if !ok {
		return checkValue(path, "", spec, false)
	}
	var errs field.ErrorList
	for _, key := range slices.Sorted(maps.Keys(tree)) {
		if len(errs) >= maxErrors {
			break
		}
		// A selector's keys are labels: they may have the names of fields.
		errs = append(errs, checkValue(path.Child(key), key, tree[key], key != "machineConfigPoolSelector")...)
	}
	return errs
}

func checkValue(path *field.Path, key string, value any, fields bool) field.ErrorList {
	switch value := value.(type) {
	case nil:
		return field.ErrorList{field.TypeInvalid(path, "null", "must not be null")}
	case float64:
		return field.ErrorList{field.TypeInvalid(path, value, "must be an integer of 64 bits, if a number")}
	case int64:
		return nil
	case string:
		if fields {
			return checkText(path, key, value)
		}
		return nil
	}
	if fields && isQuantity(key) { // its decoder does not say where it is
		return field.ErrorList{field.TypeInvalid(path, typeName(value), messageQuantity)}
	}
	var errs field.ErrorList
	switch value := value.(type) {
	case []any:
		for i, v := range value {
			if len(errs) >= maxErrors {
				break
			}
			errs = append(errs, checkValue(path.Index(i), "", v, fields)...)
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(value)) {
			if len(errs) >= maxErrors {
				break
			}
			errs = append(errs, checkValue(path.Child(k), k, value[k], fields)...)
		}
	}
	return errs
}

func isQuantity(key string) bool {
	return key == "logSizeMax" || key == "overlaySize" || key == "maxSize"
}

func checkText(path *field.Path, key, s string) field.ErrorList {
	if isQuantity(key) {
		return validateQuantityText(path, s)
	}
	if s != "" {
		return nil
	}
	switch key {
	case "defaultRuntime":
		return validateEnum(path, s, runtimes)
	case "disruption":
		return validateEnum(path, s, disruptions)
	case "cacheLimit", "artifactLimit":
		return validateShare(path, s)
	}
	return nil
}
