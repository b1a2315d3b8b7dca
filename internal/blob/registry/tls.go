// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.podman.io/image/v5/pkg/tlsclientconfig"
)

// maxTransports bounds how many TLS settings are kept at once. More of them
// only means that connections are not shared.
const maxTransports = 64

// maxConns bounds the connections to a host: more than readers and background
// fetches keep busy, less than a registry or a proxy takes for an attack. What
// stalls gives its connection back after the stall timeout.
const maxConns = 128

// transports keeps one http.Transport per TLS setting: connections can only be
// shared where the settings are the same.
type transports struct {
	certsDirs     []string
	headerTimeout time.Duration

	mu   sync.Mutex                 // protects the fields below
	used map[tlsKey]*http.Transport // by setting
}

// tlsKey is a TLS setting: whether to verify, and the state of the directory
// with the certificates for a host, so that new files are noticed.
type tlsKey struct {
	insecure bool
	dir      string
	state    string
}

// get returns the transport for a host. The settings for it are taken from the
// certificate directories as they are now.
func (t *transports) get(hostPort string, insecure bool) (*http.Transport, error) {
	key := tlsKey{insecure: insecure}
	for _, dir := range t.certsDirs {
		path := filepath.Join(dir, hostPort)
		state, err := directoryState(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading certificates for %s: %w", hostPort, err)
		}
		key.dir, key.state = path, state
		break
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	if transport := t.used[key]; transport != nil {
		return transport, nil
	}
	transport, err := t.make(key)
	if err != nil {
		return nil, fmt.Errorf("reading certificates for %s: %w", hostPort, err)
	}
	if t.used == nil || len(t.used) >= maxTransports {
		t.forget()
	}
	t.used[key] = transport
	return transport, nil
}

// make creates the transport for a setting.
func (t *transports) make(key tlsKey) (*http.Transport, error) {
	config := &tls.Config{InsecureSkipVerify: key.insecure} //nolint:gosec // what registries.conf asks for
	if key.dir != "" {
		if err := tlsclientconfig.SetupCertificates(key.dir, config); err != nil {
			return nil, err
		}
	}
	dialer := &net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    15 * time.Second,
		ResponseHeaderTimeout:  t.headerTimeout,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    16,
		MaxConnsPerHost:        maxConns,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
		ForceAttemptHTTP2:      true, // a TLSClientConfig of one's own switches it off
		// An HTTP/2 connection that died silently would take all its streams along.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}, nil
}

// forget drops all transports. Requests under way go on. It needs mu.
func (t *transports) forget() {
	for _, transport := range t.used {
		transport.CloseIdleConnections()
	}
	t.used = make(map[tlsKey]*http.Transport)
}

func (t *transports) closeIdle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, transport := range t.used {
		transport.CloseIdleConnections()
	}
}

// directoryState describes the files of a directory such that the description
// changes when they do.
func directoryState(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, entry := range entries {
		// Stat follows links: mounted secrets are changed by moving one.
		info, err := os.Stat(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue // removed since, or a dangling link; loading tells if it matters
		}
		fmt.Fprintf(&b, "%s %d %d\n", entry.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return b.String(), nil
}
