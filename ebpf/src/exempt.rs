//! Whom a workload's programs leave alone although it is in the workload's cgroup: an inner workload, whose own policy is
//! to win, and a companion that somebody else runs there, whose connections would come back to it.

use aya_ebpf::helpers::generated::bpf_get_current_ancestor_cgroup_id;
use pillion_common::{EXEMPT_LEVELS, ExemptKey, WorkloadConfig};

use crate::maps::PL_EXEMPT;

/// Whether the calling process is in an exempt cgroup or below one. A workload without exempt cgroups pays one
/// comparison.
///
/// It is the process that is asked and not its socket, because no helper tells these programs the socket's cgroup. They
/// differ only for a socket that was handed on, or was inherited by a process that has entered the cgroup since.
#[inline(always)]
pub fn is_exempt(config: &WorkloadConfig) -> bool {
    if config.exempt_levels == 0 {
        return false;
    }
    for level in 0..EXEMPT_LEVELS {
        if config.exempt_levels & (1 << level) == 0 {
            continue;
        }
        // SAFETY: takes a number and returns one: 0 when the process is not as deep (Linux 5.7).
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if cgroup == 0 {
            return false;
        }
        if PL_EXEMPT.get_ptr(ExemptKey { cgroup, workload: config.workload, pad: 0 }).is_some() {
            return true;
        }
    }
    false
}
