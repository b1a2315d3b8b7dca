// SPDX-License-Identifier: Apache-2.0

// Command bench measures what Holdfast promises, all of it in one run, on this
// machine and nothing else: a sample image of real files, a registry behind a
// line of 20 ms and 1 Gbit/s, the system's Podman, and the same image pulled
// normally beside it. It prints a table of the bars and exits with status 1 if
// one is missed. docs/benchmarks says how to read it.
//
// It needs root, is meant to be run by hand on a quiet machine, and leaves
// nothing mounted or running, also when it is interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"go.podman.io/storage/pkg/reexec"

	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

type options struct {
	dir, binary, suite string
	rtt                time.Duration
	mbit               int64
	weights            string
	pairs, rounds      int
	only, model        string
	out, svg, from     string
}

// errMissed means that all was measured, and something is not good enough.
var errMissed = errors.New("not all bars were reached")

func main() {
	agenttest.Main() // what the node's stand-ins are
	reexec.Register(clientName, clientMain)
	if reexec.Init() { // one of our clients, or what extracts layers for it
		return
	}
	var o options
	flag.StringVar(&o.dir, "dir", "/var/tmp/holdfast-bench", "where the sample images are kept and all else happens")
	flag.StringVar(&o.binary, "binary", "bin/holdfast", "the holdfast program")
	flag.StringVar(&o.suite, "suite", "bookworm", "the Debian suite of the sample image")
	flag.DurationVar(&o.rtt, "rtt", 20*time.Millisecond, "round trip time to the registry")
	flag.Int64Var(&o.mbit, "mbit", 1000, "rate of the line in Mbit/s")
	flag.StringVar(&o.weights, "weights", "2GiB", "size of the sample image's weights file")
	flag.IntVar(&o.pairs, "pairs", 3, "how many times what takes long is measured")
	flag.IntVar(&o.rounds, "rounds", 11, "how many times what is quick is measured")
	flag.StringVar(&o.only, "only", "", "measure only these of "+strings.Join(phaseNames(), ",")+"; the daemon's memory is then that of these")
	flag.StringVar(&o.model, "model", "4GiB", "size of the model that is loaded from several places, or the path of a file to load instead")
	flag.StringVar(&o.out, "o", "", "write all numbers to this file, as JSON")
	flag.StringVar(&o.svg, "svg", "", "draw the starts into this file, as SVG")
	flag.StringVar(&o.from, "from", "", "measure nothing: print and draw the numbers of this JSON file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	begin := time.Now()
	err := run(ctx, o, func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "[%6.1fs] %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	})
	if err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; everything has been cleaned up")
		}
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		stop()
		os.Exit(1) //nolint:gocritic // stop has been called
	}
}

func run(ctx context.Context, o options, log func(string, ...any)) error {
	r, err := load(o.from)
	if o.from == "" {
		r, err = measure(ctx, o, log)
	}
	if err != nil {
		return err
	}
	r.Bars = r.judge()
	if err := r.print(os.Stdout); err != nil {
		return err
	}
	if o.out != "" {
		if err := r.save(o.out); err != nil {
			return err
		}
	}
	if o.svg != "" {
		if err := os.WriteFile(o.svg, r.picture(), 0o644); err != nil { //nolint:gosec // a picture for the documentation
			return fmt.Errorf("drawing the picture: %w", err)
		}
	}
	if slices.ContainsFunc(r.Bars, func(b bar) bool { return !b.Reached }) {
		return errMissed
	}
	return nil
}

// bench is what the measurements work on.
type bench struct {
	options
	log    func(string, ...any)
	sample lab.Sample
	large  lab.Sample // the same with more than 1 GiB of files, for images without an index
	image  testimage.Image
	stand  *lab.Stand // nil if no phase needs it
	report *report
}

// phase is one of the measurements; it fills in its part of the report.
type phase struct {
	name    string
	own     bool // it has an image, and what else it needs, of its own
	measure func(*bench, context.Context) error
}

// phases are in the order in which they are run: the daemon that goes through
// read, local and pull is one process.
func phases() []phase {
	return []phase{
		{"starts", false, (*bench).measureStarts},
		{"touched", false, (*bench).measureTouched},
		{"read", false, (*bench).measureRead},
		{"local", false, (*bench).measureLocal},
		{"pull", false, (*bench).measurePull},
		{"fill", false, (*bench).measureFill},
		{"unmodified", true, (*bench).measureUnmodified},
		{"build", true, (*bench).measureBuild},
		{"update", true, (*bench).measureUpdate},
		{"storage", true, (*bench).measureStorage},
		{"models", true, (*bench).measureModels},
		{"node", true, (*bench).measureNode},
		{"cluster", true, (*bench).measureCluster},
	}
}

func phaseNames() []string {
	var names []string
	for _, p := range phases() {
		names = append(names, p.name)
	}
	return names
}

// measure sets everything up, measures, and cleans up.
func measure(ctx context.Context, o options, log func(string, ...any)) (_ *report, err error) {
	b, err := newBench(ctx, o, log)
	if err != nil {
		return nil, err
	}
	work := filepath.Join(o.dir, "work")
	if err := lab.RemoveAll(work); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	if b.image.Layers != nil {
		// Our clients are this program. Excluded is an image of measurePull.
		// The fill would blur what the others measure; it has a phase of its own, as have
		// images without an index, of which one stands here for what is left to the runtime.
		settings := fmt.Sprintf("fill = \"off\"\nindex.build = false\nprofile = \"off\"\nruntimes = [\"podman\", %q]\nexclude = [\"*/%s\"]\n", filepath.Base(self), excludedName)
		if b.stand, err = lab.NewStand(work, b.binary, b.image, shape.Line{RTT: o.rtt, Rate: b.report.Line.BytesPerSecond}, settings); err != nil {
			return nil, err
		}
		defer func() {
			log("cleaning up")
			err = errors.Join(err, b.stand.Close(ctx))
		}()
		if err := b.stand.Daemon.Start(ctx); err != nil {
			return nil, err
		}
	}
	for _, p := range phases() {
		if !o.wants(func(q phase) bool { return q.name == p.name }) {
			continue
		}
		if err := p.measure(b, ctx); err != nil {
			return nil, fmt.Errorf("measuring %s: %w", p.name, err)
		}
	}
	if b.stand == nil {
		return b.report, nil
	}
	return b.report, b.noteMemory(ctx)
}

// wants reports whether any of the phases that are to be measured is one of those.
func (o options) wants(those func(phase) bool) bool {
	return slices.ContainsFunc(phases(), func(p phase) bool {
		return those(p) && (o.only == "" || slices.Contains(strings.Split(o.only, ","), p.name))
	})
}

func newBench(ctx context.Context, o options, log func(string, ...any)) (*bench, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting file systems needs root: try sudo make bench")
	}
	size, err := units.RAMInBytes(o.weights)
	if err != nil {
		return nil, fmt.Errorf("-weights %q: want a size such as 2GiB", o.weights)
	}
	if o.mbit < 1 || o.pairs < 1 || o.rounds < 1 {
		return nil, errors.New("-mbit, -pairs and -rounds: want at least 1")
	}
	for _, name := range strings.Split(o.only, ",") {
		if o.only != "" && !slices.Contains(phaseNames(), name) {
			return nil, fmt.Errorf("-only %q: want %s", name, strings.Join(phaseNames(), ", "))
		}
	}
	if o.binary, err = filepath.Abs(o.binary); err != nil {
		return nil, err
	}
	if _, err := os.Stat(o.binary); err != nil {
		return nil, fmt.Errorf("%w: make build first, or use make bench", err)
	}
	if err := lab.Reserve(o.dir, 8*size+6*fileSize); err != nil {
		return nil, err
	}
	b := &bench{options: o, log: log, report: &report{Date: time.Now().UTC().Truncate(time.Second)}}
	b.sample = lab.Sample{Dir: filepath.Join(o.dir, "sample"), WeightsSize: size, Suite: o.suite, Log: log}
	b.large = lab.Sample{Dir: b.sample.Dir, WeightsSize: size, Suite: "trixie", Framework: "torch", Log: log}
	if o.wants(func(p phase) bool { return !p.own }) {
		if b.image, err = b.sample.Image(ctx, testimage.EStargz); err != nil {
			return nil, err
		}
		b.report.Image = describe(b.image)
	}
	b.report.Line = line{RTT: o.rtt, BytesPerSecond: o.mbit * 1e6 / 8}
	b.report.Machine, err = describeMachine(ctx, o.binary)
	return b, err
}

// logTook tells what one measurement took, unless it has failed.
func (b *bench) logTook(err error, format string, args ...any) {
	if err == nil {
		b.log(format, args...)
	}
}

// freshDaemon makes everything that the daemon knows cold: what it has in
// memory, and its connections.
func (b *bench) freshDaemon(ctx context.Context) error {
	if err := b.noteMemory(ctx); err != nil {
		return err
	}
	if err := b.stand.Daemon.Stop(); err != nil {
		return err
	}
	return b.stand.Daemon.Start(ctx)
}

// noteMemory takes down the peak of the daemon that runs.
func (b *bench) noteMemory(ctx context.Context) error {
	_, peak, err := b.stand.Daemon.RSS(ctx)
	b.report.PeakRSS = append(b.report.PeakRSS, peak)
	return err
}
