// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// What worked before still works.

// output runs a command of the machine and returns what it prints.
func (n *node) output(env []string, args ...string) string {
	n.t.Helper()
	cmd := exec.CommandContext(untilDone(n.t), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		n.t.Fatalf("%v: %v\n%s\n%s", args, err, out, n.log())
	}
	return strings.TrimSpace(string(out))
}

// TestLookingPreparesNothing looks at an image with the hook configured.
func TestLookingPreparesNothing(t *testing.T) {
	n := newNode(t, nodeOptions{})
	ref := n.push("app", application(t, testimage.EStargz))
	n.start()
	conf := n.path("hook.conf")
	n.must(os.WriteFile(conf, []byte(n.registriesConf(n.daemon.Hook())), 0o600))
	env := []string{"CONTAINERS_REGISTRIES_CONF=" + conf, "HOLDFAST_CONFIG=" + n.daemon.Config()}
	for name, skopeo := range map[string][]string{"of Debian 12": {"skopeo"}, "of Debian 13": n.debian13("skopeo")} {
		if out := n.output(env, append(skopeo, "inspect", "--tls-verify=false", "docker://"+ref)...); !strings.Contains(out, `"Layers"`) {
			t.Errorf("skopeo %s: %s", name, out)
		}
	}
	if s := n.status(ref); s != nil {
		t.Errorf("looking at an image has prepared it: %+v", s)
	}
}

// TestWithoutCommand pulls an image that has nothing to run, which is probably a
// volume: it is left to the runtime.
func TestWithoutCommand(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := application(t, testimage.EStargz)
	img.Cmd = nil
	ref := n.push("volume", img)
	n.start()
	lazy := n.newClient("client", true)
	lazy.pull(ref)
	n.wantPulled(img.Layers, img.Layers...)
	lazy.mountImage(lazy.pull(ref).ID)
}

// lazyPodman is a node with an image that its Podman has pulled lazily.
func lazyPodman(t *testing.T, topLayerLimit, method string) (n *node, lazy, normal *lab.Podman, ref string) {
	t.Helper()
	n = newNode(t, nodeOptions{settings: fmt.Sprintf("top_layer_limit = %q\nmount = %q\n", topLayerLimit, method)})
	img := application(t, testimage.EStargz)
	img.Layers[2] = topLayer(t, testimage.EStargz)
	ref = n.push("app", img)
	normal, lazy = n.newPodman("normal", false), n.newPodman("podman", true)
	n.pullWith(normal, ref)
	n.start()
	left := img.Layers[n.prepare(ref).Lazy():]
	n.resetRequests()
	n.pullWith(lazy, ref)
	n.wantPulled(img.Layers, left...)
	if topLayerLimit == "0B" && len(left) > 0 {
		t.Fatalf("not all layers are lazy: %s", n.log())
	}
	return n, lazy, normal, ref
}

// both runs containers with a Podman after a lazy and one after a normal pull;
// they must print the same.
func (n *node) both(normal, lazy podman, args ...string) string {
	n.t.Helper()
	args = append(append([]string{"run"}, lab.ContainerFlags()...), args...)
	want, got := n.podman(normal, args...), n.podman(lazy, args...)
	if want != got {
		n.t.Errorf("podman %s printed %q, after a normal pull %q", strings.Join(args, " "), got, want)
	}
	return got
}

// TestVolumes uses lazily pulled images and their trees as volumes.
func TestVolumes(t *testing.T) {
	// What auto finds out must do for all of it; loop is what it falls back to.
	for _, method := range []string{"auto", "loop"} {
		t.Run("mount="+method, func(t *testing.T) { testVolumes(t, method) })
	}
}

func testVolumes(t *testing.T, method string) {
	n, lazy, normal, ref := lazyPodman(t, "8MiB", method)
	const look = `cat /x/etc/top; stat -c '%n %u %g %a' /x/srv /x/srv/setuid; sha256sum /x/usr/bin/perl /x/app/serve.py; test ! -e /x/etc/fstab`
	t.Run("image", func(t *testing.T) {
		n.in(t).both(normal, lazy, "--mount", "type=image,source="+ref+",destination=/x", ref, "sh", "-ec", look)
	})
	t.Run("image, writable", func(t *testing.T) {
		n.in(t).both(normal, lazy, "--mount", "type=image,source="+ref+",destination=/x,rw=true", ref,
			"sh", "-ec", "echo more >> /x/etc/top; rm /x/usr/bin/perl.new || true; mv /x/usr/bin/perl /x/usr/bin/pearl; cat /x/etc/top; sha256sum /x/usr/bin/pearl")
	})
	t.Run("overlay of a directory", func(t *testing.T) {
		n := n.in(t)
		dir := n.path("volume")
		n.must(os.MkdirAll(dir, 0o755))
		n.must(os.WriteFile(filepath.Join(dir, "file"), []byte("below\n"), 0o600))
		if out := n.both(normal, lazy, "-v", dir+":/x:O", ref, "sh", "-ec", "cat /x/file; echo above > /x/file; cat /x/file"); out != "below\nabove" {
			t.Errorf("printed %q", out)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(got) != "below\n" {
			t.Errorf("the directory holds %q (%v)", got, err)
		}
	})
	// The deepest stack there is: an overlay of an overlay of our mount.
	t.Run("overlay of a container", func(t *testing.T) {
		n := n.in(t)
		overlayOf := func(p podman) string {
			id := n.podman(p, "create", "--network=host", "--pull=never", ref)
			defer n.podman(p, "rm", "--force", id)
			dir := n.podman(p, "mount", id)
			defer n.podman(p, "unmount", id)
			args := append([]string{"run"}, lab.ContainerFlags()...)
			return n.podman(p, append(args, "-v", dir+":/x:O", ref, "sh", "-ec", look+"; echo more >> /x/etc/top; cat /x/etc/top")...)
		}
		if want, got := overlayOf(normal), overlayOf(lazy); want != got {
			t.Errorf("printed %q, after a normal pull %q", got, want)
		}
	})
}

// TestBuild builds on a lazily pulled base, with a top layer of the runtime's own
// and with all layers lazy.
func TestBuild(t *testing.T) {
	for name, limit := range map[string]string{"all layers lazy": "0B", "top layer pulled": "8MiB"} {
		t.Run(name, func(t *testing.T) { testBuild(t, limit) })
	}
}

func testBuild(t *testing.T, topLayerLimit string) {
	n, lazy, normal, ref := lazyPodman(t, topLayerLimit, "auto")
	context := n.path("context")
	n.must(os.MkdirAll(context, 0o755))
	n.must(os.WriteFile(filepath.Join(context, "file"), []byte("copied\n"), 0o644))
	n.must(os.WriteFile(filepath.Join(context, "Containerfile"), []byte("FROM "+ref+`
RUN echo built >> /etc/top && mv /srv/setuid /srv/moved && rm /usr/bin/perl && chmod 700 /usr/share/doc
COPY --chown=12:34 file /srv/copied
CMD ["cat", "/etc/top", "/srv/copied"]
`), 0o600))
	build := func(p podman) string {
		n.podman(p, "build", "--network=host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000",
			"--pull-never", "--tag", "built", "--timestamp", "1700000000", context)
		args := append([]string{"run"}, lab.ContainerFlags()...)
		return n.podman(p, append(args, "localhost/built")...)
	}
	if want, got := build(normal), build(lazy); want != got || got != "top\nbuilt\ncopied" {
		t.Errorf("what was built printed %q, on a normal base %q", got, want)
	}
	compareTrees(t, n.containerTree(normal, "localhost/built", 0), n.containerTree(lazy, "localhost/built", 0),
		precision(testimage.EStargz), ofPodman4, builtNow)
}

// TestSizes asks Podman for what containers have changed and what images take,
// which it finds out by comparing layers.
func TestSizes(t *testing.T) {
	for _, limit := range []string{"0B", "8MiB"} {
		t.Run("top_layer_limit="+limit, func(t *testing.T) {
			n, lazy, normal, ref := lazyPodman(t, limit, "auto")
			changes := func(p podman) string {
				args := append([]string{"run", "--name=changed"}, lab.ContainerFlags()[1:]...) // without --rm
				n.podman(p, append(args, ref, "sh", "-c", "echo new > /srv/new; rm /usr/bin/perl; chmod 600 /etc/top")...)
				diff := strings.Split(n.podman(p, "diff", "changed"), "\n")
				slices.Sort(diff)
				out := strings.Join(diff, "\n") + n.podman(p, "system", "df", "--format", "{{.Type}} {{.Total}} {{.Active}}")
				n.podman(p, "commit", "--quiet", "changed", "committed")
				return out + n.podman(p, append([]string{"run"}, append(lab.ContainerFlags(), "committed", "sh", "-c", "cat /srv/new; stat -c %a /etc/top")...)...)
			}
			if want, got := changes(normal), changes(lazy); want != got {
				t.Errorf("Podman says %q, after a normal pull %q", got, want)
			}
		})
	}
}

// builtNow takes out what has the time of the build.
func builtNow(name string, f *file) {
	if name == "usr/bin" || name == "usr/share/doc" || strings.HasPrefix(name, "srv") || name == "etc/top" {
		*f = file{mode: f.mode, uid: f.uid, gid: f.gid, content: f.content}
	}
}

// asUser runs a program as user $1 with the directory $2 as /etc/containers and
// as home and run time directory those in $3.
const asUser = `set -e
user=$1 etc=$2 home=$3
shift 3
mount --bind "$etc" /etc/containers
cd "$home"
exec runuser -u "$user" -- env -u CONTAINERS_STORAGE_CONF HOME="$home" XDG_RUNTIME_DIR="$home/run" "$@"`

// TestRootless runs a user's own Podman on a machine that is set up for us.
func TestRootless(t *testing.T) {
	n := newNode(t, nodeOptions{})
	n.must(os.Chmod(n.dir, 0o755)) // in /tmp; what is the daemon's is closed by itself
	user := filepath.Base(n.dir)
	n.output(nil, "useradd", "--home-dir", n.path("home"), "--no-create-home", user)
	t.Cleanup(func() { n.output(nil, "userdel", "--force", user) })
	for _, dir := range []string{n.path("home"), n.path("home", "run")} {
		n.must(os.Mkdir(dir, 0o700))
		n.output(nil, "chown", user, dir)
	}
	n.start()
	etc := map[string]string{}
	for name, conf := range map[string]struct{ storage, hook string }{
		"without us": {},
		"with us":    {fmt.Sprintf("[storage.options]\nadditionalimagestores = [%q]\n", n.daemon.Store()), n.daemon.Hook()},
	} {
		etc[name] = n.path(strings.ReplaceAll("etc "+name, " ", "-"))
		n.must(os.Mkdir(etc[name], 0o755))
		for file, content := range map[string]string{
			"storage.conf":    "[storage]\ndriver = \"overlay\"\n" + conf.storage,
			"registries.conf": n.registriesConf(conf.hook),
			"policy.json":     `{"default":[{"type":"insecureAcceptAnything"}]}`,
		} {
			n.must(os.WriteFile(filepath.Join(etc[name], file), []byte(content), 0o644))
		}
	}
	run := func(etc string, args ...string) (string, error) {
		cmd := exec.CommandContext(untilDone(t), "unshare", append([]string{"--mount", "sh", "-c", asUser, "sh", user, etc, n.path("home")}, args...)...)
		cmd.Env = append(os.Environ(), "HOLDFAST_CONFIG="+n.daemon.Config())
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	img := tiny(t)
	ref := n.push("tiny", img)
	podman := func(etc string) (string, error) {
		out, err := run(etc, "podman", "pull", "--quiet", ref)
		if err != nil {
			return out, err
		}
		return run(etc, "podman", "unshare", "sh", "-c", "$(podman image mount "+ref+")/holdfast version; podman image unmount "+ref)
	}
	t.Cleanup(func() {
		for _, args := range [][]string{{"rmi", "--all", "--force"}, {"system", "migrate"}} {
			if out, err := run(etc["without us"], append([]string{"podman"}, args...)...); err != nil {
				t.Errorf("%v: %v: %s", args, err, out)
			}
		}
	})
	want, err := podman(etc["without us"])
	if err != nil {
		t.Fatalf("rootless Podman does not work on this machine, even without us: %v\n%s", err, want)
	}
	if out, err := run(etc["without us"], "podman", "rmi", ref); err != nil {
		t.Fatal(out, err)
	}
	if got, err := podman(etc["with us"]); err != nil || got != want {
		t.Errorf("rootless Podman beside us: %v: %q, without us %q", err, got, want)
	}
	// This Podman knows no hook; a later one would run it so.
	for from, to := range map[string]string{"/bin/sh": n.path("podman"), holdfast: n.path("holdfast-pull-hook"), n.daemon.Config(): n.path("config.toml")} {
		n.output(nil, "install", "-m", "755", from, to)
	}
	out, err := run(etc["with us"], "env", "HOLDFAST_CONFIG="+n.path("config.toml"),
		n.path("podman"), "-c", `echo '{"`+ref+`":{}}' | "$0"; echo "exit $?"`, n.path("holdfast-pull-hook"))
	if err != nil || !strings.HasSuffix(strings.TrimSpace(out), "exit 0") {
		t.Errorf("the hook, run by a user: %v: %s", err, out)
	}
	if s := n.status(ref); s != nil {
		t.Errorf("a user has had an image prepared: %+v", s)
	}
}

// tiny is an image with one program.
func tiny(t *testing.T) testimage.Image {
	t.Helper()
	data, err := os.ReadFile(holdfast)
	if err != nil {
		t.Fatal(err)
	}
	raw := testimage.Tar(program(data))
	l, err := testimage.ConvertBytes(t.Context(), raw, testimage.EStargz, testimage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return testimage.Image{Layers: []testimage.Layer{l}, Cmd: []string{"/holdfast", "version"}}
}

func program(data []byte) testimage.File {
	f := testimage.File{Content: data}
	f.Name, f.Mode = "holdfast", 0o755
	return f
}
