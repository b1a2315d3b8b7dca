// SPDX-License-Identifier: Apache-2.0

// Package e2e tests Holdfast with real clients: Podman of Debian 12 and 13, and
// go.podman.io/image's copy.Image, the code inside CRI-O. The oracle is always a
// normal pull of the same image: the same tree, the same bytes, the same image
// ID, or a normal pull.
//
// The tests need root, FUSE, and the tools that test/setup.sh installs; what is
// missing fails a test and skips none. What takes long to make (Debian root
// file systems) is kept in $HOLDFAST_CACHE. Each test works in a directory of
// its own, and fails if it leaves a mount, a process or a loop device.
package e2e
