// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"
)

func (m *models) completeBar() bar {
	complete, direct := seconds(m.Complete), seconds(m.Direct)
	return bar{What: "complete artifact, eight readers, of the same file read directly", Unit: "%", Want: 95, Measured: 100 * direct / complete,
		Detail: fmt.Sprintf("%.2f s, directly %.2f s, for %.0f MB", complete, direct, float64(m.Size)/1e6)}
}

func (m *models) lazyBar(l line) bar {
	took := seconds(m.Lazy)
	return bar{What: "model read lazily, eight readers, of the line", Unit: "%", Want: 90, Measured: 100 * float64(m.Size) / took / float64(l.BytesPerSecond),
		Detail: fmt.Sprintf("%.2f s from prepare to the last byte", took)}
}

func (m *models) firstBar(l line) bar {
	took := median(m.First, time.Duration.Seconds)
	return bar{What: "first byte of the middle of a lazy file", Unit: "round trips", Want: 3, Measured: took.Seconds() / l.RTT.Seconds(),
		Detail: fmt.Sprintf("%.1f ms", took.Seconds()*1e3)}
}

func (m *models) listBar() bar {
	took := seconds(m.List)
	return bar{What: "list of 200 artifacts in the composed store", Unit: "ms", Want: 50, Measured: took * 1e3,
		Detail: fmt.Sprintf("in a single store %.0f ms", seconds(m.Single)*1e3)}
}

// wayBars compare the ways to load a model with CRI-O's.
func (m *models) wayBars() []bar {
	var all []bar
	for _, w := range []struct {
		what string
		list []time.Duration
		want float64
	}{
		{"model from a slow disk", m.Slow, 1}, {"model from a store on this disk", m.Store, 0.5}, {"model from a store on the network", m.Network, 1.05}, {"model lazily", m.Lazy, 1.05},
	} {
		all = append(all, bar{What: w.what + ", against pull and read", Unit: "times", Want: w.want, Measured: seconds(w.list) / seconds(m.Pull),
			Detail: fmt.Sprintf("%.2f s, pull and read %.2f s", seconds(w.list), seconds(m.Pull))})
	}
	return all
}

func seconds(list []time.Duration) float64 { return median(list, time.Duration.Seconds).Seconds() }
