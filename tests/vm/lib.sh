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
    --property StandardError=file:"$job/agent.log" /usr/local/bin/pillion agent --log-format json
  until_true pillion list
}
container() { # NAME RUNTIME [OPTION...] -- [COMMAND...]
  local name=$1 runtime=$2; shift 2
  local options=(); while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
  ctr run --runc-binary "/usr/local/bin/pillion-$runtime" --with-ns network:/run/netns/near --label app=web \
    "${options[@]}" localhost/first:1 "$name" "$@"
}
