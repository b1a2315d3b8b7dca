// SPDX-License-Identifier: Apache-2.0

package v1

// SpecAnnotation is the annotation that holds, as JSON or YAML, what OpenShift's
// definition would drop: spec.holdfast, and the filters of artifact stores. It
// has the form of a spec. What the object itself says counts before it.
const SpecAnnotation = "holdfast.github.io/spec"

// FilesAnnotation says who writes the files of the runtimes on the nodes that an object is for,
// if it is not their agent.
const FilesAnnotation = "holdfast.github.io/files"

// FilesByMachineConfigOperator is its value where OpenShift's operator writes all files of a
// MachineConfig itself, and takes others' changes for a mistake.
const FilesByMachineConfigOperator = "MachineConfigOperator"

// HoldfastConfiguration is settings of the Holdfast daemon, by the names that they
// have in its configuration file. What is not set is as the node has it.
type HoldfastConfiguration struct {
	// include are patterns of the images that are prepared; without any, all are.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=128
	Include []Pattern `json:"include,omitempty"`

	// exclude are patterns of images that are left to the runtime.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=128
	Exclude []Pattern `json:"exclude,omitempty"`

	// trusted are patterns of images that are published before all of them has been
	// verified: HOST[/PATH][:TAG].
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=128
	Trusted []Pattern `json:"trusted,omitempty"`

	// sources are where images are looked for, in this order: "registry", the absolute
	// path of an OCI layout, or docker://HOST[/PATH].
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:XValidation:rule="self == 'registry' || self.matches('^(oci:|oci-archive:)?/[^/].*$') || self.matches('^docker://[^/]+(/.+)?$')",message="source must be registry, the absolute path of an OCI layout, or docker://HOST[/PATH]"
	// +kubebuilder:validation:XValidation:rule="self.all(x, self.exists_one(y, x == y))",message="sources must not contain duplicates"
	Sources []string `json:"sources,omitempty"`

	// trustedSources are those of the OCI layouts in sources whose images are believed
	// before all of them has been verified.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=512
	TrustedSources []string `json:"trustedSources,omitempty"`

	// registryMirrors are mirrors that daemon and runtime ask before a registry.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="self.all(x, self.exists_one(y, x.source == y.source))",message="registryMirrors must not contain duplicate sources"
	RegistryMirrors []RegistryMirror `json:"registryMirrors,omitempty"`

	// offline is whether no registry is asked for anything.
	//
	// +optional
	Offline *bool `json:"offline,omitempty"`

	// cacheLimit is how much disk space the content of layers may take: a quantity,
	// 100Gi, or a part of the file system, 50%.
	//
	// +optional
	CacheLimit Share `json:"cacheLimit,omitempty"`

	// pinned are images and artifacts that are fetched whole ahead of need, and kept.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=256
	Pinned []Pattern `json:"pinned,omitempty"`

	// artifacts are artifacts, and patterns of them, that are offered before they are
	// on the node, and fetched when they are read.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=128
	Artifacts []Pattern `json:"artifacts,omitempty"`

	// artifactLimit is how much disk space their files may take, as cacheLimit.
	//
	// +optional
	ArtifactLimit Share `json:"artifactLimit,omitempty"`

	// indexStores are where indexes for layers without one are looked for: "registry",
	// the absolute path of a directory, or docker://HOST/REPOSITORY.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:XValidation:rule="self == 'registry' || self.matches('^/[^/].*$') || self.matches('^docker://[^/]+/.+$')",message="place must be registry, the absolute path of a directory, or docker://HOST/REPOSITORY"
	IndexStores []string `json:"indexStores,omitempty"`

	// indexPublish are where indexes go that were made on the node: as indexStores.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:XValidation:rule="self == 'registry' || self.matches('^/[^/].*$') || self.matches('^docker://[^/]+/.+$')",message="place must be registry, the absolute path of a directory, or docker://HOST/REPOSITORY"
	IndexPublish []string `json:"indexPublish,omitempty"`

	// disruption is what a node does to make CRI-O read a changed configuration:
	// Restart (the service, the default) or Reboot (the node).
	//
	// +optional
	Disruption Disruption `json:"disruption,omitempty"`
}

// RegistryMirror is the mirrors of one registry, or of a part of it.
type RegistryMirror struct {
	// source is what is mirrored: HOST[/PATH], or *.DOMAIN.
	//
	// +required
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="self.matches('^[*][.][a-zA-Z0-9][a-zA-Z0-9.-]*$') || self.matches('^[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*$')",message="source must be HOST[:PORT][/PATH] or *.DOMAIN"
	Source string `json:"source"`

	// mirrors are asked in this order, then the registry itself.
	//
	// +required
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*$')",message="mirror must be HOST[:PORT][/PATH]"
	Mirrors []string `json:"mirrors"`
}

// Share is a quantity of bytes, 100Gi, or a part of a file system, 50%.
//
// +kubebuilder:validation:MaxLength=32
// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,2}|100)%$') || self.matches('^[0-9]{1,15}(k|M|G|T|Ki|Mi|Gi|Ti)?$')",message="must be a quantity of bytes such as 100Gi, or a percentage such as 50%"
type Share string

// Disruption is how a changed configuration takes effect.
//
// +kubebuilder:validation:Enum=Restart;Reboot
type Disruption string

// The ways in which a changed configuration takes effect.
const (
	RestartRuntime Disruption = "Restart"
	RebootNode     Disruption = "Reboot"
)
