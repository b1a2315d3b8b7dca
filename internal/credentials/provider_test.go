// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const goodConfig = `
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: cloud
    matchImages: ["*.cloud.example", "registry.example/team"]
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get-credentials]
    env:
      - name: PROFILE
        value: node
    aFieldOfTomorrow: true
  - name: pods
    matchImages: ["*.cloud.example"]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1beta1
    tokenAttributes:
      requireServiceAccount: true
`

func TestParseConfig(t *testing.T) {
	list, err := parseConfig([]byte(goodConfig))
	if err != nil {
		t.Fatal(err)
	}
	cloud := provider{
		Name: "cloud", MatchImages: []string{"*.cloud.example", "registry.example/team"}, DefaultCacheDuration: 12 * time.Hour,
		APIVersion: "credentialprovider.kubelet.k8s.io/v1", Args: []string{"get-credentials"},
	}
	if len(list) != 2 || len(list[0].Env) != 1 || list[0].Env[0].Name != "PROFILE" || list[0].Env[0].Value != "node" {
		t.Fatalf("got %+v", list)
	}
	list[0].Env = nil
	if diff := cmp.Diff(cloud, list[0]); diff != "" {
		t.Errorf("provider (-want +got):\n%s", diff)
	}
	if !list[1].TokenAttributes.RequireServiceAccount {
		t.Error("tokenAttributes was not read")
	}

	for name, tt := range map[string]struct{ from, to, want string }{
		"JSON":           {goodConfig, `{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1alpha1","providers":[]}`, ""},
		"beta":           {"kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", ""},
		"later version":  {"kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v2", "not a CredentialProviderConfig"},
		"other group":    {"kubelet.config.k8s.io/v1", "v1", "not a CredentialProviderConfig"},
		"other kind":     {"CredentialProviderConfig", "KubeletConfiguration", "not a CredentialProviderConfig"},
		"empty":          {goodConfig, "", "not a CredentialProviderConfig"},
		"no YAML":        {goodConfig, "\t[", "yaml"},
		"path as name":   {"name: cloud", "name: ../cloud", "its name is not that of a program"},
		"no name":        {"name: cloud", "name: ''", "its name is not that of a program"},
		"the same twice": {"name: pods", "name: cloud", "there twice"},
		"plugin version": {"credentialprovider.kubelet.k8s.io/v1beta1", "credentialprovider.kubelet.k8s.io/v9", "is not known"},
		"no images":      {`matchImages: ["*.cloud.example"]`, "matchImages: []", "no matchImages"},
		"negative time":  {`"12h"`, `"-12h"`, "negative"},
		"no time":        {`"12h"`, `"soon"`, "soon"},
	} {
		_, err := parseConfig([]byte(strings.Replace(goodConfig, tt.from, tt.to, 1)))
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v; want %q", name, err, tt.want)
		}
	}
}

const goodResponse = `{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
"cacheKeyType":"Registry","cacheDuration":"6h0m0s","auth":{"*.cloud.example":{"username":"AWS","password":"hunter2"}}}`

func TestParseResponse(t *testing.T) {
	const v1 = "credentialprovider.kubelet.k8s.io/v1"
	r, err := parseResponse([]byte(goodResponse), v1)
	if err != nil || r.scope != scopeRegistry || r.life == nil || *r.life != 6*time.Hour || r.auths["*.cloud.example"].Password != "hunter2" {
		t.Fatalf("got %+v, error %v", r, err)
	}
	for name, tt := range map[string]struct {
		from, to string
		fails    bool
	}{
		"no duration":      {`"6h0m0s"`, `null`, false},
		"none at all":      {`"cacheDuration":"6h0m0s",`, ``, false},
		"no auth":          {`"auth"`, `"other"`, false},
		"negative":         {`"6h0m0s"`, `"-1h"`, true},
		"no time":          {`"6h0m0s"`, `"hunter2"`, true},
		"other version":    {`k8s.io/v1"`, `k8s.io/v1beta1"`, true},
		"other kind":       {"CredentialProviderResponse", "CredentialProviderRequest", true},
		"key type":         {`"Registry"`, `"hunter2"`, true},
		"no key type":      {`"cacheKeyType":"Registry",`, "", true},
		"number":           {`"hunter2"`, `123456789`, true},
		"broken":           {goodResponse, goodResponse[:100], true},
		"empty":            {goodResponse, "", true},
		"more than one":    {goodResponse, goodResponse + goodResponse, true},
		"no JSON":          {goodResponse, "password=hunter2", true},
		"auth of no kind":  {`{"*.cloud.example":{"username":"AWS","password":"hunter2"}}`, `"hunter2"`, true},
		"entry of no kind": {`{"username":"AWS","password":"hunter2"}`, `["hunter2"]`, true},
	} {
		_, err := parseResponse([]byte(strings.Replace(goodResponse, tt.from, tt.to, 1)), v1)
		if (err != nil) != tt.fails {
			t.Errorf("%s: error %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error holds a secret: %v", name, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(goodConfig))
	f.Add([]byte("a: &a [*a, *a]"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseConfig(data)
		for _, p := range list {
			if err != nil || p.Name == "" || strings.Contains(p.Name, "/") || len(p.MatchImages) == 0 {
				t.Errorf("accepted %+v, error %v", p, err)
			}
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add([]byte(goodResponse))
	f.Add([]byte(`{"cacheDuration":"9223372036854775807ns"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseResponse(data, "credentialprovider.kubelet.k8s.io/v1")
		if err == nil && (r.scope == "" || r.life != nil && *r.life < 0) {
			t.Errorf("accepted %+v", r)
		}
	})
}
