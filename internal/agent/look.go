// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// explain says in words what an error of a path means.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("it does not exist")
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED):
		return fmt.Errorf("its FUSE process is gone, the mount is dead: %w", err)
	case errors.Is(err, unix.ESTALE):
		return fmt.Errorf("the NFS server does not have it any more: %w", err)
	}
	return err
}

// someNames are some of the entries of a directory.
func someNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	names, err := f.Readdirnames(16)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// maxList is more than any list of a store has; what is on a stick may be anything.
const maxList = 256 << 20

// checkJSON reads a file as JSON, a token at a time: it may be large.
func checkJSON(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	tokens, depth := 0, 0
	for d := json.NewDecoder(io.LimitReader(f, maxList)); ; tokens++ {
		token, err := d.Token()
		if errors.Is(err, io.EOF) && tokens > 0 && depth == 0 {
			return nil
		}
		if err != nil {
			return errNotJSON
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
}

var errNotJSON = errors.New("it is not JSON")

// lookAtImages wants what containers/storage needs to be there before it opens a store
// (store.go, load): it makes what is missing, which fails where it may not write.
func lookAtImages(path string) error {
	for _, name := range []string{"overlay-images/images.json", "overlay-layers/layers.json"} {
		err := checkJSON(filepath.Join(path, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("it is not an image store: %s is missing; `holdfast store create` and `podman --root` make one", name)
		case errors.Is(err, errNotJSON):
			return fmt.Errorf("%s is not JSON", name)
		case err != nil:
			return explain(err)
		}
		lock := strings.TrimSuffix(name, ".json") + ".lock"
		if _, err := os.Stat(filepath.Join(path, lock)); err != nil {
			if unix.Access(filepath.Dir(filepath.Join(path, lock)), unix.W_OK) != nil {
				return fmt.Errorf("%s is missing, and the store is read-only: make it where the store is written", lock)
			}
		}
	}
	return nil
}

func lookAtLayers(path string, names []string) error {
	mounted, err := mountinfo.Mounted(path)
	if err != nil {
		return explain(err)
	}
	if !mounted && len(names) == 0 {
		return errors.New("it is an empty directory: nothing is mounted there; its service has not started")
	}
	return nil
}

// lookAtArtifacts wants a store that CRI-O could open: its lock for writing, too
// (libartifact, NewArtifactStore), and later for each list, or CRI-O ends.
func lookAtArtifacts(path string) error {
	dir := filepath.Join(path, "artifacts")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if unix.Access(path, unix.W_OK) != nil {
			return errors.New("it is not an artifact store: artifacts/ is missing, and it is read-only")
		}
		return nil // CRI-O makes it
	}
	switch err := checkJSON(filepath.Join(dir, "index.json")); {
	case errors.Is(err, errNotJSON):
		return errors.New("artifacts/index.json is not JSON")
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return explain(err)
	}
	lock := filepath.Join(dir, "index.lock")
	err := unix.Access(lock, unix.R_OK|unix.W_OK)
	if errors.Is(err, fs.ErrNotExist) {
		err = unix.Access(dir, unix.W_OK) // CRI-O makes it
	}
	if err != nil {
		return fmt.Errorf("CRI-O has to be able to write its lock: let the Holdfast daemon serve it, for which it may be read-only (spec.holdfast): %w", err)
	}
	return nil
}
