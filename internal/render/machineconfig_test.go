// SPDX-License-Identifier: Apache-2.0

package render

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"reflect"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	apiv1 "github.com/holdfast/holdfast/api/v1"
)

// What a node takes out of a MachineConfig is what the controller has put in.
func TestObjectThroughMachineConfig(t *testing.T) {
	specs := map[string]apiv1.ContainerRuntimeConfigSpec{"nothing": {}}
	for _, dir := range []string{"lazy", "daemon"} {
		specs[dir], _ = Merge(objects(t, "testdata/"+dir+"/objects.yaml"))
	}
	for name, spec := range specs {
		for _, byMCO := range []bool{false, true} {
			object, err := Object("worker", spec, byMCO)
			if err != nil {
				t.Fatal(err)
			}
			mc, err := MachineConfig("worker", []File{{DaemonConf, []byte("# another\n")}, object})
			if err != nil {
				t.Fatal(err)
			}
			text, err := Unpack(mc, ClusterObject)
			if err != nil || !bytes.Equal(text, object.Data) {
				t.Fatalf("%s: %s, %v", name, text, err)
			}
			read, err := Objects(ClusterObject, bytes.NewReader(text))
			if err != nil || len(read) != 1 || read[0].Name != "worker" {
				t.Fatalf("%s: %v, %v\n%s", name, read, err, text)
			}
			if by := read[0].Annotations[apiv1.FilesAnnotation]; (by == apiv1.FilesByMachineConfigOperator) != byMCO {
				t.Errorf("%s: files by %q", name, by)
			}
			merged, problems := Merge(read)
			again, err := Object("worker", merged, byMCO)
			if err != nil || problems != nil || !bytes.Equal(again.Data, text) {
				t.Errorf("%s:\n%s\nthen\n%s, %v", name, text, again.Data, err)
			}
		}
	}
}

// machineConfig has files of Ignition's configuration, as JSON.
func machineConfig(files string) *apiv1.MachineConfig {
	return &apiv1.MachineConfig{
		ObjectMeta: metav1.ObjectMeta{Name: "rendered-worker-1"},
		Spec:       apiv1.MachineConfigSpec{Config: runtime.RawExtension{Raw: []byte(`{"storage": {"files": [` + files + `]}}`)}},
	}
}

// bomb is n zeros, compressed.
func bomb(t testing.TB, n int) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return "data:;base64," + base64.StdEncoding.EncodeToString(b.Bytes())
}

func TestUnpackRefuses(t *testing.T) {
	for source, want := range map[string]string{
		`{"path": "/a", "contents": {"source": "https://example.com/a"}}`:                                       "reading /a of MachineConfig rendered-worker-1",
		`{"path": "/a", "contents": {"source": "data:;base64,!"}}`:                                              "reading /a of MachineConfig rendered-worker-1",
		`{"path": "/a", "contents": {"source": "data:,a", "compression": "xz"}}`:                                "want gzip",
		`{"path": "/a", "contents": {"source": "data:,a", "compression": "gzip"}}`:                              "reading /a",
		`{"path": "/a", "contents": {"source": "` + bomb(t, maxConfig+1) + `", "compression": "gzip"}}`:         "more than 16 MiB",
		`{"path": "/a", "contents": {"source": 1}}`:                                                             "reading MachineConfig rendered-worker-1",
		`{"path": "/a", "contents": {"source": "data:,a"}}, {"path": "/a", "contents": {"source": "nonsense"}}`: "reading /a",
	} {
		if data, err := Unpack(machineConfig(source), "/a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: %q, %v; want %s", source, data, err, want)
		}
	}
	for _, source := range []string{``, `{"path": "/b", "contents": {"source": "data:,b"}}`} {
		if _, err := Unpack(machineConfig(source), "/a"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", source, err)
		}
	}
}

// FuzzUnpack: whatever the API server stores, a node reads a file of it or says that there is
// none, within a bound.
func FuzzUnpack(f *testing.F) {
	for _, raw := range []string{
		``, `null`, `{}`, `[]`, `{"storage": null}`, `{"storage": {"files": [null]}}`, `{"storage": {"files": [{"path": "/a"}]}}`,
		`{"storage": {"files": [{"path": "/a", "contents": {"source": "data:,a%20b"}}]}}`,
		`{"storage": {"files": [{"path": "/a", "contents": {"source": "data:text/plain;charset=utf-8;base64,YQ=="}}]}}`,
		`{"storage": {"files": [{"path": "/a", "contents": {"source": "` + bomb(f, 100) + `", "compression": "gzip"}}]}}`,
		`{"storage": {"files": [{"path": "/a", "contents": {"source": "data:,first"}}, {"path": "/a", "contents": {"source": ""}}]}}`,
	} {
		f.Add([]byte(raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		mc := &apiv1.MachineConfig{Spec: apiv1.MachineConfigSpec{Config: runtime.RawExtension{Raw: raw}}}
		data, err := Unpack(mc, "/a")
		if len(data) > max(maxConfig, len(raw)) {
			t.Errorf("%d bytes of %d", len(data), len(raw))
		}
		if err == nil && !json.Valid(raw) {
			t.Errorf("%q is read", raw)
		}
		again, errAgain := Unpack(mc, "/a")
		if !reflect.DeepEqual(data, again) || (err == nil) != (errAgain == nil) {
			t.Errorf("%q, then %q", data, again)
		}
	})
}
