// SPDX-License-Identifier: Apache-2.0

// Package soak holds tests that do the same harmful thing many times: kill the
// worker, swap it, corrupt what a registry sends, fill the cache. The oracle is
// always the same: every byte equal, or a clear error where one is due.
package soak
