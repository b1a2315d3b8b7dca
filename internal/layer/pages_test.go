// SPDX-License-Identifier: Apache-2.0

package layer_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast/holdfast/internal/device"
)

// Reads are seen as long as the kernel has nothing of the layer in memory.
func TestReadsThatAreSeen(t *testing.T) {
	r := newRig(t)
	c := newContent(t, 1)
	l := r.mustAdd(t, c)
	if !l.Unread() || !l.ThroughDevice() {
		t.Errorf("new: unread %v, through its device %v", l.Unread(), l.ThroughDevice())
	}
	seen := func() int {
		rec := device.NewRecorder()
		defer l.Device().Record(rec, 0)()
		if _, err := os.ReadFile(filepath.Join(l.MountDirectory(), "diff", "large")); err != nil {
			t.Fatal(err)
		}
		return len(rec.Touches())
	}
	if seen() == 0 || l.Unread() {
		t.Errorf("after it was read: unread %v", l.Unread())
	}
	if n := seen(); n != 0 {
		t.Errorf("read again, %d touches are seen", n)
	}
	if err := l.DropPages(t.Context()); err != nil {
		t.Fatal(err)
	}
	if seen() == 0 {
		t.Error("nothing is seen although the kernel has forgotten it")
	}
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := l.DropPages(ctx); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}

	// Another process may have read it before.
	r.reopen(t, func() {})
	if l, ok := r.Get(c.Descriptor.Digest); !ok || l.Unread() || !l.ThroughDevice() {
		t.Errorf("after a restart: %+v", l)
	}
}

func TestReadsThatAreNotSeen(t *testing.T) {
	r := newRig(t)
	if l := r.addWhole(t, newContent(t, 1)); l.Unread() || l.ThroughDevice() {
		t.Errorf("unread %v, through its device %v", l.Unread(), l.ThroughDevice())
	}
}
