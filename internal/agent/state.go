// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/atomicfile"
)

// stateName is the file in the state directory that has all that the agent has to
// remember. It is one file, so that it is always whole.
const (
	stateName = "state.json"
	maxState  = 64 << 20
)

// applied is what has been made of a node.
type applied struct {
	// Spec is what was asked for.
	Spec *apiv1.ContainerRuntimeConfigSpec `json:"spec,omitempty"`
	// Files are those that the agent has written.
	Files map[string]managed `json:"files"`
	// Stores are those that are listed in the files.
	Stores []Store `json:"stores"`
	// Missed are those that are not wanted and not listed, since they do not answer: should
	// images in use come from them, they are listed again when they do.
	Missed []Store `json:"missed,omitempty"`
	// Daemon is whether runtimes were told of it.
	Daemon bool `json:"daemon,omitempty"`
	// Foreign is whether others write the files, and no longer the agent.
	Foreign bool `json:"foreign,omitempty"`
}

// state is what the agent remembers.
type state struct {
	Version int `json:"version"` // 1
	applied     // when the files were last proved
	// Edits are what others have done to the files, by path: the last of each.
	Edits map[string]Edit `json:"edits,omitempty"`
	// Loaded is what the running CRI-O has read.
	Loaded loaded `json:"loaded"`
	// Pending is a change that CRI-O has not proved yet.
	Pending *change `json:"pending,omitempty"`
	// Failed is what was asked for since then, if CRI-O did not start with it.
	Failed *failure `json:"failed,omitempty"`
	// Units is whether systemd has to be told of new units.
	Units bool `json:"units,omitempty"`
	// Prefix is where the daemon was installed, "" if it was not.
	Prefix string `json:"prefix,omitempty"`
	// Reload is whether the daemon has to be given a new program, or configuration.
	Reload bool `json:"reload,omitempty"`
	// DaemonRead tells which configuration of others the daemon was last told to read.
	DaemonRead string `json:"daemonRead,omitempty"`
}

// managed is a file that the agent has written.
type managed struct {
	Base    *content `json:"base"`    // what it held without us; null: it was not there
	Written *content `json:"written"` // what we have made of it
}

// loaded is what a runtime has read when it started.
type loaded struct {
	Process    string  `json:"process"` // which process; "" if it is not known
	Version    string  `json:"version"`
	Config     string  `json:"config"` // see effective
	Registries string  `json:"registries"`
	Foreign    string  `json:"foreign"` // of Config, what is not of our files
	Stores     []Store `json:"stores"`
}

// The phases of a change.
const (
	writing    = "writing"    // files are being written
	restarting = "restarting" // all are written, CRI-O is to read them
	unproved   = "unproved"   // all are written, CRI-O did not run
	rebooting  = "rebooting"  // all are written, the node is to boot
	goingBack  = "going back" // the old files are being written
)

// change is a change of files under way, and how to undo it.
type change struct {
	applied // when it has been proved

	Phase    string              `json:"phase"`
	Started  time.Time           `json:"started"`
	Boot     string              `json:"boot"`     // in which it began
	Previous map[string]*content `json:"previous"` // the files as they were
	Next     map[string]*content `json:"next"`
	Loaded   loaded              `json:"loaded"`
	Reason   string              `json:"reason,omitempty"` // why it goes back
}

// Edit is a change of one of our files by somebody else.
type Edit struct {
	Path   string    `json:"path"`
	Time   time.Time `json:"time"`
	Action string    `json:"action"`          // what was done about it
	Found  string    `json:"found,omitempty"` // tells it from others, as long as it is there
}

// failure is something that was asked for, and undone. It is not tried again with
// other stores: each trial costs two restarts of CRI-O.
type failure struct {
	Spec   string    `json:"spec"` // digestOfSpec
	Reason string    `json:"reason"`
	Down   bool      `json:"down,omitempty"` // it did not start with the old files either
	Time   time.Time `json:"time"`
}

func loadState(dir string) (*state, error) {
	s := &state{Version: 1, applied: applied{Files: map[string]managed{}}}
	err := atomicfile.ReadJSON(filepath.Join(dir, stateName), maxState, s)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading what was applied: %w", err)
	}
	if s.Version != 1 {
		return nil, fmt.Errorf("reading what was applied: %s is of version %d, of a newer agent: install that one", filepath.Join(dir, stateName), s.Version)
	}
	if s.Files == nil {
		s.Files = map[string]managed{}
	}
	return s, nil
}

// save makes the state durable.
func (s *state) save(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("writing what was applied: %w", err)
	}
	// Configuration files may hold what is nobody else's business.
	return atomicfile.WriteJSON(filepath.Join(dir, stateName), s, 0o600)
}

// begin notes a change before the first file is written. If another is under way,
// what was before that is what it goes back to.
func (s *state) begin(c *change) {
	if s.Pending != nil {
		previous := maps.Clone(c.Previous)
		maps.Copy(previous, s.Pending.Previous)
		c.Previous = previous
	}
	s.Pending = c
}

// listed are the stores that a runtime is told of, or will be.
func (s *state) listed() []Store {
	if s.Pending == nil {
		return s.Stores
	}
	return slices.Concat(s.Stores, s.Pending.Stores)
}

// commit makes a change what is applied.
func (s *state) commit() {
	s.applied, s.Loaded = s.Pending.applied, s.Pending.Loaded
	s.Pending, s.Failed = nil, nil
}

// turn gives up what was written, without undoing it, when the files become those of others, and
// starts anew when they become ours.
func (s *state) turn(foreign bool) {
	if s.Foreign == foreign {
		return
	}
	s.applied = applied{Files: map[string]managed{}, Daemon: s.Daemon, Foreign: foreign}
	s.Loaded = loaded{Version: s.Loaded.Version}
	s.Pending, s.Failed, s.Edits, s.DaemonRead = nil, nil, nil, ""
}

// digestOfSpec tells what is asked for from other things.
func digestOfSpec(spec *apiv1.ContainerRuntimeConfigSpec) string {
	text, err := json.Marshal(spec)
	if err != nil {
		return "" // it was decoded from JSON
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// text is the state as it is saved.
func (s *state) text() (string, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return "", fmt.Errorf("encoding what was applied: %w", err)
	}
	return string(data), nil
}

// digest tells the files apart that are on the node.
func (a *applied) digest() string {
	files := map[string]*content{}
	for path, m := range a.Files {
		files[path] = m.Written
	}
	return digestOf(files)
}
