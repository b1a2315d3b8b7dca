// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/testimage"
)

// Sample is the image that everything is tried on: a Debian root file system
// with python3 and a framework, and a layer with a model's weights and the program
// that loads them.
type Sample struct {
	Dir string // where it is kept between runs
	// Framework is what the program computes with: "numpy", the default, or "torch",
	// with more than 1 GiB of files.
	Framework string
	// WeightsSize is the size of the weights file in bytes.
	WeightsSize int64
	// Suite is the Debian suite of the root file system.
	Suite string
	// Log says what is being done.
	Log func(format string, args ...any)
}

// WeightsPath is the weights file in the image.
const WeightsPath = "/models/weights.safetensors"

// ReadSize is how much of the weights the program reads before it is ready.
const ReadSize = 64 << 20

// ReadyLine is what the program prints when it is ready.
const ReadyLine = "ready"

// program is what the image runs; framework puts in the words that differ.
const program = `import sys, time
{import}

def load(path, size):
    """Reads the start of the weights, as a server does with its first layers."""
    total = np.uint64(0)
    with open(path, "rb", buffering=0) as f:
        left = size
        while left:
            block = f.read(min(left, 1 << 20))
            if not block:
                raise SystemExit("weights end early")
            left -= len(block)
            total += np.frombuffer(block[: len(block) // 8 * 8], dtype=np.uint64).sum(dtype=np.uint64)
    return total

total = load("` + WeightsPath + `", int(sys.argv[1]) if len(sys.argv) > 1 else 64 << 20)
{compute}
`

// framework is a way to compute.
type framework struct {
	packages         []string
	imports, compute string
}

var frameworks = map[string]framework{
	"numpy": {
		[]string{"python3-numpy"}, "import numpy as np",
		`m = np.arange(10000, dtype=np.float64).reshape(100, 100)
print("` + ReadyLine + `", total, np.linalg.norm(m @ m.T), flush=True)`,
	},
	"torch": {
		[]string{"python3-numpy", "python3-torch"}, "import numpy as np\nimport torch",
		`m = torch.arange(10000, dtype=torch.float64).reshape(100, 100)
print("` + ReadyLine + `", total, float(torch.linalg.norm(m @ m.T)), flush=True)`,
	},
}

func (s Sample) framework() string { return cmp.Or(s.Framework, "numpy") }

// program is the program of the sample.
func (s Sample) program() string {
	f := frameworks[s.framework()]
	return strings.NewReplacer("{import}", f.imports, "{compute}", f.compute).Replace(program)
}

// Layers returns the sample's two layers in a format, made on first use. That
// takes minutes; the results are kept in s.Dir.
func (s Sample) Layers(ctx context.Context, f testimage.Format) ([]testimage.Layer, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the sample image: %w", err)
	}
	var layers []testimage.Layer
	for _, part := range []struct {
		name string
		make func(ctx context.Context, tarPath string) error
	}{
		{s.rootName(), s.makeRoot},
		{s.weightsName(), s.makeWeights},
	} {
		l, err := s.layer(ctx, part.name, f, part.make)
		if err != nil {
			return nil, fmt.Errorf("making the sample image: %w", err)
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// Image returns the sample as an image.
func (s Sample) Image(ctx context.Context, f testimage.Format) (testimage.Image, error) {
	layers, err := s.Layers(ctx, f)
	return testimage.Image{
		Layers: layers,
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"},
		Cmd:    []string{"python3", "/app/serve.py"},
	}, err
}

// layer returns a layer from s.Dir, or makes it.
func (s Sample) layer(ctx context.Context, name string, f testimage.Format, makeTar func(context.Context, string) error) (testimage.Layer, error) {
	path := filepath.Join(s.Dir, name+"."+fileExtension(f))
	var l testimage.Layer
	err := atomicfile.ReadJSON(path+".json", 1<<20, &l)
	if err == nil {
		if info, err := os.Stat(path); err == nil && info.Size() == l.Descriptor.Size {
			l.Path = path
			return l, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return testimage.Layer{}, err
	}
	tarPath := filepath.Join(s.Dir, name+".tar")
	if _, err := os.Stat(tarPath); err != nil {
		if err := makeTar(ctx, tarPath); err != nil {
			return testimage.Layer{}, err
		}
	}
	s.Log("compressing %s as %s", name, f)
	if l, err = testimage.ConvertFile(ctx, tarPath, f, testimage.Options{}, path); err != nil {
		return testimage.Layer{}, err
	}
	l.Path = path
	return l, atomicfile.WriteJSON(path+".json", l, 0o600)
}

// rootName and weightsName are the file names of the layers, without an extension.
func (s Sample) rootName() string { return "debian-" + s.suffix() + s.Suite }

func (s Sample) weightsName() string {
	return fmt.Sprintf("weights-%s%d", s.suffix(), s.WeightsSize>>20)
}

// suffix tells files of different frameworks apart.
func (s Sample) suffix() string {
	if s.framework() == "numpy" {
		return ""
	}
	return s.framework() + "-"
}

func fileExtension(f testimage.Format) string {
	switch f {
	case testimage.ZstdChunked:
		return "zstdchunked"
	case testimage.ZstdChunkedStargz:
		return "zstdchunked-stargz"
	case testimage.Uncompressed:
		return "uncompressed" // .tar is what it is made of
	default:
		return string(f)
	}
}

// makeRoot makes a tar of a Debian root file system.
func (s Sample) makeRoot(ctx context.Context, tarPath string) error {
	root := filepath.Join(s.Dir, s.rootName())
	if err := Debootstrap(ctx, root, s.Suite, s.Log, append([]string{"python3"}, frameworks[s.framework()].packages...)...); err != nil {
		return err
	}
	s.Log("packing the root file system")
	return replace(tarPath, func(tmp string) error {
		_, err := run(ctx, nil, "tar", "--create", "--file", tmp, "--directory", root, "--sort=name",
			"--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=./dev/*", "--exclude=./proc/*",
			"--exclude=./sys/*", "--exclude=./var/cache/apt/archives/*", "--exclude=./var/lib/apt/lists/*", ".")
		return err
	})
}

// Debootstrap makes a Debian root file system in dir, unless it is there.
func Debootstrap(ctx context.Context, dir, suite string, log func(string, ...any), packages ...string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	log("making a Debian %s root file system with %v (a minute or two)", suite, packages)
	include := "ca-certificates"
	for _, p := range packages {
		include += "," + p
	}
	return replace(dir, func(tmp string) error {
		_, err := run(ctx, nil, "debootstrap", "--variant=minbase", "--include="+include, suite, tmp)
		if err != nil {
			return fmt.Errorf("is debootstrap installed (apt-get install debootstrap)? %w", err)
		}
		return nil
	})
}

// makeWeights makes a tar with the program and a weights file in the format of
// safetensors: a JSON header, then numbers, here random ones, as quantized
// weights look to a compressor.
func (s Sample) makeWeights(_ context.Context, tarPath string) error {
	s.Log("making %.1f GiB of weights", gib(s.WeightsSize))
	return replace(tarPath, func(tmp string) error {
		f, err := os.Create(tmp)
		if err != nil {
			return err
		}
		w := bufio.NewWriterSize(f, 1<<20)
		return errors.Join(writeWeights(tar.NewWriter(w), s.WeightsSize, s.program()), w.Flush(), f.Close())
	})
}

func writeWeights(w *tar.Writer, size int64, program string) error {
	stamp := time.Unix(1_700_000_000, 0)
	for _, dir := range []string{"app/", "models/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: stamp}); err != nil {
			return err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "app/serve.py", Mode: 0o644, Size: int64(len(program)), ModTime: stamp}); err != nil {
		return err
	}
	if _, err := io.WriteString(w, program); err != nil {
		return err
	}
	head, err := safetensorsHeader(size)
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: WeightsPath[1:], Mode: 0o644, Size: size, ModTime: stamp}); err != nil {
		return err
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{'h', 'o', 'l', 'd'})
	if _, err := io.CopyN(w, random, size-int64(len(head))); err != nil {
		return err
	}
	return w.Close()
}

// WriteWeights makes a file of weights, of size bytes.
func WriteWeights(_ context.Context, name string, size int64) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	return replace(name, func(tmp string) error {
		head, err := safetensorsHeader(size)
		if err != nil {
			return err
		}
		f, err := os.Create(tmp)
		if err != nil {
			return err
		}
		w := bufio.NewWriterSize(f, 1<<20)
		_, err = w.Write(head)
		if err == nil {
			_, err = io.CopyN(w, rand.NewChaCha8([32]byte{'m', 'o', 'd', 'e', 'l'}), size-int64(len(head)))
		}
		return errors.Join(err, w.Flush(), f.Close())
	})
}

// safetensorsHeader describes one tensor that fills a file of size bytes.
func safetensorsHeader(size int64) ([]byte, error) {
	const room = 1 << 10
	body, err := json.Marshal(map[string]any{"model.weights": map[string]any{
		"dtype": "U8", "shape": []int64{size - 8 - room}, "data_offsets": []int64{0, size - 8 - room},
	}})
	if err != nil {
		return nil, err
	}
	head := make([]byte, 8+room)
	binary.LittleEndian.PutUint64(head, room)
	for i := range head[8:] {
		head[8+i] = ' '
	}
	copy(head[8:], body)
	return head, nil
}

// replace makes a file or directory under another name and renames it when it
// is whole.
func replace(name string, fill func(tmp string) error) error {
	tmp := name + ".part"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := fill(tmp); err != nil {
		return errors.Join(err, RemoveAll(tmp))
	}
	return os.Rename(tmp, name)
}
