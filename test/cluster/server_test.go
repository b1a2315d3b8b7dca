// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// patience is how long what takes a moment may take on a machine that does much else.
const patience = 2 * time.Minute

// server is a kube-apiserver, with an etcd, of one test.
type server struct {
	// Config is for an administrator (system:masters), without a limit of requests.
	Config *rest.Config

	authority *authority
	dir       string
	args      []string // of kube-apiserver
	etcd      *process
	apiserver *process // nil while it is stopped
	objects   dynamic.Interface
	mapper    *restmapper.DeferredDiscoveryRESTMapper
}

// startServer starts an etcd and a kube-apiserver and waits until that is ready. They end with the
// test, which fails if they have not lived so long, and shows their logs if it has failed. They
// die with the test's process. Several may run at once; each takes some 350 MB of memory and two
// seconds to start.
//
// It authorizes as clusters do, by Node and RBAC, and admits with what is on by default and
// NodeRestriction. Users authenticate with certificates (see ConfigFor), or with
// tokens of service accounts that they ask for at the subresource token.
//
// ServiceAccount stays on, too: a pod must have a ServiceAccount that exists, even if that is
// "default". Namespace makes one.
func startServer(t testing.TB) *server {
	t.Helper()
	bin, err := programs()
	if err != nil {
		t.Fatalf("building kube-apiserver and etcd: %v", err)
	}
	s := &server{authority: newAuthority(t), dir: t.TempDir()}
	etcdURL := fmt.Sprintf("http://127.0.0.1:%d", reservePort(t))
	port := reservePort(t)
	t.Cleanup(func() { s.end(t) })

	s.etcd = run(t, s.path("etcd.log"), filepath.Join(bin, etcdProgram),
		"--data-dir="+s.path("etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL, "--socket-reuse-port",
		"--listen-peer-urls=http://127.0.0.1:0",             // there are no peers
		"--heartbeat-interval=20", "--election-timeout=200", // it elects itself soon
		"--unsafe-no-fsync", "--log-level=warn")

	cert, key := s.authority.forServer(t)
	accounts := writeFile(t, s.path("accounts.key"), keyPEM(t, newKey(t)))
	s.args = []string{
		filepath.Join(bin, apiserverProgram),
		"--etcd-servers=" + etcdURL,
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port), "--permit-port-sharing",
		"--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", // no endpoint may be on loopback
		"--cert-dir=" + s.dir,
		"--tls-cert-file=" + writeFile(t, s.path("server.crt"), cert),
		"--tls-private-key-file=" + writeFile(t, s.path("server.key"), key),
		"--client-ca-file=" + writeFile(t, s.path("ca.crt"), s.authority.pem),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + accounts, "--service-account-signing-key-file=" + accounts,
		"--service-cluster-ip-range=10.0.0.0/24",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--enable-priority-and-fairness=false", // or a busy machine makes it refuse requests
		"--profiling=false", "--allow-privileged",
	}
	s.Config = &rest.Config{Host: fmt.Sprintf("https://127.0.0.1:%d", port)}
	s.Config = s.ConfigFor(t, "admin", "system:masters")
	s.Config.QPS = -1
	s.Start(t)

	if s.objects, err = dynamic.NewForConfig(s.Config); err != nil {
		t.Fatal(err)
	}
	client, err := discovery.NewDiscoveryClientForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	s.mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client))
	return s
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

// Start starts kube-apiserver again after Stop, with the same address, certificates and data.
func (s *server) Start(t testing.TB) {
	t.Helper()
	s.apiserver = run(t, s.path("kube-apiserver.log"), s.args[0], s.args[1:]...)
	s.waitReady(t)
}

// Stop kills kube-apiserver. etcd stays.
func (s *server) Stop(t testing.TB) {
	t.Helper()
	s.apiserver.end(t)
	s.apiserver = nil
}

// end ends what runs.
func (s *server) end(t testing.TB) {
	for _, p := range []*process{s.apiserver, s.etcd} {
		if p == nil {
			continue
		}
		p.end(t)
		defer func() {
			if t.Failed() {
				showLog(t, p.log)
			}
		}()
	}
}

func (s *server) waitReady(t testing.TB) {
	t.Helper()
	client, err := rest.HTTPClientFor(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	s.eventually(t, "kube-apiserver is ready", func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Config.Host+"/readyz", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
}

// eventually tries something again and again until there is no error. It fails the test if that
// takes too long, or if a program of the server ends.
func (s *server) eventually(t testing.TB, what string, try func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var ended chan struct{} // nil, which is never closed, while it is stopped
	if s.apiserver != nil {
		ended = s.apiserver.ended
	}
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		select {
		case <-s.etcd.ended:
			t.Fatalf("waiting until %s: etcd has ended: %v", what, s.etcd.err)
		case <-ended:
			t.Fatalf("waiting until %s: kube-apiserver has ended: %v", what, s.apiserver.err)
		case <-ctx.Done():
			t.Fatalf("waiting until %s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ConfigFor is for a user who is in these groups, and as every user in system:authenticated. A user
// system:serviceaccount:NAMESPACE:NAME who is in the groups system:serviceaccounts and
// system:serviceaccounts:NAMESPACE may do what that service account may, and one
// system:node:NAME in system:nodes what a kubelet may.
func (s *server) ConfigFor(t testing.TB, user string, groups ...string) *rest.Config {
	t.Helper()
	cert, key := s.authority.forUser(t, user, groups)
	return &rest.Config{
		Host:            s.Config.Host,
		TLSClientConfig: rest.TLSClientConfig{CAData: s.authority.pem, CertData: cert, KeyData: key},
	}
}

// Kubeconfig is a file with what ConfigFor has.
func (s *server) Kubeconfig(t testing.TB, user string, groups ...string) string {
	t.Helper()
	return kubeconfig(t, s.ConfigFor(t, user, groups...))
}

// kubeconfig is a file with what a configuration has.
func kubeconfig(t testing.TB, c *rest.Config) string {
	t.Helper()
	file := clientcmdapi.NewConfig()
	file.Clusters["test"] = &clientcmdapi.Cluster{Server: c.Host, CertificateAuthorityData: c.CAData}
	file.AuthInfos["test"] = &clientcmdapi.AuthInfo{ClientCertificateData: c.CertData, ClientKeyData: c.KeyData, Token: c.BearerToken}
	file.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	file.CurrentContext = "test"
	name := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*file, name); err != nil {
		t.Fatal(err)
	}
	return name
}

// courierConfig is for the courier of a node: with the token of a pod that is on the node.
func (s *server) courierConfig(t testing.TB, node string) *rest.Config {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "courier-" + node},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: courierAccount, Containers: []corev1.Container{{Name: "courier", Image: "courier"}}},
	}
	pod, err := client(t, s.Config).CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s.tokenConfig(t, courierAccount, &authv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID})
}

// tokenConfig is for a service account of Holdfast's, with a token that is bound to an object, or nil.
func (s *server) tokenConfig(t testing.TB, account string, bound *authv1.BoundObjectReference) *rest.Config {
	t.Helper()
	request := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{BoundObjectRef: bound}}
	request, err := client(t, s.Config).CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	config := rest.AnonymousClientConfig(s.Config)
	config.BearerToken = request.Status.Token
	return config
}
