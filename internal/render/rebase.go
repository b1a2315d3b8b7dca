// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/BurntSushi/toml"

	"github.com/holdfast/holdfast/internal/tomledit"
)

// Rebase takes out of a file that somebody has edited what was written into it: the
// result is what the file would hold without us, and can be the base of the next
// rendering. base is what the file held before, written what was made of it.
//
// Where the edit has changed a value of ours, a list keeps what the editor has added to
// it, and for anything else the editor's value is the base.
func Rebase(base, written, edited []byte) ([]byte, error) {
	var trees [3]map[string]any
	for i, text := range [][]byte{base, written, edited} {
		if err := toml.Unmarshal(text, &trees[i]); err != nil {
			return nil, fmt.Errorf("parsing TOML: %w", err)
		}
	}
	before, ours := leaves(trees[0]), leaves(trees[1])
	doc, err := tomledit.Parse(edited)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		l := ours[name]
		was, had := before[name]
		if had && reflect.DeepEqual(was.value, l.value) {
			continue // not ours
		}
		now := doc.Get(l.key...)
		switch {
		case now == nil:
			continue
		case reflect.DeepEqual(now, l.value) && !had:
			err = doc.Remove(l.key...)
		case reflect.DeepEqual(now, l.value):
			err = doc.Set(was.value, l.key...)
		default:
			err = withoutOurs(doc, l, was)
		}
		if err != nil {
			return nil, err
		}
	}
	return doc.Bytes(), nil
}

// withoutOurs takes the strings that we have added out of a list that was edited.
func withoutOurs(doc *tomledit.Document, l, was leaf) error {
	list, isList := l.value.([]any)
	now, _ := doc.Strings(l.key...)
	if !isList || len(now) == 0 {
		return nil // the editor's value
	}
	old, _ := was.value.([]any)
	rest := slices.DeleteFunc(slices.Clone(now), func(s string) bool {
		return slices.Contains(list, any(s)) && !slices.Contains(old, any(s))
	})
	if len(rest) == len(now) {
		return nil
	}
	return doc.Set(rest, l.key...)
}

// leaf is a key that is not a table.
type leaf struct {
	key   []string
	value any
}

// leaves are the keys of a tree by their whole names.
func leaves(tree map[string]any) map[string]leaf {
	all := map[string]leaf{}
	var walk func(tree map[string]any, above []string)
	walk = func(tree map[string]any, above []string) {
		for k, v := range tree {
			key := slices.Concat(above, []string{k})
			if t, ok := v.(map[string]any); ok {
				walk(t, key)
				continue
			}
			all[fmt.Sprintf("%q", key)] = leaf{key, tomledit.Normal(v)}
		}
	}
	walk(tree, nil)
	return all
}
