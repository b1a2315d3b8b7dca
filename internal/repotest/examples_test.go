// SPDX-License-Identifier: Apache-2.0

package repotest

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/render"
)

var (
	block   = regexp.MustCompile("(?ms)^```(\\w*)[^\n]*\n(.*?)^```[ \t]*$")
	inline  = regexp.MustCompile("`((?:\\./)?holdfast(?:-operator)? [^`\n]+)`")
	program = regexp.MustCompile(`^(?:\S*/)?(holdfast|holdfast-operator)$`)
	comment = regexp.MustCompile(`(^|\s)#.*$`)
	// commented is a command in a comment of a manifest.
	commented = regexp.MustCompile(`(?m)^ *#   (\S.*)$`)
	// separator is what ends a command of a line.
	separator = regexp.MustCompile(`\|\|?|&&|;`)
	flagLine  = regexp.MustCompile(`(?m)^ +(?:-(\w), )?--([\w-]+)(?: (\S+))?  `)
	available = regexp.MustCompile(`(?ms)^Available Commands:\n(.*?)\n\n`)
	word      = regexp.MustCompile(`^[a-z][a-z-]*$`)
)

// documents are what users read.
func documents(t *testing.T) []string {
	t.Helper()
	return slices.DeleteFunc(files(t, "*.md"), func(name string) bool {
		return name != "README.md" && filepath.Dir(name) != "docs"
	})
}

// TestExampleObjects renders each ContainerRuntimeConfig that a document shows.
func TestExampleObjects(t *testing.T) {
	const least = 6
	found := 0
	for _, name := range documents(t) {
		for _, m := range block.FindAllStringSubmatch(read(t, name), -1) {
			if m[1] != "yaml" || !strings.Contains(m[2], "kind: ContainerRuntimeConfig\n") {
				continue
			}
			found++
			objects, err := render.Objects(name, strings.NewReader(m[2])) // parses and validates
			if err != nil {
				t.Errorf("%v\n%s", err, m[2])
				continue
			}
			spec, problems := render.Merge(objects)
			rendered, err := render.Files(spec, render.NoBase, render.Options{})
			if err != nil || len(rendered) == 0 || len(problems) > 0 {
				t.Errorf("%s: %d files, problems %+v, %v\n%s", name, len(rendered), problems, err, m[2])
			}
		}
	}
	if found < least {
		t.Errorf("the documents show %d objects, want at least %d", found, least)
	}
}

// TestExampleCommands looks for the commands and flags of all command lines in documents
// and manifests in the help texts of the programs.
func TestExampleCommands(t *testing.T) {
	dir := t.TempDir()
	command(t, "env", "CGO_ENABLED=0", "go", "build", "-o", dir+"/", "./cmd/holdfast", "./cmd/holdfast-operator")
	h := helper{dir: dir, texts: map[string]string{}}
	found := 0
	lines := map[string][]string{}
	for _, name := range documents(t) {
		lines[name] = commandLines(read(t, name))
	}
	for name, documents := range manifests(t) {
		for _, m := range commented.FindAllStringSubmatch(strings.Join(documents, "\n"), -1) {
			lines[name] = append(lines[name], m[1])
		}
	}
	for name, all := range lines {
		for _, line := range all {
			for _, c := range separator.Split(comment.ReplaceAllString(line, ""), -1) {
				words := strings.Fields(strings.TrimLeft(c, "$# \t"))
				if len(words) == 0 || !program.MatchString(words[0]) {
					continue
				}
				found++
				words[0] = filepath.Base(words[0])
				if wrong := h.check(t, words); wrong != "" {
					t.Errorf("%s: %s: %s", name, line, wrong)
				}
			}
		}
	}
	if found < 50 {
		t.Errorf("the documents have %d commands of ours, far fewer than they should", found)
	}
}

// commandLines are the lines of a document that users may type, and commands within its text.
func commandLines(text string) []string {
	var all []string
	for _, m := range block.FindAllStringSubmatch(text, -1) {
		if slices.Contains([]string{"", "sh", "console"}, m[1]) {
			for line := range strings.Lines(m[2]) {
				line = strings.TrimSpace(line)
				// In a console # is the prompt, and elsewhere a comment.
				if rest, prompted := strings.CutPrefix(line, "# "); prompted && m[1] == "console" {
					line = rest
				}
				all = append(all, line)
			}
		}
	}
	for _, m := range inline.FindAllStringSubmatch(block.ReplaceAllString(text, ""), -1) {
		all = append(all, m[1])
	}
	return all
}

// helper asks the programs for their help texts.
type helper struct {
	dir   string
	texts map[string]string // by command
}

func (h *helper) help(t *testing.T, path []string) string {
	t.Helper()
	key := strings.Join(path, " ")
	if text, ok := h.texts[key]; ok {
		return text
	}
	args := append(slices.Clone(path[1:]), "--help")
	out, err := exec.CommandContext(t.Context(), filepath.Join(h.dir, path[0]), args...).CombinedOutput() //nolint:gosec // what was built
	if err != nil {
		t.Fatalf("%s --help: %v\n%s", key, err, out)
	}
	h.texts[key] = string(out)
	return h.texts[key]
}

// check says what is wrong with a command: the first word is the program.
func (h *helper) check(t *testing.T, words []string) string {
	t.Helper()
	path, descending, isValue := words[:1], true, false
	var flags []string
	for _, w := range words[1:] {
		if isValue {
			isValue = false
			continue
		}
		text := h.help(t, path)
		if name, value, _ := strings.Cut(w, "="); strings.HasPrefix(name, "-") && name != "-" && name != "--" {
			flags = append(flags, name)
			isValue = value == "" && takesValue(text, name)
			continue
		}
		commands := available.FindStringSubmatch(text)
		if !descending || commands == nil {
			descending = false
			continue
		}
		if !regexp.MustCompile(`(?m)^  ` + regexp.QuoteMeta(w) + ` `).MatchString(commands[1] + " ") {
			if !word.MatchString(w) {
				continue // a placeholder, or three dots
			}
			return "there is no command " + w
		}
		path = append(slices.Clone(path), w)
	}
	for _, name := range flags {
		if name != "--help" && name != "-h" && flagOf(h.help(t, path), name) == nil {
			return strings.Join(path, " ") + " has no flag " + name
		}
	}
	return ""
}

// flagOf finds a flag in a help text.
func flagOf(text, name string) []string {
	for _, m := range flagLine.FindAllStringSubmatch(text, -1) {
		if name == "--"+m[2] || name == "-"+m[1] && m[1] != "" {
			return m
		}
	}
	return nil
}

func takesValue(text, name string) bool {
	m := flagOf(text, name)
	return m != nil && m[3] != ""
}

// TestCommandsAreChecked makes mistakes that must be found.
func TestCommandsAreChecked(t *testing.T) {
	const global = "      --config file   a file\n      --json          print JSON\n\n"
	h := helper{texts: map[string]string{
		"p":           "Available Commands:\n  store       Stores\n  version     Version\n\nFlags:\n" + global,
		"p store":     "Available Commands:\n  add         Add\n\nGlobal Flags:\n" + global,
		"p store add": "Flags:\n      --from path           a path\n\nGlobal Flags:\n" + global,
		"p version":   "Flags:\n  -o, --output file   a file\n\nGlobal Flags:\n" + global,
	}}
	for line, want := range map[string]string{
		"p store add /mnt a --from /x":  "",
		"p --config version store add":  "",
		"p --json version -o x":         "",
		"p version --output=x":          "",
		"p store ...":                   "",
		"p shop":                        "there is no command shop",
		"p store sell":                  "there is no command sell",
		"p store add /mnt --form /x":    "p store add has no flag --form",
		"p version -x":                  "p version has no flag -x",
		"p store add /mnt --fro=1":      "p store add has no flag --fro",
		"p store add --from x version":  "",
		"p store add --from --whatever": "",
	} {
		if got := h.check(t, strings.Fields(line)); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}
