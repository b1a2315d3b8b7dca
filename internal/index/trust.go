// SPDX-License-Identifier: Apache-2.0

package index

import "fmt"

// Trust is what an index is worth: who says that it describes its layer. Chunks are
// verified against the index in any case.
type Trust int

// The kinds of trust, the least first.
const (
	// Found: somebody has put it where it was found, beside the image.
	Found Trust = iota
	// Bound: the image's own manifest names its digest.
	Bound
	// Verified: it was made on this node, from all of the layer, and the layer had
	// its blob digest and its diff ID.
	Verified
)

var trusts = [...]string{Found: "found", Bound: "bound", Verified: "verified"}

func (t Trust) String() string {
	if t < 0 || int(t) >= len(trusts) {
		return fmt.Sprintf("trust %d", int(t))
	}
	return trusts[t]
}

// MarshalText writes the word for it.
func (t Trust) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads one of the words.
func (t *Trust) UnmarshalText(text []byte) error {
	for i, name := range trusts {
		if string(text) == name {
			*t = Trust(i)
			return nil
		}
	}
	return fmt.Errorf("trust %q: want found, bound or verified", text)
}

// Place is a place, in the configuration, where indexes are: RegistryPlace; the path
// of a directory; or RepositoryPlace and the name of a repository.
type Place string

const (
	// RegistryPlace is beside the image, wherever that is.
	RegistryPlace Place = "registry"
	// RepositoryPlace is what the name of a repository follows.
	RepositoryPlace = "docker://"
)
