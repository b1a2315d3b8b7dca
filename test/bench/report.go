// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast/holdfast/internal/atomicfile"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

// report is everything that was measured. Durations are in nanoseconds.
type report struct {
	Date    time.Time     `json:"date"`
	Machine machine       `json:"machine"`
	Line    line          `json:"line"`
	Image   []layerOnDisk `json:"image"`
	Bars    []bar         `json:"bars"`

	Shaped   starts `json:"shaped"`
	Unshaped starts `json:"unshaped"`
	// Touched is how many compressed bytes the chunks have that the workload
	// touches until it is ready.
	Touched int64 `json:"touched"`
	Read    struct {
		Mount []transfer `json:"mount"` // through the mount
		HTTP  []transfer `json:"http"`  // one plain request
	} `json:"read"`
	Local struct {
		tree
		Run  both `json:"run"`
		Read both `json:"read"`
		Stat both `json:"stat"`
	} `json:"local"`
	Pulls map[string][]pull `json:"pulls"`
	Fill  fills             `json:"fill"`
	// Of images without an index, and of new versions of images.
	Unmodified unmodified `json:"unmodified"`
	Build      []built    `json:"build"`
	Update     []update   `json:"update"`
	// Of image stores and bundles.
	Storing storing `json:"storing"`
	// Of artifacts.
	Models models `json:"models"`
	// Of the node agent.
	Node nodeNumbers `json:"node"`
	// Of the controller.
	Cluster clusterReport `json:"cluster"`
	// PeakRSS is the peak memory of each daemon process, in bytes.
	PeakRSS []int64 `json:"peakRSS"`
}

type line struct {
	RTT            time.Duration `json:"rtt"`
	BytesPerSecond int64         `json:"bytesPerSecond"`
}

type layerOnDisk struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Size      int64         `json:"size"` // compressed bytes
}

func describe(image testimage.Image) []layerOnDisk {
	var all []layerOnDisk
	for _, l := range image.Layers {
		all = append(all, layerOnDisk{l.Descriptor.Digest, l.Descriptor.MediaType, l.Descriptor.Size})
	}
	return all
}

// bar is one promise and what came out.
type bar struct {
	What     string  `json:"what"`
	Unit     string  `json:"unit"`
	Want     float64 `json:"want"`
	AtLeast  bool    `json:"atLeast"` // else Want is a maximum
	Measured float64 `json:"measured"`
	Reached  bool    `json:"reached"`
	Detail   string  `json:"detail"`
}

// judge compares what has been measured with what was promised: the table of
// docs/benchmarks. What has not been measured is left out.
func (r *report) judge() []bar {
	var bars []bar
	add := func(measured bool, atLeast bool, b func() bar) {
		if measured {
			b := b()
			b.AtLeast = atLeast
			b.Reached = b.Measured <= b.Want && !atLeast || b.Measured >= b.Want && atLeast
			bars = append(bars, b)
		}
	}
	const atLeast, atMost = true, false
	add(len(r.Shaped.Lazy) > 0, atLeast, r.readyBar)
	add(len(r.Shaped.Lazy) > 0 && r.Touched > 0, atMost, r.bytesBar)
	add(len(r.Shaped.Lazy) > 0, atMost, r.prepareBar)
	add(len(r.Shaped.Lazy) > 0, atMost, r.requestsBar)
	add(len(r.Read.Mount) > 0, atLeast, r.readBar)
	local := r.Local
	add(len(local.Run.Lazy) > 0, atMost, func() bar { return local.Run.atMost("warm run, against the normally pulled image") })
	add(len(local.Read.Lazy) > 0, atMost, func() bar { return local.Read.atMost("warm read of all files, against it") })
	add(len(local.Stat.Lazy) > 0, atLeast, local.Stat.statBar)
	add(len(r.Fill.Complete) > 0, atMost, r.completeBar)
	add(len(r.Fill.On) > 0, atMost, r.readyFilledBar)
	u := &r.Unmodified
	add(len(u.Indexed) > 0, atLeast, u.indexedBar)
	add(len(u.Indexed) > 0, atMost, u.copyBar)
	add(len(u.Profiled) > 0, atMost, func() bar { return u.profileBar(r.Line) })
	add(len(u.First) > 0, atMost, u.firstBar)
	add(len(u.First) > 0, atMost, u.firstLeastBar)
	add(len(r.Build) > 0, atLeast, r.buildBar)
	add(len(r.Build) > 0, atMost, r.indexSizeBar)
	add(len(u.ReadFirst) > 0, atMost, u.readBar)
	for _, n := range r.Update {
		add(true, atMost, n.bar)
	}
	st := &r.Storing
	add(len(st.Add) > 0, atMost, st.addBar)
	add(len(st.Add) > 0, atMost, st.secondBar)
	add(len(st.Add) > 0, atMost, st.tenBar)
	add(len(st.Create) > 0, atLeast, st.createBar)
	add(len(st.Create) > 0, atLeast, st.verifyBar)
	mo := &r.Models
	add(len(mo.Complete) > 0, atLeast, mo.completeBar)
	add(len(mo.Lazy) > 0, atLeast, func() bar { return mo.lazyBar(r.Line) })
	add(len(mo.First) > 0, atMost, func() bar { return mo.firstBar(r.Line) })
	add(len(mo.List) > 0, atMost, mo.listBar)
	if len(mo.Pull) > 0 {
		for _, b := range mo.wayBars() {
			add(true, atMost, func() bar { return b })
		}
	}
	for _, b := range append(r.Node.bars(), r.Cluster.bars()...) {
		add(true, atMost, func() bar { return b })
	}
	add(len(r.PeakRSS) > 0, atMost, r.memoryBar)
	for _, hook := range []struct{ name, what string }{
		{"excluded", "an excluded pull, hook and daemon up, takes longer by"},
		{"plain", "a pull that cannot be lazy, daemon up, takes longer by"},
		{"stopped", "a pull with the daemon down takes longer by"},
	} {
		add(len(r.Pulls[hook.name]) > 0, atMost, func() bar { return r.pullBar(hook.name, hook.what) })
	}
	return bars
}

func (r *report) readyBar() bar {
	normal, lazy := median(r.Shaped.Normal, startTime), median(r.Shaped.Lazy, lazyTime)
	return bar{
		What: "ready, sooner than a normal pull and run", Unit: "times", Want: 10,
		Measured: normal.Total.Seconds() / lazy.Total.Seconds(),
		Detail:   fmt.Sprintf("%.2f s, normally %.2f s", lazy.Total.Seconds(), normal.Total.Seconds()),
	}
}

func (r *report) bytesBar() bar {
	lazy := median(r.Shaped.Lazy, func(s lazyStart) float64 { return float64(s.Data) })
	asked := float64(touched(lazy.Layers))
	return bar{
		What: "bytes fetched before ready, to the chunks touched", Unit: "times", Want: 1.3,
		Measured: float64(lazy.Data) / float64(r.Touched),
		Detail: fmt.Sprintf("%.1f MB, touched %.1f MB; %.2f times what the kernel asked for, %.1f MB",
			float64(lazy.Data)/1e6, float64(r.Touched)/1e6, float64(lazy.Data)/asked, asked/1e6),
	}
}

func (r *report) prepareBar() bar {
	took := median(r.Shaped.Lazy, func(s lazyStart) float64 { return s.Prepare.Seconds() }).Prepare
	return bar{What: "prepare, nothing cached", Unit: "s", Want: 0.5, Measured: took.Seconds(),
		Detail: fmt.Sprintf("%d layers, the whole command", len(r.Image))}
}

func (r *report) requestsBar() bar {
	most := int64(0)
	for _, s := range r.Shaped.Lazy {
		most = max(most, s.PrepareRequests)
	}
	return bar{What: "requests until prepared", Unit: "", Want: 10, Measured: float64(most), Detail: "the most of all starts"}
}

func (r *report) readBar() bar {
	mount, plain := median(r.Read.Mount, transfer.rate).rate(), median(r.Read.HTTP, transfer.rate).rate()
	return bar{
		What: "sequential read of a cold 1 GiB file, of the line", Unit: "%", Want: 85,
		Measured: 100 * mount / float64(r.Line.BytesPerSecond),
		Detail:   fmt.Sprintf("%.1f MB/s, one HTTP request %.1f MB/s", mount/1e6, plain/1e6),
	}
}

func (b both) ratio() (ratio, normal, lazy float64) {
	normal, lazy = median(b.Normal, time.Duration.Seconds).Seconds(), median(b.Lazy, time.Duration.Seconds).Seconds()
	return lazy / normal, normal, lazy
}

func (b both) atMost(what string) bar {
	ratio, normal, lazy := b.ratio()
	return bar{What: what, Unit: "times", Want: 1.05, Measured: ratio, Detail: fmt.Sprintf("%.3f s, normally %.3f s", lazy, normal)}
}

func (b both) statBar() bar {
	ratio, normal, lazy := b.ratio()
	return bar{What: "stat of every file, no page cache, faster by", Unit: "times", Want: 2, Measured: 1 / ratio,
		Detail: fmt.Sprintf("%.3f s, normally %.3f s", lazy, normal)}
}

func (r *report) memoryBar() bar {
	peak := slices.Max(r.PeakRSS)
	return bar{What: "memory of the daemon, peak", Unit: "MiB", Want: 80, Measured: float64(peak) / (1 << 20),
		Detail: fmt.Sprintf("the most of %d processes", len(r.PeakRSS))}
}

func (r *report) pullBar(name, what string) bar {
	none, with := median(r.Pulls["none"], pullTime), median(r.Pulls[name], pullTime)
	return bar{What: what, Unit: "s", Want: 0.2, Measured: (with.Took - none.Took).Seconds(),
		Detail: fmt.Sprintf("%.3f s, without a hook %.3f s", with.Took.Seconds(), none.Took.Seconds())}
}

func startTime(s lab.Start) float64 { return s.Total.Seconds() }
func lazyTime(s lazyStart) float64  { return s.Total.Seconds() }
func pullTime(p pull) float64       { return p.Took.Seconds() }

// median returns the item in the middle by a value, the lower one of two.
func median[T any](items []T, value func(T) float64) T {
	sorted := slices.SortedFunc(slices.Values(items), func(a, b T) int {
		switch {
		case value(a) < value(b):
			return -1
		case value(a) > value(b):
			return 1
		}
		return 0
	})
	return sorted[(len(sorted)-1)/2]
}

// print prints the table.
func (r *report) print(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nwhat\tbar\tmeasured\t\t")
	for _, b := range r.Bars {
		sign, verdict := "<=", "MISSED"
		if b.AtLeast {
			sign = ">="
		}
		if b.Reached {
			verdict = "ok"
		}
		fmt.Fprintf(t, "%s\t%s %g %s\t%.4g %s\t%s\t%s\n", b.What, sign, b.Want, b.Unit, b.Measured, b.Unit, verdict, b.Detail)
	}
	if len(r.Unshaped.Lazy) > 0 {
		normal, lazy := median(r.Unshaped.Normal, startTime).Total.Seconds(), median(r.Unshaped.Lazy, lazyTime).Total.Seconds()
		fmt.Fprintf(t, "ready, without the line's delay and limit\t\t%.4g times\t\t%.2f s, normally %.2f s\n", normal/lazy, lazy, normal)
	}
	return t.Flush()
}

func (r *report) save(name string) error { return atomicfile.WriteJSON(name, r, 0o644) }

// load reads what save wrote; no name, no report.
func load(name string) (*report, error) {
	if name == "" {
		return nil, nil
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading an earlier report: %w", err)
	}
	r := new(report)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("reading an earlier report %s: %w", name, err)
	}
	return r, nil
}
