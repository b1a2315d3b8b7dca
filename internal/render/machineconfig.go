// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/coreos/ignition/v2/config/v3_2/types"
	"github.com/vincent-petithory/dataurl"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// MachineConfigName is the name of the MachineConfig that is made for a pool: as
// OpenShift calls its own.
func MachineConfigName(pool string) string { return "99-" + pool + "-generated-containerruntime" }

// YAML is an object as people read and apply it.
func YAML(mc *apiv1.MachineConfig) ([]byte, error) {
	text, err := yaml.Marshal(mc)
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", mc.Name, err)
	}
	return text, nil
}

// MachineConfig packs files for the nodes of a pool: as an Ignition configuration of
// version 3.2, which every OpenShift 4.7 and newer takes.
func MachineConfig(pool string, files []File) (*apiv1.MachineConfig, error) {
	config := types.Config{Ignition: types.Ignition{Version: types.MaxVersion.String()}}
	mode, overwrite, user := 0o644, true, "root"
	for _, f := range files {
		// The form that OpenShift writes.
		source := "data:text/plain;charset=utf-8;base64," + base64.StdEncoding.EncodeToString(f.Data)
		config.Storage.Files = append(config.Storage.Files, types.File{
			Node:          types.Node{Path: f.Path, Overwrite: &overwrite, User: types.NodeUser{Name: &user}},
			FileEmbedded1: types.FileEmbedded1{Contents: types.Resource{Source: &source}, Mode: &mode},
		})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("rendering the MachineConfig of pool %s: %w", pool, err)
	}
	return &apiv1.MachineConfig{
		TypeMeta:   metav1.TypeMeta{APIVersion: apiv1.GroupVersion.String(), Kind: "MachineConfig"},
		ObjectMeta: metav1.ObjectMeta{Name: MachineConfigName(pool), Labels: map[string]string{apiv1.RoleLabel: pool}},
		Spec:       apiv1.MachineConfigSpec{Config: runtime.RawExtension{Raw: raw}},
	}, nil
}

// Object is a configuration as a file of the node, from which its agent takes it: the agent
// renders the other files itself, on top of what the node has. byMCO says that it must not, since
// the Machine Config Operator writes them: see [apiv1.FilesAnnotation].
func Object(pool string, spec apiv1.ContainerRuntimeConfigSpec, byMCO bool) (File, error) {
	// Without settings it is valid, too: the node goes back to what it had.
	spec.ContainerRuntimeConfig = cmp.Or(spec.ContainerRuntimeConfig, &apiv1.ContainerRuntimeConfiguration{})
	object := apiv1.ContainerRuntimeConfig{
		TypeMeta:   metav1.TypeMeta{APIVersion: apiv1.GroupVersion.String(), Kind: "ContainerRuntimeConfig"},
		ObjectMeta: metav1.ObjectMeta{Name: pool},
		Spec:       spec,
	}
	if byMCO {
		object.Annotations = map[string]string{apiv1.FilesAnnotation: apiv1.FilesByMachineConfigOperator}
	}
	raw, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&object)
	if err != nil {
		return File{}, fmt.Errorf("encoding the configuration of pool %s: %w", pool, err)
	}
	delete(raw, "status")
	text, err := yaml.Marshal(raw)
	if err != nil {
		return File{}, fmt.Errorf("encoding the configuration of pool %s: %w", pool, err)
	}
	return File{ClusterObject, append([]byte("# Written by holdfast-operator: what the cluster says.\n"), text...)}, nil
}

// maxConfig bounds what is unpacked of a file in a MachineConfig.
const maxConfig = 16 << 20

// Unpack returns a file of a MachineConfig; the error wraps [fs.ErrNotExist] if it has none of
// that path. Of several the last counts, as for Ignition.
func Unpack(mc *apiv1.MachineConfig, path string) ([]byte, error) {
	// What all versions 3 of Ignition's configuration have in common.
	var config struct {
		Storage struct {
			Files []struct {
				Path     string `json:"path"`
				Contents struct {
					Source      *string `json:"source"`
					Compression *string `json:"compression"`
				} `json:"contents"`
			} `json:"files"`
		} `json:"storage"`
	}
	if len(mc.Spec.Config.Raw) > 0 {
		if err := json.Unmarshal(mc.Spec.Config.Raw, &config); err != nil {
			return nil, fmt.Errorf("reading MachineConfig %s: %w", mc.Name, err)
		}
	}
	for _, f := range slices.Backward(config.Storage.Files) {
		if f.Path != path {
			continue
		}
		data, err := contents(f.Contents.Source, f.Contents.Compression)
		if err != nil {
			return nil, fmt.Errorf("reading %s of MachineConfig %s: %w", path, mc.Name, err)
		}
		return data, nil
	}
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

func contents(source, compression *string) ([]byte, error) {
	if source == nil || *source == "" {
		return nil, nil
	}
	url, err := dataurl.DecodeString(*source)
	if err != nil {
		return nil, err
	}
	if compression == nil || *compression == "" {
		return url.Data, nil
	}
	if *compression != "gzip" {
		return nil, fmt.Errorf("compressed with %s: want gzip", *compression)
	}
	in, err := gzip.NewReader(bytes.NewReader(url.Data))
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(in, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		err = errors.New("more than 16 MiB")
	}
	return data, err
}
