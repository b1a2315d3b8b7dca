// SPDX-License-Identifier: Apache-2.0

// Package agent applies a configuration on a node, and keeps it applied.
//
// It looks at each store before a runtime is told of it, withholds what would keep CRI-O
// from starting, writes files so that they can be put back, restarts CRI-O
// only if what it would read has changed, and puts the old files back if it does not come up.
// Whatever it is about to do it notes first: it can be killed between any two
// steps, and the next one goes on. Nothing is written when nothing has changed.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	apiv1 "github.com/holdfast/holdfast/api/v1"
	"github.com/holdfast/holdfast/internal/filelock"
	"github.com/holdfast/holdfast/internal/render"
)

// Options say what the agent works on.
type Options struct {
	Root     string // of the node's file system
	StateDir string // where it remembers, on the node
	Socket   string // CRI-O's, on the node
	Unit     string // CRI-O's
	// Systemctl is the program that starts and stops units, with its first
	// arguments. Empty: nothing is started, as when an image is built.
	Systemctl []string
	// Live means that Root, if it is another than /, is that of the running node, as a container
	// sees it: programs of the node are run with it as their root.
	Live bool
	// Offline means that this is not the node itself, so that nothing on it can be
	// looked at: stores are withheld until the agent looks at them there.
	Offline bool
	// Programs is the directory that the daemon is installed from; "": it is not installed.
	Programs string
	// Retry tries a configuration again that CRI-O did not start with.
	Retry bool
	// Abandon restarts CRI-O also if that takes stores away from it that do not answer.
	Abandon bool
	// Failures is how many times a listed store must fail before it is withheld.
	Failures int

	CheckTimeout time.Duration // for a look at a store
	ReadyTimeout time.Duration // for CRI-O to come up
	Log          *slog.Logger
}

// Defaults are the options on a node.
func Defaults() Options {
	return Options{
		Root: "/", StateDir: "/var/lib/holdfast-agent", Socket: "/var/run/crio/crio.sock", Unit: "crio.service",
		Systemctl: []string{"systemctl"}, Failures: 3, CheckTimeout: 3 * time.Second, ReadyTimeout: 2 * time.Minute, Log: slog.New(slog.DiscardHandler),
	}
}

// Desired is what a node is to have.
type Desired struct {
	Spec     apiv1.ContainerRuntimeConfigSpec
	Problems []render.Problem // what could not be merged
	Digest   string           // tells it from what other files hold, or held; "" if it is of none
	// Foreign means that others write the files of the runtimes, and the daemon's: see
	// [apiv1.FilesAnnotation]. The agent changes none of them, and never restarts CRI-O.
	Foreign bool
}

// Report says what the agent found and did.
type Report struct {
	Outcome  string           `json:"outcome"`
	Error    string           `json:"error,omitempty"`
	Desired  string           `json:"desired,omitempty"` // Desired.Digest of what it is about
	Applied  string           `json:"applied"`           // tells files apart that are on the node
	Stores   []StoreStatus    `json:"stores"`
	Runtime  RuntimeStatus    `json:"runtime"`
	Daemon   DaemonStatus     `json:"daemon"`
	Problems []render.Problem `json:"problems"`
	Edits    []Edit           `json:"edits"`
	Restarts int              `json:"restarts"` // of CRI-O, this time
}

// RuntimeStatus is CRI-O.
type RuntimeStatus struct {
	Up      bool   `json:"up"`
	Version string `json:"version,omitempty"`
}

// Agent applies configurations. Its methods may not be called concurrently.
type Agent struct {
	o         Options
	host      host
	stateDir  string
	runtime   runtime
	checker   *checker
	failures  map[Store]int
	compared  map[string]bool // programs that are known to be the same
	asked     program         // the daemon's
	rebooting bool            // it has asked for a reboot
	leaving   bool            // it is being uninstalled
	starting  time.Time       // since when CRI-O is seen to start with a change
	log       *slog.Logger
	now       func() time.Time
}

// New returns an agent. It starts nothing.
func New(o Options) (*Agent, error) {
	if info, err := os.Stat(o.Root); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("there is no node at %s: want the root directory of its file system", o.Root)
	}
	h := host{o.Root}
	stateDir, err := h.path(o.StateDir)
	if err != nil {
		return nil, err
	}
	socket, err := h.path(o.Socket)
	if err != nil {
		return nil, err
	}
	chroot := ""
	if o.Live && o.Root != "/" {
		chroot = o.Root
		o.Systemctl = append([]string{h.program(o.Systemctl[0])}, o.Systemctl[1:]...)
	}
	return &Agent{
		o: o, host: h, stateDir: stateDir, log: o.Log, now: time.Now, failures: map[Store]int{}, compared: map[string]bool{},
		runtime: runtime{socket: socket, unit: o.Unit, systemctl: o.Systemctl, chroot: chroot},
		checker: &checker{host: h, patience: o.CheckTimeout, probe: func(ctx context.Context, path string) error {
			return probeImageStore(ctx, o.Root, path)
		}},
	}, nil
}

// ErrRunning means that another agent is at work.
var ErrRunning = errors.New("another agent is at work on this node")

// Sync brings the node to what is desired, as far as it can be had. The report is
// there in any case; the error is what it says, too.
func (a *Agent) Sync(ctx context.Context, want Desired) (*Report, error) {
	r := &Report{Desired: want.Digest, Problems: want.Problems, Stores: []StoreStatus{}, Edits: []Edit{}}
	unlock, err := a.lock(ctx)
	if err == nil {
		defer unlock()
		err = a.sync(ctx, want, r)
	}
	if r.Problems == nil {
		r.Problems = []render.Problem{}
	}
	if err != nil {
		r.Outcome, r.Error = Failed, err.Error()
	}
	return r, err
}

func (a *Agent) sync(ctx context.Context, want Desired, r *Report) error {
	st, err := loadState(a.stateDir)
	if err != nil {
		return err
	}
	before, err := st.text()
	if err != nil {
		return err
	}
	if !want.Foreign || !st.Foreign { // once they are others', nothing of ours is left there
		if err := a.host.clean(); err != nil {
			return err
		}
	}
	st.turn(want.Foreign)
	if up, err := a.runtime.ask(ctx); err == nil {
		r.Runtime = RuntimeStatus{true, up.version}
		if st.Pending == nil && up.process != st.Loaded.Process {
			st.Loaded.Stores = st.Stores // it has started since, with what is in the files
		}
	}
	if want.Foreign {
		r.Outcome, r.Applied, err = a.observe(ctx, st, want.Spec, r)
	} else {
		r.Outcome, err = a.pursue(ctx, st, want.Spec, r)
		r.Applied = st.digest()
	}
	for _, e := range st.Edits {
		r.Edits = append(r.Edits, e)
	}
	slices.SortFunc(r.Edits, func(a, b Edit) int { return cmp.Compare(a.Path, b.Path) })
	if err != nil {
		return err
	}
	if after, err := st.text(); err != nil || after == before {
		return err
	}
	return st.save(a.stateDir)
}

// pursue goes on with a change that is under way, or begins one.
func (a *Agent) pursue(ctx context.Context, st *state, want apiv1.ContainerRuntimeConfigSpec, r *Report) (string, error) {
	outcome, done, err := a.recoverChange(ctx, st, r)
	if err != nil || done {
		return outcome, err
	}
	outcome, err = a.bring(ctx, st, want, false, r)
	if err == nil && (outcome == RolledBack || outcome == Waiting) {
		err = a.keepProved(ctx, st, want, r)
	}
	return outcome, err
}

// bring plans and applies.
func (a *Agent) bring(ctx context.Context, st *state, spec apiv1.ContainerRuntimeConfigSpec, keeping bool, r *Report) (string, error) {
	p, err := a.planFor(ctx, st, spec, r)
	if err != nil {
		return Failed, err
	}
	p.keeping = keeping
	outcome, err := a.apply(ctx, st, p, r)
	if err != nil {
		return outcome, err
	}
	if a.leaving && st.Pending != nil && st.Pending.Phase == unproved {
		st.commit() // nobody will be there to undo it
	}
	a.retireDaemon(ctx, st, p, r)
	return outcome, nil
}

// keepProved keeps the node at what it had while what is asked for cannot be had: also of
// that, stores may die that CRI-O would not start with.
func (a *Agent) keepProved(ctx context.Context, st *state, asked apiv1.ContainerRuntimeConfigSpec, r *Report) error {
	if st.Spec == nil || st.Pending != nil || digestOfSpec(st.Spec) == digestOfSpec(&asked) {
		return nil
	}
	failure, kept := st.Failed, *r
	_, err := a.bring(ctx, st, *st.Spec, true, &kept)
	st.Failed = failure
	r.Stores, r.Daemon, r.Restarts = kept.Stores, kept.Daemon, kept.Restarts
	return err
}

// turn is how long one agent waits for another, whose look is mostly over at once.
const turn = 10 * time.Second

// lock keeps two agents from working at once.
func (a *Agent) lock(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(a.stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("locking the node: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(a.stateDir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the node: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, turn, ErrRunning)
	defer cancel()
	if err := filelock.Wait(ctx, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}
