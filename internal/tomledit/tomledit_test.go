// SPDX-License-Identifier: Apache-2.0

package tomledit

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAppend(t *testing.T) {
	key := []string{"storage", "options", "additionalimagestores"}
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", "[storage.options]\nadditionalimagestores = [\"/x\", \"/y\"]\n"},
		{"header", "# a\n[storage] # b\ndriver = \"overlay\"\n  [storage.options] # c\n  size = \"1\"\n",
			"# a\n[storage] # b\ndriver = \"overlay\"\n  [storage.options] # c\nadditionalimagestores = [\"/x\", \"/y\"]\n  size = \"1\"\n"},
		{"header at the end", "[storage.options]", "[storage.options]\nadditionalimagestores = [\"/x\", \"/y\"]\n"},
		{"no header", "[storage]\ndriver = \"overlay\"", "[storage]\ndriver = \"overlay\"\n\n[storage.options]\nadditionalimagestores = [\"/x\", \"/y\"]\n"},
		{"empty", "[storage.options]\nadditionalimagestores = [\n# none\n] # e\n", "[storage.options]\nadditionalimagestores = [\"/x\", \"/y\"\n# none\n] # e\n"},
		{"some", "[storage.options]\nadditionalimagestores = [\n  \"/a\", # first\n  '/x',\n] # e\n", "[storage.options]\nadditionalimagestores = [\n  \"/a\", # first\n  '/x', \"/y\",\n] # e\n"},
		{"all", "[storage.options]\nadditionalimagestores = ['/y', '/x']\n", "[storage.options]\nadditionalimagestores = ['/y', '/x']\n"},
		{"dotted", "[storage]\noptions.additionalimagestores = [\"/a\"]\n", "[storage]\noptions.additionalimagestores = [\"/a\", \"/x\", \"/y\"]\n"},
		{"quoted", "[ 'storage' . \"options\" ]\n\"additionalimagestores\" = [\"/a\" , ]\n", "[ 'storage' . \"options\" ]\n\"additionalimagestores\" = [\"/a\", \"/x\", \"/y\" , ]\n"},
		{"in between", "[storage.options]\n[storage.options.overlay]\nsize = ''\n", "[storage.options]\nadditionalimagestores = [\"/x\", \"/y\"]\n[storage.options.overlay]\nsize = ''\n"},
		{"windows", "[storage.options]\r\nsize = ''\r\n", "[storage.options]\r\nadditionalimagestores = [\"/x\", \"/y\"]\nsize = ''\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Parse([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time there is nothing to do
				if err := d.Append([]string{"/x", "/y"}, key...); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(c.want, string(d.Bytes())); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

func TestSet(t *testing.T) {
	for _, c := range []struct {
		name, in string
		value    any
		key      string
		want     string
	}{
		{"at the top", "", true, "offline", "offline = true\n"},
		{"before headers", "# a\nx = 1 # b\n\n[t]\n", int64(7), "n", "# a\nx = 1 # b\nn = 7\n\n[t]\n"},
		{"no newline", "x = 1", int64(7), "n", "x = 1\nn = 7\n"},
		{"only comments", "# a\n", int64(7), "n", "# a\nn = 7\n"},
		{"only headers", "# about t\n[t]\n", int64(7), "n", "n = 7\n# about t\n[t]\n"},
		{"replaced", "x = '''\na\nb''' # c\ny = 2\n", "q\"\\\n", "x", "x = \"q\\\"\\\\\\u000a\" # c\ny = 2\n"},
		{"tables", "stores = [] # s\n", []any{map[string]any{"path": "/a b", "filter": map[string]any{"types": []string{"x"}}}}, "stores",
			"stores = [{filter = {types = [\"x\"]}, path = \"/a b\"}] # s\n"},
		{"dotted", "index.build = true\n", false, "index.build", "index.build = false\n"},
		{"beside a dotted key", "[x]\na.b = 1\n[y]\n", int64(2), "x.a.c", "[x]\na.b = 1\na.c = 2\n[y]\n"},
		{"below a table", "[index]\nbuild = true\n", []string{"/a"}, "index.stores", "[index]\nstores = [\"/a\"]\nbuild = true\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Parse([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Set(c.value, strings.Split(c.key, ".")...); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, string(d.Bytes())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRemove(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"x = 1\n[a] # t\n  b = [ # what\n 1,\n] # it was\nc = 2\n", "x = 1\n[a] # t\nc = 2\n"},
		{"[a]\nb = 1", "[a]\n"},
		{"[a]\nc = 1\n", "[a]\nc = 1\n"},
		{"a.b = 1\na.c = 1\n", "a.c = 1\n"},
	} {
		d, err := Parse([]byte(c.in))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Remove("a", "b"); err != nil || string(d.Bytes()) != c.want {
			t.Errorf("%q: %q, %v", c.in, d.Bytes(), err)
		}
	}
	d, err := Parse([]byte("a = {b = 1, c = 2}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Remove("a", "b"); err == nil {
		t.Errorf("%q", d.Bytes())
	}
}

// What cannot be changed in place stays as it is, and says so.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		in, key string
	}{
		{"a = {b = 1}\n", "a.c"},
		{"a = 1\n", "a.c"},
		{"[[a]]\nx = 1\n", "a"},
		{"[[a]]\nx = 1\n", "a.c"},
	} {
		d, err := Parse([]byte(c.in))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Set(int64(1), strings.Split(c.key, ".")...); err == nil || string(d.Bytes()) != c.in {
			t.Errorf("%q: setting %s: %v, %q", c.in, c.key, err, d.Bytes())
		}
	}
	for _, text := range []string{"a = ", "a = 1\na = 2\n", "[a]\n[a]\n", "\x00"} {
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}

// Whatever a document looks like, a change does just that, or nothing.
func FuzzSet(f *testing.F) {
	for _, seed := range []string{
		"", "a = 1", "[a.b]\nc = ['x', # y\n]\n", "a.b.c = []", "a = {b = {c = ['x']}}", "[[a]]\n[a.b]\nc = []", "[a]\r\n[a.b]\r\nc = [\"\"\"x\"\"\"]",
		"[a.b]\nc = [ 'x' , ]#\n", "\"a\".'b'.c=[]", "[a.b]#x",
	} {
		f.Add([]byte(seed), "/v")
	}
	f.Fuzz(func(t *testing.T, text []byte, value string) {
		d, err := Parse(text)
		if err != nil {
			return
		}
		if err := d.Append([]string{value}, "a", "b", "c"); err == nil {
			if all, err := d.Strings("a", "b", "c"); err != nil || len(all) == 0 {
				t.Errorf("%q: %v, %v", text, all, err)
			}
		}
		if _, err := Parse(d.Bytes()); err != nil {
			t.Errorf("%q became %q: %v", text, d.Bytes(), err)
		}
	})
}
