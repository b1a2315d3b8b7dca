// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Systemd stands in for systemd: it runs the units of a node, and does what
// systemctl asks for. It may be used concurrently.
type Systemd struct {
	root string

	mu    sync.Mutex // protects the fields below
	units map[string]*unit
	calls []string
}

type unit struct {
	cmd    *exec.Cmd
	ended  chan struct{}
	failed bool
	log    *os.File
}

func (u *unit) running() bool {
	if u == nil || u.cmd == nil {
		return false
	}
	select {
	case <-u.ended:
		return false
	default:
		return true
	}
}

// reply is what Systemd says to systemctl.
type reply struct {
	Out  string
	Code int
}

// startTimeout is how long a unit may take to get ready.
const startTimeout = 4 * time.Second

// Calls are the calls that changed something, in order, and forgets them.
func (s *Systemd) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = nil
	return calls
}

// Do does what `systemctl args` would, and returns what it prints and its exit code.
func (s *Systemd) Do(args ...string) (string, int) {
	args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return strings.HasPrefix(a, "--") && a != "--now" })
	verb, names := args[0], slices.DeleteFunc(slices.Clone(args[1:]), func(a string) bool { return a == "--now" })
	now := slices.Contains(args, "--now")
	s.mu.Lock()
	defer s.mu.Unlock()
	if verb == "is-active" {
		state := s.state(names[0])
		if state == "active" {
			return state + "\n", 0
		}
		return state + "\n", 3
	}
	if verb == "show" {
		return "loaded\n", 0
	}
	if verb != "reset-failed" {
		s.calls = append(s.calls, strings.Join(args, " "))
	}
	var err error
	for _, name := range names {
		u := s.units[name]
		switch {
		case verb == "restart", verb == "enable" && now, verb == "start":
			if verb != "restart" && u.running() {
				continue
			}
			s.stop(u)
			err = errors.Join(err, s.start(name))
		case verb == "stop", verb == "disable" && now:
			s.stop(u)
		case verb == "reset-failed" && u != nil:
			u.failed = false
		case verb == "reload" && !u.running():
			err = fmt.Errorf("unit %s is not active", name)
		}
	}
	if err != nil {
		return err.Error() + "\n", 1
	}
	return "", 0
}

func (s *Systemd) state(name string) string {
	u := s.units[name]
	switch {
	case u.running():
		return "active"
	case u != nil && u.failed:
		return "failed"
	}
	return "inactive"
}

// start runs a unit's process and waits until it is ready, as for one of Type=notify.
func (s *Systemd) start(name string) error {
	known := map[string][2]string{"crio.service": {crioCommand, crioSocket}, "holdfast.service": {daemonCommand, daemonSocket}}
	program, socket := known[name][0], known[name][1]
	if program == "" {
		return nil // the agent's own: tests run it
	}
	log, err := os.OpenFile(filepath.Join(s.root, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	u := &unit{cmd: exec.Command("/proc/self/exe", program, s.root), ended: make(chan struct{}), log: log} //nolint:noctx,gosec // it is stopped below
	u.cmd.Stdout, u.cmd.Stderr = log, log
	if err := u.cmd.Start(); err != nil {
		return errors.Join(err, log.Close())
	}
	s.units[name] = u
	go func() {
		_ = u.cmd.Wait()
		_ = log.Close()
		close(u.ended)
	}()
	for end := time.Now().Add(startTimeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !u.running() {
			u.failed = true
			return fmt.Errorf("job for %s failed because the control process exited", name)
		}
		if c, err := net.Dial("unix", filepath.Join(s.root, socket)); err == nil {
			return c.Close()
		}
	}
	s.stop(u)
	u.failed = true
	return fmt.Errorf("job for %s failed because a timeout was exceeded", name)
}

func (s *Systemd) stop(u *unit) {
	if u.running() {
		_ = u.cmd.Process.Signal(syscall.SIGKILL)
		<-u.ended
	}
}

// Kill ends the process of a unit, as a crash does.
func (s *Systemd) Kill(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop(s.units[name])
}

// Boot stops everything and forgets it, as a boot does.
func (s *Systemd) Boot() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.units {
		s.stop(u)
	}
	s.units = map[string]*unit{}
}

// systemdSocket is where `systemctl` of these tests finds Systemd.
func systemdSocket(root string) string { return filepath.Join(root, "systemd.sock") }

// serve answers systemctl.
func (s *Systemd) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close() //nolint:errcheck // all has been said
			line, err := bufio.NewReader(c).ReadBytes('\n')
			var args []string
			if err == nil && json.Unmarshal(line, &args) == nil && len(args) > 0 {
				out, code := s.Do(args...)
				_ = json.NewEncoder(c).Encode(reply{out, code})
			}
		}()
	}
}

// systemctl is the program that the agent runs.
func systemctl(root string, args []string) int {
	c, err := net.Dial("unix", systemdSocket(root))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Close() //nolint:errcheck // all has been said
	var r reply
	if err := errors.Join(json.NewEncoder(c).Encode(args), json.NewDecoder(c).Decode(&r)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, _ = io.WriteString(os.Stdout, r.Out)
	return r.Code
}
