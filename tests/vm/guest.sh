#!/bin/bash
# What tests/tests/vm.rs has a virtual machine do: kernel 6.1, systemd, cgroup2 alone with all controllers. Everything is run
# once and printed in sections, see lib.sh; nothing is judged here.
. "$(dirname "$0")/lib.sh"

kernel() { uname -r; stat -fc %T /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers; ps -p 1 -o comm=; }
section kernel kernel
mkdir -p /etc/pillion/policy.d && cp web.yaml /etc/pillion/policy.d/
redirects

section run within_near pillion run --policy limits.yaml -- first
# The companion's own cgroup, while the command runs.
limits() {
  within_near pillion run --policy limits.yaml -- sh -c '
    cd /sys/fs/cgroup/pillion.slice/process*/companion-r && for f in memory.max pids.max cpu.max; do echo "$f=$(cat $f)"; done
    echo "processes=$(wc -l <cgroup.procs)"'
}
section limits limits
section memory within_near pillion run --log-level info --policy memory.yaml -- sleep 5
section pids within_near pillion run --log-level info --policy pids.yaml -- sleep 3
section cpu within_near pillion run --policy cpu.yaml -- \
  sh -c 'sleep 3; cat /sys/fs/cgroup/pillion.slice/process*/companion-busy/cpu.stat'

containerd_up
agent_up
section runc container by-runc runc -- /usr/bin/first
section crun container by-crun crun -- /usr/bin/first
# One that runs already when a policy selects it.
late() {
  ctr run -d --with-ns network:/run/netns/near --label app=late localhost/first:1 late \
    /bin/sh -c 'while :; do echo x | nc 10.77.0.2 8080 >/dev/null; sleep 0.2; done' &&
    until_true pillion describe containerd/default/late && pillion describe containerd/default/late | head -n 12
  cp late.yaml /etc/pillion/policy.d/
  until_true sh -c 'pillion list -o json | jq -e ".workloads[] | select(.name == \"late\" and .verdict == \"attached\")"'
  until_true grep -q '"workload\\":\\"containerd/default/late' "$job/agent.log"
}
section late late
section list pillion list -o json
section status pillion status -o json

systemctl stop pillion
section open container no-agent runc --label app=open -- /usr/bin/first
section closed container no-agent-closed runc -- /usr/bin/first
section agent-log cat "$job/agent.log"
section cleanup pillion cleanup --yes
section after container after runc -- /usr/bin/first
section left left
