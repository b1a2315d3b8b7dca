// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// TestColumns is what `kubectl get` shows of objects of which the controller has written the status.
func TestColumns(t *testing.T) {
	c := newCluster(t, "kubernetes", numbered(2)...)
	c.fleet.say("node-01", func(s *holdfastv1.ContainerRuntimeNode) {
		s.Status.Stores = []holdfastv1.Store{
			{Kind: "ImageStore", Path: "/mnt/a", State: holdfastv1.StoreHealthy}, {Kind: "ImageStore", Path: "/mnt/b", State: holdfastv1.StoreWithheld, Reason: "it is not there"},
		}
		s.Status.HealthyStores, s.Status.WithheldStores = 1, 1
		s.Status.Daemon, s.Status.Message = holdfastv1.Program{Up: true, Version: "v1"}, "a message"
	})
	c.changePool(t, "worker", maxUnavailable(2))
	const (
		openshift = "/apis/machineconfiguration.openshift.io/v1/"
		configs   = openshift + "containerruntimeconfigs/"
		nodes     = "/apis/holdfast.github.io/v1/containerruntimenodes/"
		none      = "=<nil>" // kubectl shows <none>
	)
	c.config(t, "new", workerLabel, "containerRuntimeConfig: {}") // nobody has looked at it yet
	c.haveColumns(t, configs+"new", "Condition"+none+" Updated"+none+" Degraded"+none+" Stores"+none, "Message"+none+" Layers"+none+" Images"+none+" Artifacts"+none)
	startController(t, c.server)
	c.config(t, "new", workerLabel, `
containerRuntimeConfig:
  additionalLayerStores: [{path: /var/lib/holdfast/store}]
  additionalImageStores: [{path: /mnt/a}, {path: /mnt/b}]
`)
	rendered := c.updated(t, "worker", "new")
	c.poolSays(t, "worker", apiv1.PoolStoresAvailable, "False", "/mnt/b")
	c.haveColumns(t, configs+"new", "Condition=Success Updated=True Degraded=False Stores=False",
		`Message=Success Layers=[{"path":"/var/lib/holdfast/store"}] Images=[{"path":"/mnt/a"},{"path":"/mnt/b"}] Artifacts`+none)
	c.haveColumns(t, openshift+"machineconfigpools/worker",
		"Config="+rendered+" Updated=True Updating=False Degraded=False Stores=False MachineCount=2 ReadyMachineCount=2 UpdatedMachineCount=2 DegradedMachineCount=0", "")
	c.haveColumns(t, openshift+"machineconfigs/"+rendered, "IgnitionVersion=3.2.0", "")
	c.haveColumns(t, nodes+"node-00", "Pool=worker State=Done Healthy=0 Withheld=0 CRI-O=1.37.0 Holdfast"+none,
		"Current="+rendered+" Desired="+rendered+" Message"+none)
	c.haveColumns(t, nodes+"node-01", "Pool=worker State=Done Healthy=1 Withheld=1 CRI-O=1.37.0 Holdfast=v1",
		"Current="+rendered+" Desired="+rendered+" Message=a message")

	c.config(t, "lost", "nobody", "containerRuntimeConfig: {additionalArtifactStores: [{path: /mnt/c, filter: {types: [a]}}]}")
	c.haveColumns(t, configs+"lost", "Condition=Failure Updated"+none+" Degraded"+none+" Stores"+none,
		"Message=could not find any MachineConfigPool set for ContainerRuntimeConfig lost Layers"+none+" Images"+none+` Artifacts=[{"filter":{"types":["a"]},"path":"/mnt/c"}]`)
}

// haveColumns waits until kubectl shows of an object what is wanted, between its name and its age,
// and, of wide columns, after that.
func (c *cluster) haveColumns(t *testing.T, path, want, wide string) {
	t.Helper()
	web := client(t, c.Config).Discovery().RESTClient()
	c.eventually(t, path+" has its columns", func(ctx context.Context) error {
		raw, err := web.Get().AbsPath(path).SetHeader("Accept", "application/json;as=Table;g=meta.k8s.io;v=v1").Do(ctx).Raw()
		if err != nil {
			return err
		}
		var table metav1.Table
		if err := json.Unmarshal(raw, &table); err != nil {
			return err
		}
		if len(table.Rows) != 1 || len(table.Rows[0].Cells) != len(table.ColumnDefinitions) {
			return fmt.Errorf("not one row: %s", raw)
		}
		var shown, more []string
		for i, d := range table.ColumnDefinitions {
			text := fmt.Sprintf("%s=%v", d.Name, table.Rows[0].Cells[i])
			if d.Priority > 0 {
				more = append(more, text)
			} else {
				shown = append(shown, text)
			}
		}
		first, last := shown[0], shown[len(shown)-1]
		if !strings.HasPrefix(first, "Name=") || !strings.HasPrefix(last, "Age=") || last == "Age=<nil>" {
			return fmt.Errorf("first %s, last %s", first, last)
		}
		if got, gotWide := strings.Join(shown[1:len(shown)-1], " "), strings.Join(more, " "); got != want || gotWide != wide {
			return fmt.Errorf("got\n%s\n%s\nwant\n%s\n%s", got, gotWide, want, wide)
		}
		return nil
	})
}
