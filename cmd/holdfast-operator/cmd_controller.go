// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/operator"
)

// controllerMemory is what the garbage collector works towards.
const controllerMemory = 64 << 20

func newControllerCommand() *cobra.Command {
	o := operator.Options{}
	var platform, features, kubeconfig string
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Bring the ContainerRuntimeConfigs of a cluster to its nodes",
		Long: `Merge the ContainerRuntimeConfigs that select a MachineConfigPool, and hand the result out to the
pool's nodes, as many at a time as its maxUnavailable says. On OpenShift the Machine Config Operator
does that; there one MachineConfig a pool is written for it.

Exit codes: 0 stopped, 1 failed or the lease is lost, 2 wrong usage.`,
		Example: `  holdfast-operator controller
  holdfast-operator controller --kubeconfig ~/.kube/config --leader-elect=false
  holdfast-operator controller --feature-set Off`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch o.Platform = operator.Platform(platform); o.Platform {
			case operator.Auto, operator.Kubernetes, operator.OpenShift:
			default:
				return cli.Usage(fmt.Errorf("there is no platform %q: want auto, kubernetes or openshift", platform))
			}
			var err error
			if o.FeatureSet, err = operator.ParseFeatureSet(features); err != nil {
				return cli.Usage(err)
			}
			if o.LeaderElection && o.Namespace == "" {
				return cli.Usage(errors.New("in which namespace is the lease? --leader-election-namespace names it, or --leader-elect=false if there is one controller only"))
			}
			config, err := clusterConfig(kubeconfig)
			if err != nil {
				return err
			}
			debug.SetMemoryLimit(controllerMemory)
			o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			return operator.Run(cmd.Context(), config, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", string(operator.Auto), "who brings files to nodes: `auto`, kubernetes (Holdfast's agents) or openshift (the Machine Config Operator)")
	f.StringVar(&features, "feature-set", string(operator.Default), "the feature set: `Default`, TechPreviewNoUpgrade (additional stores get a warning) or Off (they are refused)")
	f.BoolVar(&o.LeaderElection, "leader-elect", true, "let only one of several controllers work")
	f.StringVar(&o.Namespace, "leader-election-namespace", os.Getenv("POD_NAMESPACE"), "the `namespace` of the lease; the default is $POD_NAMESPACE")
	f.StringVar(&o.MetricsAddress, "metrics-bind-address", "0", "the `address` for metrics; 0 for none")
	f.StringVar(&o.ProbeAddress, "health-probe-bind-address", ":8081", "the `address` for /healthz and /readyz; 0 for none")
	addKubeconfig(cmd, &kubeconfig)
	return cmd
}
