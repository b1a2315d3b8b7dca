// SPDX-License-Identifier: Apache-2.0

// Package repotest checks the rules of the repository: who may import whom,
// that what is exported is documented, that documents speak of what is there,
// and that the files of deploy fit what the daemon does. It has tests only.
package repotest
