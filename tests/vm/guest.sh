#!/bin/bash
# What tests/tests/vm.rs has a virtual machine do: kernel 6.1, systemd, cgroup2 alone with all controllers. Everything is run
# once and printed; nothing is judged here. Each section is
#   == NAME
#   (what the command printed, stdout and stderr)
#   == end NAME EXIT-CODE
cd "$(dirname "$0")" || exit
job=$PWD
install -m 755 pillion pillion-hook first /usr/local/bin/
# Through a pipe: the serial line is a terminal, for which programs would colour what they print.
section() { local name=$1 code; shift; echo "== $name"; "$@" 2>&1 | cat; code=${PIPESTATUS[0]}; echo; echo "== end $name $code"; }

# A namespace for workloads on a cable to a server that echoes.
ip netns add near
ip link add near type veth peer name far && ip link set near netns near
ip addr add 10.77.0.2/24 dev far && ip link set far up && ip link set lo up
ip -n near addr add 10.77.0.1/24 dev near && ip -n near link set near up && ip -n near link set lo up
busybox nc -ll -p 8080 -e cat &
within_near() { nsenter --net=/run/netns/near "$@"; }
# The deadline is for an emulated machine.
until_true() { for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; echo "not in time: $*"; return 1; }

kernel() { uname -r; stat -fc %T /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers; ps -p 1 -o comm=; }
section kernel kernel
mkdir -p /etc/pillion/policy.d && cp web.yaml /etc/pillion/policy.d/
section check pillion check -o json --containerd-socket none

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

containerd --log-level warn >containerd.log 2>&1 &
until_true ctr version
ctr images import first.tar >/dev/null
# The wrapper goes by its name for the runtime that it stands for.
ln -s /usr/local/bin/pillion-hook /usr/local/bin/pillion-runc
ln -s /usr/local/bin/pillion-hook /usr/local/bin/pillion-crun
systemd-run --quiet --unit pillion --property Type=notify --property KillMode=process --property Delegate=yes \
  --property StandardError=file:"$job/agent.log" /usr/local/bin/pillion agent --log-format json
until_true pillion list
container() { # NAME RUNTIME [OPTION...] -- [COMMAND...]
  local name=$1 runtime=$2; shift 2
  local options=(); while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
  ctr run --runc-binary "/usr/local/bin/pillion-$runtime" --with-ns network:/run/netns/near --label app=web \
    "${options[@]}" localhost/first:1 "$name" "$@"
}
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
left() { find /sys/fs/cgroup -name '*pillion*' -not -path '*/system.slice/*'; ls -d /sys/fs/bpf/pillion /var/lib/pillion /run/pillion; pgrep -a 'pillion$'; true; }
section left left
