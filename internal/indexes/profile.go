// SPDX-License-Identifier: Apache-2.0

package indexes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/holdfast/holdfast/internal/indexstore"
)

// ErrNoPlace means that the configuration has no place to publish to.
var ErrNoPlace = errors.New("there is no place to push to: the configuration has no index.publish")

// Profile returns the document about the image's workload that the first of the places
// has, of at most limit bytes. The error wraps fs.ErrNotExist if none has one.
func (i *Image) Profile(ctx context.Context, limit int64) ([]byte, error) {
	var failed error
	for _, place := range i.look {
		var doc bytes.Buffer
		err := place.Fetch(ctx, i.subject.Digest, indexstore.Profile, limit, &doc)
		if err == nil {
			return doc.Bytes(), nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	if failed == nil {
		failed = fmt.Errorf("profile of image %s: %w", i.subject.Digest, fs.ErrNotExist)
	}
	return nil, failed
}

// PublishProfile publishes the document about the image's workload to all places of
// the configuration: [ErrNoPlace] if there is none.
func (i *Image) PublishProfile(ctx context.Context, document []byte) error {
	if !i.f.Publishes() {
		return ErrNoPlace
	}
	p := indexstore.Publication{Image: i.subject, Profile: document, Created: time.Now().UTC().Truncate(time.Second)}
	var failed error
	for _, name := range i.f.Config.Publish {
		place, err := i.Open(name)
		if err == nil {
			err = place.Publish(ctx, p)
		}
		failed = errors.Join(failed, err)
	}
	return failed
}
