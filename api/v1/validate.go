// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// What the definition's rules say when they are violated; see the markers of
// the types. TestEveryRuleIsTested finds those that differ.
const (
	messagePids         = "invalid PidsLimit, must be 0 or at least 20"
	messageLogLevel     = "invalid LogLevel, must be one of error, fatal, panic, warn, info, debug, or trace"
	messageLogSize      = "invalid LogSizeMax, cannot be less than 8kB"
	messageOverlay      = "invalid overlaySize, cannot be less than 0"
	messageMaxSize      = "invalid maxSize, cannot be less than 0"
	messageQuantity     = "must be a quantity such as 512Mi"
	messagePath         = "path must be absolute and contain only alphanumeric characters, '/', '.', '_', and '-'"
	messageSlashes      = "path must not contain consecutive forward slashes"
	messageDots         = "path must not contain '.' or '..' segments"
	messageOwnStorage   = "path must not be, or be in, the runtime's own storage"
	messageDuplicates   = "must not contain duplicate paths"
	messageSource       = "source must be registry, the absolute path of an OCI layout, or docker://HOST[/PATH]"
	messageSources      = "sources must not contain duplicates"
	messagePlace        = "place must be registry, the absolute path of a directory, or docker://HOST/REPOSITORY"
	messageMirrorSource = "source must be HOST[:PORT][/PATH] or *.DOMAIN"
	messageMirror       = "mirror must be HOST[:PORT][/PATH]"
	messageMirrors      = "registryMirrors must not contain duplicate sources"
	messageSelector     = "an expression must have a key and an operator: In or NotIn with values, Exists or DoesNotExist without"
	messageShare        = "must be a quantity of bytes such as 100Gi, or a percentage such as 50%"
)

// The expressions of the rules; CEL has the same syntax for them as Go.
var (
	pathChars    = regexp.MustCompile(`^/[a-zA-Z0-9/._-]+$`)
	dotSegments  = regexp.MustCompile(`/[.][.]?(/|$)`)
	ownStorage   = regexp.MustCompile(`^/(var/lib|run|var/run)/containers/storage(/|$)`)
	sourceForm   = regexp.MustCompile(`^registry$|^(oci:|oci-archive:)?/[^/].*$|^docker://[^/]+(/.+)?$`)
	placeForm    = regexp.MustCompile(`^registry$|^/[^/].*$|^docker://[^/]+/.+$`)
	mirrorForm   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*$`)
	wildcardForm = regexp.MustCompile(`^[*][.][a-zA-Z0-9][a-zA-Z0-9.-]*$`)
	shareForm    = regexp.MustCompile(`^([0-9]{1,2}|100)%$|^[0-9]{1,15}(k|M|G|T|Ki|Mi|Gi|Ti)?$`)

	logLevels   = []string{"error", "fatal", "panic", "warn", "info", "debug", "trace"}
	runtimes    = []string{"crun", "runc"}
	disruptions = []string{string(RestartRuntime), string(RebootNode)}
)

// Limits of the definition beside those on stores.
const (
	maxPath     = 256
	maxPattern  = 512
	maxPatterns = 128
	maxPlaces   = 32
	maxMirrored = 64
	maxMirrors  = 16
	maxPinned   = 256
	maxFiltered = 64
	maxShare    = 32
)

// Validate reports what an API server would refuse in a decoded object, in the
// same words. It is for where there is none. The only rules it cannot check
// are on how a value was written: [ParseContainerRuntimeConfigs] does.
func (c *ContainerRuntimeConfig) Validate() field.ErrorList {
	if c == nil {
		return field.ErrorList{field.Required(nil, "")}
	}
	var errs field.ErrorList
	name := field.NewPath("metadata", "name")
	if c.Name == "" {
		errs = append(errs, field.Required(name, ""))
	} else {
		for _, message := range validation.IsDNS1123Subdomain(c.Name) {
			errs = append(errs, field.Invalid(name, c.Name, message))
		}
	}
	spec := field.NewPath("spec")
	errs = append(errs, validateSelector(spec.Child("machineConfigPoolSelector"), c.Spec.MachineConfigPoolSelector)...)
	errs = append(errs, c.Spec.ContainerRuntimeConfig.validate(spec.Child("containerRuntimeConfig"))...)
	return append(errs, c.Spec.Holdfast.validate(spec.Child("holdfast"))...)
}

func (c *ContainerRuntimeConfiguration) validate(path *field.Path) field.ErrorList {
	if c == nil {
		return field.ErrorList{field.Required(path, "")}
	}
	var errs field.ErrorList
	if p := c.PidsLimit; p != nil && *p != 0 && *p < 20 {
		errs = append(errs, field.Invalid(path.Child("pidsLimit"), *p, messagePids))
	}
	if c.LogLevel != "" && !slices.Contains(logLevels, c.LogLevel) {
		errs = append(errs, field.Invalid(path.Child("logLevel"), c.LogLevel, messageLogLevel))
	}
	errs = append(errs, validateQuantity(path.Child("logSizeMax"), c.LogSizeMax, messageLogSize, func(q *resource.Quantity) bool {
		return q.Sign() <= 0 || q.CmpInt64(8192) > 0
	})...)
	errs = append(errs, validateQuantity(path.Child("overlaySize"), c.OverlaySize, messageOverlay, notNegative)...)
	if c.DefaultRuntime != "" {
		errs = append(errs, validateEnum(path.Child("defaultRuntime"), string(c.DefaultRuntime), runtimes)...)
	}
	errs = append(errs, validateStores(path.Child("additionalLayerStores"), c.AdditionalLayerStores, MaxLayerStores,
		func(s *AdditionalLayerStore) StorePath { return s.Path })...)
	errs = append(errs, validateStores(path.Child("additionalImageStores"), c.AdditionalImageStores, MaxImageStores,
		func(s *AdditionalImageStore) StorePath { return s.Path })...)
	stores := path.Child("additionalArtifactStores")
	errs = append(errs, validateStores(stores, c.AdditionalArtifactStores, MaxArtifactStores,
		func(s *AdditionalArtifactStore) StorePath { return s.Path })...)
	if len(c.AdditionalArtifactStores) <= MaxArtifactStores {
		for i, s := range c.AdditionalArtifactStores {
			errs = append(errs, s.Filter.validate(stores.Index(i).Child("filter"))...)
		}
	}
	return errs
}

// validateStores checks a list of stores of any kind.
func validateStores[S any](path *field.Path, stores []S, most int, pathOf func(*S) StorePath) field.ErrorList {
	if stores != nil && len(stores) == 0 {
		return tooFew(path)
	}
	errs := tooMany(path, len(stores), most)
	if errs != nil {
		return errs
	}
	seen := map[string]bool{}
	for i := range stores {
		p := string(pathOf(&stores[i]))
		errs = append(errs, validatePath(path.Index(i).Child("path"), p)...)
		if p = strings.TrimSuffix(p, "/"); seen[p] {
			list := path.String()
			errs = append(errs, field.Invalid(path, p, list[strings.LastIndexByte(list, '.')+1:]+" "+messageDuplicates))
		}
		seen[p] = true
	}
	return errs
}

func validatePath(path *field.Path, p string) field.ErrorList {
	if p == "" {
		return field.ErrorList{required(path)}
	}
	if n := utf8.RuneCountInString(p); n > maxPath {
		return field.ErrorList{field.TooLong(path, "", maxPath)}
	}
	var errs field.ErrorList
	for _, rule := range []struct {
		holds   bool
		message string
	}{
		{pathChars.MatchString(p), messagePath},
		{!strings.Contains(p, "//"), messageSlashes},
		{!dotSegments.MatchString(p), messageDots},
		{!ownStorage.MatchString(p), messageOwnStorage},
	} {
		if !rule.holds {
			errs = append(errs, field.Invalid(path, p, rule.message))
		}
	}
	return errs
}

func (f *ArtifactFilter) validate(path *field.Path) field.ErrorList {
	if f == nil {
		return nil
	}
	errs := validatePatterns(path.Child("references"), f.References, maxFiltered)
	errs = append(errs, validatePatterns(path.Child("types"), f.Types, maxFiltered)...)
	return append(errs, validateQuantity(path.Child("maxSize"), f.MaxSize, messageMaxSize, notNegative)...)
}

func (h *HoldfastConfiguration) validate(path *field.Path) field.ErrorList {
	if h == nil {
		return nil
	}
	var errs field.ErrorList
	for _, list := range []struct {
		name     string
		patterns []Pattern
		most     int
	}{
		{"include", h.Include, maxPatterns},
		{"exclude", h.Exclude, maxPatterns},
		{"trusted", h.Trusted, maxPatterns},
		{"pinned", h.Pinned, maxPinned},
		{"artifacts", h.Artifacts, maxPatterns},
	} {
		errs = append(errs, validatePatterns(path.Child(list.name), list.patterns, list.most)...)
	}
	sources := path.Child("sources")
	errs = append(errs, validateStrings(sources, h.Sources, maxPlaces, messageSource, sourceForm)...)
	if repeats(h.Sources, maxPlaces, func(s string) string { return s }) {
		errs = append(errs, field.Invalid(sources, len(h.Sources), messageSources))
	}
	errs = append(errs, validateStrings(path.Child("trustedSources"), h.TrustedSources, maxPlaces, "", nil)...)
	errs = append(errs, validateStrings(path.Child("indexStores"), h.IndexStores, maxPlaces, messagePlace, placeForm)...)
	errs = append(errs, validateStrings(path.Child("indexPublish"), h.IndexPublish, maxPlaces, messagePlace, placeForm)...)
	errs = append(errs, validateMirrors(path.Child("registryMirrors"), h.RegistryMirrors)...)
	if h.CacheLimit != "" {
		errs = append(errs, validateShare(path.Child("cacheLimit"), string(h.CacheLimit))...)
	}
	if h.ArtifactLimit != "" {
		errs = append(errs, validateShare(path.Child("artifactLimit"), string(h.ArtifactLimit))...)
	}
	if h.Disruption != "" {
		errs = append(errs, validateEnum(path.Child("disruption"), string(h.Disruption), disruptions)...)
	}
	return errs
}

func validateMirrors(path *field.Path, mirrors []RegistryMirror) field.ErrorList {
	errs := tooMany(path, len(mirrors), maxMirrored)
	if errs != nil {
		return errs
	}
	for i, m := range mirrors {
		source, list := path.Index(i).Child("source"), path.Index(i).Child("mirrors")
		switch {
		case m.Source == "":
			errs = append(errs, field.Required(source, messageMirrorSource))
		case utf8.RuneCountInString(m.Source) > maxPattern:
			errs = append(errs, field.TooLong(source, "", maxPattern))
		case !mirrorForm.MatchString(m.Source) && !wildcardForm.MatchString(m.Source):
			errs = append(errs, field.Invalid(source, m.Source, messageMirrorSource))
		}
		if len(m.Mirrors) == 0 {
			errs = append(errs, field.Required(list, messageTooFew))
		}
		errs = append(errs, validateStrings(list, m.Mirrors, maxMirrors, messageMirror, mirrorForm)...)
	}
	if repeats(mirrors, maxMirrored, func(m RegistryMirror) string { return m.Source }) {
		errs = append(errs, field.Invalid(path, len(mirrors), messageMirrors))
	}
	return errs
}

// notNegative is the rule of sizes that have no other.
func notNegative(q *resource.Quantity) bool { return q.Sign() >= 0 }

// validateQuantity checks a quantity that has been decoded.
func validateQuantity(path *field.Path, q *resource.Quantity, message string, holds func(*resource.Quantity) bool) field.ErrorList {
	if q == nil {
		return nil
	}
	exact := q.DeepCopy()
	// Comparing writes out all digits: of 1e1000000000, a billion.
	if scale := exact.AsDec().Scale(); scale < -maxExponent || scale > maxExponent {
		return field.ErrorList{field.Invalid(path, "", messageQuantity)}
	}
	if !holds(&exact) {
		return field.ErrorList{field.Invalid(path, fmt.Sprint(&exact), message)}
	}
	return nil
}
