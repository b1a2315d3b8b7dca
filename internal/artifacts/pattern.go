// SPDX-License-Identifier: Apache-2.0

package artifacts

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/refpattern"
)

// maxMatches bounds the artifacts that one pattern names.
const maxMatches = 1000

// IsPattern reports whether the name of a lazy artifact is a pattern of names.
func IsPattern(name string) bool { return strings.ContainsAny(name, "*?[") }

// CheckName reports what is wrong with the name of a lazy artifact, or with a pattern.
func CheckName(name string) error {
	if IsPattern(name) {
		_, err := parsePattern(name)
		return err
	}
	_, err := Parse(name)
	return err
}

// pattern is HOST/PATH[:TAG], with * for any characters but a slash.
type pattern struct {
	list refpattern.List
	// repository is the one whose tags are asked for; "" if PATH is a pattern, too.
	repository reference.Named
	host       reference.Named // any repository of the host
}

func parsePattern(text string) (*pattern, error) {
	p := &pattern{list: refpattern.List{text}}
	host, rest, ok := strings.Cut(text, "/")
	if !ok || IsPattern(host) || rest == "" {
		return nil, fmt.Errorf("artifact pattern %q: want HOST/PATH[:TAG], with * for any characters but a slash, and none in HOST", text)
	}
	if err := p.list.Validate(); err != nil {
		return nil, fmt.Errorf("artifact pattern %q: %w", text, err)
	}
	path, _, _ := strings.Cut(rest, ":")
	var err error
	if !IsPattern(path) {
		p.repository, err = reference.ParseNamed(host + "/" + path)
		p.host = p.repository
	} else {
		p.host, err = reference.ParseNamed(host + "/any")
	}
	if err != nil {
		return nil, fmt.Errorf("artifact pattern %q: %w", text, err)
	}
	return p, nil
}

// expand asks registries what the patterns of the configuration name, and reports whether
// one could not be asked. What was named stays then.
func (m *Manager) expand(ctx context.Context) (failed bool) {
	failures := map[string]string{}
	current := map[string]bool{}
	for _, text := range m.config.Names {
		if !IsPattern(text) {
			continue
		}
		current[text] = true
		asking, cancel := context.WithTimeout(ctx, lookTimeout)
		refs, err := m.matches(asking, text)
		cancel()
		if ctx.Err() != nil {
			return true
		}
		if err != nil {
			failures[text] = err.Error()
			m.config.Logger.Warn("looking up a pattern of artifacts", "pattern", text, "err", err)
			continue
		}
		m.matched(text, refs)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lazy {
		if !current[l.pattern] {
			l.pattern = ""
		}
	}
	m.failures = failures
	return len(failures) > 0
}

// matched notes what a pattern names.
func (m *Manager) matched(text string, refs []reference.Named) {
	m.mu.Lock()
	defer m.mu.Unlock()
	named := map[string]bool{}
	for _, ref := range refs {
		named[ref.String()] = true
		if l := m.want(ref, false); l.pattern == "" {
			l.pattern = text
		}
	}
	for name, l := range m.lazy {
		if l.pattern == text && !named[name] {
			l.pattern = "" // its tag is gone
		}
	}
}

func (m *Manager) matches(ctx context.Context, text string) ([]reference.Named, error) {
	p, err := parsePattern(text)
	if err != nil {
		return nil, err
	}
	repositories := []reference.Named{p.repository}
	if p.repository == nil {
		if repositories, err = m.catalog(ctx, p); err != nil {
			return nil, fmt.Errorf("%w; name the repositories themselves if the registry does not list them", err)
		}
	}
	var refs []reference.Named
	for _, repository := range repositories {
		tags, err := fromFirst(m, repository, func(r *registry.Repository) ([]string, error) { return r.Tags(ctx) })
		if err != nil {
			return nil, err
		}
		for _, tag := range tags {
			ref, err := reference.WithTag(repository, tag)
			if err != nil || !p.list.Match(ref) {
				continue
			}
			if refs = append(refs, ref); len(refs) > maxMatches {
				return nil, fmt.Errorf("it names more than %d artifacts", maxMatches)
			}
		}
	}
	return refs, nil
}

// catalog returns the repositories that a pattern may name.
func (m *Manager) catalog(ctx context.Context, p *pattern) ([]reference.Named, error) {
	paths, err := fromFirst(m, p.host, func(r *registry.Repository) ([]string, error) { return r.Catalog(ctx) })
	if err != nil {
		return nil, err
	}
	// Without its tag: that is compared later.
	text := p.list[0]
	if colon := strings.LastIndexByte(text, ':'); colon > strings.LastIndexByte(text, '/') {
		text = text[:colon]
	}
	var all []reference.Named
	for _, path := range paths {
		named, err := reference.ParseNamed(reference.Domain(p.host) + "/" + path)
		if err == nil && (refpattern.List{text}).Match(named) {
			all = append(all, named)
		}
	}
	return all, nil
}

// fromFirst asks the registries of a repository, in their order, until one answers.
func fromFirst(m *Manager, repository reference.Named, get func(*registry.Repository) ([]string, error)) ([]string, error) {
	origins, err := m.config.Sources.Origins(repository, nil, false)
	if err != nil {
		return nil, err
	}
	failed := errors.New("no registry is among the sources")
	for i, o := range origins {
		if o.Repository == nil {
			continue
		}
		all, err := get(o.Repository)
		if err == nil {
			return all, nil
		}
		if failed = err; i > 0 {
			failed = errors.Join(failed, err)
		}
	}
	return nil, failed
}
