// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"path/filepath"
	"slices"
	"strings"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/render"
	"github.com/holdfast/holdfast/internal/shards"
)

// observe is what there is to do where others write the files of the runtimes, and restart them:
// the daemon runs if it is wanted, with the configuration that is there, and the stores are looked at.
func (a *Agent) observe(ctx context.Context, st *state, want apiv1.ContainerRuntimeConfigSpec, r *Report) (outcome, digest string, err error) {
	want.ContainerRuntimeConfig = cmp.Or(want.ContainerRuntimeConfig, &apiv1.ContainerRuntimeConfiguration{})
	paths, err := render.DaemonPaths(a.host.read)
	if err != nil {
		return Failed, "", err
	}
	listed, err := a.host.listed()
	if err != nil {
		return Failed, "", err
	}
	st.Spec = &want
	if r.Runtime.Up {
		st.Loaded = loaded{Version: r.Runtime.Version}
	}
	if render.UsesDaemon(want, paths) {
		st.Daemon = true
		a.provideDaemon(ctx, st, paths, r, func() error { return a.followDaemonConfig(ctx, st) })
	}
	r.Stores = a.observeStores(ctx, st, want.ContainerRuntimeConfig, paths, listed, r)
	st.Stores = slices.DeleteFunc(slices.Clone(listed), func(s Store) bool {
		return !slices.ContainsFunc(r.Stores, func(o StoreStatus) bool { return o.Store == s })
	})
	if !r.Daemon.Wanted && st.Daemon {
		if err := a.retireForeign(ctx, st, paths, listed, r); err != nil {
			return Failed, "", err
		}
	}
	files := map[string]*content{}
	for _, path := range render.Paths() {
		if files[path], err = a.host.content(path); err != nil {
			return Failed, "", err
		}
	}
	return Unchanged, digestOf(files), nil
}

// followDaemonConfig has the daemon read its configuration again when others have changed it,
// unless it refuses it.
func (a *Agent) followDaemonConfig(ctx context.Context, st *state) error {
	c, err := a.host.content(render.DaemonConf)
	now := digestOf(map[string]*content{render.DaemonConf: c})
	if err != nil || now == st.DaemonRead {
		return err
	}
	if c != nil && st.Prefix != "" && !a.o.Offline {
		if err := a.checkConfig(ctx, st.Prefix, *c); err != nil {
			return err
		}
	}
	st.Reload, st.DaemonRead = true, now
	return st.save(a.stateDir)
}

// observeStores looks at the stores of a configuration, and says what has become of them in the
// files of others.
func (a *Agent) observeStores(ctx context.Context, st *state, config *apiv1.ContainerRuntimeConfiguration, paths render.Daemon, listed []Store, r *Report) []StoreStatus {
	all := []StoreStatus{}
	failures := a.checkAll(ctx, st, config, r.Runtime.Up)
	withoutDaemon := ""
	if r.Daemon.Wanted && !r.Daemon.Up {
		withoutDaemon = cmp.Or(r.Daemon.Reason, "the daemon does not run")
	}
	// by is the store that runtimes read instead of it, if the daemon offers what is in it.
	judge := func(store, by Store, trouble, how string) {
		status := StoreStatus{Store: store, State: StoreListed}
		switch {
		case !slices.Contains(listed, by):
			status.State, status.Reason = StoreWithheld, "the Machine Config Operator has not written it into the runtimes' files"
		case trouble != "":
			status.State, status.Reason = StoreFailing, trouble+"; the Machine Config Operator lists it all the same"
		case store != by:
			status.State, status.Reason = StoreServed, how
		}
		all = append(all, status)
	}
	for _, l := range config.AdditionalLayerStores {
		if store := layerStore(l); paths.Own(l.Path) {
			judge(store, Store{ImageStore, paths.Store}, withoutDaemon, byImageStore(paths))
		} else {
			judge(store, store, failures[store], "")
		}
	}
	for _, i := range config.AdditionalImageStores {
		judge(imageStore(i), imageStore(i), failures[imageStore(i)], "")
	}
	tooOld := tooOldForArtifacts(cmp.Or(r.Runtime.Version, st.Loaded.Version))
	for _, t := range config.AdditionalArtifactStores {
		switch store := artifactStore(t); {
		case tooOld != "":
			all = append(all, StoreStatus{store, StoreWithheld, tooOld})
		case r.Daemon.Wanted:
			composed := shards.Directories(filepath.Join(paths.RunRoot, "artifact-store"))
			judge(store, Store{ArtifactStore, composed[0]}, withoutDaemon, byArtifactStore)
		default:
			judge(store, store, failures[store], "")
		}
	}
	return all
}

// retireForeign stops a daemon that is not wanted any more, when the runtimes' files do not name
// its store and no image in use comes from it.
func (a *Agent) retireForeign(ctx context.Context, st *state, paths render.Daemon, listed []Store, r *Report) error {
	store := Store{ImageStore, paths.Store}
	kept := func(reason string) {
		r.Stores = append(r.Stores, StoreStatus{store, StoreKept, reason})
	}
	if slices.Contains(listed, store) {
		kept("the Machine Config Operator still lists it")
		return nil
	}
	storage, err := a.host.content(render.StorageConf)
	if err != nil {
		return err
	}
	users, err := a.host.users(store, map[string]*content{render.StorageConf: storage})
	if err != nil {
		users = []string{err.Error()}
	}
	if len(users) > 0 {
		kept("in use by " + strings.Join(users, ", "))
		return nil
	}
	if err := a.runtime.control(ctx, "disable", "--now", DaemonUnit); err != nil {
		r.Daemon.Reason = err.Error()
	} else {
		st.Daemon, st.DaemonRead = false, ""
	}
	return nil
}

// listed are the stores that the runtimes' files name.
func (h host) listed() ([]Store, error) {
	storage, err := h.content(render.StorageConf)
	if storage == nil && err == nil {
		storage, err = h.content(render.VendorStorage)
	}
	if err != nil {
		return nil, err
	}
	crio := map[string]any{}
	if err := h.overlayAll(crio, crioConf, render.CRIODropIns, "", nil, h.content); err != nil {
		return nil, err
	}
	var all []Store
	add := func(kind Kind, tree map[string]any, keys ...string) {
		for _, key := range keys[:len(keys)-1] {
			tree, _ = tree[key].(map[string]any)
		}
		paths, _ := tree[keys[len(keys)-1]].([]any)
		for _, p := range paths {
			if path, ok := p.(string); ok {
				all = append(all, Store{kind, filepath.Clean(strings.TrimSuffix(path, ":ref"))})
			}
		}
	}
	add(LayerStore, settings(storage), "storage", "options", "additionallayerstores")
	add(ImageStore, settings(storage), "storage", "options", "additionalimagestores")
	add(ArtifactStore, crio, "crio", "runtime", "additional_artifact_stores")
	return all, nil
}
