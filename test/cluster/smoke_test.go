// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// TestServer is what other tests rely on.
func TestServer(t *testing.T) {
	for _, name := range []string{"one", "two"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testServer(t, name)
		})
	}
}

func testServer(t *testing.T, name string) {
	s := startServer(t)
	admin := client(t, s.Config)
	version, err := admin.Discovery().ServerVersion()
	if err != nil || version.Major != "1" || version.GitVersion == "" {
		t.Errorf("version %+v, %v", version, err)
	}
	s.Namespace(t, name)
	s.Namespace(t, name) // it is there

	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig(t, "reader", "readers"))
	if err != nil {
		t.Fatal(err)
	}
	reader := client(t, config)
	list := func() error {
		_, err := reader.CoreV1().ServiceAccounts(name).List(t.Context(), metav1.ListOptions{})
		return err
	}
	if err := list(); !apierrors.IsForbidden(err) {
		t.Errorf("a user with no rights: %v", err)
	}
	s.Apply(t, []byte(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [serviceaccounts], verbs: [list]}]
---
# by group
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: readers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: readers}]
`))
	s.eventually(t, "the reader may read", func(context.Context) error { return list() })
	s.Stop(t)
	if err := list(); err == nil {
		t.Error("the server answers after it was stopped")
	}
	s.Start(t)
	s.eventually(t, "the reader may read again", func(context.Context) error { return list() })
}

func client(t testing.TB, config *rest.Config) kubernetes.Interface {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
