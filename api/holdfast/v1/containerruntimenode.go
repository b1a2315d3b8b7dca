// SPDX-License-Identifier: Apache-2.0

package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ContainerRuntimeNode is the container runtime of one node: what it is to have, which the
// controller writes, and what it has, which the node writes. Its name is the node's.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=ctrnode
// +kubebuilder:printcolumn:name=Pool,type=string,JSONPath=.spec.pool
// +kubebuilder:printcolumn:name=State,type=string,JSONPath=.status.state
// +kubebuilder:printcolumn:name=Healthy,type=integer,JSONPath=.status.healthyStores
// +kubebuilder:printcolumn:name=Withheld,type=integer,JSONPath=.status.withheldStores
// +kubebuilder:printcolumn:name=CRI-O,type=string,JSONPath=.status.runtime.version
// +kubebuilder:printcolumn:name=Holdfast,type=string,JSONPath=.status.daemon.version
// +kubebuilder:printcolumn:name=Current,type=string,priority=1,JSONPath=.status.currentConfig
// +kubebuilder:printcolumn:name=Desired,type=string,priority=1,JSONPath=.spec.desiredConfig
// +kubebuilder:printcolumn:name=Message,type=string,priority=1,JSONPath=.status.message
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=.metadata.creationTimestamp
type ContainerRuntimeNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec ContainerRuntimeNodeSpec `json:"spec"`
	// +optional
	Status ContainerRuntimeNodeStatus `json:"status,omitempty"`
}

// ContainerRuntimeNodeSpec is what a node is to have.
type ContainerRuntimeNodeSpec struct {
	// pool is the MachineConfigPool that the node is in.
	//
	// +optional
	Pool string `json:"pool,omitempty"`

	// desiredConfig is the name of the MachineConfig that the node is to have. Empty: the node
	// stays as it is.
	//
	// +optional
	DesiredConfig string `json:"desiredConfig,omitempty"`

	// drainedFor is the desiredConfig for which the node has been drained. A configuration that
	// wants nodes to reboot is not applied before.
	//
	// +optional
	DrainedFor string `json:"drainedFor,omitempty"`
}

// ContainerRuntimeNodeStatus is what a node has. The agent of the node writes it when there is
// something new.
type ContainerRuntimeNodeStatus struct {
	// observedGeneration is the generation of the object that the rest is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// currentConfig is the name of the MachineConfig that the node has.
	//
	// +optional
	CurrentConfig string `json:"currentConfig,omitempty"`

	// appliedHash tells files apart that are on nodes: nodes with the same have the same files.
	//
	// +optional
	AppliedHash string `json:"appliedHash,omitempty"`

	// state is Done if the node has desiredConfig, Degraded if it could not be given it and has
	// what it had before, and else Working.
	//
	// +optional
	State NodeState `json:"state,omitempty"`

	// message is why the node is Degraded, or what it waits for.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Message string `json:"message,omitempty"`

	// stores are the stores of the configuration.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Stores []Store `json:"stores,omitempty"`

	// healthyStores is how many of them runtimes read from.
	//
	// +optional
	// +kubebuilder:default=0
	HealthyStores int32 `json:"healthyStores"`

	// withheldStores is how many of them runtimes are not told of.
	//
	// +optional
	// +kubebuilder:default=0
	WithheldStores int32 `json:"withheldStores"`

	// runtime is CRI-O.
	//
	// +optional
	Runtime Program `json:"runtime,omitempty"`

	// daemon is the Holdfast daemon.
	//
	// +optional
	Daemon Program `json:"daemon,omitempty"`

	// agentVersion is the version of the node's agent.
	//
	// +optional
	AgentVersion string `json:"agentVersion,omitempty"`

	// conditions are Applied, StoresAvailable and DaemonAvailable.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// NodeState is how far a node is.
//
// +kubebuilder:validation:Enum=Working;Done;Degraded
type NodeState string

// How far a node is.
const (
	NodeWorking  NodeState = "Working"  // it is on its way
	NodeDone     NodeState = "Done"     // it has what it is to have
	NodeDegraded NodeState = "Degraded" // it has what it had before, since it could not be given that
)

// Store is a store of the configuration on a node.
type Store struct {
	// kind is LayerStore, ImageStore or ArtifactStore.
	//
	// +required
	Kind string `json:"kind"`
	// path is where it is.
	//
	// +required
	// +kubebuilder:validation:MaxLength=256
	Path string `json:"path"`
	// state is Healthy, Withheld (runtimes are not told of it), Failing (they are, and it does not
	// answer), or Kept (it is not wanted any more, but images in use come from it).
	//
	// +required
	// +kubebuilder:validation:Enum=Healthy;Withheld;Failing;Kept
	State StoreState `json:"state"`
	// reason is why.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Reason string `json:"reason,omitempty"`
}

// StoreState is what has become of a store.
type StoreState string

// What has become of a store.
const (
	StoreHealthy  StoreState = "Healthy"
	StoreWithheld StoreState = "Withheld"
	StoreFailing  StoreState = "Failing"
	StoreKept     StoreState = "Kept"
)

// Program is a program of a node.
type Program struct {
	// up is whether it runs.
	//
	// +optional
	Up bool `json:"up"`
	// version is its version.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=256
	Version string `json:"version,omitempty"`
	// reason is why it does not run.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Reason string `json:"reason,omitempty"`
}

// The types of conditions of a node.
const (
	NodeApplied         = "Applied"         // it has what it is to have
	NodeStoresAvailable = "StoresAvailable" // no store is withheld, and none fails
	NodeDaemonAvailable = "DaemonAvailable" // the daemon runs, or is not wanted
)

// ReasonWaitsForDrain is the reason of NodeApplied by which a node asks to be drained: it is to boot for
// spec.desiredConfig, and waits for spec.drainedFor.
const ReasonWaitsForDrain = "WaitsForDrain"

// ContainerRuntimeNodeList is a list of them.
//
// +kubebuilder:object:root=true
type ContainerRuntimeNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ContainerRuntimeNode `json:"items"`
}
