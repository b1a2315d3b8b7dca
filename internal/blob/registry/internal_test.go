// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

func TestParseContentRange(t *testing.T) {
	for _, tt := range []struct {
		in                string
		first, last, size int64
		ok                bool
	}{
		{"bytes 0-0/1", 0, 0, 1, true},
		{"bytes 10-19/100", 10, 19, 100, true},
		{"Bytes 10-19/*", 10, 19, -1, true},
		{"bytes 0-9223372036854775806/9223372036854775807", 0, 1<<63 - 2, 1<<63 - 1, true},
		{"bytes 0-9223372036854775808/*", 0, 0, 0, false},
		{"bytes 10-9/100", 0, 0, 0, false},
		{"bytes 10-100/100", 0, 0, 0, false},
		{"bytes -10-19/100", 0, 0, 0, false},
		{"bytes +10-19/100", 0, 0, 0, false},
		{"bytes */100", 0, 0, 0, false},
		{"bytes 10-19", 0, 0, 0, false},
		{"octets 10-19/100", 0, 0, 0, false},
		{"", 0, 0, 0, false},
	} {
		first, last, size, err := parseContentRange(tt.in)
		if first != tt.first || last != tt.last || size != tt.size || (err == nil) != tt.ok {
			t.Errorf("%q = %d, %d, %d, %v", tt.in, first, last, size, err)
		}
	}
}

func FuzzParseContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 10-19/*", "bytes 5-4/9", "bytes */9", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, err := parseContentRange(s)
		if err == nil && (first < 0 || last < first || size != -1 && size <= last) {
			t.Errorf("%q = %d, %d, %d", s, first, last, size)
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"0", "120", "-1", "99999999999999999999", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"} {
		f.Add(s)
	}
	now := time.Date(2015, 10, 21, 7, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string) {
		if d := retryAfter(http.Header{"Retry-After": {s}}, now); d < 0 || d > maxRetryAfter {
			t.Errorf("%q = %v", s, d)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2015, 10, 21, 7, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"120":                           2 * time.Minute,
		"-1":                            0,
		"9223372036854775807":           maxRetryAfter,
		"Wed, 21 Oct 2015 07:28:00 GMT": 28 * time.Minute,
		"Wed, 21 Oct 2015 06:28:00 GMT": 0,
		"Wed, 21 Oct 2099 06:28:00 GMT": maxRetryAfter,
		"soon":                          0,
	} {
		if got := retryAfter(http.Header{"Retry-After": {s}}, now); got != want {
			t.Errorf("%q = %v; want %v", s, got, want)
		}
	}
}

func TestShorten(t *testing.T) {
	for in, want := range map[string]string{
		"":         "",
		"plain":    "plain",
		"one\ntwo": "one",
		`Get "https://host/path?X-Signature=secret&x=y": EOF`: `Get "https://host/path": EOF`,
		"https://a/?b https://c/?d?e f":                       "https://a/ https://c/ f",
		"ends in https://host/?secret":                        "ends in https://host/",
		strings.Repeat("x", 1000):                             strings.Repeat("x", maxErrorText) + "...",
		"invalid \xff":                                        "invalid ",
	} {
		if got := shorten(in); got != want {
			t.Errorf("%q = %q; want %q", in, got, want)
		}
	}
}

func FuzzDiagnosis(f *testing.F) {
	for _, s := range []string{`{"errors":[{"code":"DENIED","message":"no"}]}`, `{"errors":[]}`, `[`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if s := shorten(diagnosis(body)); len(s) > maxErrorText+3 || !utf8.ValidString(s) || strings.ContainsAny(s, "\n?") {
			t.Errorf("%q = %q", body, s)
		}
	})
}

func TestGrantUsable(t *testing.T) {
	for _, tt := range []struct {
		name string
		g    *grant
		want bool
	}{
		{"none", nil, false},
		{"no known end", &grant{}, true},
		{"still good", &grant{expires: time.Now().Add(time.Minute)}, true},
		{"over", &grant{expires: time.Now().Add(-time.Nanosecond)}, false},
	} {
		if got := tt.g.usable(); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestIsRegistry(t *testing.T) {
	for _, tt := range []struct {
		registry, url string
		want          bool
	}{
		{"example.com", "https://example.com/v2/", true},
		{"example.com", "https://EXAMPLE.com:443/v2/", true},
		{"example.com:443", "https://example.com/v2/", true},
		{"example.com", "https://example.com:444/v2/", false},
		{"example.com", "https://cdn.example.com/v2/", false},
		{"example.com", "http://example.com:80/", true},
		{"[::1]:5000", "https://[::1]:5000/", true},
		{"[::1]", "https://[::1]:443/", true},
		{"127.0.0.1:5000", "http://127.0.0.1:5001/", false},
	} {
		registry, err := name.NewRegistry(tt.registry)
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		if got := (&Repository{registry: registry}).isRegistry(u); got != tt.want {
			t.Errorf("%s at %s: %v", tt.url, tt.registry, got)
		}
	}
}

func TestRealmRegistry(t *testing.T) {
	for _, tt := range []struct {
		registry, realm, want string
	}{
		{"10.0.0.1:5000", "http://10.0.0.1:5001/token", "10.0.0.1:5001"},
		{"10.0.0.1:5000", "https://10.0.0.1/token", "10.0.0.1"},
		{"10.0.0.1:5000", "http://10.0.0.2:5000/token", "10.0.0.1:5000"},
		{"example.com", "https://auth.example.com/token", "example.com"},
		{"example.com", "::", "example.com"},
		{"example.com", "", "example.com"},
	} {
		registry, err := name.NewRegistry(tt.registry)
		if err != nil {
			t.Fatal(err)
		}
		challenge := &transport.Challenge{Parameters: map[string]string{"realm": tt.realm}}
		if got := (&Repository{registry: registry}).realmRegistry(challenge).RegistryStr(); got != tt.want {
			t.Errorf("%s with realm %s: %s; want %s", tt.registry, tt.realm, got, tt.want)
		}
	}
}
