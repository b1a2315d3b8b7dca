// SPDX-License-Identifier: Apache-2.0

package courier

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	nodev1 "github.com/holdfast/holdfast/api/holdfast/v1"
	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// maxReport is more than any agent has to say.
const maxReport = 1 << 20

// view is what was seen on the node.
type view struct {
	stamp     string // of the files that the agent follows
	digest    string // of what is in them, "" if it is not known
	unread    error  // why not
	delivered string // the configuration that was found among them since

	file   os.FileInfo   // the report's
	report *agent.Report // nil: there is none that can be read
}

// look reads what has changed on the node.
func (c *Courier) look() {
	v := &c.node
	if stamp := c.source.Stamp(); stamp != v.stamp {
		want, err := c.source.Load()
		v.stamp, v.digest, v.delivered, v.unread = stamp, want.Digest, "", nil
		if want.Digest == "" {
			v.unread = err
		}
	}
	name := filepath.Join(c.o.StateDir, agent.ReportName)
	info, err := os.Lstat(filepath.Join(c.o.Root, name))
	if err != nil {
		info = nil
	}
	if info == nil && v.file == nil || info != nil && v.file != nil && unchanged(info, v.file) {
		return
	}
	v.file, v.report = info, nil
	if info == nil {
		return
	}
	if v.report, err = c.readReport(name, info); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("the agent's report cannot be read", "err", err)
	}
}

func unchanged(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

func (c *Courier) readReport(name string, info os.FileInfo) (*agent.Report, error) {
	if info.Size() > maxReport {
		return nil, fmt.Errorf("%s: %d bytes: want at most 1 MiB", name, info.Size())
	}
	data, err := render.BaseDir(c.o.Root)(name)
	if err != nil {
		return nil, err
	}
	r := &agent.Report{}
	if err := json.Unmarshal(data[:min(len(data), maxReport)], r); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// finding is how far a node is.
type finding struct {
	state           nodev1.NodeState
	reason, message string
}

// judge says how far the node is with the configuration that is on it, by the agent's report. nil
// means that there is nothing to say yet.
func (c *Courier) judge(desired string) *finding {
	v := &c.node
	if desired == "" {
		c.awaited = ""
		if v.report == nil {
			return &finding{nodev1.NodeDone, "NothingDesired", ""}
		}
		return outcome(v.report)
	}
	if v.digest == "" {
		return &finding{nodev1.NodeDegraded, "NotReadable", fmt.Sprintf("the files in %s cannot be read: %v", render.ObjectsDir, v.unread)}
	}
	if v.report != nil && v.report.Desired == v.digest {
		c.awaited = ""
		return outcome(v.report)
	}
	if c.awaited != v.digest {
		c.awaited, c.since = v.digest, time.Now()
	}
	if time.Since(c.since) < patience {
		return nil
	}
	return &finding{nodev1.NodeWorking, "AgentDoesNotAnswer", "the node's agent has not said within a minute what has become of its configuration: " +
		"`systemctl status " + agent.AgentUnit + "` on the node says why"}
}

// outcome is what a report says.
func outcome(r *agent.Report) *finding {
	switch r.Outcome {
	case agent.Applied, agent.Unchanged, agent.Written:
		return &finding{nodev1.NodeDone, agent.Applied, ""}
	case agent.RolledBack, agent.Failed:
		return &finding{nodev1.NodeDegraded, r.Outcome, r.Error}
	case agent.Waiting:
		return &finding{nodev1.NodeWorking, r.Outcome, r.Error}
	case agent.Rebooting:
		return &finding{nodev1.NodeWorking, r.Outcome, "the node is to boot"}
	}
	return &finding{nodev1.NodeDegraded, "UnknownOutcome", fmt.Sprintf("the node's agent reports %q: this program does not know what that means", r.Outcome)}
}
