// SPDX-License-Identifier: Apache-2.0

package testregistry

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// traits is how a manner differs from a plain registry.
type traits struct {
	bearer      bool   // tokens instead of basic authentication
	tokenPath   string // of the token service
	tokenHost   bool   // the token service has an address of its own
	useless     bool   // strangers get tokens that open nothing
	saysExpiry  bool   // the token service tells the lifetime of a token
	redirect    bool   // blobs are redirected to the storage address
	status      int    // of the redirect
	wrongStatus int    // for a wrong password in basic authentication
}

func traitsOf(m Manner) traits {
	switch m {
	case DockerHub:
		return traits{
			bearer: true, tokenPath: "/token", tokenHost: true, useless: true, saysExpiry: true,
			redirect: true, status: http.StatusTemporaryRedirect,
		}
	case Quay:
		return traits{bearer: true, tokenPath: "/v2/auth", saysExpiry: true, redirect: true, status: http.StatusFound}
	case GHCR:
		return traits{bearer: true, tokenPath: "/token", redirect: true, status: http.StatusTemporaryRedirect}
	case ECR:
		return traits{redirect: true, status: http.StatusTemporaryRedirect, wrongStatus: http.StatusForbidden}
	default:
		return traits{wrongStatus: http.StatusUnauthorized}
	}
}

// accounts is what the server knows about those who ask.
type accounts struct {
	mu       sync.Mutex // protects the fields below
	password string
	tokens   map[string]token
	key      []byte // signs URLs
}

type token struct {
	expires time.Time
	scopes  map[string]bool // "repository:NAME:pull", one action each
}

func (a *accounts) init(opts Options) {
	a.password = opts.Password
	a.tokens = make(map[string]token)
	a.key = random()
}

func random() []byte {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return b
}

// SetPassword changes the password of the account. Tokens stay valid.
func (s *Server) SetPassword(password string) {
	s.accounts.mu.Lock()
	defer s.accounts.mu.Unlock()
	s.accounts.password = password
}

// ExpireTokens ends the life of all tokens handed out so far.
func (s *Server) ExpireTokens() {
	s.accounts.mu.Lock()
	defer s.accounts.mu.Unlock()
	clear(s.accounts.tokens)
}

// ExpireRedirects ends the life of all signed URLs handed out so far.
func (s *Server) ExpireRedirects() {
	s.accounts.mu.Lock()
	defer s.accounts.mu.Unlock()
	s.accounts.key = random()
}

// allow reports whether the request may read the repository ("" for a ping); if
// not, it has answered. Tokens also have to allow a push, if that is what it is.
func (s *Server) allow(w http.ResponseWriter, r *http.Request, repository string) bool {
	if s.traits.bearer {
		return s.allowBearer(w, r, repository)
	}
	user, password, given := r.BasicAuth()
	switch {
	case !given && !s.opts.Private:
		return true
	case given && s.knows(user, password):
		return true
	case given && s.traits.wrongStatus == http.StatusForbidden:
		fail(w, http.StatusForbidden, "DENIED", "Your authorization token has expired. Reauthenticate and try again.")
	default:
		w.Header().Set("WWW-Authenticate", `Basic realm="`+s.URL()+`/",service="test"`)
		fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	}
	return false
}

func (s *Server) knows(user, password string) bool {
	s.accounts.mu.Lock()
	defer s.accounts.mu.Unlock()
	return user == s.opts.Username && password == s.accounts.password
}

func (s *Server) allowBearer(w http.ResponseWriter, r *http.Request, repository string) bool {
	actions := []string{"pull"}
	if isPush(r) && s.opts.Push != PushNever {
		actions = append(actions, "push")
	}
	prefix := "repository:" + repository + ":"
	name, given := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.accounts.mu.Lock()
	t, known := s.accounts.tokens[name]
	s.accounts.mu.Unlock()
	valid := given && known && time.Now().Before(t.expires)
	enough := !slices.ContainsFunc(actions, func(action string) bool { return !t.scopes[prefix+action] })
	if valid && (repository == "" || enough) {
		return true
	}

	challenge := fmt.Sprintf(`Bearer realm="%s%s",service="test"`, s.url(s.token), s.traits.tokenPath)
	if repository != "" {
		challenge += `,scope="` + prefix + strings.Join(actions, ",") + `"`
	}
	switch {
	case valid:
		challenge += `,error="insufficient_scope"`
	case given:
		challenge += `,error="invalid_token"`
	}
	w.Header().Set("WWW-Authenticate", challenge)
	fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}

// serveToken is the token service.
func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != s.traits.tokenPath {
		http.NotFound(w, r)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	user, password, given := r.BasicAuth()
	known := given && s.knows(user, password)
	if r.Method == http.MethodPost {
		given = true
		known = s.opts.IdentityToken != "" && r.PostForm.Get("refresh_token") == s.opts.IdentityToken
	}
	if given && !known || !given && s.opts.Private && !s.traits.useless {
		fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "incorrect username or password")
		return
	}

	t := token{expires: time.Now().Add(s.opts.TokenLifetime), scopes: make(map[string]bool)}
	if known || !s.opts.Private {
		for _, list := range r.Form["scope"] {
			for _, scope := range strings.Fields(list) {
				s.grant(t, scope, known)
			}
		}
	}
	name := hex.EncodeToString(random())
	s.accounts.mu.Lock()
	s.accounts.tokens[name] = t
	s.accounts.mu.Unlock()

	answer := map[string]any{"token": name}
	if s.traits.saysExpiry {
		answer["access_token"] = name
		answer["expires_in"] = int(s.opts.TokenLifetime.Seconds())
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

// grant adds to a token what a scope asks for, as far as the account, or a
// stranger, may have it.
func (s *Server) grant(t token, scope string, account bool) {
	i := strings.LastIndexByte(scope, ':')
	for _, action := range strings.Split(scope[i+1:], ",") {
		if action == "pull" || action == "push" && account && s.opts.Push == PushAllowed {
			t.scopes[scope[:i+1]+action] = true
		}
	}
}

// sign returns a URL of the storage address that opens one blob for a while.
func (s *Server) sign(d string) string {
	expires := strconv.FormatInt(time.Now().Add(s.opts.SignedLifetime).UnixMilli(), 10)
	query := url.Values{"X-Expires": {expires}, "X-Signature": {s.signature(d, expires)}}
	return s.url(s.storage) + "/store/" + d + "?" + query.Encode()
}

func (s *Server) signed(d string, query url.Values) bool {
	expires := query.Get("X-Expires")
	at, err := strconv.ParseInt(expires, 10, 64)
	return err == nil && time.Now().Before(time.UnixMilli(at)) &&
		hmac.Equal([]byte(query.Get("X-Signature")), []byte(s.signature(d, expires)))
}

func (s *Server) signature(d, expires string) string {
	s.accounts.mu.Lock()
	defer s.accounts.mu.Unlock()
	mac := hmac.New(sha256.New, s.accounts.key)
	_, _ = mac.Write([]byte(d + " " + expires)) // never fails
	return hex.EncodeToString(mac.Sum(nil))
}
