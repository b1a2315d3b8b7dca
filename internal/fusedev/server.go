// SPDX-License-Identifier: Apache-2.0

// Package fusedev serves the devices of layers to the kernel: a FUSE mount with
// one flat, read-only directory that holds one regular file per device.
//
// It speaks the kernel's protocol itself, for one reason: the mount has to
// survive the process that serves it. A [Conn] (the mount and its descriptor)
// can be passed from process to process, and a [Server] keeps nothing that its
// successor would need: node ids derive from the digest, nothing is remembered
// per open file or per lookup, and a request that was taken but not answered
// is handed out again by the kernel ([Conn.Resend]).
//
// It is not a general file system, and it knows nothing of chunks or networks:
// those are behind [Device].
//
// Invariants: a read answers with all the bytes asked for, up to the end of the
// file, or with an error; never with fewer, and never with bytes that the
// device did not give. No reply buffer is held while a device waits.
package fusedev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// maxRequests is how many requests are served at once; more wait in the
	// kernel. Asynchronous ones alone never use it up.
	maxRequests = 2 * maxBackground
	// maxBuffers is how many replies to reads are put together at once. With
	// maxRead it bounds the memory that reads take.
	maxBuffers = 16

	// drainTimeout is how long requests may take to end after Run was told to,
	// on kernels that could not hand them to a successor.
	drainTimeout = 30 * time.Second
)

// Why a request ends early: the causes of its context's end.
var (
	errInterrupted = errors.New("interrupted by the reader")
	errAbandoned   = errors.New("left to another server") // gets no answer
	errStopped     = errors.New("the server has stopped")
)

// Device is the data of one file. Its methods are called concurrently.
type Device interface {
	// Size is the size in bytes, which never changes.
	Size() int64
	// Wait returns when [off, off+n) can be read, which it then can be until it
	// is released, or with the error that keeps it from that, or when ctx ends.
	// The range lies within the device.
	Wait(ctx context.Context, off int64, n int) (release func(), err error)
	// ReadAt reads a range that Wait has returned for and that is not released,
	// without waiting for a network. It fills p, or returns an error.
	ReadAt(p []byte, off int64) (int, error)
}

// Server answers the requests of one connection. All methods may be called
// concurrently, also before and after Run.
type Server struct {
	conn  *Conn
	log   *slog.Logger
	nodes *nodes
	drain time.Duration // drainTimeout, but in tests

	buffers chan []byte // nil stands for one not yet allocated
	slots   chan struct{}

	mu       sync.Mutex // protects the field below
	inflight map[uint64]*call
}

// call is a request that is being served.
type call struct {
	request
	ctx    context.Context
	cancel context.CancelCauseFunc
}

// New returns a server without devices. It does not own the connection.
func New(conn *Conn, log *slog.Logger) *Server {
	s := &Server{
		conn: conn, log: log, nodes: newNodes(), drain: drainTimeout,
		buffers:  make(chan []byte, maxBuffers),
		slots:    make(chan struct{}, maxRequests),
		inflight: map[uint64]*call{},
	}
	for range maxBuffers {
		s.buffers <- nil
	}
	return s
}

// Add serves dev as the file [Server.Path] names. It fails if there is one
// already, or if, against all odds, another digest claims the same node id.
func (s *Server) Add(d digest.Digest, dev Device) error { return s.nodes.add(d, dev) }

// Remove takes the device of d away, if there is one: reads that are under way
// fail with EIO, and so do later ones of files still open. When Remove returns
// the device is not in use any more.
func (s *Server) Remove(d digest.Digest) {
	n := s.nodes.remove(d)
	if n == nil {
		return
	}
	s.mu.Lock()
	for _, c := range s.inflight {
		if c.node == n.id {
			c.cancel(errRemoved)
		}
	}
	s.mu.Unlock()
	n.users.Wait()
	if err := s.conn.forgetAttributes(n.id); err != nil && !errors.Is(err, os.ErrClosed) {
		s.log.Warn("invalidating attributes", "blob", d.String(), "err", err)
	}
}

// Path is where the device of d appears, added or not.
func (s *Server) Path(d digest.Digest) string { return filepath.Join(s.conn.dir, fileName(d)) }

// Ready tells that all devices the kernel may know from an earlier server have
// been added. Until then requests for others wait; from then on they fail.
func (s *Server) Ready() { s.nodes.setReady() }

// Resend makes the kernel repeat what an earlier server left unanswered: see
// [Conn.Resend].
func (s *Server) Resend() error { return s.conn.Resend() }

// Run answers requests until the mount is gone or ctx ends, both without an
// error. The end of ctx leaves the mount as it is: requests then wait for the
// next server, which gets those that were under way by [Server.Resend]. On a
// kernel that cannot resend they are given half a minute to end, then fail.
func (s *Server) Run(ctx context.Context) error {
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	if err := s.conn.file.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("serving %s: %w", s.conn.dir, err)
	}
	defer context.AfterFunc(ctx, s.wake)()

	var calls sync.WaitGroup
	err := s.receive(ctx, work, &calls)
	if s.conn.resend.Load() {
		cancel(errAbandoned)
	} else {
		defer time.AfterFunc(s.drain, func() { cancel(errStopped) }).Stop()
	}
	calls.Wait()
	if err != nil {
		return fmt.Errorf("serving %s: %w", s.conn.dir, err)
	}
	return nil
}

// wake makes a blocked read of the descriptor return.
func (s *Server) wake() {
	if err := s.conn.file.SetReadDeadline(time.Unix(1, 0)); err != nil {
		s.log.Error("waking the FUSE reader", "err", err)
	}
}

// receive reads requests and starts a goroutine for each. One reader is enough:
// it copies some 80 bytes per request, the data moves elsewhere. It does not
// read what it has no slot for, so that a request is never held unregistered.
func (s *Server) receive(ctx, work context.Context, calls *sync.WaitGroup) error {
	buf := make([]byte, requestSize)
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		r, err := s.next(ctx, buf)
		if err != nil {
			<-s.slots
			if errors.Is(err, unix.ENODEV) || ctx.Err() != nil {
				return nil //nolint:nilerr // unmounted, or told to stop
			}
			return err
		}
		c := s.register(work, r)
		calls.Go(func() {
			s.serve(c)
			s.unregister(c)
			<-s.slots
		})
	}
}

// next returns the next request that needs an answer.
func (s *Server) next(ctx context.Context, buf []byte) (request, error) {
	for {
		n, err := s.conn.read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
			// The deadline was set late, by the end of an earlier Run.
			if err := s.conn.file.SetReadDeadline(time.Time{}); err != nil {
				return request{}, err
			}
			continue
		}
		if err != nil {
			return request{}, fmt.Errorf("reading a request: %w", err)
		}
		r, err := decodeRequest(buf[:n])
		switch {
		case err != nil:
			s.log.Error("malformed FUSE request", "err", err)
			if r.unique != 0 {
				s.replyError(r, unix.EINVAL)
			}
		case r.op == opForget || r.op == opBatchForget:
			// Lookups are not counted, and the kernel wants no reply.
		case r.op == opInterrupt:
			s.interrupt(r.target)
		default:
			return r, nil
		}
	}
}

// register enters a request in the table through which it can be cancelled. The
// kernel repeats a request with another id after a Resend: the copy that this
// server has already is given up then, as its answer would not be taken.
func (s *Server) register(work context.Context, r request) *call {
	c := &call{request: r}
	c.ctx, c.cancel = context.WithCancelCause(work)
	s.mu.Lock()
	defer s.mu.Unlock()
	key := r.unique &^ uniqueResend
	if old := s.inflight[key]; old != nil {
		old.cancel(errAbandoned)
	}
	s.inflight[key] = c
	return c
}

func (s *Server) unregister(c *call) {
	c.cancel(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	if key := c.unique &^ uniqueResend; s.inflight[key] == c {
		delete(s.inflight, key)
	}
}

// interrupt cancels a request. One that is not there has been answered: the
// kernel sends an interrupt only after the request.
func (s *Server) interrupt(unique uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.inflight[unique&^uniqueResend]; c != nil {
		c.cancel(errInterrupted)
	}
}
