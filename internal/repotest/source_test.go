// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const maxLines = 700

func TestPackageDocs(t *testing.T) {
	for _, p := range packages(t) {
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "Command " + filepath.Base(p.Dir) + " "
		}
		if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: its package comment does not begin with %q", p.path(), want)
		}
	}
}

func TestLicence(t *testing.T) {
	for _, name := range files(t, "*.go", "*.sh", "*.yml", "*.service", "*.conf", "Makefile", "run") {
		head, _, _ := strings.Cut(read(t, name), "\n\n")
		if lines := strings.Split(head, "\n"); !slices.ContainsFunc(lines[:min(2, len(lines))], func(l string) bool {
			return strings.TrimLeft(l, "/# ") == "SPDX-License-Identifier: Apache-2.0"
		}) {
			t.Errorf("%s: no SPDX line at its top", name)
		}
	}
}

func TestFileLength(t *testing.T) {
	for _, name := range files(t, "*.go") {
		if n := strings.Count(read(t, name), "\n"); n > maxLines {
			t.Errorf("%s has %d lines, more than %d", name, n, maxLines)
		}
	}
}

// TestNoSkips: a tool that is missing is a failure.
func TestNoSkips(t *testing.T) {
	skip := regexp.MustCompile(`\b(t|b|f|tb)\.Skip(f|Now)?\(`)
	for _, name := range files(t, "*_test.go") {
		if found := skip.FindString(read(t, name)); found != "" {
			t.Errorf("%s: %s", name, found)
		}
	}
}

// TestNoForeignPlaces keeps out what holds on one machine only.
func TestNoForeignPlaces(t *testing.T) {
	// In two parts, or this file would have them.
	bad := [][2]string{
		{"proxy.golang", ".org"},
		{"sum.golang", ".org"},
		{"deb.debian", ".org"},
		{"archive.ubuntu", ".com"},
		{"registry.npmjs", ".org"},
		{"pypi", ".org"},
		{"crates", ".io"},
		{"/var/tmp", "/hf"},
		{"/work", "/main"},
		{"/work", "/shared"},
	}
	for _, name := range files(t, "*") {
		if name == "go.sum" || name == "tools/go.sum" {
			continue
		}
		text := read(t, name)
		for _, b := range bad {
			if strings.Contains(text, b[0]+b[1]) {
				t.Errorf("%s has %s", name, b[0]+b[1])
			}
		}
	}
}

// parse parses the Go files of a directory for which want is true.
func parse(t *testing.T, dir string, want func(name string) bool) (*token.FileSet, []*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []*ast.File
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || !want(e.Name()) {
			continue
		}
		f, err := parser.ParseFile(fset, filepath.Join(dir, e.Name()), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	return fset, all
}

func isTest(name string) bool  { return strings.HasSuffix(name, "_test.go") }
func notTest(name string) bool { return !isTest(name) }

func TestExportedSymbolsAreDocumented(t *testing.T) {
	// What these do is known without a comment.
	obvious := map[string]bool{"Error": true, "Unwrap": true, "String": true}
	for _, p := range packages(t) {
		fset, parsed := parse(t, p.Dir, notTest)
		d, err := doc.NewFromFiles(fset, parsed, p.ImportPath)
		if err != nil {
			t.Fatal(err)
		}
		check := func(comment string, names ...string) {
			if comment == "" {
				t.Errorf("%s: %s is not documented", p.path(), strings.Join(names, ", "))
			}
		}
		values := func(all []*doc.Value) {
			for _, v := range all {
				check(v.Doc+specDocs(v.Decl), v.Names...)
			}
		}
		funcs := func(all []*doc.Func) {
			for _, f := range all {
				if f.Recv == "" || !obvious[f.Name] {
					check(f.Doc, strings.TrimPrefix(f.Recv+"."+f.Name, "."))
				}
			}
		}
		values(d.Consts)
		values(d.Vars)
		funcs(d.Funcs)
		for _, typ := range d.Types {
			check(typ.Doc, typ.Name)
			values(typ.Consts)
			values(typ.Vars)
			funcs(typ.Funcs)
			funcs(typ.Methods)
		}
	}
}

// specDocs are the comments in a group of constants or variables, if each
// exported name has one.
func specDocs(decl *ast.GenDecl) string {
	all := ""
	for _, s := range decl.Specs {
		v, ok := s.(*ast.ValueSpec)
		if !ok || !slices.ContainsFunc(v.Names, (*ast.Ident).IsExported) {
			continue
		}
		text := v.Doc.Text() + v.Comment.Text()
		if text == "" {
			return ""
		}
		all += text
	}
	return all
}

// TestFuzzTargetsHaveSeeds: each target adds a seed outright, or has files of
// them; a loop over a list that may be empty does not count.
func TestFuzzTargetsHaveSeeds(t *testing.T) {
	dirs := map[string]bool{}
	for _, name := range files(t, "*_test.go") {
		dirs[filepath.Dir(name)] = true
	}
	targets := 0
	for dir := range dirs {
		_, parsed := parse(t, filepath.Join(root, dir), isTest)
		for _, f := range parsed {
			for _, decl := range f.Decls {
				fn, ok := decl.(*ast.FuncDecl)
				if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Fuzz") {
					continue
				}
				targets++
				corpus, _ := os.ReadDir(filepath.Join(root, dir, "testdata", "fuzz", fn.Name.Name)) // none is none
				if len(corpus) == 0 && !addsSeed(fn.Body.List) {
					t.Errorf("%s: %s has no seed that is always there", dir, fn.Name.Name)
				}
			}
		}
	}
	if targets == 0 {
		t.Error("there are no fuzz targets")
	}
}

// addsSeed reports whether statements call Add, also in a loop over a literal
// with elements.
func addsSeed(list []ast.Stmt) bool {
	for _, s := range list {
		switch s := s.(type) {
		case *ast.ExprStmt:
			if call, ok := s.X.(*ast.CallExpr); ok {
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Add" {
					return true
				}
			}
		case *ast.ForStmt:
			if addsSeed(s.Body.List) {
				return true
			}
		case *ast.RangeStmt:
			if lit, ok := s.X.(*ast.CompositeLit); ok && len(lit.Elts) > 0 && addsSeed(s.Body.List) {
				return true
			}
		}
	}
	return false
}
