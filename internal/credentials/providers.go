// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/shared"
)

const (
	// holdOff is how long a plugin is not asked the same again, whatever it
	// answered: each read of a container may end up here.
	holdOff = 10 * time.Second

	maxAnswers = 1024 // that are remembered
)

// providers runs kubelet's credential provider plugins and remembers, in memory,
// what they answer. The zero value with a configuration is ready.
type providers struct {
	config, dir string // paths

	running shared.Calls[answer]

	mu      sync.Mutex // protects the fields below
	answers map[answerKey]answer
}

type answerKey struct{ provider, scope, about string }

// answer is what a plugin said.
type answer struct {
	auths   auths
	err     error
	at      time.Time
	expires time.Time
}

// find asks the providers for an image ("host/path"), in their order.
func (p *providers) find(ctx context.Context, image string, refused []registry.Credentials) (registry.Credentials, error) {
	list, err := readConfig(p.config)
	if err != nil {
		return registry.Credentials{}, err
	}
	var failed error
	for _, provider := range list {
		if !provider.matches(image) || provider.TokenAttributes.RequireServiceAccount {
			continue
		}
		a, err := p.ask(ctx, provider, image, refused)
		if c := a.auths.pick(image, refused); err == nil && c != (registry.Credentials{}) {
			return c, nil
		}
		if err != nil {
			failed = both(failed, fmt.Errorf("running credential provider %s: %w", provider.Name, err))
		}
	}
	return registry.Credentials{}, failed
}

// ask returns what a provider said lately, or asks it if that is over or was of
// no use to the registry. Callers share a run.
func (p *providers) ask(ctx context.Context, provider provider, image string, refused []registry.Credentials) (answer, error) {
	if a, ok := p.recall(provider.Name, image); ok {
		if time.Since(a.at) < holdOff || a.auths.pick(image, refused) != (registry.Credentials{}) {
			return a, a.err
		}
	}
	return p.running.Do(ctx, provider.Name+" "+image, func(ctx context.Context) (answer, error) {
		r, err := provider.run(ctx, p.dir, image)
		if ctx.Err() != nil {
			return answer{}, context.Cause(ctx) // nobody waits any more
		}
		life := provider.DefaultCacheDuration
		if r.life != nil {
			life = *r.life
		}
		now := time.Now()
		a := answer{auths: r.auths, err: blob.Temporary(err), at: now, expires: now.Add(max(life, holdOff))}
		if err != nil {
			r.scope, a.expires = scopeImage, now.Add(holdOff)
		}
		p.remember(answerKey{provider.Name, r.scope, about(r.scope, image)}, a)
		return a, a.err
	})
}

// about is the part of an image's name that an answer of a scope is about.
func about(scope, image string) string {
	host, _, _ := strings.Cut(image, "/")
	switch scope {
	case scopeImage:
		return image
	case scopeRegistry:
		return host
	default:
		return ""
	}
}

func (p *providers) recall(provider, image string) (answer, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, scope := range []string{scopeImage, scopeRegistry, scopeGlobal} {
		if a, ok := p.answers[answerKey{provider, scope, about(scope, image)}]; ok && time.Now().Before(a.expires) {
			return a, true
		}
	}
	return answer{}, false
}

func (p *providers) remember(key answerKey, a answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.answers, func(_ answerKey, old answer) bool { return !a.at.Before(old.expires) })
	if p.answers == nil || len(p.answers) >= maxAnswers {
		p.answers = map[answerKey]answer{} // plugins can be asked again
	}
	p.answers[key] = a
}

// places names the providers for an image.
func (p *providers) places(image string) []string {
	list, err := readConfig(p.config)
	if err != nil {
		return []string{p.config + " (cannot be read)"}
	}
	var places []string
	for _, provider := range list {
		switch {
		case !provider.matches(image):
		case provider.TokenAttributes.RequireServiceAccount:
			places = append(places, "credential provider "+provider.Name+" (not asked: it wants the service account of a pod)")
		default:
			places = append(places, "credential provider "+provider.Name)
		}
	}
	if len(places) == 0 {
		return []string{"no credential provider of " + p.config + " is for this image"}
	}
	return places
}
