// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/config"
)

var (
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	fence    = regexp.MustCompile("(?ms)^```.*?^```$")
	code     = regexp.MustCompile("`([^`\n]+)`")
	repoPath = regexp.MustCompile(`^(api|cmd|internal|test|deploy|docs|tools|\.ci)/[\w./-]*\w$`)
	symbol   = regexp.MustCompile(`^([a-z]+)\.([A-Za-z]\w*(?:\.\w+)?)(?:\(\))?$`)
	notWord  = regexp.MustCompile(`[^\w\- ]`)
)

func TestMarkdownLinksResolve(t *testing.T) {
	for _, name := range files(t, "*.md") {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(read(t, name), ""), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			to := name
			if target != "" {
				to = filepath.Join(filepath.Dir(name), target)
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s: link to %s: %v", name, m[1], err)
			} else if anchor != "" && !hasAnchor(read(t, to), anchor) {
				t.Errorf("%s: link to %s: there is no such heading", name, m[1])
			}
		}
	}
}

// hasAnchor reports whether a document has a heading with the anchor that
// GitHub gives it.
func hasAnchor(text, anchor string) bool {
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		words := notWord.ReplaceAllString(strings.ToLower(strings.TrimSpace(m[1])), "")
		if strings.ReplaceAll(words, " ", "-") == anchor {
			return true
		}
	}
	return false
}

// TestDocumentsNameWhatIsThere checks the paths and the Go names that documents
// mention as code: `internal/device`, `device.Device.Wait`.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	symbols := map[string]map[string]bool{} // by package name
	for _, p := range packages(t) {
		if symbols[p.Name] == nil {
			symbols[p.Name] = map[string]bool{}
		}
		_, parsed := parse(t, p.Dir, notTest)
		for _, f := range parsed {
			for _, name := range declared(f) {
				symbols[p.Name][name] = true
			}
		}
	}
	found := 0
	for _, name := range files(t, "*.md") {
		for _, m := range code.FindAllStringSubmatch(fence.ReplaceAllString(read(t, name), ""), -1) {
			if repoPath.MatchString(m[1]) {
				found++
				if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if s := symbol.FindStringSubmatch(m[1]); s != nil && symbols[s[1]] != nil && !isFileName(m[1]) && !isSetting(m[1]) {
				found++
				if !symbols[s[1]][s[2]] {
					t.Errorf("%s: package %s has no %s", name, s[1], s[2])
				}
			}
		}
	}
	if found == 0 {
		t.Error("the documents name nothing of the code")
	}
}

// isSetting reports whether the settings have a name, which may look like that of
// something in a package.
func isSetting(s string) bool { return strings.Contains(config.DefaultFile, "\n"+s+" = ") }

func isFileName(s string) bool {
	switch filepath.Ext(s) {
	case ".go", ".md", ".toml", ".json", ".yaml", ".conf", ".service", ".lock", ".erofs":
		return true
	}
	return false
}

// declared lists the names that a file declares: F, T, T.Method, T.Field.
func declared(f *ast.File) []string {
	var all []string
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			name := d.Name.Name
			if d.Recv != nil {
				name = receiver(d.Recv.List[0].Type) + "." + name
			}
			all = append(all, name)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					all = append(all, s.Name.Name)
					all = append(all, members(s.Name.Name, s.Type)...)
				case *ast.ValueSpec:
					for _, n := range s.Names {
						all = append(all, n.Name)
					}
				}
			}
		}
	}
	return all
}

func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

// members lists the fields of a struct and the methods of an interface.
func members(name string, typ ast.Expr) []string {
	var list *ast.FieldList
	switch s := typ.(type) {
	case *ast.StructType:
		list = s.Fields
	case *ast.InterfaceType:
		list = s.Methods
	default:
		return nil
	}
	var all []string
	for _, f := range list.List {
		for _, n := range f.Names {
			all = append(all, name+"."+n.Name)
		}
	}
	return all
}

// TestEverySettingIsDocumented compares docs/configuration.md with the settings.
func TestEverySettingIsDocumented(t *testing.T) {
	text := read(t, "docs/configuration.md")
	setting := regexp.MustCompile(`(?m)^([\w.]+) = (.+)$`)
	known := map[string]bool{}
	for _, m := range setting.FindAllStringSubmatch(config.DefaultFile, -1) {
		name, value := m[1], m[2]
		known[name] = true
		_, section, ok := strings.Cut(text, "\n### `"+name+"`\n")
		if !ok {
			t.Errorf("docs/configuration.md does not have %s", name)
			continue
		}
		section, _, _ = strings.Cut(section, "\n#")
		if !strings.Contains(section, "Default: `"+value+"`") {
			t.Errorf("docs/configuration.md: the default of %s is `%s`", name, value)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^### `([\\w.]+)`$").FindAllStringSubmatch(text, -1) {
		if !known[m[1]] {
			t.Errorf("docs/configuration.md: there is no setting %s", m[1])
		}
	}
}

func TestReadmeCommands(t *testing.T) {
	readme, ci := read(t, "README.md"), read(t, ".ci/run")
	for _, c := range []string{"make demo", "make test"} {
		if !strings.Contains(readme, "\n"+c+"\n") && !strings.Contains(readme, "\n"+c+" ") {
			t.Errorf("README.md does not have the command %s", c)
		}
	}
	version := regexp.MustCompile(`(?m)^go (\S+)$`).FindStringSubmatch(read(t, "go.mod"))
	if version == nil || !strings.Contains(readme, "Go "+version[1]+" or newer") {
		t.Errorf("README.md does not ask for the Go version of go.mod, %v", version)
	}
	test, lint := strings.Index(ci, "\nmake test\n"), strings.Index(ci, "\nmake lint\n")
	if test < 0 || lint < test {
		t.Error(".ci/run does not run make test, then make lint")
	}
	makefile := read(t, "Makefile")
	if n := strings.Count(makefile, "\n"); n > 70 {
		t.Errorf("Makefile has %d lines, more than 70", n)
	}
	for _, m := range regexp.MustCompile("(?m)(?:`|^)make ([a-z0-9]+)").FindAllStringSubmatch(readme+read(t, "CONTRIBUTING.md"), -1) {
		if !regexp.MustCompile(`(?m)^([a-z0-9]+ )*` + m[1] + `( [a-z0-9]+)*:`).MatchString(makefile) {
			t.Errorf("Makefile has no target %s", m[1])
		}
	}
}

func TestChangelog(t *testing.T) {
	if !strings.Contains(read(t, "CHANGELOG.md"), "\n## [Unreleased]\n") {
		t.Error("CHANGELOG.md has no section [Unreleased]")
	}
}
