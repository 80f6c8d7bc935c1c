//! What a source tells: the only language between runtimes and the controller.
//!
//! Owns the vocabulary and its rules. Never does IO.

use std::fmt;

use pillion_workload::{FirstInstruction, Subject, Workload, WorkloadId};
use serde::Serialize;

/// Names a source: what a [`RuntimeEvent::Snapshot`] replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct SourceName(&'static str);

impl SourceName {
    /// The source that watches one containerd.
    pub const CONTAINERD: Self = Self("containerd");
    /// The gate in containerd's NRI, which tells only whether it is connected.
    pub const NRI: Self = Self("nri");
    /// The source that watches one Docker Engine.
    pub const DOCKER: Self = Self("docker");
    /// The source that watches Podman.
    pub const PODMAN: Self = Self("podman");
    /// The source that watches one systemd.
    pub const SYSTEMD: Self = Self("systemd");
    /// The source that watches processes of the host at their exec.
    pub const PROCESS: Self = Self("process");

    /// The name as text.
    pub fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for SourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

/// What happened on the node. Applying the same event twice changes nothing.
///
/// Rules that every source keeps:
/// - The first event is `Up` or `Down`. `Up` is followed by a `Snapshot`, then by `Started`, `Changed` and `Stopped`.
/// - A `Snapshot` replaces everything that its source told before. It may come at any time while the source is up.
/// - A gate ([`SourceName::NRI`]) has no workloads: it tells `Up` and `Down` alone.
/// - `Down` says nothing about workloads: they run on. Only a `Snapshot` that does not mention a workload, or a
///   `Stopped`, ends it. `Stopped` may come while the source is down, because exits are also seen without the runtime.
/// - A workload recreated under the same id is `Stopped`, then `Started`. Within a `Snapshot` it just has another
///   [`Instance`](pillion_workload::Instance).
///
/// [`FirstInstruction`] here says what was true when the source looked: `Before` means that the workload had not begun
/// *then*, `After` is final, and `Unknown` is usual for a container that is being started right now. Whether an attach was complete in time is answered by
/// [`FirstInstructionProbe`](crate::FirstInstructionProbe) afterwards.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum RuntimeEvent {
    /// The runtime answers; a `Snapshot` follows.
    Up {
        /// Which source.
        source: SourceName,
    },
    /// Every workload that the source has. What is not mentioned is gone.
    Snapshot {
        /// Which source.
        source: SourceName,
        /// Ordered by id.
        workloads: Vec<(Workload, FirstInstruction)>,
    },
    /// A workload is there.
    Started {
        /// The workload.
        workload: Workload,
        /// What was true when the source looked.
        first: FirstInstruction,
    },
    /// The same instance, with another subject: labels, image or annotations changed.
    Changed {
        /// The workload as it is now.
        workload: Workload,
    },
    /// A workload is there that redirection cannot reach, such as one whose sockets are not this kernel's. After a
    /// `Snapshot` all of them are told again.
    Unattachable {
        /// Which source.
        source: SourceName,
        /// Which one.
        id: WorkloadId,
        /// What policies select on.
        subject: Box<Subject>,
        /// Why not.
        reason: String,
    },
    /// Its first process has ended.
    Stopped {
        /// Which one.
        id: WorkloadId,
    },
    /// The runtime does not answer. The source tries again for ever.
    Down {
        /// Which source.
        source: SourceName,
        /// What was tried and why it failed, with all causes.
        error: String,
    },
}
