// SPDX-License-Identifier: Apache-2.0

package courier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/render"
)

// config is a configuration that is to be on the node.
type config struct {
	name   string
	data   []byte
	reboot bool // the node may have to boot for it
}

// deliver brings the desired configuration to the node: then there is no finding. Otherwise that
// says why not, if it is not just the API server that does not answer; an error means that it is
// to be tried again.
func (c *Courier) deliver(ctx context.Context, name string) (*finding, error) {
	if c.config == nil || c.config.name != name {
		config, f, err := c.fetch(ctx, name)
		if err != nil {
			return f, err
		}
		c.config, c.node.delivered = config, ""
	}
	for range 2 { // once more to see that it is there
		if c.node.delivered == name {
			return nil, nil
		}
		same, err := c.same()
		if err != nil {
			return &finding{nodev1.NodeDegraded, "NotWritten", err.Error()}, err
		}
		if same {
			c.node.delivered = name
			return nil, nil
		}
		if c.config.reboot && c.object.Spec.DrainedFor != name {
			return &finding{nodev1.NodeWorking, nodev1.ReasonWaitsForDrain, "waits until the node is drained"}, nil
		}
		if err := c.write(); err != nil {
			return &finding{nodev1.NodeDegraded, "NotWritten", err.Error()}, err
		}
		c.log.Info("the configuration was written", "config", name)
		c.look()
	}
	return nil, errors.New("the configuration was written, and is not there: somebody else writes it")
}

// fetch gets a configuration from the API server.
func (c *Courier) fetch(ctx context.Context, name string) (*config, *finding, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	mc := &apiv1.MachineConfig{}
	err := c.o.Client.Get(ctx, client.ObjectKey{Name: name}, mc)
	if apierrors.IsNotFound(err) {
		err = fmt.Errorf("there is no MachineConfig %s", name)
		return nil, &finding{nodev1.NodeDegraded, "ConfigNotFound", err.Error()}, err
	}
	if err != nil {
		err = fmt.Errorf("reading MachineConfig %s: %w", name, err)
		if apierrors.IsForbidden(err) {
			return nil, &finding{nodev1.NodeDegraded, "ConfigForbidden", err.Error()}, err
		}
		return nil, nil, err
	}
	config, err := unpack(mc)
	if err != nil {
		return nil, &finding{nodev1.NodeDegraded, "ConfigInvalid", err.Error()}, err
	}
	return config, nil, nil
}

// unpack takes the node's object out of a MachineConfig, if it is one that the agent reads.
func unpack(mc *apiv1.MachineConfig) (*config, error) {
	data, err := render.Unpack(mc, render.ClusterObject)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("MachineConfig %s has no %s: it is not one for Holdfast", mc.Name, render.ClusterObject)
	}
	if err != nil {
		return nil, err
	}
	objects, err := render.Objects(path.Base(render.ClusterObject), bytes.NewReader(data))
	if err == nil && len(objects) == 0 {
		err = fmt.Errorf("%s: there is no object in it", path.Base(render.ClusterObject))
	}
	if err != nil {
		return nil, fmt.Errorf("MachineConfig %s: %w", mc.Name, err)
	}
	spec, _ := render.Merge(objects)
	return &config{mc.Name, data, spec.Holdfast != nil && spec.Holdfast.Disruption == apiv1.RebootNode}, nil
}

// inRoot is a path of the node in its root directory.
func inRoot(p string) string { return strings.TrimPrefix(p, "/") }

// same reports whether the node has the configuration. A link is none, wherever it leads to.
func (c *Courier) same() (bool, error) {
	root, err := os.OpenRoot(c.o.Root)
	if err != nil {
		return false, err
	}
	defer root.Close() //nolint:errcheck // only read
	info, err := root.Lstat(inRoot(render.ClusterObject))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the node's configuration: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() != int64(len(c.config.data)) {
		return false, nil
	}
	data, err := root.ReadFile(inRoot(render.ClusterObject))
	if err != nil {
		return false, fmt.Errorf("reading the node's configuration: %w", err)
	}
	return bytes.Equal(data, c.config.data), nil
}

// write puts the configuration where the agent looks for it.
func (c *Courier) write() error {
	root, err := os.OpenRoot(c.o.Root)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // the file is durable by then
	err = root.MkdirAll(inRoot(render.ObjectsDir), 0o755)
	if err == nil {
		err = atomicfile.WriteIn(root, inRoot(render.ClusterObject), c.config.data, 0o644)
	}
	if err != nil {
		return fmt.Errorf("writing the node's configuration: %w", err)
	}
	return nil
}
