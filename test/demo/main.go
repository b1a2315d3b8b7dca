// SPDX-License-Identifier: Apache-2.0

// Command demo shows what Holdfast does, on this machine and nothing else: it
// makes a sample image of real files, serves it from a registry of its own
// behind a line of 20 ms and 1 Gbit/s, and starts a container from it with the
// system's Podman, first normally and then lazily. It needs root, and leaves
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
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"

	"github.com/holdfast/holdfast/internal/shape"
	"github.com/holdfast/holdfast/internal/testimage"
	"github.com/holdfast/holdfast/test/lab"
)

type options struct {
	dir, binary, suite string
	rtt                time.Duration
	mbit               int64
	size               string
	remove             bool
}

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", "/var/tmp/holdfast-demo", "where the sample image is kept and all else happens")
	flag.StringVar(&o.binary, "binary", "bin/holdfast", "the holdfast program")
	flag.StringVar(&o.suite, "suite", "bookworm", "the Debian suite of the sample image")
	flag.DurationVar(&o.rtt, "rtt", 20*time.Millisecond, "round trip time to the registry")
	flag.Int64Var(&o.mbit, "mbit", 1000, "rate of the line in Mbit/s; 0 for no limit")
	flag.StringVar(&o.size, "weights", "2GiB", "size of the sample image's weights file")
	flag.BoolVar(&o.remove, "rm", false, "remove the sample image afterwards, too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	begin := time.Now()
	err := run(ctx, o, func(format string, args ...any) {
		fmt.Printf("[%6.1fs] %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	})
	if err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; everything has been cleaned up")
		}
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		stop()
		os.Exit(1) //nolint:gocritic // stop has been called
	}
}

func run(ctx context.Context, o options, log func(string, ...any)) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting file systems needs root: try sudo make demo")
	}
	size, err := units.RAMInBytes(o.size)
	if err != nil {
		return fmt.Errorf("-weights %q: want a size such as 2GiB", o.size)
	}
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return err
	}
	if err := lab.Reserve(o.dir, 8*size+2<<30); err != nil {
		return err
	}
	sample := lab.Sample{Dir: filepath.Join(o.dir, "sample"), WeightsSize: size, Suite: o.suite, Log: log}
	image, err := sample.Image(ctx, testimage.EStargz)
	if err != nil {
		return err
	}
	if o.remove {
		defer func() { err = errors.Join(err, lab.RemoveAll(o.dir)) }()
	} else {
		defer log("the sample image stays in %s for the next time; -rm removes it", sample.Dir)
	}
	work := filepath.Join(o.dir, "work")
	if err := lab.RemoveAll(work); err != nil {
		return err
	}
	// The background fill would go on under the normal pull, and take its line.
	const settings = "fill = \"off\"\n"
	stand, err := lab.NewStand(work, binary, image, shape.Line{RTT: o.rtt, Rate: o.mbit * 1e6 / 8}, settings)
	if err != nil {
		return err
	}
	defer func() {
		log("cleaning up")
		err = errors.Join(err, stand.Close(ctx))
	}()
	return compare(ctx, o, stand, image, log)
}

func compare(ctx context.Context, o options, s *lab.Stand, image testimage.Image, log func(string, ...any)) error {
	log("starting the daemon")
	if err := s.Daemon.Start(ctx); err != nil {
		return err
	}
	var total int64
	for _, l := range image.Layers {
		total += l.Descriptor.Size
	}
	log("a registry at %s, %s away, %d Mbit/s, has an image of %s", s.Ref, o.rtt, o.mbit, units.HumanSize(float64(total)))
	starts := map[string]lab.Start{}
	for _, way := range []struct {
		name  string
		start func(context.Context) (lab.Start, error)
	}{
		{"lazy", s.StartLazy}, {"normal", s.StartNormal},
	} {
		if err := lab.DropPageCache(); err != nil {
			log("going on without: %v", err)
		}
		log("%s start: pulling and running with Podman ...", way.name)
		stop := watch(s, total, log)
		r, err := way.start(ctx)
		stop()
		if err != nil {
			return err
		}
		log("%s start: the program is ready after %.1f s", way.name, r.Total.Seconds())
		starts[way.name] = r
	}
	if starts["lazy"].Output != starts["normal"].Output {
		return fmt.Errorf("the program says %q when started lazily and %q normally", starts["lazy"].Output, starts["normal"].Output)
	}
	return table(starts["normal"], starts["lazy"])
}

// watch reports how much the registry has sent, until the returned function is
// called.
func watch(s *lab.Stand, total int64, log func(string, ...any)) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				sent := s.Registry.Counts().BlobBytes
				log("  ... %s of %s have been sent", units.HumanSize(float64(sent)), units.HumanSize(float64(total)))
			case <-done:
				return
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

func table(normal, lazy lab.Start) error {
	fmt.Println()
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	row := func(cells ...string) { fmt.Fprintln(t, strings.Join(cells, "\t")+"\t") }
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	row("", "normal", "holdfast")
	row("prepare", "-", seconds(lazy.Prepare))
	row("podman pull", seconds(normal.Pull), seconds(lazy.Pull))
	row("podman run, until the program is ready", seconds(normal.Run), seconds(lazy.Run))
	row("total", seconds(normal.Total), seconds(lazy.Total))
	row("downloaded until then", units.HumanSize(float64(normal.Bytes)), units.HumanSize(float64(lazy.Bytes)))
	row("requests until then", fmt.Sprint(normal.Requests), fmt.Sprint(lazy.Requests))
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Printf("\nReady %.0f times sooner, with the same output.\n\n", normal.Total.Seconds()/lazy.Total.Seconds())
	return nil
}
