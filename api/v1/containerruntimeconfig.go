// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// How many stores of each kind a configuration may name; also after all those
// that select a pool have been merged.
const (
	MaxLayerStores    = 5
	MaxImageStores    = 10
	MaxArtifactStores = 10
)

// ContainerRuntimeConfig is settings of the container runtime, and the stores
// that it uses beside its own, for the nodes of the pools that it selects. All
// objects that select a pool count together.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=ctrcfg
// +kubebuilder:printcolumn:name=Condition,type=string,JSONPath=.status.conditions[-1:].type
// +kubebuilder:printcolumn:name=Updated,type=string,JSONPath=.status.conditions[?(@.type=="Updated")].status
// +kubebuilder:printcolumn:name=Degraded,type=string,JSONPath=.status.conditions[?(@.type=="Degraded")].status
// +kubebuilder:printcolumn:name=Stores,type=string,JSONPath=.status.conditions[?(@.type=="StoresAvailable")].status
// +kubebuilder:printcolumn:name=Message,type=string,priority=1,JSONPath=.status.conditions[-1:].message
// +kubebuilder:printcolumn:name=Layers,type=string,priority=1,JSONPath=.spec.containerRuntimeConfig.additionalLayerStores
// +kubebuilder:printcolumn:name=Images,type=string,priority=1,JSONPath=.spec.containerRuntimeConfig.additionalImageStores
// +kubebuilder:printcolumn:name=Artifacts,type=string,priority=1,JSONPath=.spec.containerRuntimeConfig.additionalArtifactStores
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=.metadata.creationTimestamp
type ContainerRuntimeConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec ContainerRuntimeConfigSpec `json:"spec"`
	// +optional
	Status ContainerRuntimeConfigStatus `json:"status,omitempty"`
}

// ContainerRuntimeConfigSpec is what the user wants.
type ContainerRuntimeConfigSpec struct {
	// machineConfigPoolSelector selects pools by their labels. Without it, or if it is
	// empty, none.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.key != '' && (e.operator in ['In', 'NotIn'] ? has(e.values) && e.values.size() > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || e.values.size() == 0)))",message="an expression must have a key and an operator: In or NotIn with values, Exists or DoesNotExist without"
	MachineConfigPoolSelector *metav1.LabelSelector `json:"machineConfigPoolSelector,omitempty"`

	// containerRuntimeConfig is the settings that OpenShift has, too.
	//
	// +required
	ContainerRuntimeConfig *ContainerRuntimeConfiguration `json:"containerRuntimeConfig"`

	// holdfast is what the Holdfast daemon is told beyond the paths of stores. It runs
	// on nodes with this section, or with its layer store, /var/lib/holdfast/store,
	// among additionalLayerStores. OpenShift has no such field: there the annotation
	// holdfast.github.io/spec holds it.
	//
	// +optional
	Holdfast *HoldfastConfiguration `json:"holdfast,omitempty"`
}

// ContainerRuntimeConfiguration is settings of CRI-O and of containers/storage.
type ContainerRuntimeConfiguration struct {
	// pidsLimit is the most processes of a container: 0 for no limit, or 20 and more.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="self == 0 || self >= 20",message="invalid PidsLimit, must be 0 or at least 20"
	PidsLimit *int64 `json:"pidsLimit,omitempty"`

	// logLevel is the verbosity of CRI-O's log: fatal, panic, error, warn, info, debug or trace.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="self in ['', 'error', 'fatal', 'panic', 'warn', 'info', 'debug', 'trace']",message="invalid LogLevel, must be one of error, fatal, panic, warn, info, debug, or trace"
	LogLevel string `json:"logLevel,omitempty"`

	// logSizeMax is the largest size of a container's log file: more than 8 KiB. 0 and
	// less, and unset, mean no limit.
	//
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') && isQuantity(string(self))",message="must be a quantity such as 512Mi"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') || !isQuantity(string(self)) || !quantity(string(self)).isGreaterThan(quantity('0')) || quantity(string(self)).isGreaterThan(quantity('8192'))",message="invalid LogSizeMax, cannot be less than 8kB"
	LogSizeMax *resource.Quantity `json:"logSizeMax,omitempty"`

	// overlaySize is the largest size of a container's own layer. It needs XFS with
	// project quotas.
	//
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') && isQuantity(string(self))",message="must be a quantity such as 512Mi"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') || !isQuantity(string(self)) || !quantity(string(self)).isLessThan(quantity('0'))",message="invalid overlaySize, cannot be less than 0"
	OverlaySize *resource.Quantity `json:"overlaySize,omitempty"`

	// defaultRuntime is the OCI runtime of containers that do not ask for one: crun or runc.
	//
	// +optional
	DefaultRuntime ContainerRuntimeDefaultRuntime `json:"defaultRuntime,omitempty"`

	// additionalLayerStores are stores from which layers come lazily while their image
	// is pulled: Holdfast's own, /var/lib/holdfast/store, or the mount point of another one,
	// such as /var/lib/stargz-store/store. They are asked in this order.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=5
	// +kubebuilder:validation:XValidation:rule="self.all(x, self.exists_one(y, x.path == y.path || x.path + '/' == y.path || x.path == y.path + '/'))",message="additionalLayerStores must not contain duplicate paths"
	AdditionalLayerStores []AdditionalLayerStore `json:"additionalLayerStores,omitempty"`

	// additionalImageStores are directories with whole images, as `holdfast store add`
	// or `podman --root` fill them. The runtime only reads them, after its own store.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=10
	// +kubebuilder:validation:XValidation:rule="self.all(x, self.exists_one(y, x.path == y.path || x.path + '/' == y.path || x.path == y.path + '/'))",message="additionalImageStores must not contain duplicate paths"
	AdditionalImageStores []AdditionalImageStore `json:"additionalImageStores,omitempty"`

	// additionalArtifactStores are directories with OCI artifacts, as `holdfast artifact
	// add` fills them. They come before CRI-O's own store: of the same name the first counts.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=10
	// +kubebuilder:validation:XValidation:rule="self.all(x, self.exists_one(y, x.path == y.path || x.path + '/' == y.path || x.path == y.path + '/'))",message="additionalArtifactStores must not contain duplicate paths"
	AdditionalArtifactStores []AdditionalArtifactStore `json:"additionalArtifactStores,omitempty"`
}

// ContainerRuntimeDefaultRuntime is the name of an OCI runtime.
//
// +kubebuilder:validation:Enum=crun;runc
type ContainerRuntimeDefaultRuntime string

// StorePath is a directory on the node.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=256
// +kubebuilder:validation:XValidation:rule="self.matches('^/[a-zA-Z0-9/._-]+$')",message="path must be absolute and contain only alphanumeric characters, '/', '.', '_', and '-'"
// +kubebuilder:validation:XValidation:rule="!self.contains('//')",message="path must not contain consecutive forward slashes"
// +kubebuilder:validation:XValidation:rule="!self.matches('/[.][.]?(/|$)')",message="path must not contain '.' or '..' segments"
// +kubebuilder:validation:XValidation:rule="!self.matches('^/(var/lib|run|var/run)/containers/storage(/|$)')",message="path must not be, or be in, the runtime's own storage"
type StorePath string

// AdditionalLayerStore is a layer store.
type AdditionalLayerStore struct {
	// path is where it is, on every node.
	//
	// +required
	Path StorePath `json:"path"`
}

// AdditionalImageStore is an image store.
type AdditionalImageStore struct {
	// path is where it is, on every node.
	//
	// +required
	Path StorePath `json:"path"`
}

// AdditionalArtifactStore is an artifact store.
type AdditionalArtifactStore struct {
	// path is where it is, on every node. The artifacts are in artifacts/ below it.
	//
	// +required
	Path StorePath `json:"path"`

	// filter says which artifacts of the store are offered. It needs the Holdfast
	// daemon. OpenShift has no such field: see holdfast.
	//
	// +optional
	Filter *ArtifactFilter `json:"filter,omitempty"`
}

// ArtifactFilter says which artifacts of a store are offered: those that match
// all that is set.
type ArtifactFilter struct {
	// references are patterns of names, HOST[/PATH][:TAG]: * is any characters but a
	// slash, ! in front takes out. If all take out, the rest is offered.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	References []Pattern `json:"references,omitempty"`

	// types are patterns of artifact types, such as application/vnd.cncf.model.*.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Types []Pattern `json:"types,omitempty"`

	// maxSize is the most that an artifact may have in bytes.
	//
	// +optional
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') && isQuantity(string(self))",message="must be a quantity such as 512Mi"
	// +kubebuilder:validation:XValidation:rule="!string(self).matches('^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$') || !isQuantity(string(self)) || !quantity(string(self)).isLessThan(quantity('0'))",message="invalid maxSize, cannot be less than 0"
	MaxSize *resource.Quantity `json:"maxSize,omitempty"`
}

// Pattern is a pattern of names.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=512
type Pattern string

// ContainerRuntimeConfigStatus is what has become of it.
type ContainerRuntimeConfigStatus struct {
	// observedGeneration is the generation that the conditions are about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// conditions says whether all of it has been rendered, and what has not and why.
	//
	// +optional
	// +listType=atomic
	Conditions []ContainerRuntimeConfigCondition `json:"conditions,omitempty"`
}

// ContainerRuntimeConfigCondition is one thing to know of an object.
type ContainerRuntimeConfigCondition struct {
	// type is Success or Failure, which comes last, or sums up pools: Updated, Degraded, StoresAvailable.
	//
	// +optional
	Type ContainerRuntimeConfigStatusConditionType `json:"type"`
	// status is True, False or Unknown.
	//
	// +optional
	Status metav1.ConditionStatus `json:"status"`
	// lastTransitionTime is when status last changed.
	//
	// +optional
	// +nullable
	LastTransitionTime metav1.Time `json:"lastTransitionTime"`
	// reason is one word for machines.
	//
	// +optional
	Reason string `json:"reason,omitempty"`
	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// ContainerRuntimeConfigStatusConditionType is a type of condition.
type ContainerRuntimeConfigStatusConditionType string

// The types of conditions that OpenShift has.
const (
	ContainerRuntimeConfigSuccess ContainerRuntimeConfigStatusConditionType = "Success"
	ContainerRuntimeConfigFailure ContainerRuntimeConfigStatusConditionType = "Failure"
)

// The types of conditions that sum up the pools which an object has a part in.
const (
	ContainerRuntimeConfigUpdated         ContainerRuntimeConfigStatusConditionType = "Updated"         // all nodes have what they are to have
	ContainerRuntimeConfigDegraded        ContainerRuntimeConfigStatusConditionType = "Degraded"        // nodes could not be given it
	ContainerRuntimeConfigStoresAvailable ContainerRuntimeConfigStatusConditionType = "StoresAvailable" // no node withholds a store
)

// ContainerRuntimeConfigList is a list of them.
//
// +kubebuilder:object:root=true
type ContainerRuntimeConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ContainerRuntimeConfig `json:"items"`
}
