// SPDX-License-Identifier: Apache-2.0

// Package sharedstore keeps image stores that runtimes use by their path alone, without
// the daemon: containers/storage's additional image stores with whole trees, on NFS, an
// SSD, or media that are read-only where they are used.
//
// Besides what containers/storage reads there are three things in a store's directory:
//
//	holdfast-store.json   version, what the file system keeps, since when layers are not needed
//	holdfast-store.lock   held by the one who writes; says who that is
//	staging/              layers on their way into the store and out of it
//
// Runtimes on any number of nodes have the store open while it is written. So layers are
// complete, verified and durable before they are recorded, and recorded before the image
// that needs them; an image goes before its layers, and those only when they have not
// been needed for long, since nobody knows what other nodes refer to. Each step is a
// rename, and what a crash leaves half done is finished or undone by the next writer.
// The package imagestore tells what runtimes do with records and directories.
package sharedstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.podman.io/storage"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/filelock"
	"github.com/holdfast/holdfast/internal/imagestore"
	"github.com/holdfast/holdfast/internal/unpack"
)

const (
	stateFile  = "holdfast-store.json"
	lockFile   = "holdfast-store.lock"
	stagingDir = "staging"
	driverDir  = "overlay"
	layersDir  = "overlay-layers"
	imagesDir  = "overlay-images"

	version  = 1
	maxState = 64 << 20 // bytes of the state that are read
)

// Errors of stores.
var (
	ErrNoStore = errors.New("no image store of Holdfast: make one with holdfast store create")
	ErrNewer   = errors.New("it was made by a newer version of Holdfast, and is left as it is: use that one")
	ErrBusy    = errors.New("another process writes to it: try again when it has ended")
)

// state is what the store knows about itself.
type state struct {
	Version int             `json:"version"`
	Created time.Time       `json:"created"`
	Keeps   unpack.Features `json:"keeps"`
	// Unneeded is since when layers, and images without names, by their ids, are not
	// needed by anything in this store that has a name.
	Unneeded map[string]time.Time `json:"unneeded,omitempty"`
}

// Store is an image store. Its methods may be called concurrently, by several
// processes, on several machines.
type Store struct {
	root  string
	state state
}

// Create makes an image store in a directory, which may be there if it is empty. One
// that is there already is left as it is. The error tells what the file system lacks.
// With forNFS the store is made as if it lay on NFS, through which nodes will read it:
// what a disk keeps for its own machine alone is not used.
func Create(ctx context.Context, root string, forNFS bool) (*Store, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if s, err := Open(root); err == nil || !errors.Is(err, ErrNoStore) {
		return s, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	for _, e := range entries {
		// What an earlier try may have left, and what ext4 puts everywhere.
		if !slices.Contains([]string{lockFile, stagingDir, driverDir, layersDir, imagesDir, "lost+found"}, e.Name()) && !strings.HasPrefix(e.Name(), ".") {
			return nil, fmt.Errorf("creating image store: %s is not empty: there is %s", root, e.Name())
		}
	}
	for _, list := range []imagestore.List{imagestore.Layers, imagestore.Images} {
		var records []json.RawMessage
		if err := imagestore.ReadList(root, list, &records); err == nil && len(records) > 0 {
			return nil, fmt.Errorf("creating image store: %s is the store of something else, which would not know of changes", root)
		}
	}
	keeps, err := unpack.Probe(ctx, root)
	if err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	if forNFS {
		keeps = unpack.Features{}
	}
	s := &Store{root: root, state: state{Version: version, Created: time.Now().UTC().Truncate(time.Second), Keeps: keeps}}
	if err := os.MkdirAll(s.path(stagingDir), 0o700); err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	if err := imagestore.CreateLists(root); err != nil {
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	if err := s.save(); err != nil { // last: without it there is no store
		return nil, fmt.Errorf("creating image store: %w", err)
	}
	return s, nil
}

// Open opens the image store at a path: [ErrNoStore] if there is none, [ErrNewer] if
// this version does not know it.
func Open(root string) (*Store, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	s := &Store{root: root}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("opening %s: %w", root, err)
	}
	return s, nil
}

func (s *Store) load() error {
	s.state = state{}
	err := atomicfile.ReadJSON(s.path(stateFile), maxState, &s.state)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ErrNoStore
	case err != nil:
		return err
	case s.state.Version > version:
		return ErrNewer
	case s.state.Version != version:
		return fmt.Errorf("%s has version %d: %w", stateFile, s.state.Version, ErrNoStore)
	}
	return nil
}

func (s *Store) save() error { return atomicfile.WriteJSON(s.path(stateFile), s.state, 0o600) }

// Root is the path that runtimes list in additionalimagestores.
func (s *Store) Root() string { return s.root }

// Keeps is what the store's file system keeps.
func (s *Store) Keeps() unpack.Features { return s.state.Keeps }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// holder is who holds the lock.
type holder struct {
	Host  string    `json:"host"`
	PID   int       `json:"pid"`
	Since time.Time `json:"since"`
}

// write runs do as the only writer, after it has put right what an earlier one left.
func (s *Store) write(ctx context.Context, do func() error) (err error) {
	f, err := os.OpenFile(s.path(lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("writing to %s: %w", s.root, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }() // ends the lock
	err = filelock.Try(f)
	if errors.Is(err, filelock.ErrHeld) {
		var by holder
		if json.NewDecoder(io.LimitReader(f, 4096)).Decode(&by) != nil {
			return fmt.Errorf("writing to %s: %w", s.root, ErrBusy)
		}
		return fmt.Errorf("writing to %s: process %d on %s does since %s: %w", s.root, by.PID, by.Host, by.Since.Format(time.RFC3339), ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("locking %s: %w", s.root, err)
	}
	host, _ := os.Hostname()
	who, err := json.Marshal(holder{host, os.Getpid(), time.Now().UTC().Truncate(time.Second)})
	if err == nil {
		err = errors.Join(f.Truncate(0), writeAt(f, who))
	}
	if err == nil {
		err = s.load()
	}
	if err == nil {
		err = s.recover(ctx)
	}
	if err != nil {
		return fmt.Errorf("writing to %s: %w", s.root, err)
	}
	return do()
}

func writeAt(f *os.File, p []byte) error {
	_, err := f.WriteAt(p, 0)
	return err
}

// layers and images are the records.
func (s *Store) layers() (all []imagestore.Layer, err error) {
	return all, imagestore.ReadList(s.root, imagestore.Layers, &all)
}

func (s *Store) images() (all []storage.Image, err error) {
	return all, imagestore.ReadList(s.root, imagestore.Images, &all)
}

// sync makes durable what was written to the store's file system so far.
func (s *Store) sync() error {
	d, err := os.Open(s.root)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Syncfs(int(d.Fd())), d.Close()); err != nil {
		return fmt.Errorf("making %s durable: %w", s.root, err)
	}
	return nil
}
