// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// The outcomes of a look at the node.
const (
	Unchanged  = "Unchanged"  // there was nothing to do
	Applied    = "Applied"    // files were written, and CRI-O has read them
	Written    = "Written"    // files were written; CRI-O did not run
	RolledBack = "RolledBack" // CRI-O did not start with them: the old files are back
	Waiting    = "Waiting"    // files are to be written when something else is over
	Rebooting  = "Rebooting"  // files were written, the node is to boot
	Failed     = "Failed"     // see the error
)

// plan is what is to be on the node.
type plan struct {
	applied                        // when it has been proved
	next       map[string]*content // all files that are ours, or were
	config     string              // see host.effective, of these files ...
	compare    string              // ... and with stores that are dead and that CRI-O has loaded
	registries string
	foreign    string // see host.foreign
	unreadable string // a file that CRI-O would not start with
	store      Store  // the daemon's
	disruption apiv1.Disruption
	keeping    bool     // see Agent.keepProved
	dead       []string // stores in use that are dead: a restart would take them away
}

// busyTimeout is how long a CRI-O that runs may take to answer, before it counts as down.
const busyTimeout = 10 * time.Second

// apply brings the node to a plan. Everything that it does is noted before, so that
// one that is killed can be gone on with, or undone.
func (a *Agent) apply(ctx context.Context, st *state, p *plan, r *Report) (string, error) {
	disk := map[string]*content{}
	same := true
	for path, want := range p.next {
		have, err := a.host.content(path)
		if err != nil {
			return Failed, err
		}
		disk[path] = have
		same = same && have.equal(want)
	}
	up, upErr := a.runtime.ask(ctx)
	if upErr != nil && a.runtime.unitState(ctx, a.runtime.unit) == active {
		up, upErr = a.runtime.await(ctx, min(a.o.ReadyTimeout, busyTimeout)) // it may be busy
	}
	if ctx.Err() != nil {
		return Failed, ctx.Err() // what was looked at may only not have been waited for
	}
	if upErr == nil {
		a.noteLoaded(st, up, disk, p.foreign)
	}
	needed := a.needed(st, p, upErr == nil)
	if same && needed == restart && st.Pending == nil && st.Loaded.Foreign != p.foreign {
		// Others have changed files of theirs, or are about to: when CRI-O reads them is
		// for them to say.
		needed = nothing
	}
	if needed == restart && len(p.dead) > 0 && p.keeping {
		needed = nothing // the files are for the next start
	}
	if same && needed == nothing && (st.Pending == nil || st.Pending.Phase == unproved) {
		a.settle(st, p)
		return Unchanged, nil
	}
	if f := st.Failed; f != nil && f.Spec == digestOfSpec(p.Spec) && !a.o.Retry && !a.again(f, upErr == nil) {
		r.Error = fmt.Sprintf("CRI-O did not start with this configuration at %s, and has the one before it; change it, or try again with `holdfast-operator agent --once`: %s", f.Time.Format(time.RFC3339), f.Reason)
		return RolledBack, nil
	}
	if needed == restart && len(p.dead) > 0 && !a.o.Abandon {
		r.Error = fmt.Sprintf("CRI-O is to be restarted when these stores answer, which images in use may come from (--retry does it without): %s", strings.Join(p.dead, ", "))
		return Waiting, nil
	}
	if needed == restart && p.unreadable != "" {
		r.Error = fmt.Sprintf("CRI-O is to be restarted, but would not start: %s cannot be read as TOML: correct or remove it", p.unreadable)
		return Waiting, nil
	}
	a.starting = time.Time{}
	st.begin(&change{
		Phase: writing, Started: a.now(), Boot: bootID(), Previous: disk, Next: p.next, applied: p.applied,
		Loaded: loaded{Process: st.Loaded.Process, Version: st.Loaded.Version, Config: p.config, Registries: p.registries, Foreign: p.foreign, Stores: p.Stores},
	})
	if err := st.save(a.stateDir); err != nil {
		return Failed, err
	}
	if err := a.writeAll(p.next); err != nil {
		return a.goBack(ctx, st, r, err)
	}
	return a.prove(ctx, st, p, needed, r)
}

// again reports whether a configuration that failed is to be tried again: CRI-O is down with the
// old files, too, so that something else may have been the reason.
func (a *Agent) again(f *failure, up bool) bool {
	return f.Down && !up && a.now().Sub(f.Time) > a.o.ReadyTimeout
}

// What makes CRI-O read its files.
type measure int

const (
	nothing measure = iota
	reload
	restart
)

// needed is what has to be done for CRI-O to have read the files of a plan.
func (a *Agent) needed(st *state, p *plan, up bool) measure {
	switch {
	case !up || a.runtime.systemctl == nil:
		return nothing // it reads them when it starts
	case st.Loaded.Config != p.config && st.Loaded.Config != p.compare:
		return restart
	case st.Loaded.Registries != p.registries:
		return reload
	}
	return nothing
}

// noteLoaded keeps track of what the running CRI-O has read: if it is another process
// than the last time, it has read what is on disk.
func (a *Agent) noteLoaded(st *state, up answer, disk map[string]*content, foreign string) {
	if up.process != "" && up.process == st.Loaded.Process {
		return
	}
	config, registries, err := a.host.effective(disk)
	if err != nil || st.Pending != nil && st.Pending.Phase == writing {
		config, registries = "", "" // it may have read half of a change: it is restarted
	}
	st.Loaded = loaded{Process: up.process, Version: up.version, Config: config, Registries: registries, Foreign: foreign, Stores: st.Stores}
}

// settle notes what has changed without a file having to be written.
func (a *Agent) settle(st *state, p *plan) {
	if c := st.Pending; c != nil { // it becomes what is applied
		c.Next, c.applied = p.next, p.applied
		return
	}
	st.applied, st.Failed = p.applied, nil
}

func (a *Agent) writeAll(files map[string]*content) error {
	for _, path := range slices.Sorted(maps.Keys(files)) {
		have, err := a.host.content(path)
		if err == nil && !have.equal(files[path]) {
			err = a.host.write(path, files[path])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// prove has CRI-O read what was written, and undoes it if it does not come up.
func (a *Agent) prove(ctx context.Context, st *state, p *plan, needed measure, r *Report) (string, error) {
	unit := a.runtime.unitState(ctx, a.runtime.unit)
	switch {
	case needed == nothing && unit == failed && a.runtime.systemctl != nil:
		needed = restart // it does not run, and should
	case needed == nothing && unit != active && a.runtime.exists(ctx):
		st.Pending.Phase = unproved // the next look, or the next boot, tells
		return Written, st.save(a.stateDir)
	case needed == restart && p.disruption == apiv1.RebootNode:
		st.Pending.Phase = rebooting
		if err := st.save(a.stateDir); err != nil {
			return Failed, err
		}
		return a.reboot(ctx)
	}
	switch needed {
	case reload:
		if err := a.runtime.control(ctx, "reload", a.runtime.unit); err != nil {
			a.log.Warn("CRI-O was not told to read its registries again: the next look tries", "err", err)
			st.Pending.Loaded.Registries = st.Loaded.Registries
		}
		st.Pending.Loaded.Config = st.Loaded.Config
		st.Pending.Loaded.Foreign, st.Pending.Loaded.Stores = st.Loaded.Foreign, st.Loaded.Stores
	case restart:
		return a.restart(ctx, st, r)
	case nothing:
		if a.runtime.systemctl != nil {
			// CRI-O goes on with what it has loaded.
			st.Pending.Loaded = st.Loaded
			st.Pending.Loaded.Registries = p.registries
		}
	}
	st.commit()
	return Applied, st.save(a.stateDir)
}

// reboot asks for a reboot, until one has been begun.
func (a *Agent) reboot(ctx context.Context) (string, error) {
	if a.rebooting {
		return Rebooting, nil
	}
	if err := a.runtime.control(ctx, "reboot"); err != nil {
		return Failed, err
	}
	a.rebooting = true
	return Rebooting, nil
}

// restart restarts CRI-O on the files of the pending change.
func (a *Agent) restart(ctx context.Context, st *state, r *Report) (string, error) {
	st.Pending.Phase = restarting
	if err := st.save(a.stateDir); err != nil {
		return Failed, err
	}
	r.Restarts++
	a.log.Info("restarting CRI-O", "unit", a.runtime.unit)
	up, err := a.runtime.restart(ctx, a.o.ReadyTimeout)
	if err != nil {
		return a.goBack(ctx, st, r, err)
	}
	st.Pending.Loaded.Process, st.Pending.Loaded.Version = up.process, up.version
	st.commit()
	return Applied, st.save(a.stateDir)
}
