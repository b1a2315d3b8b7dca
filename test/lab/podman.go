// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Podman is the system's Podman with storage and configuration of its own.
type Podman struct {
	dir     string
	env     []string
	command []string
}

// PodmanOptions says what a Podman is told.
type PodmanOptions struct {
	ImageStore string // additional image store, "" for none
	// MoreStores are further ones, looked into after that.
	MoreStores []string
	Hook       string // pull hook, "" for none
	// HookConfig is the configuration of the daemon that the hook talks to.
	HookConfig string
	Insecure   []string // registries without TLS
	// Command is what runs Podman, with arguments to come; nil means the system's.
	Command []string
}

// registriesConf is a registries.conf.
func (o PodmanOptions) registriesConf() string {
	conf := "unqualified-search-registries = []\n"
	if o.Hook != "" {
		conf += fmt.Sprintf("additional-layer-store-auth-helper = %q\n", o.Hook)
	}
	for _, host := range o.Insecure {
		conf += fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", host)
	}
	return conf
}

// NewPodman returns a Podman in dir, which it creates.
func NewPodman(dir string, o PodmanOptions) (*Podman, error) {
	storage := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "run"))
	stores := o.MoreStores
	if o.ImageStore != "" {
		stores = slices.Insert(slices.Clone(stores), 0, o.ImageStore)
	}
	if len(stores) > 0 {
		storage += fmt.Sprintf("[storage.options]\nadditionalimagestores = [\"%s\"]\n", strings.Join(stores, `", "`))
	}
	for name, content := range map[string]string{
		"storage.conf":    storage,
		"registries.conf": o.registriesConf(),
		"policy.json":     `{"default":[{"type":"insecureAcceptAnything"}]}`,
		"containers.conf": "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\n" +
			fmt.Sprintf("tmp_dir = %q\n", filepath.Join(dir, "tmp")),
	} {
		if err := writeFile(filepath.Join(dir, name), content); err != nil {
			return nil, err
		}
	}
	if o.Command == nil {
		o.Command = []string{"podman"}
	}
	return &Podman{dir: dir, command: o.Command, env: []string{
		"CONTAINERS_STORAGE_CONF=" + filepath.Join(dir, "storage.conf"),
		"CONTAINERS_REGISTRIES_CONF=" + filepath.Join(dir, "registries.conf"),
		"CONTAINERS_CONF=" + filepath.Join(dir, "containers.conf"),
		"HOLDFAST_CONFIG=" + o.HookConfig,
	}}, nil
}

// Root is Podman's storage root.
func (p *Podman) Root() string { return filepath.Join(p.dir, "root") }

// Run runs podman with arguments and returns what it prints.
func (p *Podman) Run(ctx context.Context, args ...string) (string, error) {
	return run(ctx, p.env, p.command[0], slices.Concat(p.command[1:], args)...)
}

// Pull pulls an image.
func (p *Podman) Pull(ctx context.Context, ref string) error {
	_, err := p.Run(ctx, "pull", "--quiet", "--signature-policy", filepath.Join(p.dir, "policy.json"), ref)
	return err
}

// ContainerFlags make `podman run` work with what nested machines lack: see the
// man page of runc about cgroups, and capabilities(7) about CAP_SYS_RESOURCE.
func ContainerFlags() []string {
	return []string{"--rm", "--network=host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000", "--pull=never"}
}

// RunUntil runs a container, calls then (unless nil) when it prints a line that
// starts with ready, and returns how long that took and the rest of the line.
// It waits for the container to end.
func (p *Podman) RunUntil(ctx context.Context, ready string, then func(), args ...string) (time.Duration, string, error) {
	start := time.Now()
	cmd := command(ctx, p.env, p.command[0], slices.Concat(p.command[1:], []string{"run"}, ContainerFlags(), args)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, "", fmt.Errorf("starting container: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return 0, "", fmt.Errorf("starting container: %w", err)
	}
	var took time.Duration
	var line string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), ready); ok && took == 0 {
			took, line = time.Since(start), strings.TrimSpace(rest)
			if then != nil {
				then()
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		return 0, "", fmt.Errorf("podman run: %w: %s", err, tail(stderr.String()))
	}
	if took == 0 {
		return 0, "", fmt.Errorf("container ended without %q: %s", ready, tail(stderr.String()))
	}
	return took, line, nil
}

// Mount mounts the root of a new container of an image, until Reset.
func (p *Podman) Mount(ctx context.Context, ref string) (string, error) {
	id, err := p.Run(ctx, "create", "--pull=never", "--network=host", ref)
	if err != nil {
		return "", err
	}
	path, err := p.Run(ctx, "mount", strings.TrimSpace(id))
	return strings.TrimSpace(path), err
}

// Reset removes all containers and images.
func (p *Podman) Reset(ctx context.Context) error {
	_, err := p.Run(ctx, "rm", "--all", "--force", "--time=0")
	_, imgErr := p.Run(ctx, "rmi", "--all", "--force")
	return errors.Join(err, imgErr)
}

// Close removes everything that Podman keeps.
func (p *Podman) Close(ctx context.Context) error {
	err := p.Reset(ctx)
	if e := RemoveAll(p.dir); e != nil {
		return errors.Join(err, e)
	}
	if _, e := os.Stat(p.dir); e == nil {
		return errors.Join(err, fmt.Errorf("%s is still there", p.dir))
	}
	return err
}
