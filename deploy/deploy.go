// SPDX-License-Identifier: Apache-2.0

// Package deploy holds the files that are installed on a node beside the programs,
// as they are in this directory: for whoever installs without it.
package deploy

import (
	"bytes"
	_ "embed" // for the files below
)

// The files, as an installation below /usr/local has them.
var (
	//go:embed holdfast.service
	Service []byte // /etc/systemd/system/holdfast.service
	//go:embed holdfast-agent.service
	AgentService []byte // /etc/systemd/system/holdfast-agent.service
	//go:embed tmpfiles.d/holdfast.conf
	Tmpfiles []byte // /etc/tmpfiles.d/holdfast.conf
	//go:embed registries.conf.d/50-holdfast.conf
	PullHook []byte // /etc/containers/registries.conf.d/50-holdfast.conf
)

// At is a file of an installation below another prefix; "" is /usr/local.
func At(prefix string, file []byte) []byte {
	if prefix == "" {
		return file
	}
	return bytes.ReplaceAll(file, []byte("/usr/local"), []byte(prefix))
}
