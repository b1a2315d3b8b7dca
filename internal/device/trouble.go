// SPDX-License-Identifier: Apache-2.0

package device

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
)

// Trouble is what is wrong with a source of a device that has not worked since.
type Trouble struct {
	Source   string    `json:"source"`
	Error    string    `json:"error"`    // the latest
	Since    time.Time `json:"since"`    // when it failed first
	Failures int       `json:"failures"` // since then
}

// note notes how asking a source ended, here and for the other devices.
func (d *Device) note(f *fetch, src blob.Source, err error) {
	name := src.String()
	if err == nil {
		d.sched.health.worked(name)
		d.recovered(name)
		return
	}
	if f.ctx.Err() != nil {
		return // it was ended by us
	}
	d.stats.failures.Add(1)
	if blob.IsTemporary(err) {
		d.sched.health.failed(name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.troubles[name]
	if t.Failures == 0 { // as long as it fails, once is enough
		t = Trouble{Source: name, Since: time.Now()}
		d.log.Warn("fetching chunks", "source", name, "err", err)
	}
	t.Failures++
	t.Error = err.Error()
	d.troubles[name] = t
}

// recovered notes that a source works. That chunks did not match their digest
// stays to be seen.
func (d *Device) recovered(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t, ok := d.troubles[name]; ok {
		delete(d.troubles, name)
		d.log.Info("source works again", "source", name, "failures", t.Failures, "since", t.Since)
	}
	if !errors.Is(d.lastErr, blob.ErrCorrupt) {
		d.lastErr = nil
	}
}

// troubled lists the sources that do not work, by name. The caller holds d.mu.
func (d *Device) troubled() []Trouble {
	var all []Trouble
	for _, t := range d.troubles {
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b Trouble) int { return strings.Compare(a.Source, b.Source) })
	return all
}
