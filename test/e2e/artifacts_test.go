// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/artifacts"
	"github.com/holdfast/holdfast/internal/mount"
	"github.com/holdfast/holdfast/internal/shards"
	"github.com/holdfast/holdfast/internal/testimage"
)

// libartifact is the program that reads artifact stores as CRI-O does, built once.
var libartifact = sync.OnceValues(func() (string, error) {
	program := filepath.Join(filepath.Dir(holdfast), "libartifact")
	build := exec.Command("go", "build", "-tags", "exclude_graphdriver_btrfs,containers_image_openpgp", "-o", program, ".")
	build.Dir, build.Env = "../libartifact", append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building libartifact: %w\n%s", err, out)
	}
	return program, nil
})

const modelType = "application/vnd.cncf.model.manifest.v1+json"

// pushArtifact pushes an artifact to the node's registry, with files under these names.
func (n *node) pushArtifact(repository, tag, artifactType string, files map[string][]byte) string {
	n.t.Helper()
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: v1.Descriptor{MediaType: v1.MediaTypeEmptyJSON, Digest: n.registry.AddBlob([]byte("{}")), Size: 2},
	}
	for name, content := range files {
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: "application/octet-stream", Digest: n.registry.AddBlob(content), Size: int64(len(content)),
			Annotations: map[string]string{v1.AnnotationTitle: name},
		})
	}
	slices.SortFunc(m.Layers, func(a, b v1.Descriptor) int {
		return strings.Compare(a.Annotations[v1.AnnotationTitle], b.Annotations[v1.AnnotationTitle])
	})
	body, err := json.Marshal(m)
	n.must(err)
	n.registry.AddManifest(repository, tag, v1.MediaTypeImageManifest, body)
	return n.registry.Host() + "/" + repository + ":" + tag
}

// reads runs libartifact on a store.
func (n *node) reads(store string, args ...string) string {
	n.t.Helper()
	program, err := libartifact()
	n.must(err)
	return n.output(nil, append([]string{program, args[0], filepath.Join(store, "artifacts")}, args[1:]...)...)
}

// composed are the directories of the composed store.
func (n *node) composed() []string {
	return shards.Directories(filepath.Join(n.daemon.RunRoot(), "artifact-store"))
}

// offers returns the names that runtimes see, sorted, each with its digest.
func (n *node) offers() map[string]string {
	n.t.Helper()
	all := map[string]string{}
	dirs := n.composed()
	for i, dir := range dirs[1:] {
		dirs[i+1] = filepath.Join(dir, "artifacts")
	}
	for line := range strings.Lines(n.reads(dirs[0], append([]string{"list"}, dirs[1:]...)...)) {
		name, dgst, _ := strings.Cut(strings.TrimSpace(line), " ")
		if all[name] != "" {
			n.t.Errorf("%s is there twice", name)
		}
		all[name] = dgst
	}
	return all
}

// mounted returns where the files of an artifact are, as a runtime would mount them;
// nothing if it could not.
func (n *node) mounted(name string) map[string]string {
	n.t.Helper()
	program, err := libartifact()
	n.must(err)
	dir := shards.Directories(filepath.Join(n.daemon.RunRoot(), "artifact-store"))[shards.Of(name)]
	out, err := exec.CommandContext(n.t.Context(), program, "paths", filepath.Join(dir, "artifacts"), name).Output()
	if err != nil {
		return nil
	}
	files := map[string]string{}
	for line := range strings.Lines(string(out)) {
		file, path, _ := strings.Cut(strings.TrimSpace(line), " ")
		files[file] = path
	}
	return files
}

// artifact is the state of one that the daemon offers.
func (n *node) artifact(name string) *artifacts.Status {
	n.t.Helper()
	all, err := n.daemon.Client().Artifacts(n.t.Context())
	n.must(err)
	for _, s := range all.Artifacts {
		if s.Name == name {
			return &s
		}
	}
	return nil
}

func (n *node) sameFile(path string, want []byte) {
	n.t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		n.t.Errorf("%s: %d bytes that are not the %d of the file, error %v\n%s", path, len(got), len(want), err, n.log())
	}
}

func weights(size int, seed byte) []byte {
	p := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p) // never fails
	return p
}

// sumInContainer is the digest of a file as an unprivileged process reads it that has it
// by a bind mount in a mount namespace of its own, which is how runtimes mount artifacts.
func (n *node) sumInContainer(path string) digest.Digest {
	n.t.Helper()
	out := n.output(nil, "unshare", "--mount", "sh", "-ec",
		`mount -t tmpfs -o mode=755 tmpfs /mnt; touch /mnt/file; mount --bind "$1" /mnt/file; exec setpriv --reuid=1000 --regid=1000 --clear-groups sha256sum /mnt/file`, "sh", path)
	sum, _, _ := strings.Cut(out, " ")
	return digest.NewDigestFromEncoded(digest.SHA256, sum)
}

// A store is made of all kinds of sources; CRI-O's code and Podman's artifact commands
// read it.
func TestArtifactStore(t *testing.T) {
	n := newNode(t, nodeOptions{})
	model := map[string][]byte{"config.json": []byte(`{"a":1}`), "weights-1.bin": weights(3<<20, 1), "weights-2.bin": weights(1<<20+5, 2)}
	pulled := n.pushArtifact("models/llama", "8b", modelType, model)
	store := n.path("store")
	n.holdfast("artifact", "add", store, pulled)
	dir := n.path("model")
	n.must(os.Mkdir(dir, 0o700))
	for name, content := range model {
		n.must(os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	const local, second, bare = "quay.io/models/local:1", "quay.io/models/second:1", "quay.io/models/skopeo:v7"
	n.holdfast("artifact", "add", store, dir, "--as", local, "--type", modelType)
	n.holdfast("artifact", "add", store, dir, "--as", second, "--type", modelType)
	// Written by another tool, with a bare tag.
	n.output(nil, "skopeo", "copy", "--quiet", "--src-tls-verify=false", "docker://"+pulled, "oci:"+n.path("layout")+":v7")
	n.holdfast("artifact", "add", store, "oci:"+n.path("layout"), "--as", "quay.io/models/skopeo")

	list := n.reads(store, "list")
	digests := map[string]bool{}
	for _, name := range []string{pulled, local, second, bare} {
		_, rest, ok := strings.Cut("\n"+list, "\n"+name+" ")
		dgst, _, _ := strings.Cut(rest, "\n")
		if !ok || digests[dgst] {
			t.Errorf("%s is not listed, or has the digest of another: %s", name, list)
		}
		digests[dgst] = true
		for line := range strings.Lines(n.reads(store, "paths", name)) {
			file, path, _ := strings.Cut(strings.TrimSpace(line), " ")
			n.sameFile(path, model[file])
		}
		// By its digest, as kubelet has it mounted.
		if got := n.reads(store, "inspect", strings.TrimPrefix(dgst, "sha256:")); !strings.Contains(got, "weights-2.bin") {
			t.Errorf("%s by its digest %s: %s", name, dgst, got)
		}
	}
	if got := n.holdfast("artifact", "verify", store); !strings.Contains(got, ": 0 problems") {
		t.Error(got)
	}
	n.podmanArtifacts(store, local)

	// The tag moves; what is not needed goes.
	moved := map[string][]byte{"weights-1.bin": weights(1<<20, 3)}
	n.pushArtifact("models/llama", "8b", modelType, moved)
	n.holdfast("artifact", "add", store, pulled)
	n.holdfast("artifact", "remove", store, local, second, bare)
	n.holdfast("artifact", "prune", store, "--grace", "0s")
	if got := n.reads(store, "list"); strings.Contains(got, "\n") || !strings.HasPrefix(got, pulled+" ") {
		t.Errorf("listed %s", got)
	}
	left, err := os.ReadDir(filepath.Join(store, "artifacts", "blobs", "sha256"))
	if err != nil || len(left) != 3 {
		t.Errorf("left %v, %v", left, err)
	}
}

// CRI-O's code and ours write to one store at once: nothing that either lists is lost.
func TestArtifactStoreHasTwoWriters(t *testing.T) {
	n := newNode(t, nodeOptions{})
	store := n.path("store")
	const rounds = 6
	var names []string
	for i := range rounds {
		names = append(names, n.pushArtifact(fmt.Sprintf("models/m%d", i), "1", modelType, map[string][]byte{"w": weights(1<<20, byte(i))}))
	}
	n.holdfast("artifact", "add", store, names[0])
	var writing sync.WaitGroup
	for _, write := range []func(i int){
		func(i int) { n.reads(store, "pull", names[i]) },
		func(i int) { n.holdfast("artifact", "add", store, names[0], names[i]) },
	} {
		writing.Go(func() {
			for i := range rounds {
				write(i)
			}
		})
	}
	writing.Wait()
	list := n.reads(store, "list")
	for i, name := range names {
		if !strings.Contains(list, name+" ") {
			t.Errorf("%s is lost: %s", name, list)
			continue
		}
		_, path, _ := strings.Cut(n.reads(store, "paths", name), " ")
		n.sameFile(path, weights(1<<20, byte(i)))
	}
}

// podmanArtifacts reads a store with the artifact commands of Podman of Debian 13.
func (n *node) podmanArtifacts(store, name string) {
	n.t.Helper()
	root := n.path("podman13")
	n.must(os.MkdirAll(root, 0o700))
	n.must(os.Symlink(filepath.Join(store, "artifacts"), filepath.Join(root, "artifacts")))
	podman := append(n.debian13(), "podman", "--root", root, "--runroot", n.path("podman13-run"), "artifact")
	if got := n.output(nil, append(podman, "ls")...); !strings.Contains(got, strings.TrimSuffix(name, ":1")) {
		n.t.Errorf("podman artifact ls: %s", got)
	}
	if got := n.output(nil, append(podman, "inspect", name)...); !strings.Contains(got, "weights-2.bin") {
		n.t.Errorf("podman artifact inspect: %s", got)
	}
}

// Three stores have the same names and other contents: order and filters hold for a
// runtime that knows neither. Stores are read-only, go and come back under load, their
// tags move; the daemon tells which one answers.
func TestComposedStore(t *testing.T) {
	n := newNode(t, nodeOptions{})
	const a, b, c = "quay.io/models/a:1", "quay.io/models/b:1", "quay.io/other/c:1"
	stores := []string{n.path("s1"), n.path("s2"), n.path("s3")}
	add := func(store, name, content string) {
		file := n.path("w.bin")
		n.must(os.WriteFile(file, []byte(content), 0o600))
		n.holdfast("artifact", "add", store, file, "--as", name, "--type", modelType)
	}
	for i, store := range stores {
		for _, name := range []string{a, b, c} {
			add(store, name, fmt.Sprintf("%s of %d", name, i+1))
		}
	}
	add(stores[2], "quay.io/models/large:1", strings.Repeat("x", 2000))
	// The first is on read-only media, and has a only.
	n.must(unix.Mount(stores[0], stores[0], "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(stores[0], unix.MNT_DETACH) })
	n.must(unix.Mount("", stores[0], "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	n.configure(fmt.Sprintf(`
[[artifact_stores]]
path = %q
filter = {references = ["quay.io/models/a"]}
[[artifact_stores]]
path = %q
filter = {references = ["!quay.io/other/*"], types = ["application/vnd.cncf.*"]}
[[artifact_stores]]
path = %q
filter = {max_size = "1KiB"}
`, stores[0], stores[1], stores[2]))
	n.start()
	says := func(want map[string]string) func() bool {
		return func() bool {
			offered := n.offers()
			for name, content := range want {
				if offered[name] == "" {
					return false
				}
				got, err := os.ReadFile(n.mounted(name)["w.bin"])
				if err != nil || string(got) != content {
					return false
				}
			}
			return len(offered) == len(want)
		}
	}
	n.await("order and filters", says(map[string]string{a: a + " of 1", b: b + " of 2", c: c + " of 3"}))
	for i, name := range []string{a, b, c} {
		if s := n.artifact(name); s == nil || s.From != stores[i] || s.State != artifacts.InStore {
			t.Errorf("%s: %+v", name, s)
		}
	}

	// A runtime lists all the time from here on.
	program, err := libartifact()
	n.must(err)
	args := []string{"watch"}
	for _, dir := range n.composed() {
		args = append(args, filepath.Join(dir, "artifacts"))
	}
	watching := exec.CommandContext(t.Context(), program, args...)
	input, err := watching.StdinPipe()
	n.must(err)
	var said bytes.Buffer
	watching.Stdout, watching.Stderr = &said, &said
	n.must(watching.Start())
	held, err := os.Open(n.mounted(a)["w.bin"])
	n.must(err)
	for range 2 {
		n.must(unix.Unmount(stores[0], unix.MNT_DETACH))
		n.must(os.Rename(stores[0], stores[0]+".gone"))
		n.await("the second store to answer", says(map[string]string{a: a + " of 2", b: b + " of 2", c: c + " of 3"}))
		n.must(os.Rename(stores[0]+".gone", stores[0]))
		n.must(mount.Bind(stores[0], stores[0]))
		n.await("the first store to be back", says(map[string]string{a: a + " of 1", b: b + " of 2", c: c + " of 3"}))
	}
	if got, err := io.ReadAll(held); string(got) != a+" of 1" || err != nil {
		t.Errorf("who reads has %q, %v", got, err)
	}
	n.must(held.Close())
	add(stores[1], b, "moved")
	n.await("the tag to move", says(map[string]string{a: a + " of 1", b: "moved", c: c + " of 3"}))
	// What would poison a reader, or lies, is left out; the rest stays.
	n.must(os.Truncate(filepath.Join(stores[2], "artifacts", "blobs", "sha256", digest.FromString(c+" of 3").Encoded()), 3))
	add(stores[2], "quay.io/models/new:1", "new")
	n.await("a lying blob to be left out", says(map[string]string{a: a + " of 1", b: "moved", "quay.io/models/new:1": "new"}))
	all, err := n.daemon.Client().Artifacts(t.Context())
	n.must(err)
	if s := all.Stores[2]; len(s.Problems) != 1 || !strings.Contains(s.Problems[0], c) || s.Filtered != 1 || s.Shadowed != 2 {
		t.Errorf("third store %+v", s)
	}
	_, err = n.daemon.KillWorker(t.Context())
	n.must(err)
	n.await("the next worker", func() bool { _, err := n.daemon.Client().Artifacts(t.Context()); return err == nil })
	n.await("the same as before", says(map[string]string{a: a + " of 1", b: "moved", "quay.io/models/new:1": "new"}))
	n.must(input.Close())
	if err := watching.Wait(); err != nil {
		t.Errorf("listing all the time: %v: %s", err, &said)
	}
}

// An artifact that is only in a registry: whole without a chunk list, in parts with one,
// also while the worker is killed; complete, it needs neither registry nor daemon.
func TestLazyArtifact(t *testing.T) {
	n := newNode(t, nodeOptions{pushable: true, settings: "fill = \"off\"\nartifact_interval = \"1s\"\n"})
	model := map[string][]byte{"small": []byte("small"), "large": weights(24<<20+77, 7)}
	whole, listed := n.pushArtifact("models/whole", "1", modelType, model), n.pushArtifact("models/listed", "1", modelType, map[string][]byte{"other": weights(32<<20+5, 8)})
	configured := n.pushArtifact("models/configured", "v1", modelType, map[string][]byte{"c": []byte("configured")})
	n.pushArtifact("models/configured", "x1", modelType, map[string][]byte{"c": []byte("not matched")})
	small := newSmall(t, convertTo(t, testimage.Gzip)) // an image that the pattern names, too
	_, err := small.PushTo(n.registry, "models/confimage", "v1")
	n.must(err)
	n.configure(fmt.Sprintf("artifacts = [%q]\n", n.registry.Host()+"/models/conf*:v*"))
	n.start()
	n.await("the pattern", func() bool { return n.offers()[configured] != "" })
	n.sameFile(n.mounted(configured)["c"], []byte("configured"))
	if all, err := n.daemon.Client().Artifacts(t.Context()); err != nil || len(all.Artifacts) != 1 || len(all.Patterns) > 0 {
		t.Errorf("%+v, %v", all, err)
	}

	n.holdfast("artifact", "prepare", whole)
	if s := n.artifact(whole); s.State != artifacts.Lazy || s.Local > 0 {
		t.Errorf("%+v", s)
	}
	if n.mounted(whole) == nil {
		t.Errorf("%s cannot be mounted: %v", whole, n.offers())
	}
	for file, path := range n.mounted(whole) {
		if got := n.sumInContainer(path); got != digest.FromBytes(model[file]) {
			t.Errorf("%s in a container: %s", file, got)
		}
		n.sameFile(path, model[file])
	}
	if s := n.artifact(whole); s.State != artifacts.Complete {
		t.Errorf("%+v", s)
	}

	n.holdfast("artifact", "index", listed, "--push", "--output", n.path("lists"))
	n.resetRequests()
	n.holdfast("artifact", "prepare", listed)
	path := n.mounted(listed)["other"]
	f, err := os.Open(path)
	n.must(err)
	part := make([]byte, 1000)
	if _, err := f.ReadAt(part, 16<<20); err != nil || !bytes.Equal(part, weights(32<<20+5, 8)[16<<20:][:1000]) {
		t.Errorf("a part: %v\n%s", err, n.log())
	}
	if s := n.artifact(listed); s.State != artifacts.Lazy || s.Local == 0 || s.Local > 12<<20 {
		t.Errorf("for a part of 1000 bytes: %+v", s)
	}
	for range 3 { // readers do not notice
		killed := make(chan error, 1)
		go func() { _, err := n.daemon.KillWorker(t.Context()); killed <- err }()
		n.sameFile(path, weights(32<<20+5, 8))
		n.must(<-killed)
		n.await("the next worker", func() bool { _, err := n.daemon.Client().Artifacts(t.Context()); return err == nil })
	}
	n.must(f.Close())
	n.holdfast("artifact", "prepare", "--wait", listed)

	// The tag moves.
	moved := n.pushArtifact("models/configured", "v1", modelType, map[string][]byte{"c": []byte("moved")})
	n.await("the tag to move", func() bool {
		got, err := os.ReadFile(n.mounted(moved)["c"])
		return err == nil && string(got) == "moved"
	})
	n.holdfast("artifact", "forget", whole)
	if n.offers()[whole] != "" {
		t.Error("forgotten, and still offered")
	}

	// Without the daemon what is complete is offered, and nothing else.
	lazy := n.pushArtifact("models/lazy", "1", modelType, map[string][]byte{"l": weights(1<<20, 9)})
	n.holdfast("artifact", "prepare", lazy)
	n.must(n.daemon.Stop())
	offered := n.offers()
	if offered[listed] == "" || offered[lazy] != "" {
		t.Errorf("without the daemon %v", offered)
	}
	n.sameFile(n.mounted(listed)["other"], weights(32<<20+5, 8))
	if got := n.sumInContainer(n.mounted(listed)["other"]); got != digest.FromBytes(weights(32<<20+5, 8)) {
		t.Errorf("complete, in a container: %s", got)
	}
	n.must(n.registry.Close())
	n.start()
	n.await("what is known to be offered again", func() bool { return n.offers()[lazy] != "" })
	n.sameFile(n.mounted(listed)["other"], weights(32<<20+5, 8))
}

// What is wrong is told; a store stays as it was.
func TestBadArtifacts(t *testing.T) {
	n := newNode(t, nodeOptions{})
	store := n.path("store")
	file := n.path("w.bin")
	n.must(os.WriteFile(file, []byte("content"), 0o600))
	n.holdfast("artifact", "add", store, file, "--as", "quay.io/models/good:1")
	before := n.reads(store, "list")
	img := newSmall(t, convertTo(t, testimage.Gzip))
	ref := n.push("app", img.Image)
	n.output(nil, "skopeo", "copy", "--quiet", "--src-tls-verify=false", "docker://"+n.pushArtifact("m", "1", modelType, map[string][]byte{"f": []byte("content of f")}), "oci:"+n.path("layout")+":v7")
	n.must(os.WriteFile(filepath.Join(n.path("layout"), "blobs", "sha256", digest.FromString("content of f").Encoded()), []byte("CONTENT of f"), 0o600))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"add", store, file}, "--as"},
		{[]string{"add", store, file, "--as", "models/good:1"}, "full name with a registry"},
		{[]string{"add", store, ref}, "it is an image"},
		{[]string{"add", store, "oci:" + n.path("layout")}, "which is no full name"},
		{[]string{"add", store, "oci:" + n.path("layout"), "--as", "quay.io/models/lying"}, "content does not match its digest"},
		{[]string{"add", store, n.registry.Host() + "/none:1"}, "none"},
		{[]string{"remove", store, "quay.io/models/none:1"}, "not in the store"},
		{[]string{"list", n.path("nowhere")}, "not attached"},
	} {
		out, err := n.tryHoldfast(append([]string{"artifact"}, c.args...)...)
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%v: %v: %s", c.args, err, out)
		}
	}
	if after := n.reads(store, "list"); after != before {
		t.Errorf("listed %s, before %s", after, before)
	}
	n.start()
	if out, err := n.tryHoldfast("artifact", "prepare", ref); err == nil || !strings.Contains(out, "it is an image") {
		t.Errorf("%v: %s", err, out)
	}
	if offered := n.offers(); len(offered) > 0 {
		t.Errorf("offered %v", offered)
	}
}

// tryHoldfast runs the program, which may fail, and returns all that it printed.
func (n *node) tryHoldfast(args ...string) (string, error) {
	cmd := exec.CommandContext(n.t.Context(), holdfast, append(args, "--config", n.daemon.Config())...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}
