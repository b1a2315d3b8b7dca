// SPDX-License-Identifier: Apache-2.0

// Package tomledit changes single keys of a TOML document and leaves every other
// byte of it as it is: comments, order, white space, keys that nobody knows.
//
// Each change is checked: the new document must say what the old one said, but
// for that key, to the parser that the runtimes use. What cannot be changed in
// that way is an error, and the document stays as it was.
package tomledit

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Document is a TOML document. Its zero value is an empty one. It may not be used
// by several goroutines at once.
type Document struct{ text []byte }

// Parse reads a document.
func Parse(text []byte) (*Document, error) {
	d := &Document{bytes.Clone(text)}
	if _, err := d.tree(); err != nil {
		return nil, err
	}
	// Whoever reads a file with a parser that takes more has to be told now.
	if _, err := d.items(); err != nil {
		return nil, err
	}
	return d, nil
}

// Bytes returns the document's text.
func (d *Document) Bytes() []byte { return bytes.Clone(d.text) }

// Get returns the value of a key, nil if it is not there. A table is a
// map[string]any, an array a []any.
func (d *Document) Get(key ...string) any {
	tree, err := d.tree()
	if err != nil {
		return nil
	}
	return get(tree, key)
}

// Set gives a key a value: a string, a bool, an int64, or an array or a table of
// values (map[string]any). A key that is not there is added to the table that it is in, below its
// header.
func (d *Document) Set(value any, key ...string) error {
	literal, err := Literal(value)
	if err != nil {
		return fmt.Errorf("setting %s: %w", strings.Join(key, "."), err)
	}
	return d.change(value, key, func(items []item) ([]byte, error) {
		if i := find(items, key); i >= 0 {
			return splice(d.text, items[i].value, items[i].end, literal), nil
		}
		return d.insert(items, key, literal), nil
	})
}

// Append adds strings to the end of an array that has none of them, and keeps
// what is in it as it is written. An array that is not there is made.
func (d *Document) Append(values []string, key ...string) error {
	old, err := d.Strings(key...)
	if err != nil {
		return err
	}
	values = slices.DeleteFunc(slices.Clone(values), func(v string) bool { return slices.Contains(old, v) })
	if len(values) == 0 {
		return nil
	}
	all := slices.Concat(old, values)
	return d.change(all, key, func(items []item) ([]byte, error) {
		literal, err := Literal(values)
		if err != nil {
			return nil, err
		}
		i := find(items, key)
		if i < 0 {
			return d.insert(items, key, literal), nil
		}
		inner := literal[1 : len(literal)-1]
		if at := items[i].lastElement; at > 0 {
			return splice(d.text, at, at, ", "+inner), nil
		}
		at := items[i].value + 1 // behind the bracket
		return splice(d.text, at, at, inner), nil
	})
}

// Remove takes a key out, with the lines that it is on. One that is not there is no error.
func (d *Document) Remove(key ...string) error {
	if d.Get(key...) == nil {
		return nil
	}
	return d.change(nil, key, func(items []item) ([]byte, error) {
		i := find(items, key)
		if i < 0 {
			return d.text, nil // a table: change refuses
		}
		from := bytes.LastIndexByte(d.text[:items[i].value], '\n') + 1
		return splice(d.text, from, lineEnd(d.text, items[i].end), ""), nil
	})
}

// Strings returns the value of a key that is an array of strings.
func (d *Document) Strings(key ...string) ([]string, error) {
	switch v := d.Get(key...).(type) {
	case nil:
		return nil, nil
	case []any:
		all := make([]string, len(v))
		for i, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%s: want an array of strings", strings.Join(key, "."))
			}
			all[i] = s
		}
		return all, nil
	default:
		return nil, fmt.Errorf("%s: want an array of strings", strings.Join(key, "."))
	}
}

// change puts the text that edit returns in place if it says just that.
func (d *Document) change(value any, key []string, edit func([]item) ([]byte, error)) error {
	want, err := d.tree()
	if err == nil {
		err = set(want, value, key)
	}
	var items []item
	if err == nil {
		items, err = d.items()
	}
	if err != nil {
		return fmt.Errorf("setting %s: %w", strings.Join(key, "."), err)
	}
	text, err := edit(items)
	if err != nil {
		return fmt.Errorf("setting %s: %w", strings.Join(key, "."), err)
	}
	changed := &Document{text}
	got, err := changed.tree()
	if err != nil || !reflect.DeepEqual(got, Normal(want)) {
		return fmt.Errorf("setting %s: the file has it, or a table that it is in, in a form that cannot be changed in place: write it as a key below the header [%s]",
			strings.Join(key, "."), strings.Join(key[:len(key)-1], "."))
	}
	d.text = text
	return nil
}

// insert returns the text with a new key: below the header of its table, at the
// top if it is in none, or in a new table at the end.
func (d *Document) insert(items []item, key []string, literal string) []byte {
	table, name := key[:len(key)-1], quoteKey(key[len(key)-1])
	line := name + " = " + literal + "\n"
	if len(table) == 0 {
		// Behind the keys that are there, before the first header.
		at := 0
		for _, i := range items {
			if i.header {
				break
			}
			at = i.end
		}
		switch {
		case at > 0:
			return d.insertLine(at, line)
		case len(items) == 0 && len(d.text) > 0: // nothing but comments
			return d.insertLine(len(d.text)-1, line)
		}
		return splice(d.text, 0, 0, line)
	}
	for _, i := range items {
		if i.header && !i.array && slices.Equal(i.key, table) {
			return d.insertLine(i.end, line)
		}
	}
	for _, i := range items {
		// The table is made of dotted keys: then it may have no header.
		if !i.header && len(i.key) > len(table) && i.base < len(table) && slices.Equal(i.key[:len(table)], table) {
			return d.insertLine(i.end, dotted(key[i.base:])+" = "+literal+"\n")
		}
	}
	text := bytes.Clone(d.text)
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	if len(text) > 0 {
		text = append(text, '\n')
	}
	return append(text, fmt.Sprintf("[%s]\n%s", dotted(table), line)...)
}

// insertLine returns the text with a line behind the one that has a place.
func (d *Document) insertLine(at int, line string) []byte {
	if at = lineEnd(d.text, at); d.text[at-1] != '\n' {
		line = "\n" + line
	}
	return splice(d.text, at, at, line)
}

func dotted(key []string) string {
	quoted := make([]string, len(key))
	for i, k := range key {
		quoted[i] = quoteKey(k)
	}
	return strings.Join(quoted, ".")
}

// item is a key with its value, or a header, by its places in the text.
type item struct {
	key           []string // whole, from the root
	base          int      // how much of the key its header says
	header, array bool     // a header; one of an array of tables
	value, end    int      // where the value begins; behind value or header
	lastElement   int      // behind the last element of an array
}

// items lists what the document consists of.
func (d *Document) items() ([]item, error) {
	var p unstable.Parser
	// The parser tells places by the capacity of the slice.
	text := slices.Clip(bytes.Clone(d.text))
	p.Reset(text)
	var all []item
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		var key []string
		end := 0
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
			end = int(it.Node().Raw.Offset + it.Node().Raw.Length)
		}
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = key
			all = append(all, item{key: key, header: true, array: e.Kind == unstable.ArrayTable, end: end})
		case unstable.KeyValue:
			i := item{key: slices.Concat(table, key), base: len(table), end: int(e.Raw.Offset + e.Raw.Length)}
			for i.value = end; i.value < i.end && strings.ContainsRune(" \t=", rune(text[i.value])); {
				i.value++
			}
			if v := e.Value(); v.Kind == unstable.Array {
				for it := v.Children(); it.Next(); {
					if n := it.Node(); n.Raw.Length > 0 {
						i.lastElement = int(n.Raw.Offset + n.Raw.Length)
					}
				}
			}
			all = append(all, i)
		}
	}
	if err := p.Error(); err != nil {
		return nil, fmt.Errorf("parsing TOML: %w", err)
	}
	return all, nil
}

// find is the last key of that name: a document has a key once, but for the
// tables of an array, which are not looked for.
func find(items []item, key []string) int {
	return slices.IndexFunc(items, func(i item) bool { return !i.header && slices.Equal(i.key, key) })
}

func splice(text []byte, from, to int, with string) []byte {
	return slices.Concat(text[:from], []byte(with), text[to:])
}

// lineEnd is the place behind the line that has a place.
func lineEnd(text []byte, at int) int {
	if n := bytes.IndexByte(text[at:], '\n'); n >= 0 {
		return at + n + 1
	}
	return len(text)
}

// Literal is a value as TOML has it on one line.
func Literal(value any) (string, error) {
	switch v := value.(type) {
	case string:
		return quote(v), nil
	case bool:
		return strconv.FormatBool(v), nil
	case int64:
		return strconv.FormatInt(v, 10), nil
	case []string:
		return join("[", "]", v, func(s string) (string, error) { return quote(s), nil })
	case []any:
		return join("[", "]", v, Literal)
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		return join("{", "}", keys, func(k string) (string, error) {
			l, err := Literal(v[k])
			return quoteKey(k) + " = " + l, err
		})
	}
	return "", fmt.Errorf("a value of type %T", value)
}

func join[T any](start, end string, all []T, literal func(T) (string, error)) (string, error) {
	parts := make([]string, len(all))
	for i, v := range all {
		var err error
		if parts[i], err = literal(v); err != nil {
			return "", err
		}
	}
	return start + strings.Join(parts, ", ") + end, nil
}

// quote writes a basic string: what Go escapes otherwise has its own form.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func quoteKey(k string) string {
	bare := k != "" && strings.IndexFunc(k, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-')
	}) < 0
	if bare {
		return k
	}
	return quote(k)
}

func (d *Document) tree() (map[string]any, error) {
	tree := map[string]any{}
	if err := toml.Unmarshal(d.text, &tree); err != nil {
		return nil, fmt.Errorf("parsing TOML: %w", err)
	}
	return Normal(tree).(map[string]any), nil
}

// Normal makes values comparable with those of [Document.Get]: arrays of tables, which
// parsers give a type of their own, become []any.
func Normal(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for k, e := range v {
			m[k] = Normal(e)
		}
		return m
	case []map[string]any:
		return normalAll(v)
	case []any:
		return normalAll(v)
	case []string:
		return normalAll(v)
	}
	return v
}

func normalAll[T any](v []T) []any {
	all := make([]any, len(v))
	for i, e := range v {
		all[i] = Normal(e)
	}
	return all
}

func get(tree map[string]any, key []string) any {
	var v any = tree
	for _, k := range key {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

func set(tree map[string]any, value any, key []string) error {
	for _, k := range key[:len(key)-1] {
		if tree[k] == nil {
			tree[k] = map[string]any{}
		}
		m, ok := tree[k].(map[string]any)
		if !ok {
			return fmt.Errorf("%s is not a table", k)
		}
		tree = m
	}
	if last := key[len(key)-1]; value == nil {
		delete(tree, last)
	} else {
		tree[last] = value
	}
	return nil
}
