// SPDX-License-Identifier: Apache-2.0

// Package courier carries between the API server and the agent of a node, which know nothing of
// each other: the node's configuration from its ContainerRuntimeNode to a file that the agent
// follows, and what the agent reports to the object's status.
//
// It works on what there is, not on what has happened: what it has to remember, the object and the
// file say. Whatever it cannot have, the node keeps what it has. It makes no file but that one,
// needs no privileges on the node, and leaves no credentials there.
package courier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

const (
	// lookInterval is how often files are looked at for a change.
	lookInterval = 250 * time.Millisecond
	// patience is how long the agent may take to report on a configuration before that is said.
	patience = time.Minute
	// requestTimeout is for one request to the API server.
	requestTimeout = 30 * time.Second
	// attempts are made at once to write a status that others write, too.
	attempts = 5
)

// backoff is the pauses between attempts at what does not work.
func backoff() wait.Backoff {
	return wait.Backoff{Duration: time.Second, Factor: 2, Jitter: 0.5, Steps: 6, Cap: 30 * time.Second}
}

// Options say between what a courier carries.
type Options struct {
	Client   client.WithWatch // it may be one for several couriers
	Node     string           // the name of the node, and of its object
	Root     string           // where the node's file system is seen
	StateDir string           // the agent's, on the node
	Version  string           // of the program
	// Observe means that others bring configurations to the node: there is only a status to report.
	Observe bool
	Log     *slog.Logger
}

// Courier carries for one node.
type Courier struct {
	o      Options
	log    *slog.Logger
	source agent.Source // what the agent follows, as it is seen from here

	object *nodev1.ContainerRuntimeNode // as it was last seen; nil: there is none
	config *config                      // the desired one, once it is here
	node   view                         // what is on the node

	awaited string // the files on which the agent has not reported yet
	since   time.Time
}

// New returns a courier. It starts nothing.
func New(o Options) (*Courier, error) {
	if info, err := os.Stat(o.Root); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("there is no node at %s: want the root directory of its file system", o.Root)
	}
	return &Courier{
		o: o, log: o.Log.With("node", o.Node),
		source: agent.Source{Files: []string{filepath.Join(o.Root, render.ObjectsDir)}},
	}, nil
}

// Run carries until the context ends.
func (c *Courier) Run(ctx context.Context) {
	objects := make(chan *nodev1.ContainerRuntimeNode)
	var group sync.WaitGroup
	group.Go(func() { c.follow(ctx, objects) })
	defer group.Wait()
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	pause := backoff()
	for due := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case o := <-objects:
			if !c.see(o) {
				continue
			}
		case now := <-tick.C:
			if now.Before(due) {
				continue
			}
		}
		if err := c.carry(ctx); err != nil && ctx.Err() == nil {
			due = time.Now().Add(pause.Step())
			c.log.Warn("the node keeps what it has for now", "err", err)
		} else {
			pause = backoff()
		}
	}
}

// carry brings the configuration to the node, and what has become of it to the object.
func (c *Courier) carry(ctx context.Context) error {
	var err error
	for range attempts {
		if c.object == nil {
			return nil
		}
		if err = c.carryOnce(ctx); !apierrors.IsConflict(err) {
			return err
		}
		o, failed := c.read(ctx) // others write it, too
		if failed != nil {
			return failed
		}
		c.see(o)
	}
	return err
}

func (c *Courier) carryOnce(ctx context.Context) error {
	c.look()
	var f *finding
	var failed error
	desired := c.desired()
	if desired != "" {
		if f, failed = c.deliver(ctx, desired); f == nil && failed != nil {
			return failed // which says nothing about the node
		}
	}
	if f == nil {
		f = c.judge(desired)
	}
	if f == nil {
		return failed
	}
	return errors.Join(c.report(ctx, f), failed)
}

// desired is the name of the configuration that is to be brought to the node, if any.
func (c *Courier) desired() string {
	if c.o.Observe {
		return ""
	}
	return c.object.Spec.DesiredConfig
}
