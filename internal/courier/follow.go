// SPDX-License-Identifier: Apache-2.0

package courier

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// NewClient returns a client for what couriers read and write. It asks the API server for nothing
// yet, and never for what other kinds there are.
func NewClient(config *rest.Config) (client.WithWatch, error) {
	scheme, err := Scheme()
	if err != nil {
		return nil, err
	}
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.Add(nodev1.GroupVersion.WithKind("ContainerRuntimeNode"), meta.RESTScopeRoot)
	mapper.Add(apiv1.GroupVersion.WithKind("MachineConfig"), meta.RESTScopeRoot)
	config = rest.CopyConfig(config)
	config.WarningHandlerWithContext = rest.NoWarnings{}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme, Mapper: mapper})
	if err != nil {
		return nil, fmt.Errorf("making a client for the API server: %w", err)
	}
	return c, nil
}

// Scheme knows the types that couriers read and write.
func Scheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{nodev1.AddToScheme, apiv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("making a scheme: %w", err)
		}
	}
	return scheme, nil
}

// follow sends the node's object whenever it is another, and nil if there is none, until the
// context ends.
func (c *Courier) follow(ctx context.Context, objects chan<- *nodev1.ContainerRuntimeNode) {
	for pause := backoff(); ctx.Err() == nil; {
		began := time.Now()
		err := c.followOnce(ctx, objects)
		if time.Since(began) > time.Minute {
			pause = backoff()
		}
		if err != nil && ctx.Err() == nil {
			c.log.Warn("the API server is not followed", "err", err)
		}
		select { // API servers end watches now and then, and those of all nodes when they stop
		case <-time.After(pause.Step()):
		case <-ctx.Done():
		}
	}
}

// followOnce is follow for one watch.
func (c *Courier) followOnce(ctx context.Context, objects chan<- *nodev1.ContainerRuntimeNode) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := c.o.Client.Watch(ctx, &nodev1.ContainerRuntimeNodeList{}, client.MatchingFields{"metadata.name": c.o.Node})
	if err != nil {
		return err
	}
	defer w.Stop()
	send := func(o *nodev1.ContainerRuntimeNode) {
		select {
		case objects <- o:
		case <-ctx.Done():
		}
	}
	// After the watch has begun, so that nothing falls between; a watch does not say that there
	// is no object.
	o, err := c.read(ctx)
	if err != nil {
		return err
	}
	send(o)
	for {
		select {
		case e, open := <-w.ResultChan():
			if !open {
				return nil
			}
			if e.Type == watch.Error {
				return apierrors.FromObject(e.Object)
			}
			o, ok := e.Object.(*nodev1.ContainerRuntimeNode)
			switch {
			case !ok || o.Name != c.o.Node || e.Type == watch.Bookmark:
			case e.Type == watch.Deleted:
				send(nil)
			default:
				send(o)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// read returns the node's object, nil if there is none.
func (c *Courier) read(ctx context.Context) (*nodev1.ContainerRuntimeNode, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	o := &nodev1.ContainerRuntimeNode{}
	err := c.o.Client.Get(ctx, client.ObjectKey{Name: c.o.Node}, o)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the node's object: %w", err)
	}
	return o, nil
}

// see takes notice of the object, and reports whether it is another. One that was on its way while
// a newer one was read or written is left.
func (c *Courier) see(o *nodev1.ContainerRuntimeNode) bool {
	before := c.object
	switch {
	case o == nil && before == nil:
		c.log.Info("there is no object for the node: it is waited for")
	case o == nil:
		c.log.Info("the node's object has gone: the node keeps what it has")
	case before == nil:
		c.log.Info("the node's object is there", "desired", o.Spec.DesiredConfig)
	case before.UID == o.UID:
		if order, err := resourceversion.CompareResourceVersion(o.ResourceVersion, before.ResourceVersion); err == nil && order <= 0 {
			return false
		}
	}
	c.object = o
	return o != nil || before != nil
}
