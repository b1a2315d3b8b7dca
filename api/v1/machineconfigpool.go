// SPDX-License-Identifier: Apache-2.0

package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// MachineConfigPool is nodes that are to have the same configuration, and how changes
// reach them. It has the fields of OpenShift's object of that name that are needed
// for this, by the same names.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=mcp
// +kubebuilder:printcolumn:name=Config,type=string,JSONPath=.status.configuration.name
// +kubebuilder:printcolumn:name=Updated,type=string,JSONPath=.status.conditions[?(@.type=="Updated")].status
// +kubebuilder:printcolumn:name=Updating,type=string,JSONPath=.status.conditions[?(@.type=="Updating")].status
// +kubebuilder:printcolumn:name=Degraded,type=string,JSONPath=.status.conditions[?(@.type=="Degraded")].status
// +kubebuilder:printcolumn:name=Stores,type=string,JSONPath=.status.conditions[?(@.type=="StoresAvailable")].status
// +kubebuilder:printcolumn:name=MachineCount,type=integer,JSONPath=.status.machineCount
// +kubebuilder:printcolumn:name=ReadyMachineCount,type=integer,JSONPath=.status.readyMachineCount
// +kubebuilder:printcolumn:name=UpdatedMachineCount,type=integer,JSONPath=.status.updatedMachineCount
// +kubebuilder:printcolumn:name=DegradedMachineCount,type=integer,JSONPath=.status.degradedMachineCount
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=.metadata.creationTimestamp
type MachineConfigPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec MachineConfigPoolSpec `json:"spec"`
	// +optional
	Status MachineConfigPoolStatus `json:"status,omitempty"`
}

// MachineConfigPoolSpec is which nodes, and how they are updated.
type MachineConfigPoolSpec struct {
	// machineConfigSelector says whose configuration the pool inherits: it selects MachineConfigs by the
	// label machineconfiguration.openshift.io/role, the name of their pool. Without it, all pools but master
	// inherit from worker.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.key != '' && (e.operator in ['In', 'NotIn'] ? has(e.values) && e.values.size() > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || e.values.size() == 0)))",message="an expression must have a key and an operator: In or NotIn with values, Exists or DoesNotExist without"
	MachineConfigSelector *metav1.LabelSelector `json:"machineConfigSelector,omitempty"`

	// nodeSelector selects the nodes. Of the pools that select a node a custom one counts
	// before master, and that before worker. Without it, or if it is empty, none.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.key != '' && (e.operator in ['In', 'NotIn'] ? has(e.values) && e.values.size() > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || e.values.size() == 0)))",message="an expression must have a key and an operator: In or NotIn with values, Exists or DoesNotExist without"
	NodeSelector *metav1.LabelSelector `json:"nodeSelector,omitempty"`

	// paused keeps nodes as they are.
	//
	// +optional
	Paused bool `json:"paused,omitempty"`

	// maxUnavailable is how many nodes, or what part of them, may be unavailable at once
	// while they are updated: 1 if it is not set, and at least 1.
	//
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:MaxLength=16
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : self.matches('^([0-9]{1,2}|100)%$')",message="maxUnavailable must be a number of nodes, or a percentage such as 10%"
	MaxUnavailable *intstr.IntOrString `json:"maxUnavailable,omitempty"`

	// configuration is what the nodes are to have. The controller writes it.
	//
	// +optional
	Configuration MachineConfigPoolConfiguration `json:"configuration,omitempty"`
}

// MachineConfigPoolConfiguration is a MachineConfig, and what it was made of.
type MachineConfigPoolConfiguration struct {
	// name is the name of a rendered MachineConfig.
	//
	// +optional
	Name string `json:"name,omitempty"`

	// source are the ContainerRuntimeConfigs that it was made of, in the order in which they count.
	//
	// +optional
	// +listType=atomic
	Source []ObjectReference `json:"source,omitempty"`
}

// ObjectReference names an object.
type ObjectReference struct {
	// apiVersion is its group and version.
	//
	// +optional
	APIVersion string `json:"apiVersion,omitempty"`
	// kind is its kind.
	//
	// +optional
	Kind string `json:"kind,omitempty"`
	// name is its name.
	//
	// +optional
	Name string `json:"name,omitempty"`
	// generation is the generation of it that was taken.
	//
	// +optional
	Generation int64 `json:"generation,omitempty"`
}

// MachineConfigPoolStatus is how far the nodes are.
type MachineConfigPoolStatus struct {
	// observedGeneration is the generation that the rest is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// configuration is what all nodes of the pool had last.
	//
	// +optional
	Configuration MachineConfigPoolConfiguration `json:"configuration,omitempty"`

	// machineCount is how many nodes the pool has.
	//
	// +optional
	// +kubebuilder:default=0
	MachineCount int32 `json:"machineCount"`

	// updatedMachineCount is how many of them have spec.configuration.
	//
	// +optional
	// +kubebuilder:default=0
	UpdatedMachineCount int32 `json:"updatedMachineCount"`

	// readyMachineCount is how many of those are ready and schedulable.
	//
	// +optional
	// +kubebuilder:default=0
	ReadyMachineCount int32 `json:"readyMachineCount"`

	// unavailableMachineCount is how many nodes are being updated, not ready or not schedulable.
	//
	// +optional
	// +kubebuilder:default=0
	UnavailableMachineCount int32 `json:"unavailableMachineCount"`

	// degradedMachineCount is how many nodes could not be given what they were to have.
	//
	// +optional
	// +kubebuilder:default=0
	DegradedMachineCount int32 `json:"degradedMachineCount"`

	// conditions are Updated, Updating, Degraded, NodeDegraded, RenderDegraded and StoresAvailable.
	//
	// +optional
	// +listType=atomic
	Conditions []MachineConfigPoolCondition `json:"conditions,omitempty"`
}

// MachineConfigPoolCondition is one thing to know of a pool.
type MachineConfigPoolCondition struct {
	// type says which.
	//
	// +required
	Type MachineConfigPoolConditionType `json:"type"`
	// status is True, False or Unknown.
	//
	// +required
	Status metav1.ConditionStatus `json:"status"`
	// observedGeneration is the generation of the pool that it is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// lastTransitionTime is when status last changed.
	//
	// +optional
	// +nullable
	LastTransitionTime metav1.Time `json:"lastTransitionTime,omitempty"`
	// reason is one word for machines.
	//
	// +optional
	Reason string `json:"reason,omitempty"`
	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// MachineConfigPoolConditionType is a type of condition.
type MachineConfigPoolConditionType string

// The types of conditions of a pool. All but the last are OpenShift's.
const (
	PoolUpdated         MachineConfigPoolConditionType = "Updated"         // all nodes have what they are to have
	PoolUpdating        MachineConfigPoolConditionType = "Updating"        // nodes are on their way there
	PoolDegraded        MachineConfigPoolConditionType = "Degraded"        // one of the next two
	PoolNodeDegraded    MachineConfigPoolConditionType = "NodeDegraded"    // nodes could not be given it
	PoolRenderDegraded  MachineConfigPoolConditionType = "RenderDegraded"  // there is something in the objects that cannot be had
	PoolStoresAvailable MachineConfigPoolConditionType = "StoresAvailable" // no node withholds a store
)

// MachineConfigPoolList is a list of them.
//
// +kubebuilder:object:root=true
type MachineConfigPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MachineConfigPool `json:"items"`
}
