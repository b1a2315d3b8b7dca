// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/cli"
)

// memoryLimit is what the garbage collector works towards.
const memoryLimit = 40 << 20

// nodeOptions are the flags of all commands that work on a node.
type nodeOptions struct {
	root, stateDir, socket, unit, systemctl, programs string
	readyTimeout                                      time.Duration
	withoutPrograms, retry, live                      bool
}

// addPlaces adds the flags that say where the node is, and what the agent remembers of it.
func (o *nodeOptions) addPlaces(cmd *cobra.Command) {
	d := agent.Defaults()
	f := cmd.Flags()
	f.StringVar(&o.root, "root", d.Root, "the root `directory` of the node's file system; another than / is an image that is being built: nothing is started or looked at")
	f.StringVar(&o.stateDir, "state-dir", d.StateDir, "the `directory` for what the agent remembers")
}

func (o *nodeOptions) addFlags(cmd *cobra.Command) {
	o.addPlaces(cmd)
	d := agent.Defaults()
	f := cmd.Flags()
	f.BoolVar(&o.live, "live", false, "--root is that of the running node, as a container sees it: units are started, stores are looked at")
	f.StringVar(&o.socket, "cri-socket", d.Socket, "CRI-O's `socket`")
	f.StringVar(&o.unit, "crio-unit", d.Unit, "CRI-O's systemd `unit`")
	f.StringVar(&o.systemctl, "systemctl", "", "the `program`, with arguments, that starts and stops units, if it is another than systemctl")
	f.StringVar(&o.programs, "programs", "", "the `directory` that the daemon is installed from; the default is that of this program")
	f.BoolVar(&o.withoutPrograms, "without-install", false, "do not install the daemon: the node has it, from a package")
	f.DurationVar(&o.readyTimeout, "ready-timeout", d.ReadyTimeout, "how long CRI-O may take to come up, before the old configuration is put back")
	f.BoolVar(&o.retry, "retry", false, "try again what CRI-O did not start with the last time, and restart it even if that takes stores away that do not answer")
}

func (o *nodeOptions) options() (agent.Options, error) {
	a := agent.Defaults()
	a.Root, a.StateDir, a.Socket, a.Unit, a.ReadyTimeout, a.Retry, a.Abandon = o.root, o.stateDir, o.socket, o.unit, o.readyTimeout, o.retry, o.retry
	a.Programs = o.programs
	if o.programs == "" {
		exe, err := os.Executable()
		if err != nil {
			return a, fmt.Errorf("finding our own program: %w", err)
		}
		a.Programs = filepath.Dir(exe)
	}
	if o.withoutPrograms {
		a.Programs = ""
	}
	switch {
	case o.systemctl != "":
		a.Systemctl = strings.Fields(o.systemctl)
	case o.live:
		a.Live = true
	case a.Root != "/":
		a.Systemctl, a.Offline = nil, true
	}
	return a, checkRoot()
}

func newAgentCommand(g *globals) *cobra.Command {
	o := nodeOptions{}
	var files []string
	once := false
	cmd := &cobra.Command{
		Use:   "agent --file FILE",
		Short: "Apply ContainerRuntimeConfigs on this node",
		Long: `Merge the ContainerRuntimeConfigs in files, and bring this node to what they say: the daemon
is installed and started if it is needed, each store is looked at, and what would keep CRI-O from
starting is withheld until it is well. CRI-O is restarted only if its configuration has changed;
if it does not come up, the old files are put back.

Without --once the agent goes on: it follows the files, and the stores.
` + exitCodes,
		Example: `  holdfast-operator agent --once --file crc.yaml
  holdfast-operator agent --file /etc/holdfast/containerruntimeconfigs
  holdfast-operator agent --once --file crc.yaml --root /mnt/image`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return cli.Usage(errors.New("which objects? --file names a file, or a directory of files"))
			}
			options, err := o.options()
			if err != nil {
				return err
			}
			source := agent.Source{Files: files}
			if once {
				return runOnce(cmd, g, options, source)
			}
			return serve(cmd, options, source)
		},
	}
	o.addFlags(cmd)
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "a `file` with ContainerRuntimeConfigs, or a directory of them; may be repeated")
	cmd.Flags().BoolVar(&once, "once", false, "apply them once, print what was done, and end")
	cmd.AddCommand(newStatusCommand(g))
	return cmd
}

func runOnce(cmd *cobra.Command, g *globals, options agent.Options, source agent.Source) error {
	options.Failures, options.Retry = 1, true // who asks wants to know now
	options.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	want, err := source.Load()
	if err != nil {
		return err
	}
	a, err := agent.New(options)
	if err != nil {
		return err
	}
	r, err := a.SyncAndReport(cmd.Context(), want)
	if err != nil {
		return err
	}
	if err := printReport(cmd.OutOrStdout(), g, r); err != nil {
		return err
	}
	switch r.Outcome {
	case agent.RolledBack, agent.Failed, agent.Waiting:
		return fmt.Errorf("%s: %s", r.Outcome, r.Error)
	}
	if !r.Complete() {
		return errPartly
	}
	return nil
}

func serve(cmd *cobra.Command, options agent.Options, source agent.Source) error {
	debug.SetMemoryLimit(memoryLimit)
	options.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	a, err := agent.New(options)
	if err != nil {
		return err
	}
	a.Run(cmd.Context(), source, func() {
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // whoever started us may not listen
	})
	return nil
}

func newStatusCommand(g *globals) *cobra.Command {
	o := nodeOptions{}
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Say what the agent found and did last",
		Long:    "Say what the agent found and did last: each store, CRI-O, the daemon, and what is wrong.\n" + exitCodes,
		Example: "  holdfast-operator agent status\n  holdfast-operator agent status --json",
		Args:    cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkRoot(); err != nil {
				return err
			}
			options := agent.Defaults()
			options.Root, options.StateDir = o.root, o.stateDir
			r, err := agent.LastReport(options)
			if err != nil {
				return err
			}
			return printReport(cmd.OutOrStdout(), g, r)
		},
	}
	o.addPlaces(cmd)
	return cmd
}

func printReport(out io.Writer, g *globals, r *agent.Report) error {
	return g.print(out, r, func() error {
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "outcome\t%s\n", r.Outcome)
		if r.Error != "" {
			fmt.Fprintf(w, "error\t%s\n", r.Error)
		}
		fmt.Fprintf(w, "CRI-O\t%s\n", describe(r.Runtime.Up, "up, "+r.Runtime.Version, "not running"))
		if r.Daemon.Wanted {
			fmt.Fprintf(w, "daemon\t%s\n", describe(r.Daemon.Up, strings.TrimSuffix("up, "+r.Daemon.Version, ", "), cmp.Or(r.Daemon.Reason, "is started when the node boots")))
		}
		for _, s := range r.Stores {
			fmt.Fprintf(w, "%s\t%s", s.Store, strings.ToLower(s.State))
			if s.Reason != "" {
				fmt.Fprintf(w, ": %s", s.Reason)
			}
			fmt.Fprintln(w)
		}
		for _, p := range r.Problems {
			fmt.Fprintf(w, "%s\t%s\n", strings.ToLower(p.Reason), p.Message)
		}
		for _, e := range r.Edits {
			fmt.Fprintf(w, "edited\t%s, found %s: %s\n", e.Path, e.Time.Format(time.DateTime), e.Action)
		}
		return w.Flush()
	})
}

func describe(up bool, yes, no string) string {
	if up {
		return yes
	}
	return no
}
