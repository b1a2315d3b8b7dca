// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// bars shows the progress of layers and the like on a terminal. It is used by one goroutine at a
// time.
type bars struct {
	progress *mpb.Progress
	byName   map[string]*mpb.Bar
}

// bars returns bars on stderr, which show nothing if that is no terminal.
func (g *globals) bars() *bars {
	b := &bars{byName: map[string]*mpb.Bar{}}
	if isTerminal(os.Stderr) && !g.json {
		b.progress = mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(40), mpb.WithRefreshRate(100*time.Millisecond))
	}
	return b
}

// show shows how many bytes of a layer are done.
func (b *bars) show(layer digest.Digest, done, total int64) {
	b.showNamed(layer.Encoded()[:12], done, total)
}

// showNamed shows how many bytes of something are done.
func (b *bars) showNamed(name string, done, total int64) {
	if b.progress == nil || done == 0 {
		return
	}
	bar := b.byName[name]
	if bar == nil {
		bar = b.progress.AddBar(total,
			mpb.PrependDecorators(decor.Name(name+" ")),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		b.byName[name] = bar
	}
	bar.SetCurrent(done)
}

func (b *bars) stop() {
	if b.progress == nil {
		return
	}
	for _, bar := range b.byName {
		bar.Abort(false) // what is not full by now never will be
	}
	b.progress.Wait()
}
