// SPDX-License-Identifier: Apache-2.0

package render

import (
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/coreos/ignition/v2/config/v3_2/types"
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
