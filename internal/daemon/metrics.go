// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/holdfast/holdfast/internal/device"
)

// metrics are the daemon's counters, collected when they are asked for.
func (d *Daemon) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	sum := func(field func(device.Stats) int64) func() float64 {
		return func() float64 {
			var n int64
			for _, l := range d.layers.All() {
				n += field(l.Device().Stats())
			}
			return float64(n)
		}
	}
	counter := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "holdfast", Name: name, Help: help}, f))
	}
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "holdfast", Name: name, Help: help}, f))
	}
	gauge("layers", "Layers that are mounted.", func() float64 { return float64(len(d.layers.All())) })
	gauge("cache_bytes", "Disk space of layer data that is local.", func() float64 {
		var n int64
		for _, l := range d.layers.All() {
			n += l.LocalBytes()
		}
		return float64(n)
	})
	gauge("cache_limit_bytes", "Disk space that layer data may take; 0 is no limit.", func() float64 { return float64(d.space.Stats().Limit) })
	gauge("cache_memory_bytes", "Layer data that is in memory since it cannot be stored.", func() float64 { return float64(d.space.Stats().InMemory) })
	gauge("cache_full", "1 if what is fetched cannot be stored, since the disk or the limit is full.", func() float64 {
		if d.space.Stats().Full {
			return 1
		}
		return 0
	})
	counter("cache_evicted_bytes_total", "Disk space of layer data that was evicted.", func() float64 { return float64(d.space.Stats().Evicted) })
	counter("fetch_requests_total", "Range requests to sources.", sum(func(s device.Stats) int64 { return s.Requests }))
	counter("fetched_bytes_total", "Compressed bytes asked for.", sum(func(s device.Stats) int64 { return s.Fetched }))
	counter("copied_bytes_total", "Compressed bytes that were not fetched, since other layers had the chunks.", sum(func(s device.Stats) int64 { return s.Copied }))
	counter("copied_chunks_total", "Chunks that were copied from other layers.", sum(func(s device.Stats) int64 { return s.CopiedChunks }))
	counter("touched_bytes_total", "Compressed bytes of chunks that readers asked for.", sum(func(s device.Stats) int64 { return s.Touched }))
	counter("fetch_failures_total", "Range requests that failed.", sum(func(s device.Stats) int64 { return s.Failures }))
	counter("corrupt_chunks_total", "Chunks that did not match their digest.", sum(func(s device.Stats) int64 { return s.Corrupt }))
	counter("registry_requests_total", "HTTP requests to registries.", func() float64 { return float64(d.registry.Stats().Requests) })
	counter("registry_bytes_total", "Bytes received from registries.", func() float64 { return float64(d.registry.Stats().Bytes) })
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}
