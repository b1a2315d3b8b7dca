// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/control"
	"github.com/holdfast/holdfast/internal/pins"
	"github.com/holdfast/holdfast/internal/prepare"
	"github.com/holdfast/holdfast/internal/profile"
	"github.com/holdfast/holdfast/internal/rootsocket"
)

func TestMain(m *testing.M) {
	run := func() { os.Exit(Main()) }
	testscript.Main(m, map[string]func(){"holdfast": run, hookName: run})
}

// The scripts in testdata run the program against a daemon that only pretends.
// Beyond testscript's own commands they have:
//
//	daemon [hang]         starts the daemon; one that hangs accepts and never answers
//	requests FILE         writes what it was asked, a line each
//	exits CODE NAME ARGS  runs a command that must end with that exit code
//	layout DIR            writes an OCI layout with a sample image
//	registry [old|denied] starts a registry with that image, $IMAGE at $REGISTRY: one
//	                      without referrers, or where the account may only read
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv(configEnv, filepath.Join(e.WorkDir, "config.toml"))
			e.Setenv("TERM", "dumb")
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			for name, timeout := range map[string]string{"config.toml": "1m", "hasty.toml": "300ms"} {
				settings := fmt.Sprintf("root = %q\nrunroot = %q\nhook_timeout = %q\n", e.WorkDir+"/lib", e.WorkDir+"/run", timeout)
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), []byte(settings), 0o600); err != nil {
					return err
				}
			}
			return os.Mkdir(filepath.Join(e.WorkDir, "run"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"daemon": startDaemon, "requests": writeRequests, "exits": exits,
			"layout": makeLayout, "registry": startRegistry,
		},
	})
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("%s exits with %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func startDaemon(ts *testscript.TestScript, _ bool, args []string) {
	socket := ts.MkAbs("run/holdfast.sock")
	l, err := rootsocket.Listen(socket)
	ts.Check(err)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	ts.Defer(func() {
		stop()
		_ = l.Close()
		running.Wait()
	})
	if slices.Contains(args, "hang") {
		running.Go(func() { hang(ctx, l) })
		return
	}
	f := &fake{requests: ts.MkAbs("requests.log")}
	log := slog.New(slog.DiscardHandler)
	running.Go(func() { _ = control.Serve(ctx, l, f, http.NotFoundHandler(), log) })
}

// hang accepts connections and leaves them alone.
func hang(ctx context.Context, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = c.Close() })
		defer stop()
	}
}

func writeRequests(ts *testscript.TestScript, _ bool, args []string) {
	log, err := os.ReadFile(ts.MkAbs("requests.log"))
	if !errors.Is(err, os.ErrNotExist) {
		ts.Check(err)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), log, 0o600))
}

// fake is a daemon that writes down what it is asked for.
type fake struct {
	mu       sync.Mutex // protects the file
	requests string
}

func (f *fake) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	file, err := os.OpenFile(f.requests, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer file.Close() //nolint:errcheck // the script sees what is missing
	_, _ = fmt.Fprintf(file, format+"\n", args...)
}

func fakeLayer() prepare.LayerResult {
	return prepare.LayerResult{Digest: digest.FromString("layer"), Size: 3 << 20, Action: prepare.Lazy, ChainID: digest.FromString("x").Encoded(), Reason: "estargz"}
}

func (f *fake) Prepare(_ context.Context, req control.PrepareRequest, progress func(prepare.Event)) (*prepare.Result, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	f.note("prepare %s", body)
	if strings.Contains(req.Reference, "broken") {
		return nil, errors.New("the registry is on fire")
	}
	progress(prepare.Event{Layer: fakeLayer().Digest, Done: 1, Total: 3})
	if strings.Contains(req.Reference, "excluded") {
		return &prepare.Result{Reference: req.Reference, Reason: "excluded by the configuration"}, nil
	}
	return &prepare.Result{Reference: req.Reference, Layers: []prepare.LayerResult{fakeLayer()}, Duration: 1500 * time.Millisecond}, nil
}

func fakeImage() control.ImageStatus {
	return control.ImageStatus{
		References: []string{"quay.io/app:v1"}, Digest: digest.FromString("image"), Size: 3 << 20,
		Prepared: time.Unix(1_700_000_000, 0),
		Layers:   []control.LayerStatus{{LayerResult: fakeLayer(), State: "mounted", Index: "estargz", Percent: 12.5}},
	}
}

func (f *fake) Images(context.Context) ([]control.ImageStatus, error) {
	used := fakeImage()
	used.Digest, used.References = usedDigest(), []string{"quay.io/used:v1"}
	return []control.ImageStatus{fakeImage(), used}, nil
}

func (f *fake) Image(_ context.Context, ref string) (*control.ImageStatus, error) {
	f.note("image %s", ref)
	if ref != "quay.io/app:v1" {
		return nil, fmt.Errorf("%s: %w", ref, prepare.ErrUnknown)
	}
	img := fakeImage()
	return &img, nil
}

func (f *fake) Remove(_ context.Context, ref string) error {
	f.note("remove %s", ref)
	switch ref {
	case "quay.io/app:v1":
		return nil
	case "quay.io/used:v1":
		return fmt.Errorf("removing %s: %w: image quay.io/used:v1 in /storage", ref, prepare.ErrInUse)
	case usedDigest().String():
		return fmt.Errorf("removing it: %w: container db in /storage", prepare.ErrInUse)
	case fakeImage().Digest.String():
		return nil
	}
	return fmt.Errorf("%s: %w", ref, prepare.ErrUnknown)
}

func usedDigest() digest.Digest { return digest.FromString("used") }

func (f *fake) Collect(_ context.Context, req control.CollectRequest) (*prepare.Collection, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	f.note("gc %s", body)
	return &prepare.Collection{DryRun: req.DryRun, Freed: 3 << 20, Decisions: []prepare.Decision{
		{Kind: prepare.KindImage, Name: "quay.io/app:v1", Remove: true, Reason: "unused for 25h, grace period 24h", Bytes: 3 << 20},
		{Kind: prepare.KindImage, Name: "quay.io/used:v1", Reason: "in use: container db in /storage"},
	}}, nil
}

func (f *fake) Artifacts() artifacts.All {
	return artifacts.All{
		Directories: []string{"/run/holdfast/artifact-store/00"},
		Stores:      []artifacts.StoreStatus{{Path: "/mnt/models", Artifacts: 1, Filtered: 2, Shadowed: 3}, {Path: "/mnt/stick", Error: "it is not attached"}},
		Artifacts: []artifacts.Status{
			{Name: "quay.io/models/llama:8b", Digest: digest.FromString("llama"), Size: 3 << 30, Local: 3 << 30, State: artifacts.InStore, From: "/mnt/models"},
			{Name: "quay.io/models/lazy:1", Digest: digest.FromString("lazy"), Size: 2 << 30, Local: 1 << 20, State: artifacts.Lazy, From: "quay.io/models/lazy", Error: "slow"},
		},
		Patterns: map[string]string{"quay.io/x/*": "the registry does not list"},
	}
}

func (f *fake) PrepareArtifact(_ context.Context, req control.ArtifactRequest) error {
	f.note("prepare artifact %s %t", req.Reference, req.Wait)
	if strings.Contains(req.Reference, "broken") {
		return errors.New("the registry is on fire")
	}
	return nil
}

func (f *fake) RemoveArtifacts(_ context.Context, names []string) error {
	f.note("forget %s", strings.Join(names, " "))
	if names[0] == "quay.io/models/llama:8b" {
		return fmt.Errorf("artifact %s is %w", names[0], artifacts.ErrConfigured)
	}
	return nil
}

func fakeProfile() *profile.Profile {
	layers := []profile.Layer{{Digest: digest.FromString("layer"), Size: 3 << 20, Runs: 1}, {Digest: digest.FromString("top"), Size: 1 << 20, Runs: 1}}
	var touches []profile.Touch
	for i := range int64(12) {
		touches = append(touches, profile.Touch{Layer: int(i) / 11, Range: blob.Range{Offset: i << 16, Length: 1 << 10}})
	}
	return profile.New(fakeImage().Digest, layers, touches)
}

func (f *fake) profile(what, ref string) error {
	f.note("%s profile %s", what, ref)
	switch ref {
	case "quay.io/app:v1":
		return nil
	case "quay.io/used:v1":
		return fmt.Errorf("%s: %w", ref, prepare.ErrNoProfile)
	}
	return fmt.Errorf("%s: %w", ref, prepare.ErrUnknown)
}

func (f *fake) Profile(_ context.Context, ref string) (*profile.Profile, error) {
	return fakeProfile(), f.profile("show", ref)
}

func (f *fake) RecordProfile(_ context.Context, req control.RecordRequest) (*profile.Profile, error) {
	return fakeProfile(), f.profile("record for "+req.For.String(), req.Reference)
}

func (f *fake) PushProfile(_ context.Context, ref string) error {
	if err := f.profile("push", ref); err != nil {
		return err
	}
	return errors.New("there is no place to push to: the configuration has no index.publish")
}

func (f *fake) DropProfile(_ context.Context, ref string) error { return f.profile("drop", ref) }

func (f *fake) Pins() []pins.Pin {
	return []pins.Pin{
		{Name: "quay.io/app:v1", State: pins.Pinned, Digest: digest.FromString("app"), From: "registry", Configured: true},
		{Name: "quay.io/broken:v1", State: pins.Failed, Error: "not found"},
		{Name: "quay.io/large:v1", State: pins.Fetching, Done: 1 << 20, Total: 4 << 20},
	}
}

func (f *fake) Pin(names []string) error {
	f.note("pin %s", strings.Join(names, " "))
	return nil
}

func (f *fake) Unpin(names []string) error {
	f.note("unpin %s", strings.Join(names, " "))
	if names[0] == "quay.io/app:v1" {
		return fmt.Errorf("%s is %w", names[0], pins.ErrConfigured)
	}
	return nil
}

func (f *fake) Info() control.Info {
	return control.Info{Version: "v9", PID: 42, Started: time.Unix(1_700_000_000, 0), Mount: "file (as tested)"}
}
