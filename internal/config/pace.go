// SPDX-License-Identifier: Apache-2.0

package config

import "fmt"

// Pace is whether something goes on in the background, and how fast: "on", "off",
// or the most bytes a second.
type Pace struct {
	Off  bool
	Rate Bytes // a second; 0: as fast as it can
}

// UnmarshalText reads "on", "off", or a size such as "50MiB".
func (p *Pace) UnmarshalText(text []byte) error {
	*p = Pace{}
	switch string(text) {
	case "on":
		return nil
	case "off":
		p.Off = true
		return nil
	}
	if err := p.Rate.UnmarshalText(text); err != nil || p.Rate <= 0 {
		return fmt.Errorf("pace %q: want on, off, or bytes a second such as 50MiB", text)
	}
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (p Pace) MarshalText() ([]byte, error) {
	switch {
	case p.Off:
		return []byte("off"), nil
	case p.Rate > 0:
		return p.Rate.MarshalText()
	default:
		return []byte("on"), nil
	}
}
