// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// storing is what image stores and bundles were measured to do. Stores read the image
// from a registry on this machine, without the line; bundles from an OCI layout.
type storing struct {
	Size int64 `json:"size"` // of the layers' blobs, in bytes
	// Add is holdfast store add, Copy skopeo copy to containers-storage, each until what
	// it wrote is on the disk.
	Add  []time.Duration `json:"add"`
	Copy []time.Duration `json:"copy"`
	// Sent are the bytes of blobs that the registry has sent: for the addition, until a
	// second node had started the image from the store, and until ten had.
	SentAdd, SentSecond, SentTen int64
	// Create and Verify are holdfast bundle create and verify, the latter from the disk.
	Create []time.Duration `json:"create"`
	Verify []time.Duration `json:"verify"`
	Bundle int64           `json:"bundle"` // bytes of the file
	// Write and Read are the sequential rates of the disk, Hash that of sha256 on one
	// core, in bytes a second.
	Write, Read, Hash []float64
}

// measureStorage adds an image to an image store, has ten nodes start it, and packs it
// into a bundle.
func (b *bench) measureStorage(ctx context.Context) (err error) {
	img, err := b.sample.Image(ctx, testimage.Gzip)
	if err != nil {
		return err
	}
	stand, err := b.newStand("storage", img, noFill)
	if err != nil {
		return err
	}
	defer func() { err = joined(err, stand.Close(ctx)) }()
	s := &storageRun{b, stand, stand.Unshaped().Ref, &b.report.Storing}
	if err := img.WriteLayout(stand.Dir("layout"), s.ref); err != nil {
		return err
	}
	for _, l := range img.Layers {
		s.r.Size += l.Descriptor.Size
	}
	for range b.pairs {
		if err := joined(s.add(ctx), s.copy(ctx)); err != nil {
			return err
		}
	}
	if err := s.nodes(ctx); err != nil {
		return err
	}
	if err := stand.Daemon.Start(ctx); err != nil { // without its store the stand's own Podman does not even end
		return err
	}
	for range b.pairs {
		if err := joined(s.disk(), s.bundle(ctx)); err != nil {
			return err
		}
	}
	return nil
}

type storageRun struct {
	*bench
	stand *lab.Stand
	ref   string
	r     *storing
}

// timed runs a command until what it wrote is on the disk.
func (s *storageRun) timed(ctx context.Context, args ...string) (time.Duration, error) {
	unix.Sync()
	start := time.Now()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "TMPDIR="+s.stand.Dir(""), "CONTAINERS_REGISTRIES_CONF="+s.stand.Dir("registries.conf"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	unix.Sync()
	return time.Since(start), nil
}

// holdfast runs a command of ours.
func (s *storageRun) holdfast(ctx context.Context, args ...string) (time.Duration, error) {
	return s.timed(ctx, append([]string{s.binary, "--config", s.stand.Daemon.Config()}, args...)...)
}

// add makes the store anew; the last one stays for the nodes.
func (s *storageRun) add(ctx context.Context) error {
	store := s.stand.Dir("store")
	if err := os.RemoveAll(store); err != nil {
		return err
	}
	if _, err := s.holdfast(ctx, "store", "create", store); err != nil {
		return err
	}
	s.stand.Registry.ResetCounts()
	took, err := s.holdfast(ctx, "store", "add", store, s.ref)
	s.r.SentAdd = s.stand.Registry.Counts().BlobBytes
	s.r.Add = append(s.r.Add, took)
	s.logTook(err, "store add: %.2f s", took.Seconds())
	return err
}

func (s *storageRun) copy(ctx context.Context) error {
	root, run := s.stand.Dir("skopeo"), s.stand.Dir("skopeo-run")
	if err := os.WriteFile(s.stand.Dir("registries.conf"), []byte(s.stand.RegistriesConf("")), 0o600); err != nil {
		return err
	}
	took, err := s.timed(ctx, "skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false",
		"docker://"+s.ref, "containers-storage:[overlay@"+root+"+"+run+"]"+s.ref)
	s.r.Copy = append(s.r.Copy, took)
	s.logTook(err, "skopeo copy: %.2f s", took.Seconds())
	return joined(err, joined(lab.RemoveAll(root), lab.RemoveAll(run)))
}

// nodes has one and then ten Podmans with storage of their own start the image.
func (s *storageRun) nodes(ctx context.Context) error {
	node := func(i int) error {
		p, err := lab.NewPodman(s.stand.Dir(fmt.Sprint("node", i)), lab.PodmanOptions{MoreStores: []string{s.stand.Dir("store")}, Insecure: []string{s.stand.Registry.Host()}})
		if err != nil {
			return err
		}
		_, _, err = p.RunUntil(ctx, lab.ReadyLine, nil, s.ref)
		return joined(err, p.Close(context.WithoutCancel(ctx)))
	}
	s.stand.Registry.ResetCounts()
	if err := node(0); err != nil {
		return err
	}
	s.r.SentSecond = s.stand.Registry.Counts().BlobBytes
	var g errgroup.Group
	g.SetLimit(4)
	for i := range 9 {
		g.Go(func() error { return node(i + 1) })
	}
	err := g.Wait()
	s.r.SentTen = s.stand.Registry.Counts().BlobBytes
	s.logTook(err, "ten nodes have started the image from the store; the registry sent %d bytes", s.r.SentTen)
	return err
}

func (s *storageRun) bundle(ctx context.Context) error {
	file := s.stand.Dir("bundle.tar")
	took, err := s.holdfast(ctx, "bundle", "create", "-o", file, "oci:"+s.stand.Dir("layout")+":"+s.ref)
	if err != nil {
		return err
	}
	s.r.Create = append(s.r.Create, took)
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	s.r.Bundle = info.Size()
	if err := lab.DropPageCache(); err != nil {
		return err
	}
	verified, err := s.holdfast(ctx, "bundle", "verify", file)
	s.r.Verify = append(s.r.Verify, verified)
	s.logTook(err, "bundle of %.0f MB created in %.2f s, verified in %.2f s", float64(s.r.Bundle)/1e6, took.Seconds(), verified.Seconds())
	return joined(err, os.Remove(file))
}

// disk measures what bounds bundles: the disk, written and read from one end to the
// other as large as a bundle, and sha256.
func (s *storageRun) disk() (err error) {
	name := filepath.Join(s.dir, "disk")
	defer func() { err = joined(err, os.Remove(name)) }()
	block := testimage.Bytes(1<<20, 1)
	unix.Sync()
	start := time.Now()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	for done := int64(0); err == nil && done < s.r.Size; done += int64(len(block)) {
		_, err = f.Write(block)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	rate := func() float64 { return float64(s.r.Size) / time.Since(start).Seconds() }
	s.r.Write = append(s.r.Write, rate())
	if err := lab.DropPageCache(); err != nil {
		return err
	}
	start = time.Now()
	if f, err = os.Open(name); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, block); err != nil {
		return err
	}
	s.r.Read = append(s.r.Read, rate())
	start = time.Now()
	sum := sha256.New()
	for done := int64(0); done < s.r.Size; done += int64(len(block)) {
		sum.Write(block)
	}
	s.r.Hash = append(s.r.Hash, rate())
	s.log("disk: written at %.0f, read at %.0f MB/s; sha256: %.0f MB/s", last(s.r.Write)/1e6, last(s.r.Read)/1e6, last(s.r.Hash)/1e6)
	return f.Close()
}

func last(list []float64) float64 { return list[len(list)-1] }

func (s *storing) addBar() bar {
	add, skopeo := median(s.Add, time.Duration.Seconds).Seconds(), median(s.Copy, time.Duration.Seconds).Seconds()
	return bar{What: "store add, against skopeo copy to containers-storage", Unit: "times", Want: 1, Measured: add / skopeo,
		Detail: fmt.Sprintf("%.2f s, skopeo %.2f s, for %.0f MB", add, skopeo, float64(s.Size)/1e6)}
}

func (s *storing) secondBar() bar {
	return bar{What: "sent for a second node that starts it from the store", Unit: "bytes", Want: 0, Measured: float64(s.SentSecond), Detail: ""}
}

func (s *storing) tenBar() bar {
	return bar{What: "sent for the store and ten nodes, to the image", Unit: "times", Want: 1.001, // and its configuration
		Measured: float64(s.SentAdd+s.SentTen) / float64(s.Size), Detail: fmt.Sprintf("%.1f of %.1f MB", float64(s.SentAdd+s.SentTen)/1e6, float64(s.Size)/1e6)}
}

func same(v float64) float64 { return v }

func (s *storing) createBar() bar { return s.bundleBar("created", s.Create, median(s.Write, same)) }

func (s *storing) verifyBar() bar { return s.bundleBar("verified", s.Verify, median(s.Read, same)) }

func (s *storing) bundleBar(what string, took []time.Duration, disk float64) bar {
	rate, least := float64(s.Bundle)/median(took, time.Duration.Seconds).Seconds(), min(disk, median(s.Hash, same))
	return bar{What: "bundle " + what + ", of the slower of disk and sha256", Unit: "%", Want: 80, Measured: 100 * rate / least,
		Detail: fmt.Sprintf("%.0f MB/s, disk %.0f, sha256 %.0f", rate/1e6, disk/1e6, median(s.Hash, same)/1e6)}
}
