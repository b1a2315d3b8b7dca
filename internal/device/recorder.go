// SPDX-License-Identifier: Apache-2.0

package device

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/holdfast/holdfast/internal/blob"
	"github.com/holdfast/holdfast/internal/index"
)

// maxRecorded is how many frames a recording holds; what comes later is not noted.
// It is some 10 MiB of memory.
const maxRecorded = 1 << 17

// Recorder notes in which order readers first ask for the frames of several
// blobs, whether these are local or not. It sees what [Device.Wait] is asked for:
// neither what the kernel answers from its own memory, nor what is prefetched.
// Its methods may be called concurrently.
type Recorder struct {
	mu      sync.Mutex // protects the fields below; taken after Device.mu
	seen    map[recorded]bool
	touches []Touch
	latest  time.Time
	began   chan struct{} // closed at the first touch
}

// Touch is a frame that a reader asked for.
type Touch struct {
	Device int // as given to Device.Record
	blob.Range
}

type recorded struct {
	device int
	offset int64
}

// NewRecorder returns a recorder that has noted nothing.
func NewRecorder() *Recorder {
	return &Recorder{seen: map[recorded]bool{}, began: make(chan struct{})}
}

// recording is a recorder of a device, under the number that the device has there.
type recording struct {
	recorder *Recorder
	number   int
}

// Record has the device's first touches from now on noted, under that number,
// until stop is called.
func (d *Device) Record(r *Recorder, number int) (stop func()) {
	rec := &recording{r, number}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records = append(d.records, rec)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.records = slices.DeleteFunc(d.records, func(other *recording) bool { return other == rec })
	}
}

// note notes that a reader wants a chunk.
func (rec *recording) note(c index.Chunk) {
	r := rec.recorder
	key := recorded{rec.number, c.BlobOffset}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen[key] || len(r.touches) >= maxRecorded {
		return
	}
	r.seen[key] = true
	r.latest = time.Now()
	if len(r.touches) == 0 {
		close(r.began)
	}
	r.touches = append(r.touches, Touch{rec.number, blob.Range{Offset: c.BlobOffset, Length: c.BlobSize}})
}

// Touches returns what has been noted so far, in order.
func (r *Recorder) Touches() []Touch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.touches)
}

// Began is closed when a reader asks for something.
func (r *Recorder) Began() <-chan struct{} { return r.began }

// Settle waits, once readers have begun, until they have asked for nothing new
// for quiet, or until most has passed.
func (r *Recorder) Settle(ctx context.Context, quiet, most time.Duration) error {
	end := time.Now().Add(most)
	for {
		r.mu.Lock()
		left := min(time.Until(r.latest.Add(quiet)), time.Until(end))
		r.mu.Unlock()
		if left <= 0 {
			return nil
		}
		select {
		case <-time.After(left):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
