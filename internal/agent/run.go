// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/render"
)

// How often files are looked at for a change, and stores for theirs.
const (
	watchInterval = 250 * time.Millisecond
	syncInterval  = 10 * time.Second
	// bootPatience is how long CRI-O may have to wait at boot for stores that it had before:
	// without them it is restarted when they come.
	bootPatience = 10 * time.Second
)

// Source says what a node is to have.
type Source struct {
	// Files are files with ContainerRuntimeConfigs, and directories of them.
	Files []string
}

// names are the files that there are: of directories those with a name that
// is one of a document, in order.
func (s Source) names() ([]string, error) {
	var all []string
	for _, name := range s.Files {
		info, err := os.Stat(name)
		if err != nil {
			return nil, fmt.Errorf("reading what is desired: %w", err)
		}
		if !info.IsDir() {
			all = append(all, name)
			continue
		}
		entries, err := os.ReadDir(name) // sorted
		if err != nil {
			return nil, fmt.Errorf("reading what is desired: %w", err)
		}
		for _, e := range entries {
			if isObject(e.Name()) {
				all = append(all, filepath.Join(name, e.Name()))
			}
		}
	}
	return all, nil
}

// isObject reports whether a file of a directory is one with objects, by its name.
func isObject(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) && !strings.HasPrefix(name, ".")
}

// Load reads and merges what is desired. Selectors do not count: the files are the node's. Beside
// an error there is the digest, and whether what could be read is for others' files; not even that
// if a file could not be opened.
func (s Source) Load() (Desired, error) {
	names, err := s.names()
	if err != nil {
		return Desired{}, err
	}
	var objects []apiv1.ContainerRuntimeConfig
	var wrong error
	all := sha256.New()
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return Desired{}, fmt.Errorf("reading what is desired: %w", err)
		}
		one := sha256.New()
		more, err := render.Objects(name, io.TeeReader(f, one))
		if err == nil && len(more) == 0 {
			err = fmt.Errorf("%s: there is no object in it: remove the file if there is to be none", name)
		}
		wrong = errors.Join(wrong, err, f.Close())
		objects = append(objects, more...)
		fmt.Fprintf(all, "%s %x\n", filepath.Base(name), one.Sum(nil))
	}
	d := Desired{Digest: hex.EncodeToString(all.Sum(nil))}
	d.Foreign = slices.ContainsFunc(objects, func(o apiv1.ContainerRuntimeConfig) bool {
		return o.Annotations[apiv1.FilesAnnotation] == apiv1.FilesByMachineConfigOperator
	})
	if wrong == nil {
		d.Spec, d.Problems = render.Merge(objects)
	}
	return d, wrong
}

// Stamp differs from an earlier one if what Load returns may. It takes a stat of each file.
func (s Source) Stamp() string {
	names, err := s.names()
	var b strings.Builder
	fmt.Fprintln(&b, err)
	for _, name := range names {
		info, err := os.Stat(name)
		if err == nil {
			fmt.Fprintln(&b, name, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// Run keeps the node at what the source says until the context ends. ready is called, once, when
// CRI-O may be started.
func (a *Agent) Run(ctx context.Context, source Source, ready func()) {
	atBoot := a.runtime.unitState(ctx, a.runtime.unit) == inactive
	if atBoot {
		a.awaitStores(ctx)
	} else {
		// systemd starts CRI-O after us: a restart would wait until we are ready.
		ready()
	}
	var last Report
	for first := true; ; first = false {
		stamp := source.Stamp()
		r := a.syncOnce(ctx, source)
		if ctx.Err() != nil {
			return
		}
		if first || r.saysMoreThan(&last) {
			a.log.Info("the node was looked at", "outcome", r.Outcome, "stores", len(r.Stores), "err", r.Error)
		}
		last = *r
		if first && atBoot {
			ready()
		}
		a.pause(ctx, source, stamp)
	}
}

func (a *Agent) syncOnce(ctx context.Context, source Source) *Report {
	want, err := source.Load()
	if err != nil {
		// What is there stays, as far as CRI-O starts with it.
		r, kept := a.syncAgain(ctx, want.Foreign)
		r.Desired = want.Digest
		r.Outcome, r.Error = Failed, errors.Join(err, kept).Error()
		return a.publish(r)
	}
	r, _ := a.SyncAndReport(ctx, want) // the report has the error
	return r
}

// syncAgain keeps the node at what it was last brought to. Whether files are ours is not for one to
// decide that cannot be read.
func (a *Agent) syncAgain(ctx context.Context, foreign bool) (*Report, error) {
	st, err := loadState(a.stateDir)
	if err != nil || st.Spec == nil {
		return a.lastReport(), err
	}
	return a.Sync(ctx, Desired{Spec: *st.Spec, Foreign: foreign || st.Foreign})
}

// pause returns when it is time to look again.
func (a *Agent) pause(ctx context.Context, source Source, stamp string) {
	watch := time.NewTicker(watchInterval)
	defer watch.Stop()
	last := stamp
	for end := time.After(syncInterval); ; {
		select {
		case <-ctx.Done():
			return
		case <-end:
			return
		case <-watch.C:
			// A file that is being written is waited for.
			now := source.Stamp()
			if now != stamp && now == last {
				return
			}
			last = now
		}
	}
}

// awaitStores waits a while, before CRI-O has started, for the stores that it is to
// start with: network file systems come late.
func (a *Agent) awaitStores(ctx context.Context) {
	st, err := loadState(a.stateDir)
	if err != nil {
		return // Sync says so
	}
	if _, err := a.runtime.ask(ctx); err == nil {
		return
	}
	for end := time.After(bootPatience); ; {
		if !slices.ContainsFunc(st.listed(), func(s Store) bool { return a.checker.check(ctx, s, true) != nil }) {
			return
		}
		select {
		case <-time.After(watchInterval):
		case <-end:
			return
		case <-ctx.Done():
			return
		}
	}
}

// ReportName is the file in the state directory that has the last report.
const ReportName = "report.json"

// publish keeps the report for those who ask, if it says something new.
func (a *Agent) publish(r *Report) *Report {
	if r.saysMoreThan(a.lastReport()) {
		if err := atomicfile.WriteJSON(filepath.Join(a.stateDir, ReportName), r, 0o600); err != nil {
			a.log.Warn("the report was not written", "err", err)
		}
	}
	return r
}

// saysMoreThan reports whether there is something in a report that is not in the one
// before it; that what was applied has not changed since is not.
func (r *Report) saysMoreThan(before *Report) bool {
	now := *r
	if now.Outcome == Unchanged && slices.Contains([]string{Applied, Written}, before.Outcome) {
		now.Outcome, now.Restarts = before.Outcome, before.Restarts
	}
	return !reflect.DeepEqual(&now, before)
}

// LastReport returns what the agent found and did last.
func LastReport(o Options) (*Report, error) {
	a, err := New(o)
	if err != nil {
		return nil, err
	}
	return a.report()
}

func (a *Agent) report() (*Report, error) {
	r := &Report{}
	err := atomicfile.ReadJSON(filepath.Join(a.stateDir, ReportName), maxState, r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNeverRan
	}
	return r, err
}

// ErrNeverRan means that no agent has looked at the node yet.
var ErrNeverRan = errors.New("no agent has run on this node: `holdfast-operator agent --once --file FILE` does")

// lastReport is an empty one if there is none that can be read.
func (a *Agent) lastReport() *Report {
	r, err := a.report()
	if err != nil {
		return &Report{Stores: []StoreStatus{}, Edits: []Edit{}, Problems: []render.Problem{}}
	}
	return r
}

// SyncAndReport is Sync once, for whoever asks later what was done.
func (a *Agent) SyncAndReport(ctx context.Context, want Desired) (*Report, error) {
	r, err := a.Sync(ctx, want)
	if !errors.Is(err, ErrRunning) && ctx.Err() == nil {
		a.publish(r)
	}
	return r, err
}

// Complete reports whether all that was desired is there.
func (r *Report) Complete() bool {
	return len(r.Problems) == 0 && r.Error == "" && (!r.Daemon.Wanted || r.Daemon.Up || r.Daemon.Reason == "") &&
		!slices.ContainsFunc(r.Stores, func(s StoreStatus) bool { return s.State == StoreWithheld || s.State == StoreFailing })
}
