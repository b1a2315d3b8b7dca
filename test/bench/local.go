// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/test/lab"
)

// both are times of the same thing, done with the image pulled normally and
// with the lazily pulled one.
type both struct {
	Normal []time.Duration `json:"normal"`
	Lazy   []time.Duration `json:"lazy"`
}

// rounds measures both, in turn.
func rounds(n int, into *both, normal, lazy func() (time.Duration, error)) error {
	note := func(list *[]time.Duration, measure func() (time.Duration, error)) func() error {
		return func() error {
			took, err := measure()
			*list = append(*list, took)
			return err
		}
	}
	for i := range n {
		if err := inTurn(i, note(&into.Normal, normal), note(&into.Lazy, lazy)); err != nil {
			return err
		}
	}
	return nil
}

// measureLocal compares the image when all of it is local: run again, all files
// read with a warm page cache, all files listed with an empty one. The roots of
// the containers are what Podman mounts; they are read by this program itself,
// so that the start of a process does not hide the difference.
func (b *bench) measureLocal(ctx context.Context) (err error) {
	s := b.stand.Unshaped()
	if err := s.Forget(ctx); err != nil {
		return err
	}
	defer func() { err = joined(err, s.Forget(context.WithoutCancel(ctx))) }()
	b.log("making the image local")
	if _, err := s.StartNormal(ctx); err != nil {
		return err
	}
	if _, err := s.StartLazy(ctx); err != nil {
		return err
	}
	normal, err := s.Normal.Mount(ctx, s.Ref)
	if err != nil {
		return err
	}
	lazy, err := s.Lazy.Mount(ctx, s.Ref)
	if err != nil {
		return err
	}
	r := &b.report.Local
	if err := b.makeLocal(ctx, normal, lazy); err != nil {
		return err
	}
	b.log("reading all %d files (%.0f MB)", r.Files, float64(r.Bytes)/1e6)
	readAll := func(root string) func() (time.Duration, error) {
		return timed(func() error { _, err := readTree(ctx, root); return err })
	}
	if err := rounds(b.rounds, &r.Read, readAll(normal), readAll(lazy)); err != nil {
		return err
	}
	b.log("running again")
	rerun := func(p *lab.Podman) func() (time.Duration, error) {
		return func() (time.Duration, error) { return s.Rerun(ctx, p) }
	}
	if err := rounds(1, new(both), rerun(s.Normal), rerun(s.Lazy)); err != nil { // warms up
		return err
	}
	if err := rounds(b.rounds, &r.Run, rerun(s.Normal), rerun(s.Lazy)); err != nil {
		return err
	}
	b.log("listing all files")
	list := func(root string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			if err := lab.DropPageCache(); err != nil {
				return 0, err
			}
			return timed(func() error { _, err := statTree(ctx, root); return err })()
		}
	}
	return rounds(b.rounds, &r.Stat, list(normal), list(lazy))
}

// makeLocal reads everything once, and makes sure that it is the same and that
// nothing is missing.
func (b *bench) makeLocal(ctx context.Context, normal, lazy string) error {
	want, err := readTree(ctx, normal)
	if err != nil {
		return err
	}
	got, err := readTree(ctx, lazy)
	if err != nil {
		return err
	}
	if got != want || want.Files == 0 {
		return fmt.Errorf("the lazily pulled image has %+v, the other %+v", got, want)
	}
	b.report.Local.tree = got
	images, err := b.stand.Daemon.Client().Images(ctx)
	if err != nil {
		return err
	}
	for _, img := range images {
		for _, l := range img.Layers {
			if l.Device != nil && l.Device.Present != l.Device.Chunks {
				return fmt.Errorf("of layer %s, %d of %d chunks are local although all files have been read", l.Digest, l.Device.Present, l.Device.Chunks)
			}
		}
	}
	return nil
}

func timed(do func() error) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		start := time.Now()
		err := do()
		return time.Since(start), err
	}
}

// tree is how much there is in a file tree.
type tree struct {
	Entries int   `json:"entries"` // files of all types
	Files   int   `json:"files"`   // regular ones
	Bytes   int64 `json:"bytes"`   // in them
}

// statTree asks for the attributes of every file.
func statTree(ctx context.Context, root string) (tree, error) {
	return walkTree(ctx, root, func(string) error { return nil })
}

// readTree reads every regular file.
func readTree(ctx context.Context, root string) (tree, error) {
	buf := make([]byte, 1<<20)
	return walkTree(ctx, root, func(name string) error {
		_, err := readFile(ctx, name, buf)
		return err
	})
}

// walkTree counts what is below a directory, and calls do for the regular files.
func walkTree(ctx context.Context, root string, do func(name string) error) (tree, error) {
	w := walker{ctx: ctx, do: do, buf: make([]byte, 64<<10)}
	err := w.walk(unix.AT_FDCWD, root, root)
	return w.tree, err
}

// walker makes the system calls that find makes, and does little besides: what
// it does itself is measured, too.
type walker struct {
	tree
	ctx context.Context
	do  func(name string) error
	buf []byte
}

func (w *walker) walk(at int, name, path string) error {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %s: %w", path, err)
	}
	defer unix.Close(fd) //nolint:errcheck // read only
	var names []string
	for {
		n, err := unix.Getdents(fd, w.buf)
		if err != nil {
			return fmt.Errorf("listing %s: %w", path, err)
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(w.buf[:n], -1, names)
	}
	for _, name := range names {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("asking for the attributes of %s in %s: %w", name, path, err)
		}
		w.Entries++
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			w.Files++
			w.Bytes += st.Size
			err = w.do(path + "/" + name)
		case unix.S_IFDIR:
			err = w.walk(fd, name, path+"/"+name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
