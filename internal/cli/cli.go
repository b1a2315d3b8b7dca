// SPDX-License-Identifier: Apache-2.0

// Package cli is what the commands of both programs have in common.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// UsageError is a mistake on the command line.
type UsageError struct{ err error }

func (e *UsageError) Error() string { return e.err.Error() + " (see --help)" }

// Unwrap returns the mistake.
func (e *UsageError) Unwrap() error { return e.err }

// Usage makes an error one of the command line.
func Usage(err error) error { return &UsageError{err} }

// IsUsage reports whether an error is a mistake on the command line.
func IsUsage(err error) bool {
	var usage *UsageError
	return errors.As(err, &usage)
}

// Args makes the wrong number of arguments a usage error.
func Args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return Usage(err)
		}
		return nil
	}
}

// Execute runs a command. One that does not exist is a usage error.
func Execute(ctx context.Context, cmd *cobra.Command) error {
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Usage(err) })
	err := cmd.ExecuteContext(ctx)
	if err != nil && !IsUsage(err) && strings.HasPrefix(err.Error(), "unknown command") { // cobra has no type for it
		return Usage(err)
	}
	return err
}

// Print writes v as JSON if that was asked for, and else calls text.
func Print(w io.Writer, asJSON bool, v any, text func() error) error {
	if !asJSON {
		return text()
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	return nil
}
