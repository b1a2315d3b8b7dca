// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/render"
)

// bases are what files hold without us, and what they hold now.
type bases struct {
	host    host
	managed map[string]managed
}

func (b *bases) of(path string) ([]byte, error) {
	m, ours := b.managed[path]
	if !ours {
		return b.host.read(path)
	}
	if m.Base == nil {
		return render.NoBase(path)
	}
	return []byte(*m.Base), nil
}

// bases finds out what files hold without us, and what others have done to them.
func (a *Agent) bases(st *state) (*bases, error) {
	b := &bases{host: a.host, managed: maps.Clone(st.Files)}
	if c := st.Pending; c != nil {
		written := c.Phase != writing && c.Phase != goingBack
		for path, m := range c.Files {
			if _, known := b.managed[path]; !known || written {
				b.managed[path] = m // it may have been written already
			}
		}
	}
	for path, m := range maps.Clone(b.managed) {
		disk, err := a.host.content(path)
		if err != nil {
			return nil, err
		}
		if disk.equal(m.Written) || st.Pending != nil && (disk.equal(st.Pending.Next[path]) || disk.equal(st.Pending.Previous[path])) {
			st.noEdit(path)
			continue
		}
		action, err := a.adopt(st, b, path, m, disk)
		if err != nil {
			return nil, err
		}
		a.noteEdit(st, path, disk, action)
	}
	return b, nil
}

// noteEdit notes an edit when it is found. One that has to stay for now is found again
// and again.
func (a *Agent) noteEdit(st *state, path string, disk *content, action string) {
	found := "removed"
	if disk != nil {
		found = digestOf(map[string]*content{path: disk})
	}
	if e, known := st.Edits[path]; known && e.Found == found {
		return
	}
	if st.Edits == nil {
		st.Edits = map[string]Edit{}
	}
	st.Edits[path] = Edit{Path: path, Time: a.now(), Action: action, Found: found}
	a.log.Warn("a file was edited on the node", "file", path, "action", action)
}

// noEdit notes that a file is as it should be: the next edit is a new one.
func (s *state) noEdit(path string) {
	if e, known := s.Edits[path]; known && e.Found != "" {
		e.Found = ""
		s.Edits[path] = e
	}
}

// adopt makes an edited file the new base if it is one in which others have a say. Other
// files are kept aside.
func (a *Agent) adopt(st *state, b *bases, path string, m managed, disk *content) (string, error) {
	if disk == nil {
		return "it was removed, and is written again", nil
	}
	if path == render.StorageConf || path == render.DaemonConf {
		base, err := render.Start(path, b.of)
		if err == nil {
			base, err = render.Rebase(base, text(m.Written), []byte(*disk))
		}
		if err == nil && st.Pending != nil { // which may be undone, and the file with it
			_, err = a.keepAside(path, disk)
		}
		if err == nil {
			c := content(base)
			b.managed[path] = managed{Base: &c, Written: disk}
			return "what others have written stays, and is added to", nil
		}
		a.log.Warn("an edited file cannot be read", "file", path, "err", err)
	}
	aside, err := a.keepAside(path, disk)
	if err != nil {
		return "", err
	}
	return "it is written again; the edited one is " + aside, nil
}

// keepAside keeps what a file holds that is about to be replaced, and returns where.
func (a *Agent) keepAside(path string, disk *content) (string, error) {
	sum := sha256.Sum256([]byte(*disk))
	aside := filepath.Join(a.stateDir, "edited", strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "_")+"."+hex.EncodeToString(sum[:4]))
	if _, err := os.Stat(aside); err == nil {
		return aside, nil
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(aside), 0o700), atomicfile.Write(aside, []byte(*disk), 0o600)); err != nil {
		return "", fmt.Errorf("keeping the edited %s: %w", path, err)
	}
	return aside, nil
}

// keepEdits keeps what others have made of files that are about to be put back.
func (a *Agent) keepEdits(st *state) error {
	for path, old := range st.Pending.Previous {
		disk, err := a.host.content(path)
		if err == nil && disk != nil && !disk.equal(old) && !disk.equal(st.Pending.Next[path]) {
			var aside string
			if aside, err = a.keepAside(path, disk); err == nil {
				a.noteEdit(st, path, disk, "CRI-O did not start, and an older one is back; the edited one is "+aside)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func text(c *content) []byte {
	if c == nil {
		return nil
	}
	return []byte(*c)
}

// complete turns rendered files into what all of our files are to hold: those that
// are not rendered any more what they held without us.
func (b *bases) complete(files []render.File) (map[string]*content, map[string]managed) {
	all, ours := map[string]*content{}, map[string]managed{}
	for _, f := range files {
		if f.Path == render.DaemonConf {
			continue // it is the daemon's, and has been seen to
		}
		c := content(f.Data)
		m, known := b.managed[f.Path]
		if !known {
			base, err := b.host.content(f.Path)
			if err != nil {
				base = nil // Files has read it
			}
			m.Base = base
		}
		if f.Path == render.StorageConf && m.Written != nil && digestTree(settings(m.Written)) == digestTree(settings(&c)) {
			c = *m.Written // it says the same, maybe in an editor's way
		}
		m.Written = &c
		all[f.Path], ours[f.Path] = &c, m
	}
	for path, m := range b.managed {
		if _, rendered := all[path]; !rendered && path != render.DaemonConf {
			all[path] = m.Base
		}
	}
	if m, ok := b.managed[render.DaemonConf]; ok {
		ours[render.DaemonConf] = m
	}
	return all, ours
}
