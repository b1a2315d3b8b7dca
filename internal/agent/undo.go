// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// goBack puts the old files back, and CRI-O on them.
func (a *Agent) goBack(ctx context.Context, st *state, r *Report, reason error) (string, error) {
	if ctx.Err() != nil {
		return Failed, ctx.Err() // the next one decides
	}
	c := st.Pending
	wrote := c.Phase == writing
	c.Phase, c.Reason = goingBack, reason.Error()
	if err := st.save(a.stateDir); err != nil {
		return Failed, errors.Join(reason, err)
	}
	if err := a.keepEdits(st); err != nil {
		return Failed, errors.Join(reason, err)
	}
	if err := a.writeAll(c.Previous); err != nil {
		return Failed, errors.Join(reason, fmt.Errorf("putting the old files back: %w", err))
	}
	if wrote { // which says nothing about the configuration: it is tried again
		st.Pending = nil
		return Failed, errors.Join(reason, st.save(a.stateDir))
	}
	r.Error = reason.Error()
	// At a boot systemd starts it, when we are ready: a restart would wait for that.
	down := false
	if c.Boot == bootID() || a.runtime.unitState(ctx, a.runtime.unit) != inactive {
		var err error
		if down, err = a.restartOnOld(ctx, st, r); err != nil {
			return Failed, err
		}
	}
	st.Failed = &failure{Spec: digestOfSpec(c.Spec), Reason: reason.Error(), Down: down, Time: a.now()}
	st.Pending = nil
	return RolledBack, st.save(a.stateDir)
}

// restartOnOld has CRI-O start on the old files of the pending change, and reports
// whether it does not.
func (a *Agent) restartOnOld(ctx context.Context, st *state, r *Report) (down bool, err error) {
	c := st.Pending
	r.Restarts++
	a.log.Warn("CRI-O does not start: the old files are put back", "err", c.Reason)
	up, err := a.runtime.restart(ctx, a.o.ReadyTimeout)
	if ctx.Err() != nil {
		return false, ctx.Err() // the next one goes on
	}
	if down = err != nil; down {
		r.Error = fmt.Sprintf("%s; it does not start with the old files either: %s", c.Reason, err)
	}
	st.Loaded.Process, st.Loaded.Version, st.Loaded.Stores = up.process, up.version, st.Stores
	if st.Loaded.Config, st.Loaded.Registries, err = a.host.effective(c.Previous); err != nil {
		return down, err
	}
	st.Loaded.Foreign, err = a.host.foreign(c.Previous)
	return down, err
}

// recoverChange goes on with a change that a killed agent, or a boot, has left.
// done is whether that is all that is to be done now.
func (a *Agent) recoverChange(ctx context.Context, st *state, r *Report) (outcome string, done bool, err error) {
	c := st.Pending
	if c == nil || c.Phase == writing {
		return "", false, nil // what is there is compared with what is to be
	}
	if c.Phase == goingBack {
		c.Phase = restarting // CRI-O may have seen the files
		outcome, err = a.goBack(ctx, st, r, errors.New(c.Reason))
		return outcome, true, err
	}
	if c.Phase == rebooting && c.Boot == bootID() {
		outcome, err = a.reboot(ctx)
		return outcome, true, err
	}
	up, upErr := a.runtime.ask(ctx)
	if upErr == nil {
		a.starting = time.Time{}
	}
	if upErr == nil && (up.process == "" || up.process == st.Loaded.Process) {
		return "", false, nil // it has not been restarted yet
	}
	if upErr == nil {
		c.Loaded.Process, c.Loaded.Version = up.process, up.version
		st.commit()
		return "", false, st.save(a.stateDir)
	}
	unit := a.runtime.unitState(ctx, a.runtime.unit)
	if unit == inactive {
		a.starting = time.Time{}
		return "", false, nil // it was not started yet: other files may take their place
	}
	if unit == failed || a.startsTooLong(c) {
		outcome, err = a.goBack(ctx, st, r, errors.Join(fmt.Errorf("%s is %s", a.runtime.unit, unit), upErr))
		return outcome, true, err
	}
	r.Error = fmt.Sprintf("%s is %s, and is waited for", a.runtime.unit, unit)
	return Waiting, true, nil
}

// startsTooLong reports whether CRI-O has had its time to start. When it began is known only of
// a restart of ours: files may have been written long before anybody starts it.
func (a *Agent) startsTooLong(c *change) bool {
	if a.starting.IsZero() {
		a.starting = a.now()
		if c.Phase == restarting && c.Boot == bootID() {
			a.starting = c.Started
		}
	}
	return a.now().Sub(a.starting) > a.o.ReadyTimeout
}
