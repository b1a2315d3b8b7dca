// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const rootNode = 1

var (
	errUnknown = errors.New("no such device")
	errRemoved = errors.New("the device was removed")
)

// node is one file of the mount.
type node struct {
	id   uint64
	name string
	dev  Device
	size int64

	users   sync.WaitGroup // requests that use dev; grows only under nodes.mu
	failing atomic.Bool    // the last read failed, and that has been logged
}

func (n *node) attributes() attributes {
	return attributes{ino: n.id, size: n.size, mode: unix.S_IFREG | 0o400}
}

// nodes is the set of devices that are served.
type nodes struct {
	mu      sync.Mutex // protects the fields below
	byID    map[uint64]*node
	ready   bool
	changed chan struct{} // closed, and replaced, when the above change
}

func newNodes() *nodes {
	return &nodes{byID: map[uint64]*node{}, changed: make(chan struct{})}
}

// nodeID derives the id of the node with this name from nothing but the name.
// Ids are positive as signed numbers, because they serve as directory offsets.
func nodeID(name string) (uint64, bool) {
	raw, err := hex.DecodeString(name)
	if err != nil || len(raw) < 16 {
		return 0, false
	}
	id := binary.BigEndian.Uint64(raw) >> 1
	if id <= rootNode {
		id += rootNode + 1
	}
	return id, true
}

// fileName is the encoded part of a digest; unlike d.Encoded it never panics.
func fileName(d digest.Digest) string {
	_, name, _ := strings.Cut(string(d), ":")
	return name
}

func (t *nodes) add(d digest.Digest, dev Device) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("adding device %q: %w", d, err)
	}
	name := fileName(d)
	id, ok := nodeID(name)
	size := dev.Size()
	if !ok || size < 0 {
		return fmt.Errorf("adding device %s: bad digest or negative size", d)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.byID[id]; n != nil {
		return fmt.Errorf("adding device %s: its node is taken by %s", d, n.name)
	}
	t.byID[id] = &node{id: id, name: name, dev: dev, size: size}
	t.announce()
	return nil
}

// remove takes a device away, and returns it if it was there. Requests that
// use it go on until its users are done.
func (t *nodes) remove(d digest.Digest) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	id, ok := nodeID(fileName(d))
	n := t.byID[id]
	if !ok || n == nil || n.name != fileName(d) {
		return nil
	}
	delete(t.byID, id)
	return n
}

func (t *nodes) setReady() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ready = true
	t.announce()
}

func (t *nodes) announce() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// acquire returns a node for use; the caller calls users.Done. Until the table
// is ready it waits for a node that is not there.
func (t *nodes) acquire(ctx context.Context, id uint64) (*node, error) {
	for {
		t.mu.Lock()
		n, ready, changed := t.byID[id], t.ready, t.changed
		if n != nil {
			n.users.Add(1)
		}
		t.mu.Unlock()
		if n != nil {
			return n, nil
		}
		if ready {
			return nil, errUnknown
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// acquireName is acquire by file name.
func (t *nodes) acquireName(ctx context.Context, name string) (*node, error) {
	id, ok := nodeID(name)
	if !ok {
		return nil, errUnknown
	}
	n, err := t.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	if n.name != name {
		n.users.Done()
		return nil, errUnknown
	}
	return n, nil
}

// waitReady waits until the table is complete.
func (t *nodes) waitReady(ctx context.Context) error {
	for {
		t.mu.Lock()
		ready, changed := t.ready, t.changed
		t.mu.Unlock()
		if ready {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// after returns the nodes with ids above id, in the order of their ids.
func (t *nodes) after(id uint64) []*node {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*node
	for _, n := range t.byID {
		if n.id > id {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b *node) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	return list
}

func (t *nodes) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byID)
}
