// SPDX-License-Identifier: Apache-2.0

package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the API's group and version.
var GroupVersion = schema.GroupVersion{Group: "machineconfiguration.openshift.io", Version: "v1"}

// AddToScheme makes a scheme know the types of this package.
func AddToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion,
		&ContainerRuntimeConfig{}, &ContainerRuntimeConfigList{},
		&MachineConfig{}, &MachineConfigList{},
		&MachineConfigPool{}, &MachineConfigPoolList{})
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
