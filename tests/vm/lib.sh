# Sourced by what a virtual machine is to do: its programs, a cable to a server, containerd and an agent.
cd "$(dirname "$0")" || exit
job=$PWD
install -m 755 pillion pillion-hook first /usr/local/bin/
# Runs a command and prints
#   == NAME
#   (what it printed, stdout and stderr)
#   == end NAME EXIT-CODE
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

# What redirection does, with policy redirect.yaml: each command is a workload of its own.
redirects() {
  ip addr add fd77::2/64 dev far nodad; ip -n near addr add fd77::1/64 dev near nodad
  section check pillion check -o json --containerd-socket none
  section out4 within_near pillion run --policy redirect.yaml -- first
  section out6 within_near pillion run --policy redirect.yaml -- sh -c 'echo six | busybox nc -w 3 fd77::2 8080'
  # Its companion is killed, and whoever would start it anew is stopped: the kernel refuses, at once.
  section refused within_near pillion run --policy redirect.yaml -- sh -c '
    kill -STOP $PPID
    kill -9 $(cat /sys/fs/cgroup/pillion.slice/process*/companion-r/cgroup.procs)
    for server in 10.77.0.2 fd77::2; do busybox nc -w 3 $server 8080 </dev/null; echo "$server ended with $?"; done
    kill -CONT $PPID'
  section in arriving
  # Services of IPVS, as kube-proxy makes them on a node; the second one is excluded.
  section ipvs-up ipvs_up
  for port in 80 81; do
    section ipvs-$port within_near pillion run --policy redirect.yaml -- sh -c "echo service | busybox nc -w 3 10.96.0.10 $port"
  done
}
ipvs_up() {
  modprobe ip_vs_rr && ip link add kube-ipvs0 type dummy && ip addr add 10.96.0.10/32 dev kube-ipvs0 &&
    ip -n near route add default via 10.77.0.2 && sysctl -w net.ipv4.vs.conntrack=1
  local port; for port in 80 81; do
    ipvsadm -A -t 10.96.0.10:$port -s rr && ipvsadm -a -t 10.96.0.10:$port -r 10.77.0.2:8080 -m || return
  done
  ipvsadm -L -n
}
arriving() {
  local code
  within_near pillion run --policy redirect.yaml -- busybox nc -l -p 9000 -e cat & local run=$!
  until_true sh -c 'echo arriving | busybox nc -w 3 10.77.0.1 9000 | grep -q arriving'; code=$?
  wait $run && return $code
}

containerd_up() {
  containerd --log-level warn >containerd.log 2>&1 &
  until_true ctr version
  ctr images import first.tar >/dev/null
  # The wrapper goes by its name for the runtime that it stands for.
  ln -s /usr/local/bin/pillion-hook /usr/local/bin/pillion-runc
  ln -s /usr/local/bin/pillion-hook /usr/local/bin/pillion-crun
}
agent_up() {
  systemd-run --quiet --unit pillion --property Type=notify --property KillMode=process --property Delegate=yes \
    --property StandardError=file:"$job/agent.log" /usr/local/bin/pillion agent --log-format json "$@"
  until_true pillion list
}
# A relay's last record is in the log when it has ended.
none_left() { until_true sh -c 'pillion list -o json | jq -e "all(.workloads[]; .verdict == \"notMatched\")"'; }
container() { # NAME RUNTIME [OPTION...] -- [COMMAND...]
  local name=$1 runtime=$2; shift 2
  local options=(); while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
  ctr run --runc-binary "/usr/local/bin/pillion-$runtime" --with-ns network:/run/netns/near --label app=web \
    "${options[@]}" localhost/first:1 "$name" "$@"
}
# What is left of Pillion: files, and the companions' cgroups.
left() { find /sys/fs/cgroup -name '*pillion*' -not -path '*/system.slice/*'; ls -d /sys/fs/bpf/pillion /var/lib/pillion /run/pillion; pgrep -a 'pillion$'; true; }
