package fusedev

import (
	"os"
	"os/exec"
	"testing"
	"time"
	"strings"
	"context"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

type slowDev struct{ fileDevice; delay time.Duration }
func (d slowDev) Wait(ctx context.Context, _ int64, _ int) error { if d.delay>0 {time.Sleep(d.delay)}; return nil }

func TestAdhoc(t *testing.T) {
	sh := func(c string) { out, err := exec.Command("sh", "-c", c).CombinedOutput(); t.Logf("%s\n%s %v", c, strings.TrimSpace(string(out)), err) }
	os.MkdirAll("/var/tmp/fdx/src", 0755)
	sh("cd /var/tmp/fdx; test -f src/big || dd if=/dev/urandom of=src/big bs=1M count=1024 2>&1; mkdir -p src/small; test -d src/small/d0 || for d in 0 1 2 3 4 5 6 7 8 9; do mkdir src/small/d$d; for i in $(seq 300); do head -c 6000 /dev/urandom > src/small/d$d/$i; done; done; test -f meta || mkfs.erofs --chunksize=4096 --blobdev=data meta src 2>&1 | tail -3; cat data >/dev/null; ls -la")
	f, _ := os.Open("/var/tmp/fdx/data")
	st, _ := f.Stat()
	s, _ := serve(t)
	d := digest.FromString("x")
	dev := &slowDev{fileDevice{f, st.Size()}, 0}
	s.Add(d, dev)
	p := s.Path(d)
	for range 3 { sh("dd if="+p+" of=/dev/null bs=1M 2>&1 | tail -1") }
	sh("dd if="+p+" of=/dev/null bs=1M iflag=direct 2>&1 | tail -1")
	sh("dd if="+p+" of=/dev/null bs=128k 2>&1 | tail -1")
	sh("dd if="+p+" of=/dev/null bs=4k count=100000 2>&1 | tail -1")
	dir := "/var/tmp/fdx/mnt"
	os.MkdirAll(dir, 0755)
	for _, delay := range []time.Duration{0, time.Millisecond} {
		dev.delay = delay
		t.Log("delay", delay)
		if err := unix.Mount("/var/tmp/fdx/meta", dir, "erofs", unix.MS_RDONLY, "device="+p); err != nil { t.Error(err); return }
		sh("cat /sys/class/bdi/$(mountpoint -d "+dir+")/read_ahead_kb; dd if="+dir+"/big of=/dev/null bs=1M 2>&1 | tail -1; grep -c . /dev/null; time -p sh -c 'cat "+dir+"/small/*/* | sha256sum; cat /var/tmp/fdx/src/small/*/* | sha256sum'")
		unix.Unmount(dir, 0)
	}
	sh("time -p sh -c 'cmp /var/tmp/fdx/data "+p+"'")
	sh("L=$(losetup -f --show -r "+p+"); dd if=$L of=/dev/null bs=1M 2>&1|tail -1; losetup -d $L")
	b, _ := os.ReadFile("/proc/self/status")
	for _, l := range strings.Split(string(b), "\n") { if strings.HasPrefix(l, "VmHWM") { t.Log(l) } }
	sh("cat /proc/loadavg")
}
