//! What of this kernel the programs need, each thing tried by itself: by loading a program of a few instructions that uses
//! it, never by the kernel's version.
//!
//! What is needed and missing is an error that names it and the kernel that brought it. What is optional tells the
//! programs, as a load-time constant, what to do without.

use std::io;

use aya_obj::generated::{
    bpf_attach_type::{
        self, BPF_CGROUP_GETSOCKOPT, BPF_CGROUP_INET_SOCK_CREATE, BPF_CGROUP_INET_SOCK_RELEASE,
        BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_SK_LOOKUP,
    },
    bpf_prog_type::{
        self, BPF_PROG_TYPE_CGROUP_SOCK, BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_CGROUP_SOCKOPT,
        BPF_PROG_TYPE_SK_LOOKUP,
    },
};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use pillion_common::kernel;

use crate::{RedirectError, sys, sys::Instruction};

/// What a kernel without a feature means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    /// Pillion does not work.
    Nothing,
    /// The programs do it another way, told by a bit of [`kernel`].
    Bit(u32, &'static str),
    /// The other object is loaded, whose programs do it another way.
    OtherObject(&'static str),
}

/// Something that programs use and not every kernel has.
#[derive(Debug)]
struct Needed {
    name: &'static str,
    purpose: &'static str,
    since: &'static str,
    without: Without,
    program: bpf_prog_type,
    attach: bpf_attach_type,
    uses: &'static [Instruction],
}

/// What one feature of the kernel was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It is there.
    There,
    /// It is not, and this is what differs.
    Fallback(&'static str),
    /// It is not, and Pillion needs it.
    Missing,
}

/// One feature of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFeature {
    /// What the kernel calls it.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// The version of Linux that brought it; others may have it too.
    pub since: &'static str,
    /// Whether it is there.
    pub support: Support,
}

/// The context is in r1, as at a program's start.
const fn call(helper: i32) -> Instruction {
    Instruction { code: 0x85, registers: 0, offset: 0, immediate: helper }
}
/// `r1 = value`.
const fn first_argument(value: i32) -> Instruction {
    Instruction { code: 0xb7, registers: 1, offset: 0, immediate: value }
}

const SOCK_ADDR: (bpf_prog_type, bpf_attach_type) =
    (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT);
const SOCKOPT: (bpf_prog_type, bpf_attach_type) = (BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_CGROUP_GETSOCKOPT);
const LOOKUP: (bpf_prog_type, bpf_attach_type) = (BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP);

const fn needed(
    name: &'static str,
    purpose: &'static str,
    since: &'static str,
    without: Without,
    (program, attach): (bpf_prog_type, bpf_attach_type),
    uses: &'static [Instruction],
) -> Needed {
    Needed { name, purpose, since, without, program, attach, uses }
}

/// Helpers by their numbers in `enum bpf_func_id`, which are the kernel's ABI.
const FEATURES: [Needed; 11] = [
    needed("cgroup/getsockopt", "socket options answered", "5.3", Without::Nothing, SOCKOPT, &[]),
    needed(
        "bpf_get_netns_cookie",
        "network namespace cookies",
        "5.7",
        Without::Nothing,
        SOCK_ADDR,
        &[call(122)],
    ),
    needed(
        "bpf_get_socket_cookie",
        "socket cookies at close",
        "5.7",
        Without::Nothing,
        (BPF_PROG_TYPE_CGROUP_SOCK, BPF_CGROUP_INET_SOCK_CREATE),
        &[call(46)],
    ),
    needed(
        "cgroup/getpeername",
        "names shown to applications",
        "5.8",
        Without::Nothing,
        (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_GETPEERNAME),
        &[],
    ),
    needed(
        "cgroup/sock_release",
        "the end of sockets",
        "5.9",
        Without::Nothing,
        (BPF_PROG_TYPE_CGROUP_SOCK, BPF_CGROUP_INET_SOCK_RELEASE),
        &[],
    ),
    needed("sk_lookup", "arriving connections steered", "5.9", Without::Nothing, LOOKUP, &[]),
    needed(
        "bpf_ktime_get_coarse_ns",
        "the coarse clock",
        "5.11",
        Without::Bit(kernel::COARSE_CLOCK, "the exact clock is read, which takes a little longer"),
        SOCK_ADDR,
        &[call(160)],
    ),
    needed(
        "cmpxchg",
        "atomic instructions",
        "5.12",
        Without::OtherObject("slots are taken under locks, which takes a little longer"),
        SOCK_ADDR,
        &[
            // *(u64 *)(r10 - 8) = 0; r0 = 0; r1 = 1; cmpxchg_64(r10 - 8, r0, r1)
            Instruction { code: 0x7a, registers: 10, offset: -8, immediate: 0 },
            Instruction { code: 0xb7, registers: 0, offset: 0, immediate: 0 },
            first_argument(1),
            Instruction { code: 0xdb, registers: 0x1a, offset: -8, immediate: 0xf1 },
        ],
    ),
    needed(
        "bpf_get_netns_cookie in getsockopt",
        "the namespace of a companion's question",
        "5.15",
        Without::Bit(
            kernel::NETNS_OF_OPTIONS,
            "destinations are kept by workload: two namespaces nested in one workload are not told apart",
        ),
        SOCKOPT,
        &[call(122)],
    ),
    needed(
        "bpf_sk_lookup.ingress_ifindex",
        "the interface of arriving connections",
        "5.17",
        Without::Bit(
            kernel::ARRIVAL_INTERFACE,
            "what a workload sends itself at an address of its loopback interface, other than that interface's own, is taken for arriving",
        ),
        LOOKUP,
        // r0 = *(u32 *)(r1 + 64)
        &[Instruction { code: 0x61, registers: 0x10, offset: 64, immediate: 0 }],
    ),
    needed(
        "bpf_set_retval",
        "results of refused calls",
        "5.18",
        Without::Bit(
            kernel::RESULTS,
            "a refused connect() is ECONNREFUSED from the network, whatever the reason, and Multipath TCP EPERM",
        ),
        SOCK_ADDR,
        &[first_argument(-111), call(187)],
    ),
];

/// What the programs are told of this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Bits of [`kernel`].
    pub(crate) bits: u32,
    /// Whether it has atomic instructions.
    pub(crate) atomics: bool,
}

impl Kernel {
    /// Nothing that is optional.
    pub(crate) const OLDEST: Self = Self { bits: 0, atomics: false };

    /// Tries everything; an error names the first thing that is missing and needed.
    pub(crate) fn find() -> Result<Self, RedirectError> {
        let mut found = Self { bits: 0, atomics: true };
        for feature in &FEATURES {
            let there = feature.is_there()?;
            match feature.without {
                Without::Nothing if !there => {
                    return Err(RedirectError::Kernel { feature: feature.name, since: feature.since });
                }
                Without::Bit(bit, _) if there => found.bits |= bit,
                Without::OtherObject(_) => found.atomics = there,
                Without::Nothing | Without::Bit(..) => {}
            }
        }
        Ok(found)
    }

    /// Before Linux 5.11, which brought the coarse clock too, eBPF memory counts as locked memory, against a limit that is small
    /// by default: raises it as far as it goes. Where that is not enough the kernel refuses maps or programs.
    pub(crate) fn make_room(self) -> io::Result<()> {
        if self.bits & kernel::COARSE_CLOCK != 0 {
            return Ok(());
        }
        let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
        // The hard limit needs CAP_SYS_RESOURCE, the soft one nothing.
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
            .or_else(|_| setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard))?;
        Ok(())
    }
}

/// Tries everything that programs use and not every kernel has, in the order of the kernels that brought it.
pub fn kernel_features() -> Result<Vec<KernelFeature>, RedirectError> {
    FEATURES
        .iter()
        .map(|feature| {
            let support = match (feature.is_there()?, feature.without) {
                (true, _) => Support::There,
                (false, Without::Nothing) => Support::Missing,
                (false, Without::Bit(_, differs) | Without::OtherObject(differs)) => {
                    Support::Fallback(differs)
                }
            };
            Ok(KernelFeature { name: feature.name, purpose: feature.purpose, since: feature.since, support })
        })
        .collect()
}

impl Needed {
    /// Loads a program that uses it, and drops it. What the verifier refuses is not there; anything else that goes wrong is
    /// no answer.
    fn is_there(&self) -> Result<bool, RedirectError> {
        const PASS: [Instruction; 2] = [
            // r0 = 1; exit
            Instruction { code: 0xb7, registers: 0, offset: 0, immediate: 1 },
            Instruction { code: 0x95, registers: 0, offset: 0, immediate: 0 },
        ];
        let instructions = [self.uses, &PASS].concat();
        match sys::load_instructions(self.program, self.attach, &instructions) {
            Ok(_) => Ok(true),
            // An unknown helper, instruction, type or attach type; a member of a context that is not there.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES | libc::E2BIG)) => {
                Ok(false)
            }
            Err(source) => Err(RedirectError::Probe { feature: self.name, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_distinct_and_features_in_the_order_of_their_kernels() {
        let mut bits = 0;
        let mut last = 0;
        for feature in &FEATURES {
            let (major, minor) = feature.since.split_once('.').unwrap();
            let since = major.parse::<u32>().unwrap() * 1000 + minor.parse::<u32>().unwrap();
            assert!(since >= last, "{feature:?}");
            last = since;
            if let Without::Bit(bit, _) = feature.without {
                assert_eq!(bits & bit, 0, "{feature:?}");
                bits |= bit;
            }
            // Needed without a substitute is only what the oldest supported kernel has.
            assert!(feature.without != Without::Nothing || since <= 5_010, "{feature:?}");
        }
        let all =
            [kernel::RESULTS, kernel::COARSE_CLOCK, kernel::NETNS_OF_OPTIONS, kernel::ARRIVAL_INTERFACE];
        assert_eq!(all.iter().fold(0, |sum, bit| sum | bit), bits);
    }
}
