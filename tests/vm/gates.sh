#!/bin/bash
# What `cargo xtask bench gate` has a virtual machine do: at each gate as many starts as the file `starts` says, of a program
# whose first instruction connects. Printed in sections, see lib.sh; nothing is judged here.
. "$(dirname "$0")/lib.sh"
starts=$(cat starts)
many() { local n; for n in $(seq "$starts"); do "$@" "$n" || { echo "start $n ended with $?"; return 1; }; done; }

section kernel uname -r
by_run() { within_near pillion run --policy run.yaml -- first; }
section run many by_run

install -m 755 first /usr/local/bin/first-held
mkdir -p /etc/pillion/policy.d && cp containers.yaml programs.yaml /etc/pillion/policy.d/
containerd_up
agent_up
# The agent itself keeps only its latest ones.
pillion events --follow -o json >events.json &
by_wrapper() { container "$1-$2" "$1" --rm -- /usr/bin/first; }
section runc many by_wrapper runc
section crun many by_wrapper crun
by_exec() { within_near first-held; }
section exec many by_exec
section none-left none_left
section events cat events.json
systemctl stop pillion
section agent-log cat "$job/agent.log"
section cleanup pillion cleanup --yes
