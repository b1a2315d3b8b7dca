// SPDX-License-Identifier: Apache-2.0

package index

// The annotations of a layer whose blob carries its own index. Their values are
// the digests that vouch for it.
const (
	AnnotationEStargz           = "containerd.io/snapshot/stargz/toc.digest"
	AnnotationZstdChunked       = "io.github.containers.zstd-chunked.manifest-checksum"
	AnnotationZstdChunkedStargz = "io.containers.zstd-chunked.manifest-checksum"
)

// Annotated reports whether a layer says that its blob carries an index.
func Annotated(annotations map[string]string) bool {
	for _, name := range []string{AnnotationEStargz, AnnotationZstdChunked, AnnotationZstdChunkedStargz} {
		if annotations[name] != "" {
			return true
		}
	}
	return false
}
