// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/courier"
)

// nodeVariable is the environment variable that names the node in a pod.
const nodeVariable = "NODE_NAME"

func newCourierCommand() *cobra.Command {
	o := courier.Options{}
	kubeconfig := ""
	cmd := &cobra.Command{
		Use:   "courier --node NAME",
		Short: "Carry between the API server and the agent of a node",
		Long: `Bring the configuration that the node's ContainerRuntimeNode names to
/etc/holdfast/containerruntimeconfigs/cluster.yaml, which the node's agent follows, and write to the
object's status what the agent reports. It runs in a pod that sees /etc/holdfast and
/var/lib/holdfast-agent of the node below --root; the agent is a service of the node.

While the API server does not answer, or what it says is not valid, the node keeps what it has.

Exit codes: 0 stopped, 1 failed, 2 wrong usage.`,
		Example: `  holdfast-operator courier --node worker-1
  NODE_NAME=worker-1 holdfast-operator courier --observe
  holdfast-operator courier --node worker-1 --root / --kubeconfig admin.kubeconfig`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Node = cmp.Or(o.Node, os.Getenv(nodeVariable))
			if o.Node == "" {
				return cli.Usage(errors.New("which node? --node or " + nodeVariable + " says"))
			}
			debug.SetMemoryLimit(memoryLimit)
			config, err := clusterConfig(kubeconfig)
			if err != nil {
				return err
			}
			config.UserAgent = "holdfast-courier/" + Version
			if o.Client, err = courier.NewClient(config); err != nil {
				return err
			}
			o.Version, o.Log = Version, slog.New(slog.NewTextHandler(os.Stderr, nil))
			c, err := courier.New(o)
			if err != nil {
				return err
			}
			c.Run(cmd.Context())
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", "", "the `name` of the node; the default is $"+nodeVariable)
	f.StringVar(&o.Root, "root", "/host", "the root `directory` of the node's file system")
	f.StringVar(&o.StateDir, "state-dir", agent.Defaults().StateDir, "the `directory` for what the agent remembers, on the node")
	addKubeconfig(cmd, &kubeconfig)
	f.BoolVar(&o.Observe, "observe", false, "only report: OpenShift's Machine Config Operator brings configurations to the node")
	return cmd
}
