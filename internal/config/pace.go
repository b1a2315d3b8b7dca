// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"

	"github.com/docker/go-units"
)

// Pace is whether something goes on in the background, and how fast: "on", "off",
// or the most bytes a second; and "missing" if it is to do without what there is
// already, alone or before a rate.
type Pace struct {
	Off     bool
	Missing bool
	Rate    Bytes // a second; 0: as fast as it can
}

// UnmarshalText reads "on", "off", a size such as "50MiB", "missing", or "missing
// 50MiB".
func (p *Pace) UnmarshalText(text []byte) error {
	*p = Pace{}
	rate := string(text)
	switch rate {
	case "on":
		return nil
	case "off":
		p.Off = true
		return nil
	case "missing":
		p.Missing = true
		return nil
	}
	rate, p.Missing = strings.CutPrefix(rate, "missing ")
	if err := p.Rate.UnmarshalText([]byte(rate)); err != nil || p.Rate <= 0 {
		return fmt.Errorf("pace %q: want on, off, missing, or bytes a second such as 50MiB", text)
	}
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (p Pace) MarshalText() ([]byte, error) {
	switch {
	case p.Off:
		return []byte("off"), nil
	case p.Missing && p.Rate > 0:
		return []byte("missing " + units.BytesSize(float64(p.Rate))), nil
	case p.Missing:
		return []byte("missing"), nil
	case p.Rate > 0:
		return p.Rate.MarshalText()
	default:
		return []byte("on"), nil
	}
}
