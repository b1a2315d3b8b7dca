// SPDX-License-Identifier: Apache-2.0

// Package shards names the directories that the composed artifact store consists of:
// the daemon writes them, and the configuration of CRI-O lists them.
package shards

import (
	"fmt"
	"hash/fnv"
	"path/filepath"
)

// Count is how many directories there are, each a whole artifact store. Readers
// parse a store's index twice for each artifact in it: two hundred artifacts in one
// take them half a second, for each list and each look at a single one; in sixteen
// a tenth of that, in sixty-four a fifteenth.
const Count = 64

// Directories returns the directories of the composed store at dir, as
// additional_artifact_stores of CRI-O lists them.
func Directories(dir string) []string {
	all := make([]string, Count)
	for i := range all {
		all[i] = filepath.Join(dir, fmt.Sprintf("%02d", i))
	}
	return all
}

// Of is the place among them of the one that has the artifact with a name.
func Of(name string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	return int(h.Sum32() % Count)
}
