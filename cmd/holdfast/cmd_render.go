// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/render"
)

// renderOptions are the flags of `holdfast render`.
type renderOptions struct {
	files         []string
	base, output  string
	pool          string
	labels        map[string]string
	withoutDaemon bool
}

// rendered is what `holdfast render` prints as JSON.
type rendered struct {
	Files    []renderedFile   `json:"files"`
	Problems []render.Problem `json:"problems"`
}

type renderedFile struct {
	Path string `json:"path"`
	Text string `json:"text"`
}

func newRenderCommand(g *globals) *cobra.Command {
	o := renderOptions{}
	cmd := &cobra.Command{
		Use:   "render -f FILE",
		Short: "Show what a ContainerRuntimeConfig makes of a node's files",
		Long: `Read ContainerRuntimeConfigs, check and merge them, and print the files that nodes
of their pool get. No cluster and no daemon are needed, and nothing on this machine is read
but the files that are named. Objects that want different things are named on stderr; the
rest of them is rendered.

Exit codes: 0 done, 1 failed, 2 wrong usage.`,
		Example: `  holdfast render -f crc.yaml
  holdfast render -f crc.yaml --base / -o /tmp/files
  holdfast render -f crc.yaml --pool gpu -o ignition | kubectl apply -f -`,
		Args: cli.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd, g) },
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.files, "filename", "f", nil, "a `file` with ContainerRuntimeConfigs, YAML or JSON; - is stdin; may be repeated")
	f.StringVar(&o.base, "base", "", "the root `directory` of a node's file system, or of a copy of its /etc: its files are added to")
	f.StringVarP(&o.output, "output", "o", "", "where to: a `directory`, or \"ignition\" for a MachineConfig on stdout")
	f.StringVar(&o.pool, "pool", "worker", "the `pool` of the MachineConfig")
	f.StringToStringVar(&o.labels, "labels", nil, "the pool's labels (`KEY=VALUE`,...): only objects that select it count; without, all do")
	f.BoolVar(&o.withoutDaemon, "without-daemon", false, "what a node gets on which the Holdfast daemon does not run")
	return cmd
}

func (o *renderOptions) run(cmd *cobra.Command, g *globals) error {
	if len(o.files) == 0 {
		return cli.Usage(errors.New("which objects? -f names a file"))
	}
	var objects []apiv1.ContainerRuntimeConfig
	for _, name := range o.files {
		more, err := readObjects(name, cmd.InOrStdin())
		if err != nil {
			return err
		}
		objects = append(objects, more...)
	}
	if o.labels != nil {
		var err error
		if objects, err = render.Select(objects, o.labels); err != nil {
			return err
		}
	}
	spec, problems := render.Merge(objects)
	base := render.NoBase
	if o.base != "" {
		base = render.BaseDir(o.base)
	}
	files, err := render.Files(spec, base, render.Options{WithoutDaemon: o.withoutDaemon})
	if err != nil {
		return fmt.Errorf("rendering: %w", err)
	}
	for _, p := range problems {
		fmt.Fprintf(cmd.ErrOrStderr(), "holdfast: %s (%s): %s\n", p.Reason, strings.Join(p.Objects, ", "), p.Message)
	}
	return o.write(cmd.OutOrStdout(), g, files, problems)
}

func (o *renderOptions) write(w io.Writer, g *globals, files []render.File, problems []render.Problem) error {
	switch {
	case o.output == "ignition":
		mc, err := render.MachineConfig(o.pool, files)
		if err != nil {
			return err
		}
		text, err := render.YAML(mc)
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	case o.output != "":
		for _, f := range files {
			name := filepath.Join(o.output, f.Path)
			err := os.MkdirAll(filepath.Dir(name), 0o755) //nolint:gosec // as on the node
			if err == nil {
				err = os.WriteFile(name, f.Data, 0o644) //nolint:gosec // as on the node
			}
			if err != nil {
				return fmt.Errorf("writing what was rendered: %w", err)
			}
			if !g.json {
				fmt.Fprintln(w, name)
			}
		}
		if !g.json {
			return nil
		}
	}
	r := rendered{Files: []renderedFile{}, Problems: problems}
	if r.Problems == nil {
		r.Problems = []render.Problem{}
	}
	for _, f := range files {
		r.Files = append(r.Files, renderedFile{f.Path, string(f.Data)})
	}
	return g.print(w, r, func() error {
		for i, f := range r.Files {
			if i > 0 {
				fmt.Fprintln(w)
			}
			fmt.Fprintf(w, "==> %s <==\n%s", f.Path, f.Text)
		}
		if len(files) == 0 {
			fmt.Fprintln(w, "nothing is to be written")
		}
		return nil
	})
}

// readObjects reads valid objects from a file, or from stdin.
func readObjects(name string, stdin io.Reader) ([]apiv1.ContainerRuntimeConfig, error) {
	if name == "-" {
		return render.Objects("stdin", stdin)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading objects: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	return render.Objects(name, f)
}
