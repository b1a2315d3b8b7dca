// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
)

// Kind is a kind of store.
type Kind string

// The kinds of stores, as the API calls them.
const (
	LayerStore    Kind = "layer"
	ImageStore    Kind = "image"
	ArtifactStore Kind = "artifact"
)

// Store is a store by the path that it has on the node.
type Store struct {
	Kind Kind   `json:"kind"`
	Path string `json:"path"`
}

func (s Store) String() string { return fmt.Sprintf("%s store %s", s.Kind, s.Path) }

// checker looks at stores. A look that hangs, as one at a dead server does, holds
// up nobody: it is left behind, and until it returns the store counts as hanging.
type checker struct {
	host     host
	patience time.Duration
	probe    func(ctx context.Context, path string) error // of an image store

	mu    sync.Mutex // protects the field below
	looks map[Store]chan struct{}
}

// check returns what is wrong with a store: what would keep a runtime from
// starting with it, or make it useless. nil means that it can be listed. known is
// whether it was listed before: then it is not tried out once more.
func (c *checker) check(ctx context.Context, s Store, known bool) error {
	c.mu.Lock()
	if earlier, ok := c.looks[s]; ok {
		select {
		case <-earlier:
		default:
			c.mu.Unlock()
			return errHangs
		}
	}
	done := make(chan struct{})
	if c.looks == nil {
		c.looks = map[Store]chan struct{}{}
	}
	c.looks[s] = done
	c.mu.Unlock()
	result := make(chan error, 1)
	go func() {
		result <- c.look(s)
		close(done)
	}()
	select {
	case err := <-result:
		if err != nil || known || s.Kind != ImageStore {
			return err
		}
	case <-time.After(c.patience):
		return errHangs
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 4*c.patience, errHangs)
	defer cancel()
	return c.probe(ctx, s.Path)
}

var errHangs = errors.New("it does not answer: the server behind it, or its FUSE process, hangs or is stopped")

// look is what check does while somebody waits.
func (c *checker) look(s Store) error {
	path, err := c.host.path(s.Path)
	if err != nil {
		return explain(err)
	}
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		return errors.New("it is not a directory")
	}
	if err != nil {
		if unmounted := c.unmounted(s.Path); unmounted != nil {
			return unmounted
		}
		return explain(err)
	}
	if err := c.unmounted(s.Path); err != nil {
		return err
	}
	// A mount that is dead may still have its root in the kernel's memory.
	names, err := someNames(path)
	if err != nil {
		return explain(err)
	}
	switch s.Kind {
	case ImageStore:
		return lookAtImages(path)
	case LayerStore:
		return lookAtLayers(path, names)
	default:
		return lookAtArtifacts(path)
	}
}

// unmounted says so if something should be mounted at a path, or above it, and is not:
// /etc/fstab and mount units know.
func (c *checker) unmounted(path string) error {
	path, err := c.host.resolved(path)
	if err != nil {
		return err
	}
	var wanted, by, at string
	for _, m := range c.expectedMounts() {
		where, err := c.host.resolved(m.where)
		if err != nil {
			return err
		}
		if (path == where || strings.HasPrefix(path, where+"/")) && len(where) > len(at) {
			wanted, by, at = m.where, m.by, where
		}
	}
	if at == "" {
		return nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(at))
	if err == nil && len(mounts) == 0 {
		err = fmt.Errorf("%s is not mounted, which %s asks for", wanted, by)
	}
	return err
}

type expectedMount struct{ where, by string }

func (c *checker) expectedMounts() []expectedMount {
	var all []expectedMount
	fstab, _ := c.host.read("/etc/fstab") // one that is not there asks for nothing
	for s := bufio.NewScanner(bytes.NewReader(fstab)); s.Scan(); {
		// Blanks in a path are written \040 (fstab(5)); paths of stores have none.
		if f := strings.Fields(s.Text()); len(f) >= 3 && !strings.HasPrefix(f[0], "#") && f[1] != "/" && strings.HasPrefix(f[1], "/") {
			all = append(all, expectedMount{filepath.Clean(f[1]), "/etc/fstab"})
		}
	}
	units, _ := c.host.path("/etc/systemd/system")
	names, _ := filepath.Glob(filepath.Join(units, "*.mount"))
	for _, name := range names {
		unit, _ := c.host.read(filepath.Join("/etc/systemd/system", filepath.Base(name)))
		for line := range strings.Lines(string(unit)) {
			if where, ok := strings.CutPrefix(strings.TrimSpace(line), "Where="); ok && where != "/" {
				all = append(all, expectedMount{filepath.Clean(where), filepath.Base(name)})
			}
		}
	}
	return all
}
