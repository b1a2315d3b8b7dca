// SPDX-License-Identifier: Apache-2.0

package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// RoleLabel is the label by which a MachineConfig belongs to a pool.
const RoleLabel = "machineconfiguration.openshift.io/role"

// MachineConfig is files for the nodes of a pool, as an Ignition configuration.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=mc
// +kubebuilder:printcolumn:name=IgnitionVersion,type=string,JSONPath=.spec.config.ignition.version
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=.metadata.creationTimestamp
type MachineConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec MachineConfigSpec `json:"spec"`
}

// MachineConfigSpec is what is on a node.
type MachineConfigSpec struct {
	// config is an Ignition configuration of version 3.
	//
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	Config runtime.RawExtension `json:"config,omitzero"`
}

// MachineConfigList is a list of them.
//
// +kubebuilder:object:root=true
type MachineConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MachineConfig `json:"items"`
}
