// SPDX-License-Identifier: Apache-2.0

package fusedev

import (
	"encoding/binary"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// startReader reads one block of a file in another process, until killed.
func startReader(t *testing.T, path string) (kill func()) {
	t.Helper()
	dd := exec.Command("dd", "if="+path, "of=/dev/null", "bs=4096", "count=1")
	if err := dd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := dd.Process.Kill(); err != nil {
			t.Error(err)
		}
		if err := dd.Wait(); err == nil {
			t.Error("the reader was not killed")
		}
	}
}

// encodeRequest is what the kernel would send.
func encodeRequest(op opcode, unique, node uint64, body []byte) []byte {
	ne := binary.NativeEndian
	b := ne.AppendUint32(nil, uint32(inHeaderSize+len(body)))
	b = ne.AppendUint32(b, uint32(op))
	b = ne.AppendUint64(b, unique)
	b = ne.AppendUint64(b, node)
	b = append(b, make([]byte, 16)...)
	return append(b, body...)
}

func readBody(offset uint64, size uint32) []byte {
	b := make([]byte, readInSize)
	binary.NativeEndian.PutUint64(b[8:], offset)
	binary.NativeEndian.PutUint32(b[16:], size)
	return b
}

func TestDecodeRequest(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		in   []byte
		want request
		bad  bool
	}{
		{name: "empty", bad: true},
		{name: "half a header", in: make([]byte, 39), bad: true},
		{name: "wrong length", in: append(encodeRequest(opOpen, 6, 2, nil), 0), want: request{op: opOpen, unique: 6, node: 2}, bad: true},
		{name: "read", in: encodeRequest(opRead, 4, 9, readBody(1<<40, 4096)),
			want: request{op: opRead, unique: 4, node: 9, offset: 1 << 40, size: 4096}},
		{name: "short read", in: encodeRequest(opRead, 4, 9, readBody(0, 1)[:39]), want: request{op: opRead, unique: 4, node: 9}, bad: true},
		{name: "lookup", in: encodeRequest(opLookup, 2, 1, []byte("abc\x00")), want: request{op: opLookup, unique: 2, node: 1, name: "abc"}},
		{name: "lookup without an end", in: encodeRequest(opLookup, 2, 1, []byte("abc")), want: request{op: opLookup, unique: 2, node: 1, name: "abc"}},
		{name: "lookup without a name", in: encodeRequest(opLookup, 2, 1, nil), want: request{op: opLookup, unique: 2, node: 1}, bad: true},
		{name: "interrupt", in: encodeRequest(opInterrupt, 3, 0, []byte{2, 0, 0, 0, 0, 0, 0, 0}),
			want: request{op: opInterrupt, unique: 3, target: binary.NativeEndian.Uint64([]byte{2, 0, 0, 0, 0, 0, 0, 0})}},
		{name: "short init", in: encodeRequest(opInit, 2, 0, make([]byte, 12)), want: request{op: opInit, unique: 2}, bad: true},
		{name: "unknown", in: encodeRequest(4711, 2, 0, nil), want: request{op: 4711, unique: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := decodeRequest(c.in)
			if (err != nil) != c.bad {
				t.Errorf("error %v", err)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(request{})); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeInit(t *testing.T) {
	t.Parallel()
	ne := binary.NativeEndian
	body := make([]byte, 64)
	ne.PutUint32(body, 7)
	ne.PutUint32(body[4:], 45)
	ne.PutUint32(body[8:], 1<<17)
	ne.PutUint32(body[16:], 1<<7)
	for _, c := range []struct {
		name  string
		body  []byte
		flags uint32
		want  uint64
	}{
		{"extended", body, flagInitExt, flagInitExt | flagHasResend},
		{"extension not announced", body, flagAsyncRead, flagAsyncRead},
		{"extension missing", body[:16], flagInitExt, flagInitExt},
	} {
		ne.PutUint32(c.body[12:], c.flags)
		want := initRequest{major: 7, minor: 45, readahead: 1 << 17, flags: c.want}
		if got := decodeInit(c.body); got != want {
			t.Errorf("%s: got %+v, want %+v", c.name, got, want)
		}
	}
}

// TestReplySizes compares with the sizes of the kernel's structures.
func TestReplySizes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"out_header", len(appendHeader(nil, 1, unix.EIO)), 16},
		{"init_out", len(appendInit(nil, initRequest{}, 0)), 64},
		{"attr", len(appendAttr(nil, attributes{})), 88},
		{"attr_out", len(appendAttrOut(nil, attributes{})), 104},
		{"entry_out", len(appendEntryOut(nil, attributes{})), 128},
		{"open_out", len(appendOpenOut(nil, 0)), 16},
		{"statfs_out", len(appendStatfsOut(nil, 0)), 80},
		{"dirent of 8", len(appendDirent(nil, 1, "12345678")), 32},
		{"dirent of 9", len(appendDirent(nil, 1, "123456789")), 40},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d bytes, want %d", c.name, c.got, c.want)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, op := range []opcode{0, opLookup, opForget, opGetattr, opOpen, opRead, opStatfs, opRelease, opInit, opOpendir,
		opReaddir, opReleasedir, opInterrupt, opDestroy, opBatchForget, 4711} {
		f.Add(encodeRequest(op, 2, 1, nil))
		f.Add(encodeRequest(op, 1<<63|2, 1, readBody(1<<63, 1<<31)))
	}
	f.Add([]byte{})
	f.Add(encodeRequest(opLookup, 2, 1, []byte("name\x00rest")))
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := decodeRequest(p)
		if err != nil {
			return
		}
		if r.op == opInit {
			decodeInit(p[inHeaderSize:])
		}
		if len(r.name) > len(p) {
			t.Errorf("a name of %d bytes from %d", len(r.name), len(p))
		}
		nodeID(r.name)
	})
}
