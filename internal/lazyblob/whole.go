// SPDX-License-Identifier: Apache-2.0

package lazyblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/blob/parts"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/chunklist"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/index"
)

const (
	incomingName = "incoming"
	syncedName   = "incoming.json"
	// syncStep is how often what has come is made durable, in bytes: a crash costs that
	// much of the line.
	syncStep = 256 << 20
)

// ErrNoRoom means that a blob without a chunk list does not fit on the disk, or in what
// blobs may have of it.
var ErrNoRoom = errors.New("there is no room for it")

// errStalled ends a request that does not get on.
var errStalled = errors.New("no progress")

// fetching is a fetch of a whole blob.
type fetching struct {
	cancel  context.CancelFunc
	waiting atomic.Int32  // readers
	done    atomic.Int64  // bytes
	ended   chan struct{} // closed after err is set
	err     error
}

// fetchWhole returns when all of a blob without a chunk list is here and has its digest.
// Those who want it at the same time share the fetch, which goes on when they leave.
func (b *Blob) fetchWhole(ctx context.Context) error {
	b.mu.Lock()
	if b.listed != nil {
		b.mu.Unlock()
		return nil
	}
	f := b.whole
	if f == nil {
		f = &fetching{ended: make(chan struct{})}
		var work context.Context
		work, f.cancel = context.WithCancel(b.set.ctx)
		b.whole, b.failed = f, nil
		b.set.active.Go(func() { b.run(work, f) })
	}
	b.mu.Unlock()
	f.waiting.Add(1)
	defer f.waiting.Add(-1)
	select {
	case <-f.ended:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop ends a fetch of the whole, and waits for that.
func (b *Blob) stop() {
	b.mu.Lock()
	f := b.whole
	b.mu.Unlock()
	if f != nil {
		f.cancel()
		<-f.ended
	}
}

func (b *Blob) run(ctx context.Context, f *fetching) {
	defer f.cancel()
	list, err := b.download(ctx, f)
	if err == nil {
		err = b.take(list)
	}
	b.mu.Lock()
	b.whole, b.failed = nil, err
	b.mu.Unlock()
	f.err = err
	close(f.ended)
	if err != nil {
		b.set.Logger.Warn("fetching a blob", "blob", b.desc.Digest.String(), "err", err)
		return
	}
	b.set.Logger.Info("blob is complete", "blob", b.desc.Digest.String(), "bytes", b.desc.Size)
	if err := b.set.Keep(ctx, list); err != nil {
		b.set.Logger.Warn("keeping a chunk list", "blob", b.desc.Digest.String(), "err", err)
	}
	b.set.Changed()
}

// take makes what has been fetched the blob's data. The chunk table comes last: with it
// the rest counts.
func (b *Blob) take(list *chunklist.List) error {
	if err := os.Rename(filepath.Join(b.dir, incomingName), filepath.Join(b.dir, cache.DataName)); err != nil {
		return err
	}
	if err := cache.MarkComplete(b.dir, b.desc.Size, len(list.Chunks)); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(b.dir, syncedName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.meta.Verified, b.meta.Trust = true, index.Verified
	if err := b.saveMeta(); err != nil {
		return err
	}
	if err := writeTable(b.dir, list); err != nil {
		return err
	}
	return b.openListed()
}

// download fetches the whole to the file incoming, and goes on where an earlier process
// was.
func (b *Blob) download(ctx context.Context, f *fetching) (*chunklist.List, error) {
	file, err := os.OpenFile(filepath.Join(b.dir, incomingName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // made durable before it counts
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nil, err
	}
	if err := b.room(b.desc.Size - st.Blocks*512); err != nil {
		return nil, err
	}
	ok, err := b.set.Space.Reserve(ctx, b.desc.Size)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("%w: blobs of artifacts may take %s altogether (artifact_limit), it has %s", ErrNoRoom,
			units.BytesSize(float64(b.set.Space.Stats().Limit)), units.BytesSize(float64(b.desc.Size)))
	}
	defer b.set.Space.Release(b.desc.Size)
	in := &incoming{b: b, f: f, file: file}
	resumed, err := in.resume(ctx)
	if err != nil {
		return nil, err
	}
	list, err := in.fromAny(ctx)
	if errors.Is(err, blob.ErrCorrupt) && resumed { // it may be what was there that is wrong
		if err := in.reset(); err != nil {
			return nil, err
		}
		list, err = in.fromAny(ctx)
	}
	return list, err
}

// room checks that there is room for so many bytes on the disk.
func (b *Blob) room(n int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(b.dir, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; n > free { //nolint:gosec // disks are smaller
		return fmt.Errorf("%w: it needs %s, the disk of %s has %s free; without a chunk list (holdfast artifact index) it cannot be read in parts",
			ErrNoRoom, units.BytesSize(float64(n)), b.set.Root, units.BytesSize(float64(free)))
	}
	return nil
}

// incoming is the file that a blob is fetched to. One goroutine uses it.
type incoming struct {
	b      *Blob
	f      *fetching
	file   *os.File
	list   *chunklist.Builder
	at     int64 // so much has come
	synced int64
}

func (in *incoming) reset() error {
	in.list, in.at, in.synced = chunklist.NewBuilder(), 0, 0
	in.f.done.Store(0)
	err := os.Remove(filepath.Join(in.b.dir, syncedName))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, in.file.Truncate(0))
}

// resume reads what an earlier process has fetched and made durable.
func (in *incoming) resume(ctx context.Context) (bool, error) {
	var synced int64
	err := atomicfile.ReadJSON(filepath.Join(in.b.dir, syncedName), maxMeta, &synced)
	if err != nil || synced <= 0 || synced > in.b.desc.Size {
		return false, in.reset()
	}
	in.list = chunklist.NewBuilder()
	buf := make([]byte, 1<<20)
	for in.at < synced && ctx.Err() == nil {
		n, err := in.file.ReadAt(buf[:min(int64(len(buf)), synced-in.at)], in.at)
		if n == 0 || err != nil {
			return false, in.reset()
		}
		if _, err := in.list.Write(buf[:n]); err != nil {
			return false, err
		}
		in.at += int64(n)
		in.f.done.Store(in.at)
	}
	in.synced = in.at
	return true, context.Cause(ctx)
}

// fromAny fetches the rest from the first sources that have it.
func (in *incoming) fromAny(ctx context.Context) (*chunklist.List, error) {
	in.b.mu.Lock()
	sources := in.b.sources
	in.b.mu.Unlock()
	if len(sources) == 0 {
		return nil, device.ErrNoSource
	}
	patience := in.b.set.Patience / time.Duration(len(sources)+1)
	var failed error
	for _, src := range sources {
		err := in.from(ctx, src, patience)
		if err == nil {
			var list *chunklist.List
			if list, err = in.finish(); err == nil {
				return list, nil
			}
		}
		failed = errors.Join(failed, fmt.Errorf("from %s: %w", src, err))
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if errors.Is(err, unix.ENOSPC) {
			return nil, errors.Join(fmt.Errorf("%w: %w", ErrNoRoom, err), in.reset())
		}
	}
	return nil, failed
}

// from fetches what is missing from a source, which has to get on.
func (in *incoming) from(ctx context.Context, src blob.Source, patience time.Duration) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(patience, func() { cancel(fmt.Errorf("%w for %s", errStalled, patience)) })
	defer watchdog.Stop()
	body, err := parts.OpenFrom(ctx, src, in.b.desc, in.at)
	if err != nil {
		return err
	}
	defer body.Close() //nolint:errcheck // read only; a broken stream shows in Read
	buf := make([]byte, 1<<20)
	for in.at < in.b.desc.Size {
		if in.f.waiting.Load() == 0 {
			fill := func() device.Priority { return device.Fill }
			if err := in.b.set.Scheduler.Yield(ctx, fill); err != nil {
				return err
			}
		}
		n, err := io.ReadFull(body, buf[:min(int64(len(buf)), in.b.desc.Size-in.at)])
		if werr := in.write(buf[:n]); werr != nil {
			return werr
		}
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return err
		}
		watchdog.Reset(patience)
	}
	return nil
}

func (in *incoming) write(p []byte) error {
	if _, err := in.file.WriteAt(p, in.at); err != nil {
		return err
	}
	if _, err := in.list.Write(p); err != nil {
		return err
	}
	in.at += int64(len(p))
	in.f.done.Store(in.at)
	if in.at-in.synced < syncStep {
		return nil
	}
	if err := unix.Fdatasync(int(in.file.Fd())); err != nil {
		return err
	}
	in.synced = in.at
	return atomicfile.WriteJSON(filepath.Join(in.b.dir, syncedName), in.synced, 0o600)
}

// finish compares what has come with the blob's digest.
func (in *incoming) finish() (*chunklist.List, error) {
	list, err := in.list.Finish()
	if err != nil {
		return nil, err
	}
	if list.Blob != in.b.desc.Digest {
		return nil, errors.Join(fmt.Errorf("it has digest %s: %w", list.Blob, blob.ErrCorrupt), in.reset())
	}
	return list, in.file.Sync()
}
