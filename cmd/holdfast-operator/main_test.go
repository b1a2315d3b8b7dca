// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"holdfast-operator": func() { os.Exit(Main()) }})
}

// The scripts in testdata run the program on root directories of their own. Beyond
// testscript's own commands they have:
//
//	exits CODE NAME ARGS  runs a command that must end with that exit code
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				err = ts.Exec(args[1], args[2:]...)
				got := 0
				var ended *exec.ExitError
				if errors.As(err, &ended) {
					got = ended.ExitCode()
				}
				if neg || got != want {
					ts.Fatalf("exit code %d (%v), want %d", got, err, want)
				}
			},
		},
	})
}
