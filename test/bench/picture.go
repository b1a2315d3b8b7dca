// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"html"
	"time"

	"github.com/holdfast/holdfast/test/lab"
)

// The picture's measures, in pixels.
const (
	pictureWidth = 760
	labelWidth   = 190
	barLength    = 470 // of the longest bar
	barHeight    = 24
	rowHeight    = 34
	topMargin    = 64
)

// part is one of what a start consists of.
type part struct {
	name, colour string
	of           func(lab.Start) time.Duration
}

func parts() []part {
	return []part{
		{"prepare", "#8e6bbf", func(s lab.Start) time.Duration { return s.Prepare }},
		{"pull", "#4c78a8", func(s lab.Start) time.Duration { return s.Pull }},
		{"run until ready", "#f2a541", func(s lab.Start) time.Duration { return s.Total - s.Prepare - s.Pull }},
	}
}

// picture draws the starts as an SVG: for each line the normal and the lazy
// start of median length, broken into its parts.
func (r *report) picture() []byte {
	rows, image := r.unmodifiedRows(), r.Image
	if len(image) == 0 {
		image = r.Unmodified.Image
	}
	for _, l := range []struct {
		name string
		starts
	}{
		{fmt.Sprintf("%v, %.4g Gbit/s", r.Line.RTT, float64(r.Line.BytesPerSecond)*8/1e9), r.Shaped}, {"local line", r.Unshaped},
	} {
		if len(l.Normal) == 0 || len(l.Lazy) == 0 {
			continue
		}
		normal, lazy := median(l.Normal, startTime), median(l.Lazy, lazyTime).Start
		rows = append(rows, row{l.name + ": normal", normal}, row{l.name + ": Holdfast", lazy})
	}
	var longest time.Duration
	for _, row := range rows {
		longest = max(longest, row.start.Total)
	}
	var out bytes.Buffer
	height := topMargin + rowHeight*len(rows) + 10
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="13">`+"\n", pictureWidth, height)
	fmt.Fprintf(&out, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	var size int64
	for _, l := range image {
		size += l.Size
	}
	text := func(x, y float64, anchor, s string) {
		fmt.Fprintf(&out, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="#222">%s</text>`+"\n", x, y, anchor, html.EscapeString(s))
	}
	rect := func(x, y, width, height float64, colour string) {
		fmt.Fprintf(&out, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n", x, y, width, height, colour)
	}
	text(10, 22, "start", fmt.Sprintf("From nothing to the first useful output, image of %.2f GB", float64(size)/1e9))
	for i, p := range parts() {
		x := float64(labelWidth + 130*i)
		rect(x, 36, 12, 12, p.colour)
		text(x+18, 47, "start", p.name)
	}
	for i, row := range rows {
		y := float64(topMargin + i*rowHeight)
		text(labelWidth-8, y+17, "end", row.label)
		x := float64(labelWidth)
		for _, p := range parts() {
			width := barLength * p.of(row.start).Seconds() / longest.Seconds()
			rect(x, y, width, barHeight, p.colour)
			x += width
		}
		text(x+8, y+17, "start", fmt.Sprintf("%.1f s", row.start.Total.Seconds()))
	}
	out.WriteString("</svg>\n")
	return out.Bytes()
}

// row is one start in the picture.
type row struct {
	label string
	start lab.Start
}

// unmodifiedRows are the starts of the image without an index.
func (r *report) unmodifiedRows() (rows []row) {
	u := &r.Unmodified
	for _, s := range []struct {
		label  string
		starts []lab.Start
	}{
		{"gzip: normal", u.Normal}, {"gzip, no index anywhere", u.First}, {"its eStargz copy", u.EStargz},
		{"gzip, index in registry", u.Indexed}, {"gzip, and a profile", u.Profiled},
	} {
		if len(s.starts) > 0 {
			rows = append(rows, row{s.label, median(s.starts, startTime)})
		}
	}
	return rows
}
