// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/blob/registry"
)

func memfd(t *testing.T) *os.File {
	t.Helper()
	f, err := NewMemfd()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func openKept(t *testing.T, f *os.File) *Kept {
	t.Helper()
	k, err := OpenKept(f)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func put(t *testing.T, k *Kept, reference string, c registry.Credentials) {
	t.Helper()
	if err := k.Put(reference, c); err != nil {
		t.Fatal(err)
	}
}

// has is all that is kept, readable.
func has(k *Kept) string {
	var all []string
	for _, e := range k.entries {
		all = append(all, e.reference+"="+password(e.credentials))
	}
	return strings.Join(all, " ")
}

func content(t *testing.T, f *os.File) []byte {
	t.Helper()
	data, err := io.ReadAll(io.NewSectionReader(f, 0, slots*slotSize))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestKept(t *testing.T) {
	for name, f := range map[string]*os.File{"memfd": memfd(t), "memory only": nil} {
		t.Run(name, func(t *testing.T) {
			k := openKept(t, f)
			if _, ok := k.Get("a"); ok {
				t.Error("something is kept at the start")
			}
			exact := registry.Credentials{Username: "\xff", Password: "\x00\"é", IdentityToken: "token"}
			put(t, k, "a", login(1))
			put(t, k, "b", exact)
			put(t, k, "a", login(2))
			put(t, k, "none", registry.Credentials{})
			check := func(k *Kept) {
				t.Helper()
				if a, ok := k.Get("a"); !ok || a != login(2) {
					t.Errorf("a = %s, %v", password(a), ok)
				}
				if b, ok := k.Get("b"); !ok || b != exact {
					t.Errorf("b = %q, %v", password(b), ok)
				}
				if _, ok := k.Get("none"); ok {
					t.Error("no credentials are kept as some")
				}
			}
			check(k)
			if f == nil {
				return
			}
			check(openKept(t, f))

			// What is forgotten is not in the file either.
			if err := openKept(t, f).Forget("a", "unknown"); err != nil {
				t.Fatal(err)
			}
			k = openKept(t, f)
			if _, ok := k.Get("a"); ok {
				t.Error("what was forgotten is back")
			}
			if _, ok := k.Get("b"); !ok {
				t.Error("what was not forgotten is gone")
			}
			if err := k.Forget("b"); err != nil {
				t.Fatal(err)
			}
			if data := content(t, f); bytes.Contains(data, []byte("Password")) {
				t.Error("an entry that was forgotten is in the file")
			}
		})
	}
}

func TestNilKeepsNothing(t *testing.T) {
	var k *Kept
	put(t, k, "a", login(1))
	if _, ok := k.Get("a"); ok {
		t.Error("it keeps something")
	}
	if err := k.Forget("a"); err != nil {
		t.Error(err)
	}
}

// Credential helpers and plugins must not inherit it.
func TestMemfdIsClosedOnExec(t *testing.T) {
	f := memfd(t)
	check := func() {
		t.Helper()
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("flags %#x, error %v", flags, err)
		}
	}
	check()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil { // as a parent passes it on
		t.Fatal(err)
	}
	openKept(t, f)
	check()
}

// head is as much of a slot as these tests fill.
const head = 1 << 10

// heads are the beginnings of both slots.
func heads(t *testing.T, f *os.File) [slots][]byte {
	t.Helper()
	data := content(t, f)
	data = append(data, make([]byte, slots*slotSize-len(data))...)
	return [slots][]byte{data[:head:head], data[slotSize : slotSize+head : slotSize+head]}
}

// A writer that is killed leaves the state before or the one after, wherever it
// stopped: in the write of the new slot, or while it emptied the old one.
func TestTornWrites(t *testing.T) {
	f, torn := memfd(t), memfd(t)
	check := func(to [slots][]byte, want string) {
		t.Helper()
		fill(t, torn, to)
		if got := has(openKept(t, torn)); got != want {
			t.Fatalf("kept %s; want %s", got, want)
		}
	}
	k := openKept(t, f)
	put(t, k, "a", login(1))
	for n := range 3 {
		before, state := heads(t, f), has(k)
		put(t, k, "b", login(n))
		after, next := heads(t, f), has(k)
		in := k.sequence % slots
		length := len(bytes.TrimRight(after[in], "\x00"))
		for cut := range length + 1 {
			part := before
			part[in] = append(bytes.Clone(after[in][:cut]), before[in][cut:]...)
			want := state
			if cut == length {
				want = next
			}
			check(part, want)
		}
		for cut := range head {
			part := after
			part[1-in] = append(make([]byte, cut), before[1-in][cut:]...)
			check(part, next)
		}
	}
}

func fill(t *testing.T, f *os.File, to [slots][]byte) {
	t.Helper()
	for i, b := range to {
		if _, err := f.WriteAt(b, int64(i)*slotSize); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDamage(t *testing.T) {
	f := memfd(t)
	put(t, openKept(t, f), "a", login(1))
	whole, damaged := heads(t, f), memfd(t)
	for at := range headerSize + 20 {
		whole[1][at] ^= 1
		fill(t, damaged, whole)
		whole[1][at] ^= 1
		k := openKept(t, damaged)
		if has(k) != "" {
			t.Errorf("byte %d damaged: kept %s", at, has(k))
		}
	}
	put(t, openKept(t, damaged), "b", login(2)) // and all goes on
	if got := has(openKept(t, damaged)); !strings.Contains(got, "b=") {
		t.Errorf("kept %s", got)
	}
}

func TestKeptIsBounded(t *testing.T) {
	f := memfd(t)
	k := openKept(t, f)
	large := registry.Credentials{Username: "user", Password: strings.Repeat("x", maxSecret-1000)}
	if err := k.Put("too large", registry.Credentials{Password: strings.Repeat("x", maxSecret+1)}); err == nil {
		t.Error("no error for credentials that are too large")
	}
	for i := range 30 {
		put(t, k, fmt.Sprint(i), large)
	}
	k = openKept(t, f)
	if _, ok := k.Get("29"); !ok {
		t.Error("the newest is gone")
	}
	if _, ok := k.Get("0"); ok || len(k.entries) > 25 {
		t.Errorf("%d are kept", len(k.entries))
	}
	info, err := f.Stat()
	if err != nil || info.Size() > slots*slotSize {
		t.Errorf("the file has %d bytes, error %v", info.Size(), err)
	}
}

func TestKeptDoesNotPrint(t *testing.T) {
	k := openKept(t, nil)
	put(t, k, "a", login(1))
	encoded, err := json.Marshal(map[string]any{"k": k})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "kept", k)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "kept", k)
	for _, s := range []string{string(encoded), fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s %q", k, k, k, k, k), log.String()} {
		if strings.Contains(s, "hunter2") || strings.Contains(s, "user1") {
			t.Errorf("printed as %q", s)
		}
	}
}

func TestKeptConcurrently(t *testing.T) {
	f := memfd(t)
	k := openKept(t, f)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 20 {
				ref := fmt.Sprint(i)
				if err := k.Put(ref, login(i)); err != nil {
					t.Error(err)
				}
				if c, ok := k.Get(ref); !ok || c != login(i) {
					t.Errorf("%s = %s, %v", ref, password(c), ok)
				}
				if err := k.Forget(ref); err != nil {
					t.Error(err)
				}
			}
			if err := k.Put(fmt.Sprint(i), login(i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if k := openKept(t, f); len(k.entries) != 8 {
		t.Errorf("kept %s", has(k))
	}
}

const writerVariable = "HOLDFAST_TEST_KEPT_WRITER"

// writeForever is the child of TestKillAtAnyMoment: it writes what can be checked.
func writeForever() {
	k, err := OpenKept(os.NewFile(3, "kept"))
	if err != nil {
		panic(err)
	}
	for n := 0; ; n++ {
		c := registry.Credentials{Username: fmt.Sprint(n), Password: strings.Repeat(fmt.Sprint(n%10), 40<<10)}
		if err := k.Put(fmt.Sprint("ref", n%3), c); err != nil {
			panic(err)
		}
		if n == 0 {
			fmt.Println("ready")
		}
	}
}

func TestKillAtAnyMoment(t *testing.T) {
	f := memfd(t)
	for i := range 20 {
		cmd := exec.Command(os.Args[0], "-test.run=^$") //nolint:gosec // this test
		cmd.Env = append(os.Environ(), writerVariable+"=1")
		cmd.ExtraFiles = []*os.File{f}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Duration(i) * 313 * time.Microsecond) // any moment will do
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed

		k := openKept(t, f)
		if len(k.entries) == 0 {
			t.Fatal("nothing is kept")
		}
		for _, e := range k.entries {
			n := e.credentials.Username
			if want := strings.Repeat(n[len(n)-1:], 40<<10); e.credentials.Password != want {
				t.Fatalf("%s of %s is garbage", e.reference, n)
			}
		}
	}
}

func FuzzKept(f *testing.F) {
	good, err := encode([]entry{{"a", login(1)}, {"b", login(2)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slotOf(1, good))
	f.Add(slotOf(1, []byte("null")))
	f.Add(slotOf(1<<63, good)[:100])
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		sequence, entries, err := readSlot(bytes.NewReader(data))
		if err != nil || sequence == 0 && len(entries) > 0 {
			t.Errorf("sequence %d, %d entries, error %v", sequence, len(entries), err)
		}
	})
}

// FuzzKeptContent goes behind the checksum.
func FuzzKeptContent(f *testing.F) {
	good, err := encode([]entry{{"a", login(1)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`[{"Reference":1}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := decode(data)
		if err != nil {
			return
		}
		again, err := encode(entries)
		if err != nil {
			t.Fatal(err)
		}
		if same, err := decode(again); err != nil || len(same) != len(entries) {
			t.Errorf("%d entries become %d, error %v", len(entries), len(same), err)
		}
	})
}
