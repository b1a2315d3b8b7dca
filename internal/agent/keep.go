// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"slices"
	"strings"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
)

// keepUsed keeps stores in the files that are not wanted any more, as long as images
// refer to them, and finds out which of the dead ones are in use.
func (a *Agent) keepUsed(ctx context.Context, st *state, s *sifted, p *plan) error {
	storage, err := a.host.content(render.StorageConf)
	if err != nil {
		return err
	}
	files := map[string]*content{render.StorageConf: storage}
	for _, store := range s.dead {
		// What a dead store holds cannot be read: images may be in use.
		if store.Kind != ArtifactStore {
			s.deadInUse = append(s.deadInUse, store.String())
		}
	}
	for _, store := range st.unwanted(s, p) {
		if a.o.Offline && !a.host.exists(store.Path) {
			continue // it is not part of the image
		}
		loaded := slices.Index(st.Loaded.Stores, store)
		if err := a.checker.check(ctx, store, true); err != nil { // no runtime starts with it
			if store.Kind != ArtifactStore && (loaded >= 0 || !a.o.Abandon) {
				s.miss(store, st, loaded, err)
			}
			continue
		}
		users, err := a.host.users(store, files)
		if err != nil {
			users = []string{err.Error()}
		}
		if len(users) == 0 {
			continue
		}
		before := st.before(store, loaded)
		keep(&s.files, store, before)
		keep(&s.compare, store, before)
		s.status = append(s.status, StoreStatus{store, StoreKept, "in use by " + strings.Join(users, ", ")})
	}
	return nil
}

// unwanted are the stores that a runtime may have been told of, and that the configuration
// does not have.
func (s *state) unwanted(now *sifted, p *plan) []Store {
	var all []Store
	for _, store := range slices.Concat(s.listed(), s.Loaded.Stores, s.Missed) {
		known := p.Daemon && store == p.store || slices.Contains(all, store) ||
			slices.ContainsFunc(now.status, func(o StoreStatus) bool { return o.Store == store })
		if !known {
			all = append(all, store)
		}
	}
	return all
}

// before are the stores that come before one in the lists: in those that CRI-O has
// loaded if that is one of them.
func (s *state) before(store Store, loaded int) []Store {
	if loaded >= 0 {
		return s.Loaded.Stores[:loaded]
	}
	return s.Stores[:max(0, slices.Index(s.Stores, store))]
}

// miss remembers a store that is not wanted and does not answer: what it holds cannot be
// read, and images in use may come from it.
func (s *sifted) miss(store Store, st *state, loaded int, reason error) {
	s.missed = append(s.missed, store)
	if loaded >= 0 {
		keep(&s.compare, store, st.before(store, loaded))
		s.deadInUse = append(s.deadInUse, store.String())
	}
	s.status = append(s.status, StoreStatus{store, StoreWithheld, "it is not wanted any more, but images in use may come from it: " + reason.Error()})
}

// keep puts a store where it was in the lists: behind the nearest of those that were before
// it, so that CRI-O need not be restarted for their order.
func keep(c *apiv1.ContainerRuntimeConfiguration, store Store, before []Store) {
	switch path := apiv1.StorePath(store.Path); store.Kind {
	case LayerStore:
		c.AdditionalLayerStores = weave(c.AdditionalLayerStores, apiv1.AdditionalLayerStore{Path: path}, layerStore, before)
	case ImageStore:
		c.AdditionalImageStores = weave(c.AdditionalImageStores, apiv1.AdditionalImageStore{Path: path}, imageStore, before)
	case ArtifactStore:
		c.AdditionalArtifactStores = weave(c.AdditionalArtifactStores, apiv1.AdditionalArtifactStore{Path: path}, artifactStore, before)
	}
}

func weave[T any](list []T, one T, storeOf func(T) Store, before []Store) []T {
	at := 0
	for _, b := range before {
		at = max(at, 1+slices.IndexFunc(list, func(t T) bool { return storeOf(t) == b }))
	}
	return slices.Insert(slices.Clone(list), at, one)
}
