// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// machine makes a Debian of its own out of the root file system $1: what is written in it goes to the
// directory $2, and the programs in $3 are in /programs. It stays for as long as it runs.
const machine = `set -e
root=$1 dir=$2 bin=$3 node=$2/node
mkdir -p "$dir/upper" "$dir/work" "$node"
mount -t overlay -o "lowerdir=$root,upperdir=$dir/upper,workdir=$dir/work" overlay "$node"
mount -t proc proc "$node/proc"
mount --rbind /sys "$node/sys"
mount --rbind /dev "$node/dev"
for d in run tmp var/tmp; do mount -t tmpfs tmpfs "$node/$d"; done
for d in containers holdfast holdfast-agent; do mkdir -p "$dir/$d" "$node/var/lib/$d"; mount --bind "$dir/$d" "$node/var/lib/$d"; done
mkdir -p "$node/programs"
mount --bind "$bin" "$node/programs"
mkdir "$node/run/old"
cd "$node"
pivot_root . run/old
umount -l /run/old
echo ready
exec sleep infinity`

// systemctl does what the agent asks of systemd on a machine without it.
const systemctl = `#!/bin/sh
pid=$(cat /run/daemon.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null || pid=
case "$*" in
is-active\ holdfast.service) [ -n "$pid" ] && echo active && exit; echo inactive; exit 3 ;;
is-active*) echo inactive; exit 3 ;;
show*) echo not-found ;;
enable*\ holdfast.service)
	[ -z "$pid" ] || exit 0
	setsid $(sed -n s/^ExecStart=//p /etc/systemd/system/holdfast.service) >/run/daemon.log 2>&1 </dev/null &
	echo $! >/run/daemon.pid
	for i in $(seq 300); do [ -S /run/holdfast/holdfast.sock ] && exit; sleep 0.1; done
	cat /run/daemon.log; exit 1 ;;
reload\ holdfast.service) exec $(sed -n s/^ExecReload=//p /etc/systemd/system/holdfast.service) ;;
disable*\ holdfast.service)
	[ -n "$pid" ] || exit 0
	kill "$pid"
	for i in $(seq 300); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 0.1; done
	exit 1 ;;
esac`

// declared is such a machine.
type declared struct {
	*node
	pid int // of the process that keeps it
}

func newMachine(t *testing.T) *declared {
	t.Helper()
	d := &declared{node: newNode(t, nodeOptions{})}
	root := d.debian13()[8] // made if it is not there yet
	for name, text := range map[string]string{
		"etc/containers/registries.conf.d/00-test.conf": d.registriesConf(""),
		"etc/containers/policy.json":                    `{"default":[{"type":"insecureAcceptAnything"}]}`,
		"etc/containers/containers.conf":                "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\n",
		"etc/containers/storage.conf":                   "# The administrator's.\n[storage]\ndriver = \"overlay\"\ngraphroot = \"/var/lib/containers/storage\"\nrunroot = \"/run/containers/storage\"\n",
		"etc/hosts":                                     "127.0.0.1 localhost\n",
		"usr/local/sbin/systemctl":                      systemctl,
	} {
		name = d.path("upper", name)
		d.must(os.MkdirAll(filepath.Dir(name), 0o755))
		d.must(os.WriteFile(name, []byte(text), 0o755))
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", machine, "sh", root, d.dir, filepath.Dir(holdfast))
	out, err := cmd.StdoutPipe()
	d.must(err)
	cmd.Stderr = os.Stderr
	d.must(cmd.Start())
	d.pid = cmd.Process.Pid
	t.Cleanup(func() {
		_, _, _ = d.in("systemctl", "disable", "--now", "holdfast.service")
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the machine is not there: %q, %v", line, err)
	}
	return d
}

// in runs a program on the machine, and returns what it prints and its exit code.
func (d *declared) in(args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	cmd := exec.CommandContext(untilDone(d.t), "nsenter", append([]string{"--target", fmt.Sprint(d.pid), "--mount", "--wdns=/", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the code says so
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// exits is in for what has to succeed, with code.
func (d *declared) exits(code int, args ...string) string {
	d.t.Helper()
	out, errs, got := d.in(args...)
	if got != code {
		d.t.Fatalf("%q ended with %d, want %d\n%s%s", args, got, code, out, errs)
	}
	return out + errs
}

// object is what the machine is to have.
const object = `apiVersion: machineconfiguration.openshift.io/v1
kind: ContainerRuntimeConfig
metadata: {name: app}
spec:
  containerRuntimeConfig:
    additionalLayerStores: [{path: /var/lib/holdfast/store}]
    additionalImageStores: [{path: /var/lib/containers/shared}, {path: /mnt/not-mounted}]
  holdfast:
    trusted: [%q]
    cacheLimit: %s
`

// TestDeclared: from a ContainerRuntimeConfig to a container of Podman whose image is not
// there yet, and back to a machine without Holdfast.
func TestDeclared(t *testing.T) {
	d := newMachine(t)
	img, other := application(t, testimage.EStargz), tiny(t)
	ref, shared := d.push("app", img), d.push("shared", other)
	before := d.exits(0, "cat", "/etc/containers/storage.conf")
	list := []string{"find", "/etc", "/usr/local", "/var/lib/holdfast", "/var/lib/holdfast-agent", "-not", "-type", "d"}
	files := d.exits(0, list...)
	d.exits(0, "podman", "--root", "/var/lib/containers/shared", "--runroot", "/run/shared", "pull", "--quiet", shared)
	d.must(os.WriteFile(d.path("holdfast-agent", "crc.yaml"), fmt.Appendf(nil, object, d.registry.Host(), "1Gi"), 0o600))

	// One store is not there: all else is, and the exit code says so.
	out := d.exits(6, "/programs/holdfast-operator", "agent", "--once", "--file", "/var/lib/holdfast-agent/crc.yaml")
	t.Log(out)
	if !strings.Contains(out, "image store /mnt/not-mounted") || !strings.Contains(out, "withheld: it does not exist") || !strings.Contains(out, "Applied") || strings.Count(out, "listed") != 1 {
		t.Errorf("it said\n%s", out)
	}
	state := d.exits(0, "sha256sum", "/var/lib/holdfast-agent/state.json", "/etc/containers/storage.conf", "/etc/holdfast/config.toml")
	d.exits(6, "/programs/holdfast-operator", "agent", "--once", "--file", "/var/lib/holdfast-agent/crc.yaml")
	if now := d.exits(0, "sha256sum", "/var/lib/holdfast-agent/state.json", "/etc/containers/storage.conf", "/etc/holdfast/config.toml"); now != state {
		t.Errorf("a second run has written something:\n%s%s", state, now)
	}

	// Podman does what it always does.
	if names := d.exits(0, "podman", "images", "--format", "{{.Repository}}:{{.Tag}}"); !strings.Contains(names, shared) {
		t.Errorf("podman lists\n%s", names)
	}
	d.resetRequests()
	d.exits(0, "podman", "pull", "--quiet", ref)
	d.wantPulled(img.Layers, img.Layers[2])
	run := slices.Concat([]string{"podman", "run"}, lab.ContainerFlags(), []string{ref})
	if out := d.exits(0, run...); !strings.HasPrefix(out, lab.ReadyLine) {
		t.Errorf("the container printed %q", out)
	}

	// An agent in a container finds the same.
	d.exits(0, "sh", "-c", "mkdir -p /host && mount --rbind / /host && mount --make-rslave /host")
	inContainer := []string{"/programs/holdfast-operator", "agent", "--once", "--root", "/host", "--live", "--file", "/var/lib/holdfast-agent/crc.yaml"}
	if out := d.exits(6, inContainer...); !strings.Contains(out, "Unchanged") {
		t.Errorf("it said\n%s", out)
	}
	d.must(os.WriteFile(d.path("holdfast-agent", "crc.yaml"), fmt.Appendf(nil, object, d.registry.Host(), "2Gi"), 0o600))
	if out := d.exits(6, inContainer...); !strings.Contains(out, "daemon                                  up") {
		t.Errorf("it said\n%s", out)
	}
	if out := d.exits(0, "cat", "/etc/holdfast/config.toml"); !strings.Contains(out, "2147483648B") {
		t.Errorf("the daemon's configuration is\n%s", out)
	}
	d.exits(0, "sh", "-c", "umount -R -l /host && rmdir /host")

	// Holdfast is to go, but an image has layers in its store.
	if out := d.exits(5, "/programs/holdfast-operator", "uninstall"); !strings.Contains(out, ref) {
		t.Errorf("it said\n%s", out)
	}
	if out := d.exits(0, run...); !strings.HasPrefix(out, lab.ReadyLine) {
		t.Errorf("then the container printed %q", out)
	}
	d.exits(0, "podman", "rmi", ref)
	d.exits(0, "/programs/holdfast-operator", "uninstall")
	if now := d.exits(0, "cat", "/etc/containers/storage.conf"); now != before {
		t.Errorf("storage.conf is\n%s", now)
	}
	d.exits(0, "rm", "-r", "/var/lib/containers/shared", "/var/lib/holdfast-agent/crc.yaml")
	if diff := cmp.Diff(files, d.exits(0, list...)); diff != "" {
		t.Errorf("files:\n%s", diff)
	}
	if mounts := d.exits(0, "cat", "/proc/self/mountinfo"); strings.Contains(mounts, "/run/holdfast") {
		t.Errorf("mounts are left:\n%s", mounts)
	}
}

// TestOperatorImage: one image has all that a node needs, and puts it there.
func TestOperatorImage(t *testing.T) {
	n := newNode(t, nodeOptions{})
	p := n.newPodman("podman", false)
	root := n.path("image-root")
	n.must(os.MkdirAll(root, 0o755))
	n.must(os.MkdirAll(n.path("context"), 0o755))
	n.must(os.CopyFS(n.path("context", "bin"), os.DirFS(filepath.Dir(holdfast))))
	n.podman(p, "build", "--quiet", "--network=none", "--file", "../../deploy/Containerfile", "--tag", "localhost/holdfast", n.path("context"))
	run := slices.Concat([]string{"run"}, lab.ContainerFlags(), []string{"--volume", root + ":/host", "localhost/holdfast", "holdfast-operator"})
	n.podman(p, append(run, "install", "--root", "/host")...)
	for _, name := range []string{"usr/local/bin/holdfast", "usr/local/bin/holdfast-pull-hook", "usr/local/bin/holdfast-operator", "etc/systemd/system/holdfast-agent.service"} {
		if info, err := os.Stat(filepath.Join(root, name)); err != nil || info.Mode().Perm()&0o111 == 0 && !strings.HasSuffix(name, ".service") {
			t.Errorf("%s: %v", name, err)
		}
	}
	want, err := exec.Command(holdfast, "version").Output()
	n.must(err)
	if got, err := exec.Command(filepath.Join(root, "usr/local/bin/holdfast"), "version").Output(); err != nil || string(got) != string(want) {
		t.Errorf("version %q, %v", got, err)
	}
	n.podman(p, append(run, "uninstall", "--root", "/host")...)
	if _, err := os.Lstat(filepath.Join(root, "usr/local/bin/holdfast")); !os.IsNotExist(err) {
		t.Error(err)
	}
}
