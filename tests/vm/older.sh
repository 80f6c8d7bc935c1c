#!/bin/bash
# What tests/tests/vm.rs has a virtual machine with the oldest kernel do: redirection, the gates of which Pillion's programs are
# a part, and taking all of it back. Printed in sections, see lib.sh; nothing is judged here.
. "$(dirname "$0")/lib.sh"
section kernel uname -r
redirects

mkdir -p /etc/pillion/policy.d && cp programs.yaml /etc/pillion/policy.d/
install -m 755 first /usr/local/bin/first-held
agent_up --containerd-socket none
until_true grep -q "held at their exec" "$job/agent.log"
section exec within_near first-held
section none-left none_left
section status pillion status -o json
systemctl stop pillion
section agent-log cat "$job/agent.log"
section cleanup pillion cleanup --yes
section left left
