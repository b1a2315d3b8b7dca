// SPDX-License-Identifier: Apache-2.0

// Package cluster tests what meets a Kubernetes API server with a real one: kube-apiserver and etcd,
// which are built from test/kubernetes once and kept in $HOLDFAST_CACHE. Each test has servers of
// its own, on loopback; startServer says what they are like. What is missing fails a test and skips
// none.
//
// There are only these two programs. Nothing does what kube-controller-manager, the scheduler and
// kubelets do:
//   - objects whose owner is deleted stay, and a namespace that is deleted stays in Terminating;
//   - no namespace has the ServiceAccount default (server.Namespace makes it), and the ClusterRoles
//     admin, edit and view, which are aggregated, allow nothing;
//   - a DaemonSet or a Deployment has no pods, and a PodDisruptionBudget allows no disruption
//     before a test writes its status;
//   - a node has the taint not-ready, and stays as it was made; a pod on it that is deleted stays until
//     somebody deletes it with a grace period of 0.
package cluster
