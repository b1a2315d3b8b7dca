// SPDX-License-Identifier: Apache-2.0

package control_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/rootsocket"
)

// socketEnv makes the test binary a client of that socket: see TestOtherUsers.
const socketEnv = "CONTROL_TEST_SOCKET"

func TestMain(m *testing.M) {
	if socket := os.Getenv(socketEnv); socket != "" {
		if _, err := control.NewClient(socket).Info(context.Background()); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// service answers with its functions; the others must not be called.
type service struct {
	prepare func(context.Context, control.PrepareRequest, func(prepare.Event)) (*prepare.Result, error)
	images  func() ([]control.ImageStatus, error)
	image   func(string) (*control.ImageStatus, error)
	remove  func(string) error
	collect func(control.CollectRequest) (*prepare.Collection, error)
	control.Profiles
	control.Pinning
	artifactService
}

func (s *service) Prepare(ctx context.Context, req control.PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error) {
	return s.prepare(ctx, req, progress)
}
func (s *service) Images(context.Context) ([]control.ImageStatus, error) { return s.images() }
func (s *service) Image(_ context.Context, ref string) (*control.ImageStatus, error) {
	return s.image(ref)
}
func (s *service) Remove(_ context.Context, ref string) error { return s.remove(ref) }
func (s *service) Collect(_ context.Context, req control.CollectRequest) (*prepare.Collection, error) {
	return s.collect(req)
}
func (s *service) Info() control.Info { return info() }

func info() control.Info {
	return control.Info{Version: "v9", PID: 42, Started: time.Unix(1_700_000_000, 0).UTC(), Mount: "file", Disabled: "why"}
}

// serve serves until the end of the test, or until stop is called.
func serve(t *testing.T, s *service) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "control.sock")
	l, err := rootsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "metrics 1\n") })
	go func() { done <- control.Serve(ctx, l, s, metrics, slog.New(slog.DiscardHandler)) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the server does not end")
		}
	}
	t.Cleanup(stop)
	return socket, stop
}

func status() control.ImageStatus {
	return control.ImageStatus{
		References: []string{"quay.io/app:v1"}, Digest: digest.FromString("image"), Size: 7,
		Layers: []control.LayerStatus{{State: "mounted", Percent: 12.5, LayerResult: prepare.LayerResult{Action: prepare.Lazy}}},
	}
}

func TestRoundTrip(t *testing.T) {
	result := &prepare.Result{Reference: "quay.io/app:v1", Digest: digest.FromString("image"), Duration: time.Second,
		Layers: []prepare.LayerResult{{Digest: digest.FromString("layer"), Action: prepare.Fetched, Reason: "because"}}}
	events := []prepare.Event{{Layer: digest.FromString("layer"), Total: 10}, {Layer: digest.FromString("layer"), Done: 10, Total: 10}}
	request := control.PrepareRequest{
		Reference: "quay.io/app:v1", Hook: true,
		Credentials: &control.Credentials{Username: "u", Password: "p", IdentityToken: "t"},
	}
	var removed string
	hour := time.Hour
	var asked []control.CollectRequest
	collection := &prepare.Collection{Freed: 7, Decisions: []prepare.Decision{{Kind: prepare.KindImage, Name: "x", Remove: true, Reason: "why", Bytes: 7}}}
	socket, _ := serve(t, &service{
		prepare: func(_ context.Context, got control.PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error) {
			if diff := cmp.Diff(request, got); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			for _, e := range events {
				progress(e)
			}
			return result, nil
		},
		images: func() ([]control.ImageStatus, error) { return []control.ImageStatus{status()}, nil },
		image: func(ref string) (*control.ImageStatus, error) {
			if ref != "a/b&c=d#e" {
				t.Errorf("reference %q", ref)
			}
			s := status()
			return &s, nil
		},
		remove: func(ref string) error { removed = ref; return nil },
		collect: func(got control.CollectRequest) (*prepare.Collection, error) {
			asked = append(asked, got)
			return collection, nil
		},
	})
	c := control.NewClient(socket)

	var got []prepare.Event
	res, err := c.Prepare(t.Context(), request, func(e prepare.Event) { got = append(got, e) })
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(result, res); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(events, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if _, err := c.Prepare(t.Context(), request, nil); err != nil {
		t.Errorf("without progress: %v", err)
	}
	all, err := c.Images(t.Context())
	if diff := cmp.Diff([]control.ImageStatus{status()}, all); diff != "" || err != nil {
		t.Errorf("images: error %v, (-want +got):\n%s", err, diff)
	}
	one, err := c.Image(t.Context(), "a/b&c=d#e")
	if err != nil || one.Digest != status().Digest {
		t.Errorf("image %+v, error %v", one, err)
	}
	if err := c.Remove(t.Context(), "a/b&c=d#e"); err != nil || removed != "a/b&c=d#e" {
		t.Errorf("removed %q, error %v", removed, err)
	}
	requests := []control.CollectRequest{{}, {Grace: &hour, DryRun: true}}
	for _, r := range requests {
		done, err := c.Collect(t.Context(), r)
		if diff := cmp.Diff(collection, done); diff != "" || err != nil {
			t.Errorf("collection: error %v, (-want +got):\n%s", err, diff)
		}
	}
	if diff := cmp.Diff(requests, asked); diff != "" {
		t.Errorf("collections (-want +got):\n%s", diff)
	}
	i, err := c.Info(t.Context())
	if diff := cmp.Diff(info(), i); diff != "" || err != nil {
		t.Errorf("info: error %v, (-want +got):\n%s", err, diff)
	}
}

func TestErrors(t *testing.T) {
	boom := errors.New("boom")
	var answer error
	socket, _ := serve(t, &service{
		prepare: func(context.Context, control.PrepareRequest, func(prepare.Event)) (*prepare.Result, error) {
			return nil, answer
		},
		images:  func() ([]control.ImageStatus, error) { return nil, answer },
		image:   func(string) (*control.ImageStatus, error) { return nil, answer },
		remove:  func(string) error { return answer },
		collect: func(control.CollectRequest) (*prepare.Collection, error) { return nil, answer },
	})
	c := control.NewClient(socket)
	known := []error{prepare.ErrUnknown, prepare.ErrInUse}
	for _, answer = range []error{prepare.ErrUnknown, prepare.ErrInUse, control.ErrBadRequest, boom} {
		answer = fmt.Errorf("about it: %w", answer)
		calls := map[string]error{"remove": c.Remove(t.Context(), "x")}
		_, calls["image"] = c.Image(t.Context(), "x")
		_, calls["images"] = c.Images(t.Context())
		_, calls["gc"] = c.Collect(t.Context(), control.CollectRequest{})
		for name, err := range calls {
			if err == nil || err.Error() != answer.Error() {
				t.Errorf("%s: error %v, want %v", name, err, answer)
			}
			for _, k := range known {
				if errors.Is(err, k) != errors.Is(answer, k) {
					t.Errorf("%s: error %v is %v: %v", name, err, k, errors.Is(err, k))
				}
			}
		}
		_, err := c.Prepare(t.Context(), control.PrepareRequest{}, nil)
		if err == nil || err.Error() != answer.Error() {
			t.Errorf("prepare: error %v, want %v", err, answer)
		}
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, socket := range []string{filepath.Join(dir, "none"), dead} {
		_, err := control.NewClient(socket).Info(t.Context())
		if !errors.Is(err, control.ErrNotRunning) || !strings.Contains(err.Error(), socket) {
			t.Errorf("error %v", err)
		}
	}
	// A socket that a dead daemon left is replaced.
	l, err = rootsocket.Listen(dead)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dead); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// post sends what a client of ours would not.
func post(t *testing.T, socket, method, path string, body io.Reader) (int, string) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://holdfast"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(text)
}

func TestBadRequests(t *testing.T) {
	socket, _ := serve(t, &service{})
	huge := `{"reference":"` + strings.Repeat("x", 2<<20) + `"}`
	for name, c := range map[string]struct {
		method, path, body string
		want               int
	}{
		"no JSON":         {http.MethodPost, "/v1/prepare", "}{", 400},
		"nothing":         {http.MethodPost, "/v1/prepare", "", 400},
		"another type":    {http.MethodPost, "/v1/prepare", "[]", 400},
		"gc without JSON": {http.MethodPost, "/v1/gc", "}{", 400},
		"huge":            {http.MethodPost, "/v1/prepare", huge, 400},
		"no such path":    {http.MethodGet, "/v2/prepare", "", 404},
		"no such method":  {http.MethodPut, "/v1/prepare", "{}", 405},
	} {
		if got, text := post(t, socket, c.method, c.path, strings.NewReader(c.body)); got != c.want {
			t.Errorf("%s: status %d: %s", name, got, text)
		}
	}
	if got, text := post(t, socket, http.MethodGet, "/metrics", http.NoBody); got != 200 || text != "metrics 1\n" {
		t.Errorf("metrics: status %d: %s", got, text)
	}
}

// A client that leaves ends what was done for it.
func TestClientLeaves(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	socket, _ := serve(t, &service{
		prepare: func(ctx context.Context, _ control.PrepareRequest, _ func(prepare.Event)) (*prepare.Result, error) {
			close(started)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		},
	})
	why := errors.New("patience is at its end")
	ctx, leave := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := control.NewClient(socket).Prepare(ctx, control.PrepareRequest{}, nil)
		done <- err
	}()
	<-started
	leave(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("client: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the service goes on")
	}
}

// A server that ends lets requests finish, for a moment.
func TestServerEnds(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	socket, stop := serve(t, &service{
		prepare: func(context.Context, control.PrepareRequest, func(prepare.Event)) (*prepare.Result, error) {
			close(started)
			<-release
			return &prepare.Result{Reference: "done"}, nil
		},
	})
	done := make(chan error, 1)
	go func() {
		res, err := control.NewClient(socket).Prepare(t.Context(), control.PrepareRequest{}, nil)
		if err == nil && res.Reference != "done" {
			err = fmt.Errorf("result %+v", res)
		}
		done <- err
	}()
	<-started
	go func() {
		// Once nobody can connect any more, the end has begun.
		for {
			c, err := net.Dial("unix", socket)
			if err != nil {
				close(release)
				return
			}
			_ = c.Close()
		}
	}()
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A request that does not end by itself is ended.
func TestServerEndsAStuckRequest(t *testing.T) {
	started := make(chan struct{})
	var ended atomic.Bool
	socket, stop := serve(t, &service{
		prepare: func(ctx context.Context, _ control.PrepareRequest, _ func(prepare.Event)) (*prepare.Result, error) {
			close(started)
			<-ctx.Done()
			ended.Store(true)
			return nil, ctx.Err()
		},
	})
	done := make(chan error, 1)
	go func() {
		_, err := control.NewClient(socket).Prepare(t.Context(), control.PrepareRequest{}, nil)
		done <- err
	}()
	<-started
	stop()
	if !ended.Load() {
		t.Error("the server has ended, the request has not")
	}
	if err := <-done; err == nil {
		t.Error("the client got no error")
	}
}

// The mode of the socket keeps others out; and should it not, we do.
func TestOtherUsers(t *testing.T) {
	socket, _ := serve(t, &service{})
	client := func() (string, error) {
		exe := copyOfMyself(t)
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), socketEnv+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	open(t, filepath.Dir(socket))
	if out, err := client(); err == nil || !strings.Contains(out, "permission denied") {
		t.Errorf("error %v: %s", err, out)
	}
	if err := os.Chmod(socket, 0o666); err != nil { //nolint:gosec // what is tested
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if out, err := client(); !errors.As(err, &exit) || strings.Contains(out, "permission denied") || out == "" {
		t.Errorf("with an open socket: error %v: %s", err, out)
	}
	if _, err := control.NewClient(socket).Info(t.Context()); err != nil {
		t.Errorf("root: %v", err)
	}
}

// copyOfMyself puts the test binary where everybody can run it.
func copyOfMyself(t *testing.T) string {
	t.Helper()
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	open(t, dir)
	name := filepath.Join(dir, "client")
	if err := os.WriteFile(name, exe, 0o755); err != nil { //nolint:gosec // others run it
		t.Fatal(err)
	}
	return name
}

// open lets everybody into a directory of the test.
func open(t *testing.T, dir string) {
	t.Helper()
	for ; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // for other users
			t.Fatal(err)
		}
	}
}

func TestSecretsStayOutOfLogs(t *testing.T) {
	c := control.Credentials{Username: "u", Password: "hunter2", IdentityToken: "token"}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "c", c, "p", &c)
	text := fmt.Sprintf("%v %+v %#v %s %v", c, c, c, c, &c) + log.String()
	if strings.Contains(text, "hunter2") || strings.Contains(text, "token") {
		t.Error(text)
	}
}
