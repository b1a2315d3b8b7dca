// SPDX-License-Identifier: Apache-2.0

// Package startup reads ahead what a container will surely read first: the
// program it starts, the interpreter of that, and the libraries both name.
//
// A dynamic program asks for its libraries one after the other, each time for a
// round trip. All of that can be known before: it is in the files' headers. The
// time between the preparation of an image and the start of its container is
// enough to fetch it.
//
// It is only a hint. Files that are not found are passed over; what is hostile
// ends in a bounded number of files and bytes.
package startup

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Bounds on what one program makes us read.
const (
	maxFiles    = 64
	maxFileSize = 8 << 20 // bytes read of one file
	maxAtOnce   = 8
	maxLinks    = 40  // as the kernel's
	maxLine     = 256 // as the kernel's, of a script
)

// Command is what a container starts.
type Command struct {
	Args []string // entrypoint and command
	Env  []string // for PATH
	Dir  string   // working directory
}

// Layer is a layer of an image.
type Layer struct {
	// FS is the layer's tree; it has symbolic links (fs.ReadLinkFS).
	FS fs.FS
	// Data holds the content of files whose fs.FileInfo says where, with the
	// method DataRange of package erofs. Files that are io.ReaderAt are read
	// themselves.
	Data Data
	// Origin is where Data starts in the addresses of DataRange.
	Origin int64
}

// Data is content that may be on its way: see package device.
type Data interface {
	Wait(ctx context.Context, off int64, n int) (release func(), err error)
	io.ReaderAt
}

// Warm reads the files that the command needs, from the layers of an image,
// base first. It returns the names it has read, as far as it has come.
func Warm(ctx context.Context, layers []Layer, cmd Command) ([]string, error) {
	w := &warmer{tree: tree(layers), seen: map[string]bool{}}
	program, ok := w.find(cmd)
	if !ok {
		return nil, nil
	}
	err := w.follow(ctx, []string{program})
	return w.read, err
}

type warmer struct {
	tree tree
	seen map[string]bool
	read []string
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// find returns the path of the command's program.
func (w *warmer) find(cmd Command) (string, bool) {
	if len(cmd.Args) == 0 || cmd.Args[0] == "" {
		return "", false
	}
	name := cmd.Args[0]
	if strings.Contains(name, "/") {
		return w.tree.resolve(path.Join("/", cmd.Dir, name)[1:])
	}
	search := defaultPath
	for _, v := range cmd.Env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			search = p
		}
	}
	return w.first(strings.Split(search, ":"), name)
}

// first returns the first of dirs' files of that name that exists.
func (w *warmer) first(dirs []string, name string) (string, bool) {
	for _, dir := range dirs {
		if found, ok := w.tree.resolve(strings.TrimPrefix(path.Join("/", dir, name), "/")); ok {
			return found, true
		}
	}
	return "", false
}

// follow reads files, then those that they name, level by level.
func (w *warmer) follow(ctx context.Context, names []string) error {
	for len(names) > 0 {
		needed := make([][]string, len(names))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(maxAtOnce)
		for i, name := range names {
			g.Go(func() (err error) {
				needed[i], err = w.visit(gctx, name)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		w.read = append(w.read, names...)
		names = w.unseen(needed)
	}
	return nil
}

// unseen returns the names that have not been visited, as many as are allowed.
func (w *warmer) unseen(lists [][]string) []string {
	var next []string
	for _, list := range lists {
		for _, name := range list {
			if !w.seen[name] && len(w.seen) < maxFiles {
				w.seen[name] = true
				next = append(next, name)
			}
		}
	}
	return next
}

// visit reads a file and returns what it names. What the file holds is nobody's
// error, only that its bytes could not be had.
func (w *warmer) visit(ctx context.Context, name string) ([]string, error) {
	f, err := w.tree.open(ctx, name)
	if err != nil {
		return nil, nil // gone, or no regular file: nothing to warm
	}
	defer f.close()
	if err := f.wait(min(f.Size(), maxFileSize)); err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	head := make([]byte, min(f.Size(), maxLine))
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, f.Size()), head); err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		return w.script(strings.Fields(string(line))), nil
	}
	return w.libraries(name, f), nil
}

// script returns the interpreter that a script names in its first line.
func (w *warmer) script(words []string) []string {
	if len(words) > 1 && path.Base(words[0]) == "env" {
		env, _ := w.find(Command{Args: words[:1]})
		program, _ := w.find(Command{Args: words[1:]})
		return nonEmpty(env, program)
	}
	program, _ := w.find(Command{Args: words})
	return nonEmpty(program)
}

// libraries returns the interpreter and the libraries that a program or library
// names.
func (w *warmer) libraries(name string, r io.ReaderAt) []string {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil
	}
	var found []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		raw, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			continue
		}
		interp, _ := w.find(Command{Args: []string{strings.TrimRight(string(raw), "\x00")}})
		found = append(found, interp)
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nonEmpty(found...)
	}
	dirs := searchDirs(f, path.Dir("/"+name))
	for _, lib := range needed[:min(len(needed), maxFiles)] {
		l, _ := w.first(dirs, path.Base(lib))
		found = append(found, l)
	}
	return nonEmpty(found...)
}

// searchDirs is where the dynamic loader looks: see ld.so(8). Its cache and its
// configuration are not read; these are where distributions have libraries.
func searchDirs(f *elf.File, origin string) []string {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			continue
		}
		for _, v := range values {
			v = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(v)
			dirs = append(dirs, strings.Split(v, ":")...)
		}
	}
	triplet := map[elf.Machine]string{
		elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu",
		elf.EM_PPC64: "powerpc64le-linux-gnu", elf.EM_S390: "s390x-linux-gnu",
	}[f.Machine]
	for _, prefix := range []string{"/lib", "/usr/lib"} {
		if triplet != "" {
			dirs = append(dirs, prefix+"/"+triplet)
		}
		dirs = append(dirs, prefix+"64", prefix)
	}
	return dirs[:min(len(dirs), maxFiles)]
}

func nonEmpty(names ...string) []string {
	var kept []string
	for _, n := range names {
		if n != "" {
			kept = append(kept, n)
		}
	}
	return kept
}
