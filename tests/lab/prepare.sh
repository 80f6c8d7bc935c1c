#!/bin/bash
# prepare.sh run
#   Makes everything that the other scripts would make at their first use: packages, Debian trees, images, the virtual
#   machine's disk. Some minutes on a new machine, with a line for each step; under a second when all is there.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ "${1:-}" = run ] && [ $# = 1 ] || usage
# One at a time: a tree that two make at once would be a mixture.
exec 9>"$LAB/prepare.lock"; flock -w 1800 9 || die "another prepare.sh is at it for half an hour"
need debootstrap e2fsprogs busybox-static gcc libc6-dev iproute2 iptables qemu-system-x86 \
  containerd runc containernetworking-plugins docker.io podman conmon netavark
[ -f "$LAB/images/pause_1.tar" ] && [ -f "$LAB/images/busybox_1.tar" ] || { say "making images"; "$KIT/image.sh" >/dev/null; }
suite_tree trixie
suite_tree sid
node_tree
[ -f "$LAB/machine/vmlinuz-5.10" ] || { say "making the virtual machine's disk"; "$KIT/vm.sh" build; }
