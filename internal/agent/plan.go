// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// The states of a store.
const (
	StoreListed   = "Listed"   // runtimes are told of it
	StoreWithheld = "Withheld" // they are not
	StoreKept     = "Kept"     // not wanted any more, but images in use come from it
	StoreServed   = "Served"   // the daemon offers what is in it
	StoreFailing  = "Failing"  // it does not answer, but others tell runtimes of it all the same
)

// StoreStatus says what has become of a store.
type StoreStatus struct {
	Store
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

// planFor decides what is to be on the node: the configuration without what would do
// it harm.
func (a *Agent) planFor(ctx context.Context, st *state, want apiv1.ContainerRuntimeConfigSpec, r *Report) (*plan, error) {
	bases, err := a.bases(st)
	if err != nil {
		return nil, err
	}
	paths, err := render.DaemonPaths(bases.of)
	if err != nil {
		return nil, err
	}
	want.ContainerRuntimeConfig = cmp.Or(want.ContainerRuntimeConfig, &apiv1.ContainerRuntimeConfiguration{})
	p := &plan{applied: applied{Spec: &want}, store: Store{ImageStore, paths.Store}}
	if want.Holdfast != nil {
		p.disruption = want.Holdfast.Disruption
	}
	if render.UsesDaemon(want, paths) {
		p.Daemon = a.provideDaemon(ctx, st, paths, r, func() error { return a.renderDaemonConfig(ctx, st, bases, want) })
	}
	s := a.sift(ctx, st, want.ContainerRuntimeConfig, paths, p, r)
	if err := a.keepUsed(ctx, st, s, p); err != nil {
		return nil, err
	}
	r.Stores, p.Stores, p.dead, p.Missed = s.status, s.inFiles(paths, p), s.deadInUse, s.missed
	rendered := func(config apiv1.ContainerRuntimeConfiguration) (map[string]*content, map[string]managed, error) {
		spec := apiv1.ContainerRuntimeConfigSpec{ContainerRuntimeConfig: &config, Holdfast: want.Holdfast}
		files, err := render.Files(spec, bases.of, render.Options{Prefix: st.Prefix, WithoutDaemon: !p.Daemon})
		if err != nil {
			return nil, nil, err
		}
		all, ours := bases.complete(files)
		return all, ours, nil
	}
	compare, _, err := rendered(s.compare)
	if err == nil {
		p.compare, _, err = a.host.effective(compare)
	}
	if err == nil {
		p.next, p.Files, err = rendered(s.files)
	}
	if err == nil {
		p.config, p.registries, err = a.host.effective(p.next)
	}
	if err == nil {
		p.foreign, err = a.host.foreign(p.next)
	}
	if err == nil {
		p.unreadable, err = a.host.unreadable(p.next)
	}
	return p, err
}

// sifted is what has become of the stores of a configuration.
type sifted struct {
	status []StoreStatus
	// files is the configuration without what is withheld, compare the same with what is
	// withheld now and what the running CRI-O has loaded: for that it is not restarted.
	files, compare apiv1.ContainerRuntimeConfiguration
	dead           []Store // withheld, and loaded
	deadInUse      []string
	missed         []Store // see applied.Missed
}

// inFiles are the stores of the files, in the order in which they are there.
func (s *sifted) inFiles(paths render.Daemon, p *plan) []Store {
	var all []Store
	for _, l := range s.files.AdditionalLayerStores {
		if !paths.Own(l.Path) {
			all = append(all, layerStore(l))
		}
	}
	for _, i := range s.files.AdditionalImageStores {
		if store := imageStore(i); !p.Daemon || store != p.store {
			all = append(all, store)
		}
	}
	if p.Daemon {
		return append(all, p.store)
	}
	for _, t := range s.files.AdditionalArtifactStores {
		if t.Filter == nil {
			all = append(all, artifactStore(t))
		}
	}
	return all
}

// verdict is what is to become of a store.
type verdict struct{ state, reason string }

// sift takes the stores out of the configuration that a runtime would not start with.
func (a *Agent) sift(ctx context.Context, st *state, config *apiv1.ContainerRuntimeConfiguration, paths render.Daemon, p *plan, r *Report) *sifted {
	s := &sifted{status: []StoreStatus{}, files: *config, compare: *config}
	failures := a.checkAll(ctx, st, config, r.Runtime.Up)
	judge := func(store Store) verdict {
		if reason := failures[store]; reason != "" {
			return verdict{StoreWithheld, reason}
		}
		return verdict{StoreListed, ""}
	}
	withoutDaemon := cmp.Or(r.Daemon.Reason, "the daemon does not run")
	s.files.AdditionalLayerStores, s.compare.AdditionalLayerStores = divide(s, st, config.AdditionalLayerStores, layerStore,
		func(l apiv1.AdditionalLayerStore, store Store) verdict {
			switch {
			case !paths.Own(l.Path):
				return judge(store)
			case p.Daemon:
				return verdict{StoreServed, byImageStore(paths)}
			}
			return verdict{StoreWithheld, withoutDaemon}
		})
	s.files.AdditionalImageStores, s.compare.AdditionalImageStores = divide(s, st, config.AdditionalImageStores, imageStore,
		func(_ apiv1.AdditionalImageStore, store Store) verdict { return judge(store) })
	tooOld := tooOldForArtifacts(cmp.Or(r.Runtime.Version, st.Loaded.Version))
	s.files.AdditionalArtifactStores, s.compare.AdditionalArtifactStores = divide(s, st, config.AdditionalArtifactStores, artifactStore,
		func(t apiv1.AdditionalArtifactStore, store Store) verdict {
			switch {
			case tooOld != "":
				return verdict{StoreWithheld, tooOld}
			case p.Daemon: // it copes with whatever is there, and says so itself
				return verdict{StoreServed, byArtifactStore}
			case t.Filter != nil:
				return verdict{StoreWithheld, "it has a filter, for which the daemon has to run: " + withoutDaemon}
			}
			return judge(store)
		})
	return s
}

// How the daemon offers what is in a store.
const byArtifactStore = "see `holdfast artifact status`"

func byImageStore(paths render.Daemon) string { return "by the image store " + paths.Store }

func layerStore(s apiv1.AdditionalLayerStore) Store {
	return Store{LayerStore, filepath.Clean(string(s.Path))}
}
func imageStore(s apiv1.AdditionalImageStore) Store {
	return Store{ImageStore, filepath.Clean(string(s.Path))}
}
func artifactStore(s apiv1.AdditionalArtifactStore) Store {
	return Store{ArtifactStore, filepath.Clean(string(s.Path))}
}

// divide returns the stores that go into the files, and those with which CRI-O has
// what it has loaded.
func divide[T any](s *sifted, st *state, all []T, storeOf func(T) Store, judge func(T, Store) verdict) (files, compare []T) {
	for _, t := range all {
		store := storeOf(t)
		v := judge(t, store)
		s.status = append(s.status, StoreStatus{store, v.state, v.reason})
		loaded := slices.Contains(st.Loaded.Stores, store)
		if v.state != StoreWithheld {
			files, compare = append(files, t), append(compare, t)
		} else if loaded {
			compare = append(compare, t)
			s.dead = append(s.dead, store)
		}
	}
	return files, compare
}

// checkAll looks at all stores at once, and says why those that must not be listed
// must not. up is whether CRI-O runs.
func (a *Agent) checkAll(ctx context.Context, st *state, config *apiv1.ContainerRuntimeConfiguration, up bool) map[Store]string {
	var all []Store
	for _, l := range config.AdditionalLayerStores {
		all = append(all, layerStore(l))
	}
	for _, i := range config.AdditionalImageStores {
		all = append(all, imageStore(i))
	}
	for _, t := range config.AdditionalArtifactStores {
		all = append(all, artifactStore(t))
	}
	listed := st.listed()
	reasons := make([]string, len(all))
	var group sync.WaitGroup
	for i, store := range all {
		group.Go(func() {
			if a.o.Offline {
				reasons[i] = "it is looked at on the node, when it boots"
			} else if err := a.checker.check(ctx, store, slices.Contains(listed, store)); err != nil {
				reasons[i] = err.Error()
			}
		})
	}
	group.Wait()
	failures := map[Store]string{}
	for i, store := range all {
		if reasons[i] == "" {
			delete(a.failures, store)
			continue
		}
		a.failures[store]++
		// It may be busy. A CRI-O that is to start does not give it a second chance.
		if up && slices.Contains(listed, store) && a.failures[store] < a.o.Failures && !a.o.Offline {
			continue
		}
		failures[store] = reasons[i]
	}
	return failures
}

// tooOldForArtifacts says so if a version of CRI-O does not know additional artifact
// stores, which came with 1.36. One that is not known passes: an older one ignores them.
func tooOldForArtifacts(version string) string {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return ""
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	if err1 != nil || err2 != nil || major > 1 || major == 1 && minor >= 36 {
		return ""
	}
	return fmt.Sprintf("CRI-O %s does not know artifact stores: 1.36 and newer do", version)
}
