// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// guestTime is how long the machine that TestNFS makes may run. It is emulated, and
// takes a third of that.
const guestTime = 6 * time.Minute

// guest is what runs in the machine, as its only program: an NFS server of the kernel,
// clients of the same kernel, our program on one of them, and Podman on read-only ones.
// Every line that begins with = is a result.
const guest = `export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp
mount -t sysfs sys /sys; mount -t cgroup2 cgroup2 /sys/fs/cgroup
for d in /run /tmp; do mount -t tmpfs tmpfs $d; done
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
ip link set lo up; ln -sfn /proc/self/mounts /etc/mtab
modprobe overlay
mkdir -p /srv/export /mnt/rw /mnt/v4 /mnt/v3 /mnt/soft
mount /dev/vdb /srv/export
mount -t nfsd nfsd /proc/fs/nfsd; echo 10 > /proc/fs/nfsd/nfsv4leasetime; echo 10 > /proc/fs/nfsd/nfsv4gracetime
mkdir -p /run/rpcbind /run/sendsigs.omit.d; rpcbind -w; rpc.statd
echo '/srv/export 127.0.0.0/8(rw,async,no_root_squash,insecure,no_subtree_check,fsid=0,crossmnt)' > /etc/exports
exportfs -ra; rpc.mountd; rpc.nfsd 4; echo Y > /proc/fs/nfsd/v4_end_grace
mount -t nfs -o vers=4.2 127.0.0.1:/ /mnt/rw
/work/holdfast store create /mnt/rw/store || exit
/work/holdfast store add /mnt/rw/store /work/image.tar || exit
echo "= refused: $(/work/holdfast store add /mnt/rw/store oci-archive:/work/capable.tar 2>&1)"
mount -t nfs -o vers=4.2,ro,nosharecache 127.0.0.1:/store /mnt/v4
mount -t nfs -o vers=3,nolock,ro,nosharecache 127.0.0.1:/srv/export/store /mnt/v3
echo "= verified: $(/work/holdfast store verify /mnt/v4)"
echo '{"default":[{"type":"insecureAcceptAnything"}]}' > /etc/containers/policy.json
printf '[engine]\ncgroup_manager="cgroupfs"\nevents_logger="none"\nruntime="runc"\n' > /etc/containers/containers.conf
for v in v4 v3; do
	printf '[storage]\ndriver="overlay"\ngraphroot="/var/pm"\nrunroot="/run/pm"\n[storage.options]\nadditionalimagestores=["/mnt/'$v'"]\n' > /etc/containers/storage.conf
	echo "= $v images: $(podman images --quiet --no-trunc 2>&1)"
	echo "= $v run: $(podman run --rm --network=host --pull=never registry.example.com/team/app:1 2>&1)"
	id=$(podman create --network=host --pull=never registry.example.com/team/app:1)
	root=$(podman mount $id)
	echo "= $v tree: $(cd $root && find d -mindepth 1 | sort | tr '\n' ' ')"
	podman rm --force $id > /dev/null
done
mount -t nfs -o vers=4.2,ro,nosharecache,soft,timeo=20,retrans=1 127.0.0.1:/store /mnt/soft
sed -i 's#/mnt/v3#/mnt/soft#' /etc/containers/storage.conf
podman images > /dev/null
rpc.nfsd 0
timeout 100 podman images > /tmp/dead 2>&1; echo "= dead: $? $(tr '\n' ' ' < /tmp/dead)"
echo "= end"
`

// nfsRoot is the root file system of the machine, with its kernel.
func (n *node) nfsRoot() string {
	n.t.Helper()
	root := filepath.Join(cacheDir(n.t), "trixie-nfs")
	n.must(os.MkdirAll(cacheDir(n.t), 0o700))
	n.must(lab.Debootstrap(n.t.Context(), root, "trixie", n.t.Logf,
		"podman", "runc", "conmon", "nfs-kernel-server", "iproute2", "linux-image-cloud-amd64"))
	return root
}

// disk makes a file with an ext4 file system that holds what is in a directory.
func (n *node) disk(name, dir, size string) string {
	n.t.Helper()
	file := n.path(name)
	args := []string{"mke2fs", "-q", "-t", "ext4"}
	if dir != "" {
		args = append(args, "-d", dir)
	}
	n.output(nil, append(args, file, size)...)
	return file
}

// boot runs a script in a machine of its own, with two disks beside the one of its root
// file system, and returns what it printed. Should the emulation itself end early, as it
// does once in a while where the machine below is busy, its console is logged and one
// with a single processor is tried.
func (n *node) boot(root, work string) string {
	n.t.Helper()
	for _, cpus := range []string{"2", "1"} {
		text, last := n.bootOnce(root, work, n.disk("export.img", "", "1G"), cpus)
		if strings.Contains(text, "= end") {
			return text
		}
		n.t.Logf("the machine with %s processors ended early; it printed:\n%s\nits console:\n%s", cpus, text, last)
	}
	n.t.Fatal("no machine got to the end")
	return ""
}

// bootOnce returns what the script printed, and what the kernel did.
func (n *node) bootOnce(root, work, export, cpus string) (printed, kernel string) {
	n.t.Helper()
	kernels, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		n.t.Fatalf("kernels %q, %v", kernels, err)
	}
	const start = "mount -t devtmpfs dev /dev; mount -t proc proc /proc; modprobe virtio_blk; modprobe virtio_console; mkdir -p /work; mount /dev/vda /work; " +
		"bash /work/run.sh > /dev/hvc0 2>&1; sync; echo o > /proc/sysrq-trigger; sleep 100"
	out, console := n.path("out.log"), n.path("console.log")
	ctx, cancel := context.WithTimeout(untilDone(n.t), guestTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", cpus, "-m", "2048",
		"-nographic", "-nodefaults", "-no-reboot", "-kernel", kernels[0],
		"-append", `console=ttyS0 quiet panic=-1 root=/dev/nvme0n1 rw rootfstype=ext4 init=/bin/sh -- -c "`+start+`"`,
		"-serial", "file:"+console, "-device", "virtio-serial-pci", "-chardev", "file,id=out,path="+out, "-device", "virtconsole,chardev=out",
		"-drive", "file="+n.disk("root.img", root, "3G")+",format=raw,if=none,id=d0,cache=unsafe", "-device", "nvme,drive=d0,serial=a",
		"-drive", "file="+work+",format=raw,if=none,id=d1,cache=unsafe", "-device", "virtio-blk-pci,drive=d1",
		"-drive", "file="+export+",format=raw,if=none,id=d2,cache=unsafe", "-device", "virtio-blk-pci,drive=d2")
	said, err := cmd.CombinedOutput()
	text, rerr := os.ReadFile(out)
	last, lerr := os.ReadFile(console)
	if err != nil || rerr != nil || lerr != nil {
		n.t.Fatalf("the machine: %v, %v, %v\n%s\n%s\n%s", err, rerr, lerr, said, text, last)
	}
	return strings.ReplaceAll(string(text), "\r", ""), string(last)
}

// layered is an image whose top layer replaces a directory and deletes a file of the one
// below, things for which overlayfs and NFS have no common way.
func layered(t *testing.T, with ...testimage.File) testimage.Image {
	t.Helper()
	data, err := os.ReadFile(holdfast)
	if err != nil {
		t.Fatal(err)
	}
	dir := func(name string) testimage.File {
		return testimage.File{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
	}
	file := func(name string) testimage.File {
		return testimage.File{Header: tar.Header{Name: name}, Content: []byte(name)}
	}
	base := []testimage.File{program(data), dir("d/"), file("d/gone"), file("d/kept"), dir("d/replaced/"), file("d/replaced/old"), dir("d/replaced/sub/"), file("d/replaced/sub/old")}
	top := []testimage.File{dir("d/"), file("d/.wh.gone"), dir("d/replaced/"), file("d/replaced/.wh..wh..opq"), dir("d/replaced/sub/"), file("d/replaced/sub/new")}
	top[1].Content, top[3].Content = nil, nil
	gzip := convertTo(t, testimage.Gzip)
	return testimage.Image{Layers: []testimage.Layer{gzip(testimage.Tar(base...)), gzip(testimage.Tar(append(top, with...)...))}, Cmd: []string{"/holdfast", "version"}}
}

// Our program makes a store on NFS, of the kernel at both ends; Podman of Debian 13 runs
// its image from read-only mounts of versions 4.2 and 3. What NFS would lose is refused.
// Podman says so when the server is gone; it neither hangs nor panics.
func TestNFS(t *testing.T) {
	n := newNode(t, nodeOptions{})
	img := layered(t)
	const name = "registry.example.com/team/app:1"
	capable := layered(t, testimage.File{Header: tar.Header{Name: "bin/ping", PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}}, Content: []byte("ping")})
	work := n.path("work")
	for file, image := range map[string]testimage.Image{"image": img, "capable": capable} {
		n.must(image.WriteLayout(n.path(file), name))
		n.must(os.MkdirAll(work, 0o700))
		n.holdfast("bundle", "create", "-o", filepath.Join(work, file+".tar"), "oci:"+n.path(file)+":"+name)
	}
	n.output(nil, "cp", holdfast, filepath.Join(work, "holdfast"))
	n.must(os.WriteFile(filepath.Join(work, "run.sh"), []byte(guest), 0o600))
	root := n.nfsRoot()
	out := n.boot(root, n.disk("work.img", work, "400M"))
	config, _, err := img.Build()
	n.must(err)
	results := map[string]string{}
	for line := range strings.Lines(out) {
		if what, ok := strings.CutPrefix(line, "= "); ok {
			what, result, _ := strings.Cut(strings.TrimSpace(what), ": ")
			results[what] = result
		}
	}
	id := digest.FromBytes(config).Encoded()
	for what, want := range map[string]string{
		"refused": "bin/ping", "verified": "1 images, 2 layers", "v4 images": id, "v3 images": id, "v4 run": "holdfast ", "v3 run": "holdfast ",
		"v4 tree": "d/kept d/replaced d/replaced/sub d/replaced/sub/new", "v3 tree": "d/kept d/replaced d/replaced/sub d/replaced/sub/new", "end": "",
	} {
		if got, ok := results[what]; !ok || !strings.Contains(got, want) || strings.Contains(what, "tree") && got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	if dead := results["dead"]; dead == "" || strings.HasPrefix(dead, "124") || strings.Contains(dead, "panic") {
		t.Errorf("with the server gone Podman ended with %q", dead)
	}
	if t.Failed() {
		t.Logf("the machine printed:\n%s", out)
	}
}
