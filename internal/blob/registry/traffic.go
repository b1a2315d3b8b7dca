// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"io"
	"net/http"
	"sync/atomic"
)

// Stats is what went over the network. Requests counts every one that was sent,
// pings, tokens and the steps of redirects included; Bytes is what arrived in
// the bodies of the answers.
type Stats struct {
	Requests, Bytes int64
}

// traffic counts.
type traffic struct {
	requests, bytes atomic.Int64
}

func (t *traffic) stats() Stats {
	return Stats{Requests: t.requests.Load(), Bytes: t.bytes.Load()}
}

// meter is the round tripper that all requests of a repository go through. It
// counts for the repository and for the client.
type meter struct {
	base      http.RoundTripper
	userAgent string
	counters  [2]*traffic
}

func (m *meter) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("User-Agent", m.userAgent)
	for _, t := range m.counters {
		t.requests.Add(1)
	}
	resp, err := m.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = &meteredBody{resp.Body, m.counters}
	return resp, nil
}

type meteredBody struct {
	io.ReadCloser
	counters [2]*traffic
}

func (b *meteredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	for _, t := range b.counters {
		t.bytes.Add(int64(n))
	}
	return n, err
}
