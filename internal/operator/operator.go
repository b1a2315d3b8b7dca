// SPDX-License-Identifier: Apache-2.0

// Package operator brings the ContainerRuntimeConfigs of a cluster to its nodes.
//
// Four reconcilers, each of which compares what is with what should be, whatever has
// happened in between: that of pools renders what a pool is to have and hands it out to its
// nodes, a few at a time; that of configurations sums up what has become of an object; that of
// nodes drains those that are going to boot; that of the gate keeps the admission policy.
// Nothing is written that is there already.
//
// On OpenShift the Machine Config Operator brings files to nodes: there one MachineConfig a
// pool is written, and nothing of what that operator, or a user, has written.
package operator

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	crconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	holdfastv1 "github.com/holdfast/holdfast/api/holdfast/v1"
	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// Name is what the controller is called where it writes something.
const Name = "holdfast-operator"

// leaseName is the lease for which controllers compete.
const leaseName = "holdfast-controller"

// Platform is who brings files to nodes.
type Platform string

// The platforms.
const (
	Kubernetes Platform = "kubernetes" // our own agents do
	OpenShift  Platform = "openshift"  // the Machine Config Operator does
	Auto       Platform = "auto"       // the API server is asked whether there is one
)

// Options say how the controller works.
type Options struct {
	Platform   Platform
	FeatureSet FeatureSet
	// LeaderElection has only one of several controllers work; Namespace is where its lease is.
	LeaderElection bool
	Namespace      string
	// MetricsAddress and ProbeAddress are where HTTP is served: "0" for nowhere.
	MetricsAddress, ProbeAddress string
	Log                          *slog.Logger
}

// Run reconciles until the context ends, or the lease is lost.
func Run(ctx context.Context, config *rest.Config, o Options) error {
	ctrl.SetLogger(logr.FromSlogHandler(o.Log.Handler()))
	config = rest.CopyConfig(config)
	config.QPS = -1 // the API server has its own means against those who ask too much
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	warm := true // a lease that another holder has lost is taken over at once, with caches that are there
	mgr, err := ctrl.NewManager(config, manager.Options{
		Scheme:                        scheme,
		Cache:                         cacheOptions(),
		Client:                        client.Options{FieldOwner: Name},
		Controller:                    crconfig.Controller{EnableWarmup: &warm},
		LeaderElection:                o.LeaderElection,
		LeaderElectionID:              leaseName,
		LeaderElectionNamespace:       o.Namespace,
		LeaderElectionReleaseOnCancel: true, // the program ends when Run returns
		Metrics:                       server.Options{BindAddress: o.MetricsAddress},
		HealthProbeBindAddress:        o.ProbeAddress,
		Logger:                        logr.FromSlogHandler(o.Log.Handler()),
	})
	if err != nil {
		return fmt.Errorf("connecting to the API server (is it there, and are the definitions of Holdfast installed?): %w", err)
	}
	if o.Platform == Auto {
		if o.Platform, err = detect(mgr.GetRESTMapper()); err != nil {
			return err
		}
	}
	o.Log.Info("the controller starts", "platform", o.Platform, "features", o.FeatureSet)
	if err := setUp(mgr, o); err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	return mgr.Start(ctx)
}

// setUp adds the reconcilers, and probes.
func setUp(mgr manager.Manager, o Options) error {
	events := mgr.GetEventRecorder(Name)
	c := cluster{client: mgr.GetClient(), features: o.FeatureSet}
	add := []func() error{
		func() error {
			r := &poolReconciler{cluster: c, events: events, platform: o.Platform, written: map[types.UID]int64{}, said: said{}}
			return r.setUp(mgr)
		},
		func() error {
			r := &configReconciler{cluster: c, events: events, platform: o.Platform, said: said{}}
			return r.setUp(mgr)
		},
		func() error { return mgr.AddHealthzCheck("ping", healthz.Ping) },
		func() error { return mgr.AddReadyzCheck("ping", healthz.Ping) },
	}
	if o.Platform == Kubernetes { // on OpenShift the gate and the nodes are others'
		add = append(add, func() error {
			return (&gateReconciler{client: mgr.GetClient(), features: o.FeatureSet}).setUp(mgr)
		}, func() error {
			r, err := newNodeReconciler(mgr, events, o.Namespace)
			if err != nil {
				return err
			}
			return r.setUp(mgr)
		})
	}
	for _, f := range add {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

func newScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, apiv1.AddToScheme, holdfastv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("registering the API's types: %w", err)
		}
	}
	return scheme, nil
}

// detect asks whether there is a Machine Config Operator.
func detect(mapper meta.RESTMapper) (Platform, error) {
	_, err := mapper.RESTMapping(schema.GroupKind{Group: "operator.openshift.io", Kind: "MachineConfiguration"})
	if meta.IsNoMatchError(err) {
		return Kubernetes, nil
	}
	if err != nil {
		return "", fmt.Errorf("asking whether this is OpenShift: %w", err)
	}
	return OpenShift, nil
}

// cacheOptions keep the cache small: of a thousand nodes only what is looked at.
func cacheOptions() cache.Options {
	byName := func(name string) cache.ByObject {
		return cache.ByObject{Field: fields.OneTermEqualSelector(metav1.ObjectNameField, name)}
	}
	return cache.Options{
		DefaultTransform: func(o any) (any, error) {
			if m, err := meta.Accessor(o); err == nil {
				m.SetManagedFields(nil)
			}
			return o, nil
		},
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Node{}:                                  {Transform: stripNode},
			&apiv1.MachineConfig{}:                          {Transform: stripMachineConfig},
			&admissionv1.ValidatingAdmissionPolicy{}:        byName(policyName),
			&admissionv1.ValidatingAdmissionPolicyBinding{}: byName(policyName),
		},
	}
}

// stripNode leaves of a node what the reconcilers look at.
func stripNode(o any) (any, error) {
	node, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	small := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion, Labels: node.Labels, DeletionTimestamp: node.DeletionTimestamp,
	}}
	if by, ok := node.Annotations[cordonedAnnotation]; ok {
		small.Annotations = map[string]string{cordonedAnnotation: by}
	}
	small.Spec.Unschedulable = node.Spec.Unschedulable
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			small.Status.Conditions = []corev1.NodeCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return small, nil
}

// retry is when a write is tried again that somebody else was faster with: by then the cache
// has what they have written.
const retry = 50 * time.Millisecond
