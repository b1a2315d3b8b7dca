// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.podman.io/image/v5/docker/reference"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast/holdfast/internal/loopback"
	"github.com/holdfast/holdfast/internal/mirrorconf"
	"github.com/holdfast/holdfast/internal/sources"
)

// lookAround is how often it is looked what is attached.
const lookAround = 3 * time.Second

// logical returns the name of an image that a runtime pulls from the registry on
// loopback, which calls it by another one.
func (d *Daemon) logical(ref reference.Named) (reference.Named, bool) {
	name, ok := strings.CutPrefix(ref.String(), d.cfg.SourceRegistry+"/")
	if d.cfg.SourceRegistry == "" || !ok {
		return nil, false
	}
	logical, err := reference.ParseNamed(loopback.Unescape(name))
	return logical, err == nil
}

// serveAttached serves to the runtimes what is attached, and tells them of it, as long
// as there is anything. What goes wrong costs them nothing: they pull from registries.
func (d *Daemon) serveAttached(ctx context.Context) error {
	if d.cfg.SourceRegistry == "" {
		return nil
	}
	conf := mirrorconf.Config{Conf: d.cfg.RegistriesConf, ConfDir: d.cfg.RegistriesConfDir}
	defer func() {
		if _, err := mirrorconf.Write(conf, nil); ending(ctx) && err != nil {
			d.log.Warn("telling runtimes that nothing is attached any more", "err", err)
		}
	}()
	var g errgroup.Group
	defer g.Wait() //nolint:errcheck // logged
	serving, said, told := false, "", ""
	for ctx.Err() == nil {
		all := d.sources.Repositories(ctx)
		if len(all) > 0 && !serving {
			l, err := loopback.Listen(ctx, d.cfg.SourceRegistry)
			if err == nil {
				serving = true
				g.Go(func() error {
					err := loopback.Serve(ctx, l, d.sources, d.log)
					if err != nil {
						d.log.Error("serving what is attached", "err", err)
					}
					return err
				})
			} else if said != err.Error() {
				said = err.Error()
				d.log.Error("attached images cannot be pulled without a registry", "err", err)
			}
		}
		if !serving {
			all = nil
		}
		if now := fmt.Sprint(all, conf.Stamp()); now != told {
			changed, err := mirrorconf.Write(conf, d.mirrors(all))
			told = fmt.Sprint(all, conf.Stamp())
			switch {
			case err != nil:
				d.log.Error("telling runtimes what is attached", "err", err)
			case changed:
				d.log.Info("told runtimes what is attached", "repositories", len(all), "registry", d.cfg.SourceRegistry)
			}
		}
		select {
		case <-time.After(lookAround):
		case <-ctx.Done():
		}
	}
	return nil
}

// mirrors is what runtimes are told.
func (d *Daemon) mirrors(all []sources.Attached) []mirrorconf.Repository {
	var list []mirrorconf.Repository
	for _, a := range all {
		if name, ok := loopback.Escape(a.Name); ok && len(list) < mirrorconf.MaxRepositories {
			list = append(list, mirrorconf.Repository{Name: a.Name, Mirror: d.cfg.SourceRegistry + "/" + name, AfterRegistry: a.AfterRegistry})
		}
	}
	return list
}
