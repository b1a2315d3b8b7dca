// SPDX-License-Identifier: Apache-2.0

// Package render makes the files of a node out of the objects of the API. It is
// pure: the same objects and the same base files give the same bytes, and
// nothing is read or written but through its arguments.
//
// What it renders are whole files, in which keys and comments of the base stay as
// they are: see package tomledit. Lists of stores are the base's, and ours after it.
package render

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/deploy"
	"github.com/holdfast/holdfast/internal/shards"
	"github.com/holdfast/holdfast/internal/tomledit"
)

// The files that are rendered. Those of CRI-O have the names that OpenShift's Machine
// Config Operator gives them (pkg/controller/container-runtime-config/helpers.go).
const (
	StorageConf    = "/etc/containers/storage.conf"
	DaemonConf     = "/etc/holdfast/config.toml"
	HookConf       = "/etc/containers/registries.conf.d/50-holdfast.conf"
	MirrorsConf    = "/etc/containers/registries.conf.d/51-holdfast-mirrors.conf"
	CRIODropIns    = "/etc/crio/crio.conf.d"
	criOPrefix     = CRIODropIns + "/01-ctrcfg-"
	LogLevelConf   = criOPrefix + "logLevel"
	PidsLimitConf  = criOPrefix + "pidsLimit"
	LogSizeMaxConf = criOPrefix + "logSizeMax"
	RuntimeConf    = criOPrefix + "defaultRuntime"
	ArtifactsConf  = criOPrefix + "additionalArtifactStores"
	ObjectsDir     = "/etc/holdfast/containerruntimeconfigs" // what a node is to have, which its agent follows
	ClusterObject  = ObjectsDir + "/cluster.yaml"            // of that, what the cluster says
	VendorStorage  = "/usr/share/containers/storage.conf"    // read where there is no StorageConf; never written
)

// Paths returns all files that may be rendered.
func Paths() []string {
	return []string{StorageConf, DaemonConf, HookConf, MirrorsConf, LogLevelConf, PidsLimitConf, LogSizeMaxConf, RuntimeConf, ArtifactsConf}
}

// File is a file of a node. All of them belong to root, and everybody may read them.
type File struct {
	Path string `json:"path"`
	Data []byte `json:"data"`
}

// Base returns what a file of the node holds without us; the error wraps
// [fs.ErrNotExist] if there is none.
type Base func(path string) ([]byte, error)

// NoBase is the base of a node of which nothing is known.
func NoBase(path string) ([]byte, error) {
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

// maxFile bounds the files that are read.
const maxFile = 4 << 20

// BaseDir reads base files below a directory, and nowhere else.
func BaseDir(dir string) Base {
	return func(path string) ([]byte, error) {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return nil, err
		}
		defer root.Close() //nolint:errcheck // only read
		info, err := root.Stat(strings.TrimPrefix(path, "/"))
		if err == nil && (!info.Mode().IsRegular() || info.Size() > maxFile) {
			err = fmt.Errorf("%s: want a file of at most 4 MiB", path)
		}
		if err != nil {
			return nil, err
		}
		return root.ReadFile(strings.TrimPrefix(path, "/"))
	}
}

// Options say what the objects do not.
type Options struct {
	// Prefix is where the daemon is installed; "" is /usr/local.
	Prefix string
	// WithoutDaemon renders what a node is to have on which the daemon does not run:
	// neither hook nor image store, and artifact stores as they are.
	WithoutDaemon bool
}

// Files renders a configuration. What it does not ask for is not among the files:
// then the base counts. They are sorted by path.
func Files(spec apiv1.ContainerRuntimeConfigSpec, base Base, o Options) ([]File, error) {
	paths, err := DaemonPaths(base)
	if err != nil {
		return nil, err
	}
	r := renderer{spec: spec, config: *cmp.Or(spec.ContainerRuntimeConfig, &apiv1.ContainerRuntimeConfiguration{}), base: base, paths: paths}
	r.daemon = !o.WithoutDaemon && UsesDaemon(spec, paths)
	for _, render := range []func() error{r.storage, r.dropIns, r.mirrors} {
		if err := render(); err != nil {
			return nil, err
		}
	}
	if r.daemon {
		r.add(HookConf, deploy.At(o.Prefix, deploy.PullHook))
		if err := r.daemonConfig(); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(r.files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return r.files, nil
}

type renderer struct {
	spec   apiv1.ContainerRuntimeConfigSpec
	config apiv1.ContainerRuntimeConfiguration
	base   Base
	paths  Daemon
	daemon bool // it runs
	files  []File
}

func (r *renderer) add(path string, data []byte) { r.files = append(r.files, File{path, data}) }

// Start is what the rendering of a file that others have a say in starts from: the
// node's own, where there is none the vendor's, and else what is the default.
func Start(path string, base Base) ([]byte, error) {
	names, text := []string{path}, ""
	switch path {
	case StorageConf:
		names, text = []string{path, VendorStorage}, noStorageConf
	case DaemonConf:
		text = noDaemonConf
	}
	for _, n := range names {
		data, err := base(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", n, err)
		}
		return data, nil
	}
	return []byte(text), nil
}

// document is a file to be changed.
func (r *renderer) document(path string) (*tomledit.Document, error) {
	data, err := Start(path, r.base)
	if err != nil {
		return nil, err
	}
	d, err := tomledit.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return d, nil
}

// noStorageConf is the storage.conf of a node that has none: the defaults, which
// CRI-O and Podman have without one.
const noStorageConf = `# Written by Holdfast since there was none. See containers-storage.conf(5).
[storage]
driver = "overlay"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
`

func (r *renderer) storage() error {
	var layers, images []string
	for _, s := range r.config.AdditionalLayerStores {
		if !r.paths.Own(s.Path) {
			// Runtimes tell a store the reference of the image that a layer is of if the path says
			// so, and all stores that there are need it.
			layers = append(layers, clean(s.Path)+":ref")
		}
	}
	for _, s := range r.config.AdditionalImageStores {
		images = append(images, clean(s.Path))
	}
	if r.daemon {
		// Last: whole images need no daemon.
		images = append(slices.DeleteFunc(images, func(p string) bool { return p == r.paths.Store }), r.paths.Store)
	}
	size := r.config.OverlaySize
	if len(layers)+len(images) == 0 && (size == nil || size.IsZero()) {
		return nil
	}
	d, err := r.document(StorageConf)
	if err != nil {
		return err
	}
	err = errors.Join(
		d.Append(layers, "storage", "options", "additionallayerstores"),
		d.Append(images, "storage", "options", "additionalimagestores"))
	if err == nil && size != nil && !size.IsZero() {
		// Its units are all powers of 1024, and a single letter (go-units, RAMInBytes).
		err = d.Set(strconv.FormatInt(size.Value(), 10), "storage", "options", "overlay", "size")
	}
	if err != nil {
		return fmt.Errorf("changing %s: %w", StorageConf, err)
	}
	r.add(StorageConf, d.Bytes())
	return nil
}

// dropIns are one file a setting, so that what is not asked for stays as CRI-O has it.
func (r *renderer) dropIns() error {
	add := func(path, key string, value any) error {
		literal, err := tomledit.Literal(value)
		if err != nil {
			return fmt.Errorf("rendering %s: %w", path, err)
		}
		r.add(path, fmt.Appendf(nil, "[crio]\n  [crio.runtime]\n    %s = %s\n", key, literal))
		return nil
	}
	c := r.config
	var all error
	if c.LogLevel != "" {
		all = errors.Join(all, add(LogLevelConf, "log_level", c.LogLevel))
	}
	if c.PidsLimit != nil {
		all = errors.Join(all, add(PidsLimitConf, "pids_limit", *c.PidsLimit))
	}
	if c.LogSizeMax != nil && !c.LogSizeMax.IsZero() {
		all = errors.Join(all, add(LogSizeMaxConf, "log_size_max", c.LogSizeMax.Value()))
	}
	if c.DefaultRuntime != "" {
		all = errors.Join(all, add(RuntimeConf, "default_runtime", string(c.DefaultRuntime)))
	}
	if stores := r.artifactStores(); len(stores) > 0 {
		all = errors.Join(all, add(ArtifactsConf, "additional_artifact_stores", stores))
	}
	return all
}

// artifactStores are what CRI-O is to read: the store that the daemon composes of
// all, or each of them.
func (r *renderer) artifactStores() []string {
	if r.daemon {
		if len(r.config.AdditionalArtifactStores) == 0 && (r.spec.Holdfast == nil || len(r.spec.Holdfast.Artifacts) == 0) {
			return nil
		}
		return shards.Directories(filepath.Join(r.paths.RunRoot, "artifact-store"))
	}
	var all []string
	for _, s := range r.config.AdditionalArtifactStores {
		if s.Filter == nil { // only the daemon can leave something out
			all = append(all, clean(s.Path))
		}
	}
	return all
}

// mirrors are told to the runtime, and to the daemon, which reads the same files.
func (r *renderer) mirrors() error {
	if r.spec.Holdfast == nil || len(r.spec.Holdfast.RegistryMirrors) == 0 {
		return nil
	}
	var b bytes.Buffer
	b.WriteString("# Written by Holdfast: spec.holdfast.registryMirrors of a ContainerRuntimeConfig.\n")
	for _, m := range r.spec.Holdfast.RegistryMirrors {
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %q\n", m.Source)
		if !strings.HasPrefix(m.Source, "*.") { // such an entry may not have a location
			fmt.Fprintf(&b, "location = %q\n", m.Source)
		}
		for _, mirror := range m.Mirrors {
			fmt.Fprintf(&b, "\n[[registry.mirror]]\nlocation = %q\n", mirror)
		}
	}
	if _, err := tomledit.Parse(b.Bytes()); err != nil {
		return fmt.Errorf("rendering %s: %w", MirrorsConf, err)
	}
	r.add(MirrorsConf, b.Bytes())
	return nil
}

// clean is the one spelling of a path.
func clean(p apiv1.StorePath) string { return filepath.Clean(string(p)) }
