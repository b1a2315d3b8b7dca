// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"

	"github.com/holdfast/holdfast/internal/blob/registry"
	"github.com/holdfast/holdfast/internal/cache"
	"github.com/holdfast/holdfast/internal/device"
	"github.com/holdfast/holdfast/internal/image"
	"github.com/holdfast/holdfast/internal/indexes"
	"github.com/holdfast/holdfast/internal/layer"
	"github.com/holdfast/holdfast/internal/profile"
)

// Profiles is how profiles are recorded, found and used: see package profile.
type Profiles struct {
	// Store keeps those of this node; nil: none are recorded, and none are used.
	Store *profile.Store
	// Settle ends a recording once readers have wanted nothing new for so long.
	Settle time.Duration
}

// Errors about profiles that callers tell apart.
var (
	// ErrNoProfile means that there is no profile of the image.
	ErrNoProfile = errors.New("there is no profile of this image")
	// ErrProfilesOff means that the configuration wants no profiles.
	ErrProfilesOff = errors.New(`profiles are off: the configuration has profile = "off"`)
)

// findTimeout bounds looking for a profile elsewhere: by then the workload reads.
const findTimeout = 10 * time.Second

// found is a profile that is being looked for.
type found struct {
	done    chan struct{} // closed after profile is set
	profile *profile.Profile
}

// wait returns the profile, or nil if there is none.
func (f *found) wait(ctx context.Context) *profile.Profile {
	select {
	case <-f.done:
		return f.profile
	case <-ctx.Done():
		return nil
	}
}

// findProfile looks for the image's profile, on this node and then elsewhere,
// while its layers are prepared.
func (p *Preparer) findProfile(img *resolved) *found {
	f := &found{done: make(chan struct{})}
	if p.profiles.Store == nil {
		close(f.done)
		return f
	}
	p.background.Go(func() error {
		defer close(f.done)
		ctx, cancel := context.WithTimeout(p.ctx, findTimeout)
		defer cancel()
		prof, err := p.lookForProfile(ctx, img)
		if err != nil && p.ctx.Err() == nil && !errors.Is(err, fs.ErrNotExist) {
			p.log.Warn("starting without a profile", "image", img.ref.String(), "err", err)
		}
		f.profile = prof
		return nil
	})
	return f
}

// lookForProfile returns a profile that fits the image. One from elsewhere is kept:
// what is recorded here is added to it.
func (p *Preparer) lookForProfile(ctx context.Context, img *resolved) (*profile.Profile, error) {
	prof, err := p.profiles.Store.Load(img.Manifest.Digest)
	if err == nil {
		err = img.fits(prof)
	}
	if err == nil {
		return prof, nil
	}
	data, err := img.indexes.Profile(ctx, profile.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("fetching profile: %w", err)
	}
	if prof, err = profile.Check(data, img.Manifest.Digest); err == nil {
		err = img.fits(prof)
	}
	if err == nil {
		err = p.profiles.Store.Save(prof)
	}
	return only(prof, err)
}

// only is the profile if there is no error.
func only(prof *profile.Profile, err error) (*profile.Profile, error) {
	if err != nil {
		return nil, err
	}
	return prof, nil
}

// fits refuses a profile that speaks of layers that the image does not have.
func (r *resolved) fits(prof *profile.Profile) error {
	for _, l := range prof.Layers {
		i := slices.IndexFunc(r.Layers, func(d image.Layer) bool { return d.Digest == l.Digest })
		if i < 0 || r.Layers[i].Size != l.Size {
			return fmt.Errorf("profile of image %s: the image has no layer %s of %d bytes: %w", r.Manifest.Digest, l.Digest, l.Size, profile.ErrInvalid)
		}
	}
	return nil
}

// readAhead fetches what the image's workload will want first: what its profile
// says, or without one what its program needs.
func (p *Preparer) readAhead(img *resolved, plans []*plan) {
	prof := img.profile.wait(p.ctx)
	if prof == nil {
		p.warm(img, plans)
		return
	}
	start := time.Now()
	n, err := p.prefetch(prof)
	if err != nil && p.ctx.Err() == nil && !errors.Is(err, cache.ErrFull) {
		p.log.Warn("fetching by the profile", "image", img.ref.String(), "err", err)
		return
	}
	p.log.Info("fetched by the profile", "image", img.ref.String(), "bytes", n, "took", time.Since(start).Round(time.Millisecond).String())
}

// prefetch fetches what a profile wants, in order, and returns how many
// compressed bytes that is.
func (p *Preparer) prefetch(prof *profile.Profile) (n int64, err error) {
	var wants []device.Want
	for _, t := range prof.Wanted() {
		if l, ok := p.layers.Get(prof.Layers[t.Layer].Digest); ok { // or it is left to the runtime
			wants = append(wants, device.Want{Device: l.Device(), Range: t.Range})
			n += t.Length
		}
	}
	return n, device.FetchInOrder(p.ctx, wants, device.Profile)
}

// Profile returns the profile of an image, prepared or not: [ErrNoProfile] if
// there is none.
func (p *Preparer) Profile(name string) (*profile.Profile, error) {
	image, err := p.profiled(name)
	if err != nil {
		return nil, err
	}
	prof, err := p.profiles.Store.Load(image)
	return prof, noProfile(name, err)
}

// DropProfile forgets the profile of an image, prepared or not: [ErrNoProfile] if
// there is none.
func (p *Preparer) DropProfile(name string) error {
	image, err := p.profiled(name)
	if err != nil {
		return err
	}
	p.recordings.end(image)
	return noProfile(name, p.profiles.Store.Drop(image))
}

// PushProfile publishes the profile of an image for other nodes.
func (p *Preparer) PushProfile(ctx context.Context, name string) error {
	prof, err := p.Profile(name)
	if err != nil {
		return err
	}
	data, err := prof.Encode()
	if err == nil {
		err = p.publishProfile(ctx, name, data)
	}
	if err != nil {
		return fmt.Errorf("pushing the profile of %s: %w", name, err)
	}
	return nil
}

// publishProfile publishes a profile of a prepared image, with the credentials that
// are kept for it.
func (p *Preparer) publishProfile(ctx context.Context, name string, document []byte) error {
	if !p.indexes.Publishes() {
		return indexes.ErrNoPlace
	}
	img, err := p.Find(name)
	if err != nil {
		return err
	}
	if len(img.References) == 0 {
		return errors.New("nobody knows where it is from")
	}
	last := img.References[len(img.References)-1]
	ref, err := reference.ParseNormalizedNamed(last)
	if err != nil {
		return err
	}
	var creds *registry.Credentials
	if c, ok := p.kept.Get(last); ok {
		creds = &c
	}
	endpoints, err := p.registry.Endpoints(ref, creds)
	if err != nil {
		return err
	}
	var failed error
	for _, repo := range slices.Backward(endpoints) { // mirrors come first
		m, err := repo.Manifest(ctx, img.Digest.String())
		if err == nil {
			described := &image.Image{Manifest: v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Body))}}
			return p.indexes.Image(described, repo).PublishProfile(ctx, document)
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// profiled returns the manifest digest of a prepared image, or of one that is not
// any more if name is one.
func (p *Preparer) profiled(name string) (digest.Digest, error) {
	if p.profiles.Store == nil {
		return "", ErrProfilesOff
	}
	img, err := p.Find(name)
	if d := digest.Digest(name); errors.Is(err, ErrUnknown) && d.Validate() == nil {
		return d, nil
	}
	return img.Digest, err
}

func noProfile(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", name, ErrNoProfile)
	}
	return err
}

// visible describes layers to a profile: whether what is read of each can be seen,
// and of any of them.
func visible(layers []*layer.Layer, see func(*layer.Layer) bool) (known []profile.Layer, some bool) {
	for _, l := range layers {
		runs := 0
		if see(l) {
			runs, some = 1, true
		}
		known = append(known, profile.Layer{Digest: l.Digest, Size: l.Size, Runs: runs})
	}
	return known, some
}
