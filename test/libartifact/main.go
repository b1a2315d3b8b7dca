// SPDX-License-Identifier: Apache-2.0

// Command libartifact reads artifact stores with the very code that CRI-O and Podman
// read them with, for the tests and the bench. It has a module of its own, since that
// code wants other versions of what Holdfast is made of.
//
//	libartifact list STORE...        name and digest of each artifact
//	libartifact inspect STORE NAME   its manifest
//	libartifact paths STORE NAME     name and path of each of its files, as they are mounted
//	libartifact time STORE... N      how long a list of all takes, in nanoseconds, N times
//	libartifact watch STORE...       lists again and again until its input ends
//	libartifact pull STORE NAME      from a registry without TLS
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"go.podman.io/common/libimage"
	"go.podman.io/common/pkg/libartifact/store"
	"go.podman.io/common/pkg/libartifact/types"
	image "go.podman.io/image/v5/types"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("usage: libartifact list|inspect|paths|time|watch|pull STORE [NAME|N]")
	}
	system := &image.SystemContext{DockerInsecureSkipTLSVerify: image.OptionalBoolTrue}
	s, err := store.NewArtifactStore(args[1], system)
	if err != nil {
		return err
	}
	arg := ""
	if len(args) > 2 {
		arg = args[2]
	}
	switch args[0] {
	case "list":
		return list(ctx, system, args[1:])
	case "inspect":
		a, err := s.Inspect(ctx, arg)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(a.Manifest)
	case "paths":
		paths, err := s.BlobMountPaths(ctx, arg, &types.BlobMountPathOptions{})
		for _, p := range paths {
			fmt.Println(p.Name, p.SourcePath)
		}
		return err
	case "time":
		return measure(ctx, system, args[1:len(args)-1], args[len(args)-1])
	case "watch":
		return watch(ctx, system, args[1:])
	case "pull":
		_, err := s.Pull(ctx, arg, libimage.CopyOptions{InsecureSkipTLSVerify: image.OptionalBoolTrue, RemoveSignatures: true})
		return err
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func open(system *image.SystemContext, paths []string) (stores []*store.ArtifactStore, err error) {
	for _, p := range paths {
		s, err := store.NewArtifactStore(p, system)
		if err != nil {
			return nil, err
		}
		stores = append(stores, s)
	}
	return stores, nil
}

func list(ctx context.Context, system *image.SystemContext, paths []string) error {
	stores, err := open(system, paths)
	if err != nil {
		return err
	}
	for _, s := range stores {
		all, err := s.List(ctx)
		if err != nil {
			return err
		}
		for _, a := range all {
			d, err := a.GetDigest()
			if err != nil {
				return err
			}
			fmt.Println(a.Name, d)
		}
	}
	return nil
}

// measure lists several stores one after the other, as CRI-O does, from one process.
func measure(ctx context.Context, system *image.SystemContext, paths []string, times string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	stores, err := open(system, paths)
	if err != nil {
		return err
	}
	for range n {
		start := time.Now()
		for _, s := range stores {
			if _, err := s.List(ctx); err != nil {
				return err
			}
		}
		fmt.Println(time.Since(start).Nanoseconds())
	}
	return nil
}

// watch fails with the first list that does, and says how many rounds there were.
func watch(ctx context.Context, system *image.SystemContext, paths []string) error {
	stores, err := open(system, paths)
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	for n := 0; ; n++ {
		for _, s := range stores {
			if _, err := s.List(ctx); err != nil {
				return fmt.Errorf("list %d: %w", n, err)
			}
		}
		select {
		case <-ended:
			fmt.Println(n)
			return nil
		default:
		}
	}
}
