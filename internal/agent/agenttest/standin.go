// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"go.podman.io/storage"
	"go.podman.io/storage/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Behaviour is what a stand-in for CRI-O does beyond reading its configuration. It is read
// at each start.
type Behaviour struct {
	Version string        // "" is 1.37.0
	Delay   time.Duration // before it answers
	Never   bool          // it starts and never answers
}

const (
	behaviourFile = "/standin.json"
	crioSocket    = "/var/run/crio/crio.sock"
)

// standIn is CRI-O as far as its start is concerned: it reads the files that CRI-O reads, with the
// code that CRI-O has for it, and ends when CRI-O would (pkg/config/config.go, Validate).
// With only the check it ends when it would be ready.
func standIn(root string, onlyCheck bool) error {
	if err := errors.Join(unix.Chroot(root), unix.Chdir("/")); err != nil {
		return err
	}
	var b Behaviour
	if data, err := os.ReadFile(behaviourFile); err == nil {
		if err := json.Unmarshal(data, &b); err != nil {
			return err
		}
	}
	var c crioConfig
	options, err := types.LoadStoreOptions(types.LoadOptions{})
	if err != nil {
		return fmt.Errorf("reading storage.conf: %w", err)
	}
	if err := c.load(); err != nil {
		return err
	}
	options.GraphDriverOptions = append(options.GraphDriverOptions, c.CRIO.StorageOption...)
	store, err := storage.GetStore(options)
	if err != nil {
		return fmt.Errorf("validating root config: failed to get store to set defaults: %w", err)
	}
	defer store.Shutdown(false) //nolint:errcheck // it ends
	if err := c.validate(); err != nil {
		return err
	}
	if onlyCheck {
		return nil
	}
	if b.Never {
		select {}
	}
	time.Sleep(b.Delay)
	l, err := listen(crioSocket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(s, &runtimeService{version: b.Version})
	cri.RegisterImageServiceServer(s, &imageService{store: store})
	return s.Serve(l)
}

// crioConfig is what of crio.conf decides whether CRI-O starts.
type crioConfig struct {
	CRIO struct {
		StorageOption []string `toml:"storage_option"`
		Runtime       struct {
			DefaultRuntime           string         `toml:"default_runtime"`
			LogLevel                 string         `toml:"log_level"`
			PidsLimit                int64          `toml:"pids_limit"`
			LogSizeMax               int64          `toml:"log_size_max"`
			AdditionalArtifactStores []string       `toml:"additional_artifact_stores"`
			Runtimes                 map[string]any `toml:"runtimes"`
		} `toml:"runtime"`
	} `toml:"crio"`
}

// load reads crio.conf and then every file of crio.conf.d, whatever its name.
func (c *crioConfig) load() error {
	c.CRIO.Runtime.DefaultRuntime = "crun"
	c.CRIO.Runtime.Runtimes = map[string]any{"crun": nil}
	read := func(name string) error {
		if _, err := toml.DecodeFile(name, c); err != nil {
			return fmt.Errorf("unable to decode configuration %s: %w", name, err)
		}
		return nil
	}
	if err := read("/etc/crio/crio.conf"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return filepath.WalkDir("/etc/crio/crio.conf.d", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && d.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
		return read(path)
	})
}

func (c *crioConfig) validate() error {
	r := c.CRIO.Runtime
	for _, p := range r.AdditionalArtifactStores {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("additional_artifact_stores entry must be absolute: %q", p)
		}
	}
	if _, ok := r.Runtimes[r.DefaultRuntime]; !ok {
		return fmt.Errorf("default_runtime set to %q, but no runtime entry found", r.DefaultRuntime)
	}
	if r.LogSizeMax > 0 && r.LogSizeMax <= 8192 {
		return fmt.Errorf("log size max should be negative or >= 8192")
	}
	if !slices.Contains([]string{"", "fatal", "panic", "error", "warn", "info", "debug", "trace"}, r.LogLevel) {
		return fmt.Errorf("not a valid log level: %q", r.LogLevel)
	}
	// A store that cannot be opened is left out, one that is missing is made
	// (internal/ociartifact/store.go, New).
	for _, p := range r.AdditionalArtifactStores {
		if err := os.MkdirAll(filepath.Join(p, "artifacts"), 0o700); err == nil {
			if f, err := os.OpenFile(filepath.Join(p, "artifacts", "index.lock"), os.O_RDWR|os.O_CREATE, 0o644); err == nil {
				_ = f.Close()
			}
		}
	}
	return nil
}

type runtimeService struct {
	cri.UnimplementedRuntimeServiceServer
	version string
}

// Version is what the agent asks for.
func (s *runtimeService) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	v := s.version
	if v == "" {
		v = "1.37.0"
	}
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: "cri-o", RuntimeVersion: v, RuntimeApiVersion: "v1"}, nil
}

type imageService struct {
	cri.UnimplementedImageServiceServer
	store storage.Store
}

// ListImages fails as a whole if the layers of one image cannot be found, as CRI-O's does.
func (s *imageService) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	images, err := s.store.Images()
	if err != nil {
		return nil, err
	}
	r := &cri.ListImagesResponse{}
	for _, i := range images {
		for id := i.TopLayer; id != ""; {
			l, err := s.store.Layer(id)
			if err != nil {
				return nil, fmt.Errorf("image %s: %w", strings.Join(i.Names, ","), err)
			}
			id = l.Parent
		}
		r.Images = append(r.Images, &cri.Image{Id: i.ID, RepoTags: i.Names})
	}
	return r, nil
}
