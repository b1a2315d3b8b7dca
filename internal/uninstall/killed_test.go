// SPDX-License-Identifier: Apache-2.0

package uninstall_test

import (
	"errors"
	"os"
	"testing"

	"github.com/holdfast/holdfast/internal/killtest"
	"github.com/holdfast/holdfast/internal/layer/layertest"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/uninstall"
)

// An uninstallation that was killed at any step can be run again.
func TestKilledUninstall(t *testing.T) {
	killtest.Operation(t, func(in killtest.Inherited) func() error {
		options := nodeIn(in.Args[0]).options
		return func() error {
			_, err := uninstall.Run(options)
			return err
		}
	})
	killtest.EachStep(t, func(t *testing.T, kill killtest.Kill) {
		n := newNode(t)
		n.write(t, "runtime/overlay-images/images.json", "[]")
		layer := n.mountLayer(t, "run/holdfast/layers/abc")
		record := n.path("run/holdfast/records/base/tree")
		if err := errors.Join(os.MkdirAll(record, 0o700), mount.Bind(layer, record)); err != nil {
			t.Fatal(err)
		}
		kill(t, []string{n.dir})
		if _, err := uninstall.Run(n.options); err != nil {
			t.Error(err)
		}
		if n.exists(t, "lib/holdfast") || n.exists(t, "run/holdfast") || layertest.Mounted(t, layer) || layertest.Mounted(t, record) {
			t.Error("something is left")
		}
		if !n.exists(t, "runtime/overlay-images/images.json") || !n.exists(t, "etc/storage.conf") {
			t.Error("what belongs to others was removed")
		}
	})
}
