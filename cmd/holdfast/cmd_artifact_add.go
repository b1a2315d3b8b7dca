// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/artifactstore"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/ocidir"
	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/bundle"
	"github.com/holdfast/holdfast/internal/cli"
	"github.com/holdfast/holdfast/internal/config"
	"github.com/holdfast/holdfast/internal/daemon"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexstore"
)

// addingArtifacts is what holdfast artifact add does.
type addingArtifacts struct {
	*globals
	as       string
	kind     string
	fileType string
	platform string
	follow   bool

	named map[string]string // what --as has given a name to
}

func newArtifactAddCommand(g *globals) *cobra.Command {
	o := &addingArtifacts{globals: g}
	cmd := storeCommand(&cobra.Command{
		Use:   "add STORE SOURCE...",
		Short: "Add artifacts to a store",
		Long: `Add artifacts to a store, which is made if it is not there. Everything is verified, and
durable before it is listed; a name that is there moves. Name the store in
artifact_stores of the configuration, or in additional_artifact_stores of CRI-O.

SOURCE is one of
  NAME                     an artifact in a registry, such as quay.io/models/llama:8b
  oci:DIRECTORY[:TAG]      an OCI layout, or just its directory; without a tag all it lists
  oci-archive:FILE[:TAG]   an uncompressed archive of one, or a bundle, or just the file
  PATH, file:PATH          files: all files and directories together become one artifact,
                           with the name that --as gives

Runtimes find artifacts by their full names. Layouts that other tools have written may
list tags only: --as quay.io/models/llama makes v1 quay.io/models/llama:v1.
` + exitCodes,
		Example: `  holdfast artifact add /mnt/models quay.io/models/llama:8b
  holdfast artifact add /mnt/models ./llama-8b --as quay.io/models/llama:8b
  holdfast artifact add /mnt/models oci:/media/usb/layout --as quay.io/models/llama
  holdfast artifact add /mnt/models file:weights.safetensors --as quay.io/models/llama:8b`,
		Args: cli.Args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			added, err := o.run(cmd.Context(), a[0], a[1:])
			if len(added) == 0 && err != nil {
				return err
			}
			return errors.Join(g.print(cmd.OutOrStdout(), added, func() error { return printArtifacts(cmd.OutOrStdout(), added) }), err)
		},
	})
	cmd.Flags().StringVar(&o.as, "as", "", "the full `name` of the artifact, or the repository of tags")
	cmd.Flags().StringVar(&o.kind, "type", "", "the artifact `type` of files, such as application/vnd.cncf.model.manifest.v1+json")
	cmd.Flags().StringVar(&o.fileType, "file-type", artifactstore.DefaultFileType, "the media `type` of each file")
	cmd.Flags().BoolVar(&o.follow, "follow-links", false, "follow links that lead out of a directory of files, as in a cache of Hugging Face")
	cmd.Flags().StringVar(&o.platform, "platform", image.Machine().String(), "the `platform` of an artifact that has several, OS/ARCHITECTURE[/VARIANT]")
	return cmd
}

// source is one SOURCE.
type source struct {
	name   string
	layout *ocidir.Layout // all of it is added
	file   bool
}

func parseSource(name string) source {
	if path, ok := strings.CutPrefix(name, "file:"); ok {
		return source{name: path, file: true}
	}
	path, isLayout := name, false
	for _, prefix := range []string{"oci:", "oci-archive:"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			path, isLayout = rest, true
		}
	}
	if _, err := os.Stat(path); err != nil {
		return source{name: name} // with a tag, or in a registry
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	l := ocidir.New(path)
	// One that is torn is not a directory of files: file: says that it is meant so.
	if _, err := os.Stat(filepath.Join(path, v1.ImageLayoutFile)); err == nil {
		isLayout = true
	}
	if _, err := l.Index(context.Background()); err == nil || isLayout {
		return source{name: name, layout: l}
	}
	return source{name: path, file: true}
}

// run adds sources until the first that fails.
func (o *addingArtifacts) run(ctx context.Context, path string, names []string) (all []artifactstore.Summary, err error) {
	all = []artifactstore.Summary{}
	platform, err := image.ParsePlatform(o.platform)
	if err != nil {
		return all, cli.Usage(err)
	}
	var files []string
	var others []source
	for _, n := range names {
		if s := parseSource(n); s.file {
			files = append(files, s.name)
		} else {
			others = append(others, s)
		}
	}
	if err := o.check(files, others); err != nil {
		return all, cli.Usage(err)
	}
	cfg, err := config.Load(o.config)
	if err != nil {
		return all, err
	}
	log, err := newLogger("warn")
	if err != nil {
		return all, err
	}
	client := registry.New(daemon.RegistryConfig(cfg, log))
	defer client.Close()
	store, err := openArtifacts(path, true)
	if err != nil {
		return all, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if len(files) > 0 {
		bars := o.bars()
		added, err := store.AddFiles(ctx, o.as, files, artifactstore.FileOptions{Type: o.kind, FileType: o.fileType, FollowLinks: o.follow, Progress: bars.showNamed})
		bars.stop()
		if err != nil {
			return all, err
		}
		all = append(all, *added)
	}
	for _, s := range others {
		added, err := o.add(ctx, store, image.Opener{Registry: client, Platform: platform}, s)
		all = append(all, added...)
		if err != nil {
			return all, err
		}
	}
	return all, nil
}

func (o *addingArtifacts) check(files []string, others []source) error {
	switch {
	case len(files) > 0 && len(others) > 0:
		return errors.New("files become an artifact of their own: add what is in layouts and registries by another command")
	case len(files) > 0:
		if o.as == "" {
			return fmt.Errorf("%s: give the artifact a name with --as, such as quay.io/models/llama:8b", strings.Join(files, " "))
		}
		_, err := artifactstore.CheckName(o.as)
		return err
	case o.kind != "":
		return errors.New("--type: only files have no type of their own")
	case o.as != "":
		_, err := reference.ParseNamed(o.as)
		if err != nil {
			return fmt.Errorf("--as %q: want a full name, or a repository: %w", o.as, err)
		}
	}
	return nil
}

// add adds what a source names.
func (o *addingArtifacts) add(ctx context.Context, store *artifactstore.Store, opener image.Opener, s source) (all []artifactstore.Summary, err error) {
	bars := o.bars()
	defer bars.stop()
	options := bundle.Options{Progress: bars.show}
	if s.layout != nil {
		origins, err := o.origins(ctx, s.layout)
		if err != nil {
			return nil, err
		}
		for _, origin := range origins {
			added, err := store.Add(ctx, origin, opener.Platform, options)
			if err != nil {
				return all, err
			}
			all = append(all, *added)
		}
		return all, nil
	}
	found, err := opener.Locate(ctx, s.name)
	if errors.Is(err, image.ErrName) {
		return nil, cli.Usage(err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Close()) }()
	reader, ok := found.Reader().(indexstore.Reader)
	if !ok {
		return nil, fmt.Errorf("%s cannot be added", s.name)
	}
	name := o.rename(found.Asked)
	if err := o.claim(name, s.name); err != nil {
		return nil, err
	}
	if name == "" {
		if name, err = found.FullName(ctx); err != nil {
			return nil, fmt.Errorf("%w (--as)", err)
		}
	}
	added, err := store.Add(ctx, bundle.Origin{Name: name, Asked: found.Asked, Reader: reader, Sources: found.Sources()}, opener.Platform, options)
	if err != nil {
		return nil, err
	}
	return []artifactstore.Summary{*added}, nil
}

// rename is the name that --as gives to what is called so where it is; "" if it gives none.
func (o *addingArtifacts) rename(tag string) string {
	ref, err := reference.ParseNamed(o.as)
	if err != nil {
		return ""
	}
	if !reference.IsNameOnly(ref) {
		return o.as
	}
	if full, ok := ocidir.FullName(tag); ok {
		_, tag, _ = ocidir.SplitTag(full)
	}
	tagged, err := reference.WithTag(ref, tag)
	if err != nil {
		return ""
	}
	return tagged.String()
}

// claim notes that --as gives a name to something: an error if it has given it to another
// thing, which would be lost.
func (o *addingArtifacts) claim(name, what string) error {
	if o.as == "" || name == "" {
		return nil
	}
	if other, taken := o.named[name]; taken {
		return cli.Usage(fmt.Errorf("--as %s: %s and %s would both be %s: add them by commands of their own", o.as, other, what, name))
	}
	if o.named == nil {
		o.named = map[string]string{}
	}
	o.named[name] = what
	return nil
}

// origins are all artifacts that a layout lists under a name, without what cosign keeps
// beside them.
func (o *addingArtifacts) origins(ctx context.Context, l *ocidir.Layout) (all []bundle.Origin, err error) {
	if err := l.CheckVersion(ctx); err != nil {
		return nil, err
	}
	idx, err := l.Index(ctx)
	if err != nil {
		return nil, err
	}
	kept, err := bundle.Names(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	for _, d := range idx.Manifests {
		tag := d.Annotations[v1.AnnotationRefName]
		if tag == "" && len(idx.Manifests) > 1 {
			continue // what refers to others
		}
		name := o.rename(tag)
		if full, ok := ocidir.FullName(tag); ok && !slices.Contains(kept, full) {
			continue
		} else if name == "" {
			name = full
		}
		if name == "" {
			return nil, cli.Usage(fmt.Errorf("%s lists %q, which is no full name: give it a repository with --as, such as quay.io/models/llama", l, tag))
		}
		if err := o.claim(name, fmt.Sprintf("%q of %s", tag, l)); err != nil {
			return nil, err
		}
		all = append(all, bundle.Origin{Name: name, Asked: d.Digest.String(), Reader: l, Sources: []blob.Source{l}})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s lists nothing that has a name", l)
	}
	return all, nil
}
