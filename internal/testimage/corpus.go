// SPDX-License-Identifier: Apache-2.0

// Package testimage makes layers and images for tests, the demo and the
// benchmark: a corpus of small nasty layers, conversion of a tar to every layer
// format, and OCI images made of the results.
//
// Nothing of the daemon uses it. What it makes is the same on every run, but for
// compressors whose output depends on the number of processors.
package testimage

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Case is a layer that a normal pull extracts without complaint.
type Case struct {
	Name string
	Tar  []byte
	// RawNames means that the layer has names that JSON cannot carry: no table of
	// contents describes it truly, and decoders must refuse theirs.
	RawNames bool
	// Formats are those that the layer can be converted to.
	Formats []Format
}

// File is an entry of a tar made by [Tar]. Size is that of Content. A zero
// Typeflag means a regular file, a zero Mode 0644, or 0755 for a directory, and a
// zero ModTime a day in 2023.
type File struct {
	tar.Header
	Content []byte
}

// timestamp is when files were changed unless they say otherwise.
func timestamp() time.Time { return time.Unix(1_700_000_000, 0) }

// Corpus returns the corpus, the same each time.
func Corpus() []Case {
	cases := []Case{
		{Name: "empty", Tar: Tar()},
		{Name: "whiteouts", Tar: whiteouts()},
		{Name: "directories", Tar: directories()},
		{Name: "attributes", Tar: attributes()},
		{Name: "special files", Tar: specialFiles()},
		{Name: "modes and owners", Tar: modes()},
		{Name: "times", Tar: times()},
		{Name: "links", Tar: links()},
		{Name: "names", Tar: names()},
		{Name: "names that are not UTF-8", Tar: rawNames(), RawNames: true},
		{Name: "sizes", Tar: sizes()},
		{Name: "holes", Tar: holes()},
		{Name: "many small files", Tar: manyFiles()},
		{Name: "converted before", Tar: converted()},
	}
	for i := range cases {
		cases[i].Formats = Formats()
	}
	// The converter of containers/storage refuses these.
	return append(cases, Case{
		Name: "repeated directories", Tar: repeated(),
		Formats: slices.DeleteFunc(Formats(), func(f Format) bool { return f == ZstdChunked }),
	})
}

// Tar returns a tar with these entries. It panics if one cannot be written: the
// entries are the programmer's.
func Tar(files ...File) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := f.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = timestamp()
		}
		h.Size = int64(len(f.Content))
		if err := w.WriteHeader(&h); err != nil {
			panic(fmt.Sprintf("testimage: %q: %v", h.Name, err))
		}
		if _, err := w.Write(f.Content); err != nil {
			panic(fmt.Sprintf("testimage: %q: %v", h.Name, err))
		}
	}
	if err := w.Close(); err != nil {
		panic(fmt.Sprintf("testimage: %v", err))
	}
	return buf.Bytes()
}

// Bytes returns n bytes that compress to about half, the same for the same n and
// seed.
func Bytes(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, uint64(n))) //nolint:gosec // no secret
	p := make([]byte, n)
	for i := 0; i < n; {
		for v := r.Uint64(); v != 0 && i < n; v >>= 4 {
			p[i] = "etaoinshrdlucmfw"[v&15]
			i++
		}
	}
	return p
}

func file(name, content string) File {
	return File{Header: tar.Header{Name: name}, Content: []byte(content)}
}

func dir(name string) File {
	return File{Header: tar.Header{Name: name, Typeflag: tar.TypeDir}}
}

func symlink(name, target string) File {
	return File{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}}
}

func link(name, target string) File {
	return File{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}}
}

// with changes a file's header.
func with(f File, change func(*tar.Header)) File {
	change(&f.Header)
	return f
}

func xattr(f File, pairs ...string) File {
	f.PAXRecords = map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		f.PAXRecords["SCHILY.xattr."+pairs[i]] = pairs[i+1]
	}
	return f
}

func owned(f File, uid, gid int) File {
	f.Uid, f.Gid = uid, gid
	return f
}

func moded(f File, mode int64) File {
	f.Mode = mode
	return f
}

func dated(f File, t time.Time) File {
	f.ModTime = t
	f.Format = tar.FormatPAX // the others have whole seconds since the epoch
	return f
}

func whiteouts() []byte {
	return Tar(
		dir("./"),
		file(".wh.gone", ""),
		dir("etc/"),
		owned(file("etc/.wh.passwd", ""), 1000, 1001),
		file("etc/shadow", "x"),
		file("implied/.wh.file", "content that means nothing"),
		dir("opaque/"),
		file("opaque/.wh..wh..opq", ""),
		file("opaque/new", "new"),
		file("late/.wh..wh..opq", ""),
		xattr(dir("late/"), "user.note", "kept"),
		file(".wh.again", ""),
		file("again", "back"),
		file(".wh.tree", ""),
		dir("tree/"),
		file("tree/leaf", "leaf"),
		file(".wh.twice", ""),
		file("twice/.wh.inside", ""),
		dir(".wh..wh.plnk/"),
		with(File{}, func(h *tar.Header) { h.Name, h.Typeflag, h.Mode = "direct", tar.TypeChar, 0o600 }),
	)
}

func directories() []byte {
	files := []File{
		moded(owned(dir("./"), 5, 6), 0o711),
		file("no/one/described/these", "implied"),
		dir("/absolute/"),
		file("./dotted//double", "d"),
	}
	deep := "deep"
	for range 200 {
		deep += "/d"
		files = append(files, dir(deep+"/"))
	}
	files = append(files, file(deep+"/bottom", "bottom"))
	return Tar(files...)
}

func repeated() []byte {
	return Tar(
		xattr(moded(dir("twice/"), 0o700), "user.first", "1", "user.both", "1"),
		file("twice/between", "b"),
		xattr(moded(owned(dir("twice"), 7, 8), 0o750), "user.second", "2", "user.both", "2"),
	)
}

// capabilityNetBind is CAP_NET_BIND_SERVICE, permitted and effective, revision 2.
const capabilityNetBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func attributes() []byte {
	return Tar(
		xattr(moded(file("ping", "elf"), 0o755), "security.capability", capabilityNetBind),
		xattr(file("user", "u"), "user.empty", "", "user.binary", "a\x00b\xff\n", "user.long", strings.Repeat("v", 2000)),
		xattr(dir("dir/"), "user.dir", "d", "trusted.dir", "t"),
		xattr(symlink("symlink", "ping"), "trusted.on.link", "1"),
		xattr(file("selinux", "s"), "security.selinux", "system_u:object_r:bin_t:s0\x00", "user.x", "y"),
		xattr(moded(file("linked", "elf"), 0o755), "security.capability", capabilityNetBind, "user.x", "1"),
		link("without", "linked"),
		xattr(moded(file("linked2", "elf"), 0o755), "security.capability", capabilityNetBind),
		xattr(moded(file("linked3", "elf"), 0o755), "security.capability", capabilityNetBind, "user.x", "3"),
		owned(moded(link("given-away", "linked3"), 0o755), 1, 1),
		xattr(moded(link("with", "linked2"), 0o755), "security.capability", capabilityNetBind, "user.y", "2"),
	)
}

func specialFiles() []byte {
	device := func(name string, kind byte, major, minor int64) File {
		return File{Header: tar.Header{Name: name, Typeflag: kind, Devmajor: major, Devminor: minor, Mode: 0o660}}
	}
	return Tar(
		dir("dev/"),
		device("dev/null", tar.TypeChar, 1, 3),
		owned(device("dev/loop0", tar.TypeBlock, 7, 0), 0, 6),
		device("dev/large", tar.TypeBlock, 4095, 1<<20-1),
		moded(File{Header: tar.Header{Name: "dev/fifo", Typeflag: tar.TypeFifo}}, 0o622),
		link("dev/zilch", "dev/null"),
	)
}

func modes() []byte {
	files := []File{}
	for _, mode := range []int64{0o4755, 0o2755, 0o6711, 0o1644, 0o7777, 0o400, 0o100644} {
		files = append(files, moded(file(fmt.Sprintf("file-%o", mode), "m"), mode))
	}
	for _, mode := range []int64{0o1777, 0o2775, 0o3000, 0o40700} {
		files = append(files, moded(dir(fmt.Sprintf("dir-%o/", mode)), mode))
	}
	return Tar(append(files,
		file("dir-1777/inside", "i"),
		moded(symlink("narrow", "file-400"), 0o600),
		owned(file("large-owner", "o"), 2_000_000_000, 1_999_999_999),
		owned(symlink("owned-link", "x"), 65534, 65533),
		owned(moded(file("owned-setuid", "s"), 0o4711), 1000, 1000),
	)...)
}

func times() []byte {
	return Tar(
		dated(file("nanoseconds", "n"), time.Unix(1_600_000_000, 123_456_789)),
		dated(file("almost", "n"), time.Unix(1_600_000_000, 999_999_999)),
		dated(dir("dir/"), time.Unix(1_500_000_000, 400_000_001)),
		file("dir/changes-the-dir", "later"),
		dated(symlink("link", "nanoseconds"), time.Unix(1_400_000_000, 7)),
		dated(file("epoch", "e"), time.Unix(0, 0)),
		dated(file("before", "b"), time.Unix(-86_400, 0)),
		dated(symlink("link-before", "b"), time.Unix(-86_400, 0)),
		dated(file("far", "f"), time.Unix(4_102_444_800, 0)),
	)
}

func links() []byte {
	return Tar(
		dir("a/"), dir("b/"),
		file("a/one", "shared"),
		link("b/two", "a/one"),
		link("three", "./b/two"),
		link("/four", "/three"),
		moded(owned(file("a/differs", "before"), 1, 2), 0o600),
		dated(moded(owned(link("b/differs", "a/differs"), 3, 4), 0o4755), time.Unix(1_234_567_890, 0)),
		file("a/empty", ""),
		link("b/empty", "a/empty"),
		symlink("sym", "a/one"),
		owned(link("symlinked", "sym"), 9, 9),
		symlink("dangling", "no/such/file"),
		symlink("absolute", "/etc/passwd"),
		symlink("up", "../../../.."),
		symlink("itself", "itself"),
		symlink("long", strings.Repeat("x/", 1000)),
		symlink("dirlink", "a"),
	)
}

func names() []byte {
	long := strings.Repeat("n", 255)
	gnu := func(f File) File { return with(f, func(h *tar.Header) { h.Format = tar.FormatGNU }) }
	files := []File{
		file(long, "255"),
		file(strings.Repeat(strings.Repeat("p", 255)+"/", 5)+"end", "long path"),
		gnu(file("gnu/"+strings.Repeat("g", 200), "GNU long name")),
		gnu(symlink("gnu/link", strings.Repeat("t", 300))),
	}
	for _, name := range []string{
		" ", "a b", "new\nline", "tab\t", "quote\"", "back\\slash", "<&>", "\u2028", "ünï", "日本", "-rf", "*", "...", "..a", ".hidden", "\x01", "%s", "#",
	} {
		files = append(files, file("odd/"+name, name))
	}
	return Tar(files...)
}

func rawNames() []byte {
	gnu := func(f File) File { return with(f, func(h *tar.Header) { h.Format = tar.FormatGNU }) }
	return Tar(gnu(file("latin\xe9", "1")), gnu(file("dir\xff/\xc3", "2")), gnu(symlink("link", "to\xfe")), file("plain", "3"))
}

func sizes() []byte {
	const block, chunk = 4096, 4 << 20
	var files []File
	for i, n := range []int{0, 1, 511, 512, 513, block - 1, block, block + 1, 2 * block, chunk - 1, chunk, chunk + 1} {
		files = append(files, File{Header: tar.Header{Name: fmt.Sprintf("size-%d", n)}, Content: Bytes(n, uint64(i))}) //nolint:gosec // small
	}
	return Tar(files...)
}

func holes() []byte {
	random := func(seed uint64) []byte { return Bytes(100_000, seed) }
	zeros := make([]byte, 1<<20)
	return Tar(
		File{Header: tar.Header{Name: "zeros"}, Content: zeros},
		File{Header: tar.Header{Name: "between"}, Content: bytes.Join([][]byte{random(1), zeros, random(2)}, nil)},
		File{Header: tar.Header{Name: "first"}, Content: append(zeros[:len(zeros):len(zeros)], random(3)...)},
		File{Header: tar.Header{Name: "last"}, Content: append(random(4), zeros...)},
	)
}

func manyFiles() []byte {
	var files []File
	for i := range 600 {
		if i%50 == 0 {
			files = append(files, dir(fmt.Sprintf("d%d/", i/50)))
		}
		files = append(files, file(fmt.Sprintf("d%d/f%d", i/50, i), strings.Repeat("content ", i%40)))
	}
	return Tar(files...)
}

// converted looks like an eStargz that was decompressed: converters replace the
// table of contents and the landmark, others keep them as they are.
func converted() []byte {
	return Tar(file(".no.prefetch.landmark", "\x0f"), file("bin", "b"), file("stargz.index.json", "{}"))
}
