// SPDX-License-Identifier: Apache-2.0

package v1

import (
	"regexp"
	"slices"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// What an API server says of minLength and minItems, which are 1 where they are set.
const (
	messageTooShort = "should be at least 1 chars long"
	messageTooFew   = "should have at least 1 items"
)

// maxQuantity is the longest text of a quantity, maxExponent bounds its power of ten:
// no text that matches quantityCost has a larger one.
const (
	maxQuantity = 32
	maxExponent = 1100
)

var (
	// quantityForm is the pattern of the definition; what it lets through need not be a quantity.
	quantityForm = regexp.MustCompile(`^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$`)
	// quantityCost is what it does not cost much to decode.
	quantityCost = regexp.MustCompile(`^[0-9.+-]{1,40}([eE][0-9+-]{1,3}|[a-zA-Z]{0,2})$`)
)

// required says what is wrong with a text that is empty or not there: a decoded
// object does not tell these apart, and an API server has a message for each.
func required(path *field.Path) *field.Error { return field.Required(path, messageTooShort) }

func tooFew(path *field.Path) field.ErrorList {
	return field.ErrorList{field.Invalid(path, 0, messageTooFew)}
}

func tooMany(path *field.Path, n, most int) field.ErrorList {
	if n <= most {
		return nil
	}
	return field.ErrorList{field.TooMany(path, n, most)}
}

// validateQuantityText checks a quantity before it is decoded.
func validateQuantityText(path *field.Path, s string) field.ErrorList {
	if utf8.RuneCountInString(s) > maxQuantity {
		return field.ErrorList{field.TooLong(path, "", maxQuantity)}
	}
	var errs field.ErrorList
	if !quantityForm.MatchString(s) {
		errs = append(errs, field.Invalid(path, s, "should match '"+quantityForm.String()+"'"))
	}
	valid := quantityCost.MatchString(s)
	if valid {
		_, err := resource.ParseQuantity(s)
		valid = err == nil
	}
	if !valid {
		errs = append(errs, field.Invalid(path, s, messageQuantity))
	}
	return errs
}

func validateEnum(path *field.Path, value string, supported []string) field.ErrorList {
	if slices.Contains(supported, value) {
		return nil
	}
	return field.ErrorList{field.NotSupported(path, value, supported)}
}

func validateSelector(path *field.Path, s *metav1.LabelSelector) field.ErrorList {
	if s == nil {
		return nil
	}
	for i, e := range s.MatchExpressions {
		path := path.Child("matchExpressions").Index(i)
		valid := false
		switch e.Operator {
		case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
			valid = len(e.Values) > 0
		case metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist:
			valid = len(e.Values) == 0
		case "":
			return field.ErrorList{field.Required(path.Child("operator"), messageSelector)}
		}
		if e.Key == "" {
			return field.ErrorList{field.Required(path.Child("key"), messageSelector)}
		}
		if !valid {
			return field.ErrorList{field.Invalid(path.Child("operator"), e.Operator, messageSelector)}
		}
	}
	return nil
}

func validateShare(path *field.Path, s string) field.ErrorList {
	if utf8.RuneCountInString(s) > maxShare {
		return field.ErrorList{field.TooLong(path, "", maxShare)}
	}
	if !shareForm.MatchString(s) {
		return field.ErrorList{field.Invalid(path, s, messageShare)}
	}
	return nil
}

func validatePatterns(path *field.Path, patterns []Pattern, most int) field.ErrorList {
	errs := tooMany(path, len(patterns), most)
	if errs != nil {
		return errs
	}
	for i, p := range patterns {
		if p == "" {
			errs = append(errs, field.Invalid(path.Index(i), "", messageTooShort))
		} else if utf8.RuneCountInString(string(p)) > maxPattern {
			errs = append(errs, field.TooLong(path.Index(i), "", maxPattern))
		}
	}
	return errs
}

// validateStrings checks a list of texts, each against a form if there is one.
func validateStrings(path *field.Path, list []string, most int, message string, form *regexp.Regexp) field.ErrorList {
	errs := tooMany(path, len(list), most)
	if errs != nil {
		return errs
	}
	for i, s := range list {
		if utf8.RuneCountInString(s) > maxPattern {
			errs = append(errs, field.TooLong(path.Index(i), "", maxPattern))
		} else if form != nil && !form.MatchString(s) {
			errs = append(errs, field.Invalid(path.Index(i), s, message))
		}
	}
	return errs
}

// repeats reports whether two elements of a list have the same key. A list that
// is too long is wrong anyway.
func repeats[E any](list []E, most int, key func(E) string) bool {
	if len(list) > most {
		return false
	}
	seen := make(map[string]bool, len(list))
	for _, e := range list {
		if seen[key(e)] {
			return true
		}
		seen[key(e)] = true
	}
	return false
}
