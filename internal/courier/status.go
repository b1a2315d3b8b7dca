// SPDX-License-Identifier: Apache-2.0

package courier

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	"github.com/holdfast/holdfast/internal/agent"
)

// The limits of the object's definition, in characters.
const (
	maxMessage = 4096
	maxReason  = 1024
	maxPath    = 256
	maxVersion = 256
	maxStores  = 64
)

// report writes the status, if it says something new.
func (c *Courier) report(ctx context.Context, f *finding) error {
	o := c.object.DeepCopy()
	o.Status = c.status(f)
	if equality.Semantic.DeepEqual(o.Status, c.object.Status) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := c.o.Client.Status().Update(ctx, o)
	if apierrors.IsNotFound(err) {
		c.see(nil)
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing the node's status: %w", err)
	}
	c.log.Info("the status was written", "state", o.Status.State, "config", o.Status.CurrentConfig, "message", o.Status.Message)
	c.object = o
	return nil
}

// status is the object's, with what is known now. What is not stays as it was.
func (c *Courier) status(f *finding) nodev1.ContainerRuntimeNodeStatus {
	s := c.object.Status.DeepCopy()
	s.ObservedGeneration, s.AgentVersion = c.object.Generation, clip(c.o.Version, maxVersion)
	s.State, s.Message = f.state, clip(f.message, maxMessage)
	if desired := c.desired(); desired != "" && f.state == nodev1.NodeDone {
		s.CurrentConfig = desired
	}
	if c.o.Observe {
		s.CurrentConfig = ""
	}
	conditions := []metav1.Condition{applied(f, c.node.report)}
	if r := c.node.report; r != nil {
		describe(s, r)
		conditions = append(conditions, storesAvailable(s), daemonAvailable(r))
	} else {
		for _, kind := range []string{nodev1.NodeStoresAvailable, nodev1.NodeDaemonAvailable} {
			conditions = append(conditions, metav1.Condition{Type: kind, Status: metav1.ConditionUnknown, Reason: "NoReport"})
		}
	}
	for _, condition := range conditions {
		condition.ObservedGeneration = s.ObservedGeneration
		condition.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second)) // as it comes back
		meta.SetStatusCondition(&s.Conditions, condition)                               // which counts if the status is another
	}
	return *s
}

// describe puts into a status what a report says of the node, cut down to what the object may hold.
func describe(s *nodev1.ContainerRuntimeNodeStatus, r *agent.Report) {
	s.AppliedHash = clip(r.Applied, maxVersion)
	s.Runtime = nodev1.Program{Up: r.Runtime.Up, Version: clip(r.Runtime.Version, maxVersion)}
	s.Daemon = nodev1.Program{Up: r.Daemon.Up, Version: clip(r.Daemon.Version, maxVersion), Reason: clip(r.Daemon.Reason, maxReason)}
	s.Stores, s.HealthyStores, s.WithheldStores = nil, 0, 0
	for _, store := range r.Stores[:min(len(r.Stores), maxStores)] {
		state := stateOf(store.State)
		switch state {
		case nodev1.StoreHealthy:
			s.HealthyStores++
		case nodev1.StoreWithheld:
			s.WithheldStores++
		case nodev1.StoreFailing, nodev1.StoreKept:
		}
		s.Stores = append(s.Stores, nodev1.Store{
			Kind: kindOf(store.Kind), Path: clip(store.Path, maxPath), State: state, Reason: clip(store.Reason, maxReason),
		})
	}
}

// stateOf is a store's state as the object has it. One that a newer agent has is not healthy.
func stateOf(state string) nodev1.StoreState {
	switch state {
	case agent.StoreListed, agent.StoreServed:
		return nodev1.StoreHealthy
	case agent.StoreWithheld:
		return nodev1.StoreWithheld
	case agent.StoreKept:
		return nodev1.StoreKept
	}
	return nodev1.StoreFailing
}

func kindOf(kind agent.Kind) string {
	switch kind {
	case agent.LayerStore:
		return "LayerStore"
	case agent.ImageStore:
		return "ImageStore"
	case agent.ArtifactStore:
		return "ArtifactStore"
	}
	return clip(string(kind), maxPath)
}

// applied says whether the node has what it is to have: all of it, so that what could not be
// merged is said here, too.
func applied(f *finding, r *agent.Report) metav1.Condition {
	condition := metav1.Condition{Type: nodev1.NodeApplied, Status: metav1.ConditionFalse, Reason: f.reason, Message: clip(f.message, maxMessage)}
	if f.state != nodev1.NodeDone {
		return condition
	}
	condition.Status = metav1.ConditionTrue
	if r != nil && len(r.Problems) > 0 {
		var all []string
		for _, p := range r.Problems {
			all = append(all, p.Message)
		}
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, "NotMerged", clip(strings.Join(all, "; "), maxMessage)
	}
	return condition
}

func storesAvailable(s *nodev1.ContainerRuntimeNodeStatus) metav1.Condition {
	var withheld, failing []string
	for _, store := range s.Stores {
		text := fmt.Sprintf("%s %s: %s", store.Kind, store.Path, store.Reason)
		switch store.State {
		case nodev1.StoreWithheld:
			withheld = append(withheld, text)
		case nodev1.StoreFailing:
			failing = append(failing, text)
		case nodev1.StoreHealthy, nodev1.StoreKept:
		}
	}
	condition := metav1.Condition{Type: nodev1.NodeStoresAvailable, Status: metav1.ConditionTrue, Reason: nodev1.NodeStoresAvailable}
	if len(withheld)+len(failing) > 0 {
		condition.Status, condition.Reason = metav1.ConditionFalse, "StoresWithheld"
		if len(failing) > 0 {
			condition.Reason = "StoresFailing"
		}
		condition.Message = clip(strings.Join(append(failing, withheld...), "; "), maxMessage)
	}
	return condition
}

func daemonAvailable(r *agent.Report) metav1.Condition {
	condition := metav1.Condition{Type: nodev1.NodeDaemonAvailable, Status: metav1.ConditionTrue, Reason: "Running"}
	switch d := r.Daemon; {
	case !d.Wanted:
		condition.Reason = "NotWanted"
	case !d.Up:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, "NotRunning", clip(cmp.Or(d.Reason, "it does not run"), maxMessage)
	}
	return condition
}

// clip cuts a text to a number of characters, and makes it one that comes back as it was written.
func clip(s string, most int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= most {
		return s
	}
	for i := range s {
		if most == 0 {
			return s[:i]
		}
		most--
	}
	return s
}
