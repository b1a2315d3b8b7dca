// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/shards"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// models is what loading a model was measured to take, from several places, and each
// time with eight readers, from a cold page cache.
type models struct {
	Size int64 `json:"size"` // of the model's file, in bytes
	// Pull is CRI-O's way: libartifact pulls through the line, then the file is read.
	Pull []time.Duration `json:"pull"`
	// Slow is a disk of 150 MB/s, Store an artifact store on this machine's disk, Network
	// one behind the line (by HTTP: no network file system is faster), each read
	// through the composed store but for Network.
	Slow    []time.Duration `json:"slow"`
	Store   []time.Duration `json:"store"`
	Network []time.Duration `json:"network"`
	// Lazy is from holdfast artifact prepare until all has been read, through the line.
	Lazy []time.Duration `json:"lazy"`
	// Complete is a lazy artifact that is complete, as containers mount it; Direct a copy
	// of the file on the same disk.
	Complete []time.Duration `json:"complete"`
	Direct   []time.Duration `json:"direct"`
	// First is from opening a lazy file to the first byte of its middle.
	First []time.Duration `json:"first"`
	// List is a list of two hundred artifacts in the composed store, and Single one of the
	// same in a single store.
	List   []time.Duration `json:"list"`
	Single []time.Duration `json:"single"`
}

const (
	modelReaders = 8
	slowRate     = 150e6 // bytes a second
	listed       = 200   // artifacts
	firstFiles   = 11
	firstSize    = 48 << 20
)

// modelRun is one run of the phase.
type modelRun struct {
	*bench
	stand   *lab.Stand
	program string // libartifact
	file    string // the model
	r       *models
}

// measureModels loads the same model from several places.
func (b *bench) measureModels(ctx context.Context) (err error) {
	m := &modelRun{bench: b, r: &b.report.Models}
	if err := m.makeModel(ctx); err != nil {
		return err
	}
	layer, err := testimage.ConvertBytes(ctx, testimage.Tar(), testimage.Gzip, testimage.Options{})
	if err != nil {
		return err
	}
	img := testimage.Image{Layers: []testimage.Layer{layer}} // the stand wants one
	if m.stand, err = b.newStand("models", img, "artifact_interval = \"1h\"\n"); err != nil {
		return err
	}
	defer func() { err = joined(err, m.stand.Close(ctx)) }()
	m.program = m.stand.Dir("libartifact")
	build := exec.CommandContext(ctx, "go", "build", "-tags", "exclude_graphdriver_btrfs,containers_image_openpgp", "-o", m.program, ".")
	build.Dir, build.Env = "test/libartifact", append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the reader of artifact stores (run bench in the project's directory): %w: %s", err, out)
	}
	if err := m.setUp(ctx); err != nil {
		return err
	}
	if err := m.list(ctx); err != nil { // while the daemon does nothing else
		return err
	}
	for range b.pairs {
		if err := m.pair(ctx); err != nil {
			return err
		}
	}
	return m.first(ctx)
}

// makeModel makes the model once, unless it is the user's own.
func (m *modelRun) makeModel(ctx context.Context) error {
	m.file = m.model
	if info, err := os.Stat(m.model); err == nil && info.Mode().IsRegular() {
		m.r.Size = info.Size()
		return nil
	}
	size, err := units.RAMInBytes(m.model)
	if err != nil {
		return fmt.Errorf("-model %q: want a size such as 4GiB, or a file", m.model)
	}
	m.r.Size, m.file = size, filepath.Join(m.dir, "sample", "model-"+m.model)
	if info, err := os.Stat(m.file); err == nil && info.Size() == size {
		return nil
	}
	m.log("making a model of %s", m.model)
	return lab.WriteWeights(ctx, m.file, size)
}

// setUp pushes the model, makes a store of it, and starts the daemon.
func (m *modelRun) setUp(ctx context.Context) error {
	store := m.stand.Dir("store")
	if err := m.holdfast(ctx, "artifact", "add", store, "file:"+m.file, "--as", storeName); err != nil {
		return err
	}
	blobs, err := filepath.Glob(filepath.Join(store, "artifacts", "blobs", "sha256", "*"))
	if err != nil {
		return err
	}
	for _, b := range blobs {
		info, err := os.Stat(b)
		if err != nil {
			return err
		}
		if info.Size() == m.r.Size {
			err = m.stand.Registry.AddBlobFile(m.file, digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(b)), info.Size())
			if err == nil {
				err = m.push("models/bench", map[string]v1.Descriptor{"model": {Digest: digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(b)), Size: info.Size()}})
			}
		}
		if err != nil {
			return err
		}
	}
	settings := fmt.Sprintf("[[artifact_stores]]\npath = %q\n", store)
	many := m.stand.Dir("many")
	for i := range listed {
		file := m.stand.Dir("small")
		if err := os.WriteFile(file, []byte(strconv.Itoa(i)), 0o600); err != nil {
			return err
		}
		if err := m.holdfast(ctx, "artifact", "add", many, file, "--as", fmt.Sprintf("quay.io/models/family/llama-%d:v1.2.3", i)); err != nil {
			return err
		}
	}
	settings += fmt.Sprintf("[[artifact_stores]]\npath = %q\n", many)
	config, err := os.OpenFile(m.stand.Daemon.Config(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = config.WriteString(settings)
	if err := errors.Join(err, config.Close()); err != nil {
		return err
	}
	if err := m.stand.Daemon.Start(ctx); err != nil {
		return err
	}
	return m.holdfast(ctx, "artifact", "index", m.stand.Registry.Host()+"/models/bench:1", "--push", "--output", m.stand.Dir("lists"))
}

const storeName = "quay.io/models/bench:1"

// push pushes an artifact whose files the registry has.
func (m *modelRun) push(repository string, files map[string]v1.Descriptor) error {
	doc := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: "application/vnd.cncf.model.manifest.v1+json",
		Config: v1.Descriptor{MediaType: v1.MediaTypeEmptyJSON, Digest: m.stand.Registry.AddBlob([]byte("{}")), Size: 2},
	}
	for name, d := range files {
		d.MediaType, d.Annotations = "application/octet-stream", map[string]string{v1.AnnotationTitle: name}
		doc.Layers = append(doc.Layers, d)
	}
	body, err := json.Marshal(doc)
	m.stand.Registry.AddManifest(repository, "1", v1.MediaTypeImageManifest, body)
	return err
}

func (m *modelRun) holdfast(ctx context.Context, args ...string) error {
	_, err := m.stand.Daemon.CLI(ctx, nil, args...)
	return err
}

// composed returns the file of an artifact, as CRI-O mounts it.
func (m *modelRun) composed(ctx context.Context, artifact, file string) (string, error) {
	dir := shards.Directories(filepath.Join(m.stand.Daemon.RunRoot(), "artifact-store"))[shards.Of(artifact)]
	out, err := exec.CommandContext(ctx, m.program, "paths", filepath.Join(dir, "artifacts"), artifact).Output()
	if err != nil {
		return "", fmt.Errorf("finding artifact %s: %w", artifact, err)
	}
	for line := range strings.Lines(string(out)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), file+" "); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s has no file %s", artifact, file)
}

// readAll reads a file with eight readers, each a part; rate is the most that comes a
// second, 0 for all that can.
func readAll(ctx context.Context, path string, rate float64) (time.Duration, error) {
	start := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	g, ctx := errgroup.WithContext(ctx)
	part := (info.Size() + modelReaders - 1) / modelReaders
	for i := range int64(modelReaders) {
		g.Go(func() error {
			r := io.NewSectionReader(f, i*part, max(0, min(part, info.Size()-i*part)))
			buf, done := make([]byte, 1<<20), int64(0)
			for ctx.Err() == nil {
				n, err := r.Read(buf)
				if err == io.EOF {
					return nil
				}
				if err != nil {
					return err
				}
				if done += int64(n); rate > 0 {
					time.Sleep(time.Until(start.Add(time.Duration(float64(done) * modelReaders / rate * float64(time.Second)))))
				}
			}
			return context.Cause(ctx)
		})
	}
	err = g.Wait()
	return time.Since(start), err
}

// far has the registry's copy in memory: it is another machine, whose disk is not ours.
func (m *modelRun) far(ctx context.Context) error {
	_, err := readAll(ctx, m.file, 0)
	return err
}

// pair loads the model from each place once.
func (m *modelRun) pair(ctx context.Context) error {
	ref := m.stand.Host() + "/models/bench:1"
	for _, step := range []struct {
		what string
		list *[]time.Duration
		far  bool // it is read from another machine
		load func() (time.Duration, error)
	}{
		{"CRI-O's way", &m.r.Pull, true, func() (time.Duration, error) { return m.pull(ctx, ref) }},
		{"slow disk", &m.r.Slow, false, func() (time.Duration, error) { return m.fromStore(ctx, slowRate) }},
		{"store on this disk", &m.r.Store, false, func() (time.Duration, error) { return m.fromStore(ctx, 0) }},
		{"store on the network", &m.r.Network, true, func() (time.Duration, error) { return m.overNetwork(ctx) }},
		{"lazily", &m.r.Lazy, true, func() (time.Duration, error) { return m.lazily(ctx, ref) }},
	} {
		if err := lab.DropPageCache(); err != nil {
			return err
		}
		if step.far {
			if err := m.far(ctx); err != nil {
				return err
			}
		}
		took, err := step.load()
		if err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
		*step.list = append(*step.list, took)
		m.log("%s: %.2f s, %.0f MB/s", step.what, took.Seconds(), float64(m.r.Size)/1e6/took.Seconds())
	}
	if err := m.complete(ctx, ref); err != nil {
		return err
	}
	return m.forget(ctx, ref)
}

func (m *modelRun) pull(ctx context.Context, ref string) (time.Duration, error) {
	store := m.stand.Dir("pulled")
	start := time.Now()
	if out, err := exec.CommandContext(ctx, m.program, "pull", store, ref).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("pulling: %w: %s", err, out)
	}
	out, err := exec.CommandContext(ctx, m.program, "paths", store, ref).Output()
	if err != nil {
		return 0, err
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if _, err := readAll(ctx, path, 0); err != nil {
		return 0, err
	}
	return time.Since(start), os.RemoveAll(store)
}

func (m *modelRun) fromStore(ctx context.Context, rate float64) (time.Duration, error) {
	path, err := m.composed(ctx, storeName, filepath.Base(m.file))
	if err != nil {
		return 0, err
	}
	return readAll(ctx, path, rate)
}

// overNetwork reads the file through a line of the same kind, in eight parts.
func (m *modelRun) overNetwork(ctx context.Context) (took time.Duration, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	server := &http.Server{Handler: http.FileServer(http.Dir(filepath.Dir(m.file))), ReadHeaderTimeout: time.Minute}
	var g errgroup.Group
	g.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	defer func() { err = joined(err, joined(server.Close(), g.Wait())) }()
	line, err := shape.Start(l.Addr().String(), shape.Line{RTT: m.rtt, Rate: m.report.Line.BytesPerSecond})
	if err != nil {
		return 0, err
	}
	defer func() { err = joined(err, line.Close()) }()
	start := time.Now()
	parts, ctx := errgroup.WithContext(ctx)
	part := (m.r.Size + modelReaders - 1) / modelReaders
	for i := range int64(modelReaders) {
		parts.Go(func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+line.Addr()+"/"+filepath.Base(m.file), nil)
			if err != nil {
				return err
			}
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", i*part, min((i+1)*part, m.r.Size)-1))
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				return err
			}
			_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{resp.Body}, make([]byte, 1<<20))
			return errors.Join(err, resp.Body.Close())
		})
	}
	err = parts.Wait()
	return time.Since(start), err
}

func (m *modelRun) lazily(ctx context.Context, ref string) (time.Duration, error) {
	start := time.Now()
	if err := m.holdfast(ctx, "artifact", "prepare", ref); err != nil {
		return 0, err
	}
	path, err := m.composed(ctx, ref, "model")
	if err != nil {
		return 0, err
	}
	if _, err := readAll(ctx, path, 0); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// complete compares the complete artifact with a copy of its file, in turns.
func (m *modelRun) complete(ctx context.Context, ref string) error {
	if err := m.holdfast(ctx, "artifact", "prepare", "--wait", ref); err != nil {
		return err
	}
	path, err := m.composed(ctx, ref, "model")
	if err != nil {
		return err
	}
	for i := range 6 {
		from, list := path, &m.r.Complete
		if i%2 == 1 {
			from, list = m.file, &m.r.Direct
		}
		if err := lab.DropPageCache(); err != nil {
			return err
		}
		took, err := readAll(ctx, from, 0)
		if err != nil {
			return err
		}
		*list = append(*list, took)
	}
	m.log("complete: %.2f s, the file itself %.2f s", median(m.r.Complete, time.Duration.Seconds).Seconds(), median(m.r.Direct, time.Duration.Seconds).Seconds())
	return nil
}

// forget makes the artifact cold again: its files go with the daemon's directories.
func (m *modelRun) forget(ctx context.Context, ref string) error {
	if err := m.holdfast(ctx, "artifact", "forget", ref); err != nil {
		return err
	}
	if err := m.stand.Daemon.Stop(); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(filepath.Dir(m.stand.Daemon.Store()), "artifacts")); err != nil {
		return err
	}
	return m.stand.Daemon.Start(ctx)
}

// first measures how soon a byte in the middle of a file comes.
func (m *modelRun) first(ctx context.Context) error {
	files := map[string]v1.Descriptor{}
	for i := range firstFiles {
		content := testimage.Bytes(firstSize, uint64(1000+i)) //nolint:gosec // small
		files[fmt.Sprintf("part-%02d", i)] = v1.Descriptor{Digest: m.stand.Registry.AddBlob(content), Size: firstSize}
	}
	if err := m.push("models/parts", files); err != nil {
		return err
	}
	if err := m.holdfast(ctx, "artifact", "index", m.stand.Registry.Host()+"/models/parts:1", "--push", "--output", m.stand.Dir("lists")); err != nil {
		return err
	}
	ref := m.stand.Host() + "/models/parts:1"
	if err := m.holdfast(ctx, "artifact", "prepare", ref); err != nil {
		return err
	}
	for name := range files {
		path, err := m.composed(ctx, ref, name)
		if err != nil {
			return err
		}
		time.Sleep(time.Second) // what the one before has set off is over
		start := time.Now()
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = f.ReadAt(make([]byte, 1), firstSize/2)
		m.r.First = append(m.r.First, time.Since(start))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	m.log("first byte of the middle: %.1f ms", median(m.r.First, time.Duration.Seconds).Seconds()*1e3)
	return nil
}

// list measures how long the runtimes' code takes to list two hundred artifacts, in a
// process that has done so before.
func (m *modelRun) list(ctx context.Context) (err error) {
	if m.r.List, err = m.times(ctx, shards.Directories(filepath.Join(m.stand.Daemon.RunRoot(), "artifact-store"))); err != nil {
		return err
	}
	m.r.Single, err = m.times(ctx, []string{m.stand.Dir("many")})
	m.logTook(err, "list: %.1f ms; of one store %.1f ms", seconds(m.r.List)*1e3, seconds(m.r.Single)*1e3)
	return err
}

func (m *modelRun) times(ctx context.Context, dirs []string) (all []time.Duration, err error) {
	args := []string{"time"}
	for _, dir := range dirs {
		args = append(args, filepath.Join(dir, "artifacts"))
	}
	out, err := exec.CommandContext(ctx, m.program, append(args, strconv.Itoa(m.rounds+1))...).Output()
	if err != nil {
		return nil, fmt.Errorf("listing artifacts: %w", err)
	}
	for _, line := range strings.Fields(string(out))[1:] {
		n, err := strconv.ParseInt(line, 10, 64)
		if err != nil {
			return nil, err
		}
		all = append(all, time.Duration(n))
	}
	return all, nil
}
