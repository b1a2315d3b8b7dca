// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	loadReaders = 20
	kills       = 200
	swaps       = 100
	// maxMemory is what keeper and worker may need, in bytes.
	maxMemory = 80 << 20
)

// TestKills kills the worker at random moments while readers compare.
func TestKills(t *testing.T) {
	s := newStand(t, "")
	before := s.footprint()
	compared, stop := s.load(loadReaders)
	random := rand.New(rand.NewPCG(2, 3)) //nolint:gosec // a test
	last := 0
	var peak int64
	for i := range kills {
		pid, err := s.daemon.KillWorker(t.Context())
		s.must(err)
		if pid == last {
			s.must(s.awaitOther(pid))
		}
		last = pid
		// From "it has hardly started" to "it has served for a while".
		time.Sleep(time.Duration(random.Int64N(int64(400 * time.Millisecond))))
		if i%20 == 19 {
			s.awaitAnswer()
			_, now, err := s.daemon.RSS(t.Context())
			s.must(err)
			peak = max(peak, now)
		}
	}
	s.awaitAnswer()
	stop()
	s.checkAfter(before, compared.Load(), kills, "kills")
	s.checkMemory(peak)
}

// TestSwaps swaps the worker for another version under the same load.
func TestSwaps(t *testing.T) {
	s := newStand(t, "")
	before := s.footprint()
	compared, stop := s.load(loadReaders)
	for i := range swaps {
		s.must(s.daemon.Replace(t.Context(), programs[(i+1)%2]))
		info, err := s.daemon.Client().Info(t.Context())
		s.must(err)
		if want := fmt.Sprintf("v%d", (i+1)%2+1); info.Version != want {
			t.Fatalf("version %s runs, want %s", info.Version, want)
		}
	}
	stop()
	s.checkAfter(before, compared.Load(), swaps, "swaps")
}

// awaitOther waits until the worker is not pid.
func (s *stand) awaitOther(pid int) error {
	for {
		now, err := s.daemon.Worker(s.t.Context())
		if err != nil || now != pid {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// awaitAnswer waits until a worker answers.
func (s *stand) awaitAnswer() {
	s.t.Helper()
	for start := time.Now(); time.Since(start) < time.Minute; time.Sleep(10 * time.Millisecond) {
		if _, err := s.daemon.Client().Info(s.t.Context()); err == nil {
			return
		}
	}
	s.t.Fatal("no worker answers")
}

// checkAfter checks that everything was read, and that nothing has piled up.
func (s *stand) checkAfter(before footprint, compared int64, n int, what string) {
	s.t.Helper()
	s.t.Logf("%d %s, %d MiB compared by %d readers", n, what, compared>>20, loadReaders)
	if compared < 256<<20 {
		s.t.Errorf("only %d bytes were compared", compared)
	}
	if after := s.footprint(); after != before {
		s.t.Errorf("afterwards there is %+v, before there was %+v", after, before)
	}
	if g := s.goroutines(); g > 100 {
		s.t.Errorf("the idle worker has %d goroutines", g)
	}
}

func (s *stand) checkMemory(peak int64) {
	s.t.Helper()
	s.t.Logf("memory of keeper and worker: %.1f MiB at most", float64(peak)/(1<<20))
	if peak > maxMemory {
		s.t.Errorf("keeper and worker take %d bytes", peak)
	}
}

// goroutines asks the worker, when it has come to rest, how many it has.
func (s *stand) goroutines() int {
	s.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(s.daemon.RunRoot(), "holdfast.sock"))
	}}}
	n := 0
	for range 100 {
		res, err := client.Get("http://holdfast/metrics")
		s.must(err)
		body, err := io.ReadAll(res.Body)
		s.must(err)
		_ = res.Body.Close()
		for line := range strings.Lines(string(body)) {
			if rest, ok := strings.CutPrefix(line, "go_goroutines "); ok {
				n, err = strconv.Atoi(strings.TrimSpace(rest))
				s.must(err)
			}
		}
		if n < 40 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return n
}
