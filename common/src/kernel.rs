//! What not every kernel that is supported has: bits of the load-time constant `KERNEL`. A program does without what its
//! bit does not promise; the verifier never looks at the branch that would use it.

/// A program can set the result of the system call that it refuses (`bpf_set_retval`, Linux 5.18). Else connections
/// are refused by a destination that nobody can listen on, and other calls with `EPERM`.
pub const RESULTS: u32 = 1 << 0;
/// `bpf_ktime_get_coarse_ns` (Linux 5.11). Else the exact clock, which takes longer to read.
pub const COARSE_CLOCK: u32 = 1 << 1;
/// `bpf_get_netns_cookie` where `getsockopt` is answered (Linux 5.15). Else the workload's number stands for its
/// network namespace in keys.
pub const NETNS_OF_OPTIONS: u32 = 1 << 2;
/// `sk_lookup` programs are told the interface (Linux 5.17). Else the destination tells what is for loopback: 127.0.0.0/8 and `::1`.
pub const ARRIVAL_INTERFACE: u32 = 1 << 3;
