// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast/holdfast/internal/agent/agenttest"
	"github.com/holdfast/holdfast/internal/render"
	"github.com/holdfast/holdfast/test/lab"
)

// nodeNumbers are those of the agent as a service, with a stand-in for CRI-O.
type nodeNumbers struct {
	Start    []time.Duration `json:"start"`    // CRI-O's own, without the agent
	Change   []time.Duration `json:"change"`   // from a changed file until CRI-O is up again
	Restarts []int           `json:"restarts"` // of CRI-O for each change
	Written  []string        `json:"written"`  // files that were written without a change
	PeakRSS  int64           `json:"peakRSS"`  // of the agent, bytes
}

// quiet is how long nothing is changed: several looks of the agent.
const (
	quiet   = 25 * time.Second
	settled = 2 * time.Second // the agent notes what it has done
)

// measureNode changes the configuration of a node.
func (b *bench) measureNode(ctx context.Context) (err error) {
	b.log("node: changes of the configuration")
	dir := filepath.Join(b.dir, "node")
	if err := lab.RemoveAll(dir); err != nil {
		return err
	}
	root, objects := filepath.Join(dir, "root"), filepath.Join(dir, "objects")
	if err := errors.Join(os.MkdirAll(root, 0o755), os.MkdirAll(objects, 0o755)); err != nil { //nolint:gosec // a node's
		return err
	}
	n, err := agenttest.Start(root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close(), lab.RemoveAll(dir)) }()
	r := &b.report.Node
	for range b.rounds {
		begin := time.Now()
		if out, code := n.Systemd.Do("restart", "crio.service"); code != 0 {
			return fmt.Errorf("starting the stand-in for CRI-O: %s", out)
		}
		r.Start = append(r.Start, time.Since(begin))
	}
	n.Systemd.Calls()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(b.binary), "holdfast-operator"), //nolint:gosec // our own
		"agent", "--file", objects, "--root", root, "--systemctl", strings.Join(n.Systemctl(self), " "), "--without-install")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the agent (make build): %w", err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	for i := range b.rounds {
		took, restarts, err := changeNode(ctx, n, objects, 100+i)
		if err != nil {
			return err
		}
		r.Change, r.Restarts = append(r.Change, took), append(r.Restarts, restarts)
	}
	time.Sleep(settled)
	before := stamps(root)
	select {
	case <-time.After(quiet):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for name, stamp := range stamps(root) {
		if before[name] != stamp {
			r.Written = append(r.Written, name)
		}
	}
	r.PeakRSS, err = peakRSS(cmd.Process.Pid)
	return err
}

// changeNode changes one setting, and returns when CRI-O is up with it.
func changeNode(ctx context.Context, n *agenttest.Node, objects string, limit int) (time.Duration, int, error) {
	text := fmt.Sprintf("apiVersion: machineconfiguration.openshift.io/v1\nkind: ContainerRuntimeConfig\nmetadata: {name: bench}\nspec:\n  containerRuntimeConfig: {pidsLimit: %d}\n", limit)
	begin := time.Now()
	if err := os.WriteFile(filepath.Join(objects, "bench.yaml"), []byte(text), 0o600); err != nil {
		return 0, 0, err
	}
	restarts := 0
	for end := begin.Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		// Calls waits for what is under way: a restart is there when it is over.
		for _, c := range n.Systemd.Calls() {
			if c == "restart crio.service" {
				restarts++
			}
		}
		data, err := os.ReadFile(n.Path(render.PidsLimitConf))
		if restarts > 0 && err == nil && strings.Contains(string(data), strconv.Itoa(limit)) {
			return time.Since(begin), restarts, nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return 0, 0, errors.Join(errors.New("the change has not arrived within a minute"), ctx.Err())
		}
	}
}

// stamps are the times of all files that the agent might write.
func stamps(root string) map[string]string {
	all := map[string]string{}
	for _, dir := range []string{"etc", "var/lib/holdfast-agent"} {
		_ = filepath.Walk(filepath.Join(root, dir), func(path string, info os.FileInfo, err error) error {
			if err == nil {
				all[path] = fmt.Sprint(info.Size(), info.ModTime().UnixNano())
			}
			return nil
		})
	}
	return all
}

// peakRSS is the most memory that a process has had.
func peakRSS(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the agent's memory: %w", err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return kib << 10, err
}

func (r *nodeNumbers) bars() []bar {
	if len(r.Change) == 0 {
		return nil
	}
	start, change := seconds(r.Start), seconds(r.Change)
	return []bar{
		{What: "change of a node's configuration, beyond CRI-O's own start", Unit: "s", Want: 2, Measured: change - start,
			Detail: fmt.Sprintf("%.2f s until CRI-O is ready, its start alone %.2f s", change, start)},
		{What: "restarts of CRI-O for a change", Unit: "", Want: 1, Measured: float64(slices.Max(r.Restarts)), Detail: "the most of all changes"},
		{What: "files written without a change", Unit: "", Want: 0, Measured: float64(len(r.Written)), Detail: fmt.Sprintf("within %s", quiet)},
		{What: "memory of the agent, peak", Unit: "MiB", Want: 60, Measured: float64(r.PeakRSS) / (1 << 20), Detail: "as a service"},
	}
}
