// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/holdfast/holdfast/internal/atomicfile"
)

// ErrQuarantined means that a layer is not what its digests say.
var ErrQuarantined = errors.New("the layer is in quarantine")

// Verdict is what a look at the whole of a layer has shown.
type Verdict struct {
	// Verified means that blob digest, diff ID and tree have been checked over
	// the whole layer. Until then the registry's word is taken for them.
	Verified bool `json:"verified"`
	// Quarantined says what is wrong with the layer; "" if nothing is. Its reads
	// fail, and no other image gets it.
	Quarantined string `json:"quarantined,omitempty"`
}

// Verdict is what is known of the layer at present.
func (l *Layer) Verdict() Verdict {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.verdict
}

// Err is [ErrQuarantined] with the reason, or nil.
func (v Verdict) Err() error {
	if v.Quarantined == "" {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrQuarantined, v.Quarantined)
}

// SetVerdict makes a verdict known and durable. A quarantine makes all reads of
// the layer fail at once, whether it can be made durable or not.
func (l *Layer) SetVerdict(v Verdict) error {
	l.settle(v)
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.Meta
	m.Verdict = v
	if err := atomicfile.WriteJSON(filepath.Join(l.dir, metaName), m, 0o600); err != nil {
		return fmt.Errorf("noting the verdict on layer %s: %w", l.Digest, err)
	}
	return nil
}

func (l *Layer) settle(v Verdict) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.verdict = v
	if err := v.Err(); err != nil {
		l.dev.Fail(fmt.Errorf("layer %s: %w", l.Digest, err))
	}
}
