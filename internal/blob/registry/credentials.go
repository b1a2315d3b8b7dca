// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"log/slog"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Credentials is what somebody shows to a registry: a user name and a password,
// or an OAuth2 refresh token. The zero value is a stranger. However it is
// printed, it shows at most the user name.
type Credentials struct {
	Username, Password string
	IdentityToken      string
}

// String tells what kind of credentials these are.
func (c Credentials) String() string {
	switch {
	case c == Credentials{}:
		return "anonymous"
	case c.IdentityToken != "":
		return "identity token"
	default:
		return "user " + c.Username
	}
}

// GoString keeps the secrets out of %#v.
func (c Credentials) GoString() string { return fmt.Sprintf("registry.Credentials{%s}", c) }

// LogValue keeps the secrets out of logs.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// MarshalText keeps the secrets out of JSON.
func (c Credentials) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

func (c Credentials) authenticator() authn.Authenticator {
	if c == (Credentials{}) {
		return authn.Anonymous
	}
	return authn.FromConfig(authn.AuthConfig{
		Username:      c.Username,
		Password:      c.Password,
		IdentityToken: c.IdentityToken,
	})
}
