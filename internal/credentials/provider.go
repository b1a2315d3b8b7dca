// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

const (
	maxConfig   = 1 << 20 // bytes of a configuration of providers
	maxResponse = 1 << 20 // bytes that a plugin may print

	// pluginTimeout is kubelet's.
	pluginTimeout = time.Minute
)

// provider is one plugin, as kubelet's CredentialProviderConfig has it. See
// https://kubernetes.io/docs/tasks/administer-cluster/kubelet-credential-provider/.
type provider struct {
	Name                 string        `yaml:"name"`
	MatchImages          []string      `yaml:"matchImages"`
	DefaultCacheDuration time.Duration `yaml:"defaultCacheDuration"`
	APIVersion           string        `yaml:"apiVersion"`
	Args                 []string      `yaml:"args"`
	Env                  []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	TokenAttributes struct {
		RequireServiceAccount bool `yaml:"requireServiceAccount"`
	} `yaml:"tokenAttributes"`
}

// parseConfig reads a CredentialProviderConfig. Fields that are not known are
// left to newer versions of kubelet.
func parseConfig(data []byte) ([]provider, error) {
	var config struct {
		Kind       string     `yaml:"kind"`
		APIVersion string     `yaml:"apiVersion"`
		Providers  []provider `yaml:"providers"`
	}
	if err := yaml.Unmarshal(data, &config); err != nil {
		return nil, err
	}
	if config.Kind != "CredentialProviderConfig" || !isVersion(config.APIVersion, "kubelet.config.k8s.io") {
		return nil, fmt.Errorf("%q of %q is not a CredentialProviderConfig of kubelet.config.k8s.io", config.Kind, config.APIVersion)
	}
	seen := map[string]bool{}
	for _, p := range config.Providers {
		switch {
		case p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/\\ "):
			return nil, fmt.Errorf("provider %q: its name is not that of a program in a directory", p.Name)
		case seen[p.Name]:
			return nil, fmt.Errorf("provider %s is there twice", p.Name)
		case !isVersion(p.APIVersion, "credentialprovider.kubelet.k8s.io"):
			return nil, fmt.Errorf("provider %s: apiVersion %q is not known", p.Name, p.APIVersion)
		case len(p.MatchImages) == 0:
			return nil, fmt.Errorf("provider %s has no matchImages", p.Name)
		case p.DefaultCacheDuration < 0:
			return nil, fmt.Errorf("provider %s: defaultCacheDuration is negative", p.Name)
		}
		seen[p.Name] = true
	}
	return config.Providers, nil
}

func isVersion(version, group string) bool {
	group, v, _ := strings.Cut(strings.TrimPrefix(version, group), "/")
	return group == "" && slices.Contains([]string{"v1", "v1beta1", "v1alpha1"}, v)
}

func (p provider) matches(image string) bool {
	return slices.ContainsFunc(p.MatchImages, func(pattern string) bool { return matches(pattern, image) })
}

// response is what a plugin answers.
type response struct {
	scope string         // what the answer is good for: scopeImage, scopeRegistry or scopeGlobal
	life  *time.Duration // how long; nil: the provider's default
	auths auths
}

// The values of cacheKeyType.
const (
	scopeImage    = "Image"
	scopeRegistry = "Registry"
	scopeGlobal   = "Global"
)

// parseResponse reads a CredentialProviderResponse. Its errors quote nothing.
func parseResponse(data []byte, version string) (response, error) {
	var answer struct {
		Kind          string  `json:"kind"`
		APIVersion    string  `json:"apiVersion"`
		CacheKeyType  string  `json:"cacheKeyType"`
		CacheDuration *string `json:"cacheDuration"`
		Auth          map[string]struct {
			Username string `json:"username"`
			Password string `json:"password"`
		} `json:"auth"`
	}
	if json.Unmarshal(data, &answer) != nil || answer.Kind != "CredentialProviderResponse" || answer.APIVersion != version {
		return response{}, fmt.Errorf("its answer is not a CredentialProviderResponse of %s", version)
	}
	r := response{scope: answer.CacheKeyType, auths: auths{}}
	if !slices.Contains([]string{scopeImage, scopeRegistry, scopeGlobal}, r.scope) {
		return response{}, errors.New("its answer has no cacheKeyType that is known")
	}
	if answer.CacheDuration != nil {
		d, err := time.ParseDuration(*answer.CacheDuration)
		if err != nil || d < 0 {
			return response{}, errors.New("its answer has a cacheDuration that is none")
		}
		r.life = &d
	}
	for pattern, c := range answer.Auth {
		r.auths[pattern] = registry.Credentials{Username: c.Username, Password: c.Password}
	}
	return r, nil
}

// run asks the plugin about an image. What it prints on stderr is dropped: it
// may be anything.
func (p provider) run(ctx context.Context, dir, image string) (response, error) {
	request, err := json.Marshal(map[string]string{
		"kind": "CredentialProviderRequest", "apiVersion": p.APIVersion, "image": image,
	})
	if err != nil {
		return response{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, pluginTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, p.Name), p.Args...) //nolint:gosec // the node's configuration names it
	cmd.Env = os.Environ()
	for _, e := range p.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	out := &bounded{left: maxResponse, full: cancel}
	cmd.Stdin, cmd.Stdout = bytes.NewReader(request), out
	// What it started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	switch {
	case out.left < 0:
		return response{}, fmt.Errorf("it printed more than %d bytes", maxResponse)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return response{}, fmt.Errorf("no answer within %s", pluginTimeout)
	case err != nil:
		return response{}, err
	}
	return parseResponse(out.buf, p.APIVersion)
}

// bounded is a buffer for so many bytes. Whoever writes more is stopped: some
// programs do not mind that nobody takes what they print.
type bounded struct {
	buf  []byte
	left int
	full func()
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		b.full()
		return 0, io.ErrShortBuffer
	}
	b.buf = append(b.buf, p...)
	return len(p), nil
}

// readConfig reads the configuration of the providers.
func readConfig(name string) ([]provider, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration of credential providers: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		err = fmt.Errorf("it is larger than %d bytes", maxConfig)
	}
	var list []provider
	if err == nil {
		list, err = parseConfig(data)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the configuration of credential providers %s: %s", name, strings.Join(strings.Fields(err.Error()), " "))
	}
	return list, nil
}
