// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfast/holdfast/internal/agent"
	"github.com/holdfast/holdfast/internal/render"
)

// What happens to a node in no particular order: configurations, good and bad, stores that go
// and come, crashes, boots, edits. After each look CRI-O could be started, the administrator's
// lines are there, nothing is done twice; and in the end all is as it should be.
func TestWhateverHappens(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { whateverHappens(t, rand.New(rand.NewPCG(seed, 7))) })
	}
}

func whateverHappens(t *testing.T, random *rand.Rand) {
	n := newNode(t, func(o *agent.Options) { o.CheckTimeout = time.Minute }) // nothing hangs, but for a busy machine
	layer := n.ImageStore(t, "/mnt/used", "quay.io/used:1")
	n.ImageStore(t, "/mnt/other", "quay.io/other:1")
	n.Write(t, render.StorageConf, "# line 0\n"+n.Read(t, render.StorageConf))
	n.startCRIO(t)
	specs := []string{
		"  containerRuntimeConfig: {}\n",
		"  containerRuntimeConfig: {additionalImageStores: [{path: /mnt/used}]}\n",
		"  containerRuntimeConfig: {additionalImageStores: [{path: /mnt/used}, {path: /mnt/other}]}\n",
		"  containerRuntimeConfig: {pidsLimit: 100, additionalImageStores: [{path: /mnt/other}]}\n",
		"  containerRuntimeConfig: {defaultRuntime: runc, additionalImageStores: [{path: /mnt/used}]}\n", // there is no runc
		"  containerRuntimeConfig: {overlaySize: 1Gi, pidsLimit: 30}\n",                                  // nor XFS
	}
	spec, lines, log := 2, 1, []string{}
	away := map[string]bool{}
	look := func() *agent.Report {
		r, err := n.Sync(t.Context(), want(t, specs[spec]))
		if err != nil {
			t.Fatalf("%v after\n%s\n%s", err, strings.Join(log, "\n"), n.log)
		}
		log = append(log, fmt.Sprintf("looked with %d: %s %s", spec, r.Outcome, r.Error))
		return r
	}
	check := func(what string, ok bool, detail any) {
		t.Helper()
		if !ok {
			t.Fatalf("%s: %v, after\n%s\n%s", what, detail, strings.Join(log, "\n"), n.Read(t, render.StorageConf))
		}
	}
	look()
	n.Refer(t, layer, "quay.io/app:1")
	for range 25 {
		switch event := random.IntN(8); event {
		case 0, 1:
			spec = random.IntN(len(specs))
		case 2, 3:
			store := []string{"/mnt/used", "/mnt/other"}[random.IntN(2)]
			from, to := store, store+".away"
			if away[store] {
				from, to = to, from
			}
			n.move(t, from, to)
			away[store] = !away[store]
			log = append(log, from+" is "+to)
		case 4:
			n.restartAgent(t)
			log = append(log, "a new agent")
		case 5:
			n.Write(t, render.StorageConf, fmt.Sprintf("# line %d\n", lines)+n.Read(t, render.StorageConf))
			lines++
			log = append(log, "edited")
		case 6:
			n.Systemd.Kill("crio.service")
			look()
			out, _ := n.Systemd.Do("start", "crio.service")
			log = append(log, "CRI-O crashed, and started: "+out)
		case 7:
			n.Systemd.Boot()
			n.restartAgent(t)
			look()
			out, _ := n.Systemd.Do("start", "crio.service")
			log = append(log, "booted: "+out)
		}
		r := look()
		// One that fails, one back, and one for a store that came at the same time.
		check("restarts of one look", r.Restarts <= 3, r.Restarts)
		if r.Outcome == agent.Written {
			continue // the next look proves it, or undoes it
		}
		r = look() // it may note what it found
		check("restarts without a reason", r.Restarts == 0, r.Restarts)
		files, state := n.files(t), n.Read(t, "/var/lib/holdfast-agent/state.json")
		r = look()
		check("restarts without a reason", r.Restarts == 0, r.Restarts)
		// A store that could be listed after a restart is tried again, in a directory there.
		maps.DeleteFunc(files, func(name, _ string) bool { return name == "/var/lib/holdfast-agent" })
		now := n.files(t)
		maps.DeleteFunc(now, func(name, _ string) bool { return name == "/var/lib/holdfast-agent" })
		check("files written without a reason", maps.Equal(files, now), cmp.Diff(state, n.Read(t, "/var/lib/holdfast-agent/state.json")))
		err := n.WouldStart(t)
		check("CRI-O would start", err == nil, err)
		for i := range lines {
			check("the administrator's lines", strings.Contains(n.Read(t, render.StorageConf), fmt.Sprintf("# line %d\n", i)), i)
		}
	}
	for store, gone := range away {
		if gone {
			n.move(t, store+".away", store)
		}
	}
	spec = 2
	log = append(log, "all is well")
	for range 2 {
		look()
	}
	if _, code := n.Systemd.Do("start", "crio.service"); code != 0 {
		check("CRI-O runs", false, n.Read(t, "crio.service.log"))
	}
	look()
	r := look()
	check("outcome", r.Outcome == agent.Unchanged && r.Complete(), r)
	check("stores", n.listed(t) == "/mnt/used /mnt/other", n.listed(t))
	_, err := n.Images(t)
	check("images", err == nil, err)
}
