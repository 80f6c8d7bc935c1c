//! The admin API's vocabulary: what the agent answers on its Unix socket and what the command line prints.
//!
//! Owns the JSON shapes and the paths, in camelCase; both sides use these types, so they cannot drift apart.
//! Unknown fields are accepted when reading: an older command line must be able to talk to a newer agent.
//! Never does IO and knows nothing of the controller.
//!
//! | method and path | request | answer |
//! | --- | --- | --- |
//! | `GET /v1/status` | | [`StatusResponse`] |
//! | `GET /v1/workloads` | | [`WorkloadsResponse`] |
//! | `GET /v1/workloads/{id}` | the id as it is, slashes included | [`WorkloadDetail`] |
//! | `GET /v1/events?since=N&follow=true&workload=ID` | | one [`EventRecord`] a line (NDJSON); with `follow` it does not end |
//! | `POST /v1/attach`, `POST /v1/detach` | [`OverrideRequest`] | [`WorkloadSummary`] once it has settled |
//! | `POST /v1/reload` | | [`ReloadResponse`] |
//! | `POST /v1/explain` | [`ExplainRequest`] | [`ExplainResponse`] |
//!
//! Every answer with a status of 400 and above has an [`ErrorResponse`] as its body.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use pillion_workload::{
    CompanionName, FailureMode, FirstInstruction, Instance, Plan, PolicyName, RuntimeKind, Subject,
    WorkloadId,
};
use serde::{Deserialize, Serialize};

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/pillion/admin.sock";

/// The paths of the API.
pub mod path {
    /// `GET`: [`super::StatusResponse`].
    pub const STATUS: &str = "/v1/status";
    /// `GET`: [`super::WorkloadsResponse`]; with `/{id}` behind it: [`super::WorkloadDetail`].
    pub const WORKLOADS: &str = "/v1/workloads";
    /// `GET`: lines of [`super::EventRecord`].
    pub const EVENTS: &str = "/v1/events";
    /// `POST` [`super::OverrideRequest`]: [`super::WorkloadSummary`].
    pub const ATTACH: &str = "/v1/attach";
    /// `POST` [`super::OverrideRequest`]: [`super::WorkloadSummary`].
    pub const DETACH: &str = "/v1/detach";
    /// `POST`: [`super::ReloadResponse`].
    pub const RELOAD: &str = "/v1/reload";
    /// `POST` [`super::ExplainRequest`]: [`super::ExplainResponse`].
    pub const EXPLAIN: &str = "/v1/explain";
}

/// The agent as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusResponse {
    /// Version of the agent.
    pub version: String,
    /// Its pid.
    pub pid: i32,
    /// When it started.
    pub started_at: Timestamp,
    /// `ok` when `problems` is empty.
    pub health: Health,
    /// What is not as it should be, most severe first.
    pub problems: Vec<Problem>,
    /// Loaded policies and the last reload.
    pub policies: PolicyStatus,
    /// Runtime sources.
    pub sources: Vec<SourceStatus>,
    /// The kernel side.
    pub dataplane: DataplaneStatus,
    /// Number of workloads by verdict; every verdict is present.
    pub workloads: BTreeMap<Verdict, usize>,
}

/// Whether somebody should look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Health {
    /// Nothing to see.
    Ok,
    /// Something in `problems` needs attention; what works is left working. Exit code 5.
    Degraded,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Which part: `policy`, `source`, `workload`, `journal`, `dataplane`.
    pub area: String,
    /// What is wrong, with its subject.
    pub message: String,
}

/// The policies in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// The directory that is watched.
    pub directory: PathBuf,
    /// Counts accepted changes; 0 while nothing has been loaded.
    pub generation: u64,
    /// When the policies in force were loaded.
    pub loaded_at: Option<Timestamp>,
    /// The policies in force, by descending priority.
    pub policies: Vec<PolicySummary>,
    /// Why the newest reload was refused; the policies in force are those of before.
    pub refused: Option<RefusedReload>,
}

/// A policy in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySummary {
    /// `metadata.name`.
    pub name: PolicyName,
    /// `spec.priority`.
    pub priority: i64,
    /// The workloads whose plan comes from it.
    pub workloads: usize,
}

/// A reload that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedReload {
    /// When.
    pub at: Timestamp,
    /// All faults, as `pillion validate` prints them. Several lines.
    pub message: String,
}

/// A runtime source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// Such as `containerd`.
    pub name: String,
    /// Whether it is connected.
    pub state: SourceState,
    /// Since when it is in that state.
    pub since: Timestamp,
    /// Why it is down.
    pub error: Option<String>,
    /// Workloads that it told of.
    pub workloads: usize,
}

/// Whether a source is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SourceState {
    /// Not yet heard of.
    Connecting,
    /// Connected; its snapshot has been taken.
    Up,
    /// Not connected; what it told last stays in force.
    Down,
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// The kernel side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DataplaneStatus {
    /// Where links and maps are pinned.
    pub pin_root: PathBuf,
    /// Counters of the eBPF programs, by name, since the maps were made.
    pub counters: BTreeMap<String, u64>,
}

/// What has become of a workload. Every known workload has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// Companions ready, sockets redirected.
    Attached,
    /// Companions are starting, or sockets are about to be redirected.
    Attaching,
    /// Redirected as far as `onFailure` allows, but a companion is not ready: `reason` says which and why.
    Degraded,
    /// Could not be attached: `reason` says why. Tried again.
    Failed,
    /// Being detached.
    Detaching,
    /// Kept detached by `pillion detach` until `pillion attach`.
    Held,
    /// No policy selects it.
    NotMatched,
}

impl Verdict {
    /// All verdicts, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Attached,
        Self::Attaching,
        Self::Degraded,
        Self::Failed,
        Self::Detaching,
        Self::Held,
        Self::NotMatched,
    ];

    /// Whether it needs somebody's attention.
    pub fn is_problem(self) -> bool {
        match self {
            Self::Degraded | Self::Failed => true,
            Self::Attached | Self::Attaching | Self::Detaching | Self::Held | Self::NotMatched => false,
        }
    }

    /// The name used in JSON, tables and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Attaching => "attaching",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Detaching => "detaching",
            Self::Held => "held",
            Self::NotMatched => "notMatched",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// All workloads, by id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadsResponse {
    /// Sorted by id.
    pub workloads: Vec<WorkloadSummary>,
}

/// One line of `pillion list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSummary {
    /// Its id.
    pub id: WorkloadId,
    /// Where it comes from.
    pub runtime: RuntimeKind,
    /// The runtime's name for it.
    pub name: String,
    /// The runtime's namespace.
    pub namespace: Option<String>,
    /// Its first process.
    pub pid: i32,
    /// What has become of it.
    pub verdict: Verdict,
    /// Since when.
    pub since: Timestamp,
    /// Why, where the verdict does not say it all.
    pub reason: Option<String>,
    /// The policy that selects it.
    pub policy: Option<PolicyName>,
    /// Its companions, in order.
    pub companions: Vec<CompanionStatus>,
    /// Whether redirection was in force before its first instruction; absent while never attached.
    pub first_instruction: Option<FirstInstruction>,
    /// From the runtime's word of it to redirection in force, in milliseconds; absent while never attached and when
    /// adopted from an earlier agent.
    pub attach_millis: Option<u64>,
}

/// A companion of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CompanionStatus {
    /// Its name in the policy.
    pub name: CompanionName,
    /// What it is doing.
    pub state: CompanionState,
    /// Its first process, while it has one.
    pub pid: Option<i32>,
    /// How often it was started again since the attach, by this agent.
    pub restarts: u64,
    /// Why it is not ready.
    pub error: Option<String>,
}

/// What a companion is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CompanionState {
    /// Started, not ready yet, or waiting to be started again.
    Starting,
    /// Its readiness probe has passed.
    Ready,
    /// Not ready, and not being started again for now.
    Down,
}

impl fmt::Display for CompanionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Down => "down",
        })
    }
}

/// Everything about one workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadDetail {
    /// What `list` shows.
    #[serde(flatten)]
    pub summary: WorkloadSummary,
    /// What policies select on.
    pub subject: Subject,
    /// Which one it is.
    pub instance: Instance,
    /// The plan in force or in the making.
    pub plan: Option<Plan>,
    /// What happens while a companion is missing.
    pub on_failure: Option<FailureMode>,
    /// The ports that companions listen on for it.
    pub ports: Option<PortsInUse>,
    /// The decision, policy by policy.
    pub reasons: Vec<ReasonInfo>,
    /// Its latest events, oldest first.
    pub events: Vec<EventRecord>,
}

/// Companion ports in the workload's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortsInUse {
    /// Where outbound connections go.
    pub outbound: Option<u16>,
    /// Where inbound connections go: companion port by application port.
    pub inbound: BTreeMap<u16, u16>,
}

/// What one policy said about a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReasonInfo {
    /// Its name.
    pub policy: PolicyName,
    /// Its priority.
    pub priority: i64,
    /// How it came out.
    pub outcome: ReasonOutcome,
    /// For `shadowed`: the policy that won.
    pub shadowed_by: Option<PolicyName>,
    /// Every field of its selector.
    pub fields: Vec<FieldInfo>,
}

/// How a policy came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ReasonOutcome {
    /// It matched and won.
    Selected,
    /// It matched, but another won.
    Shadowed,
    /// It did not match.
    NotMatched,
}

/// One field of a selector, and what the workload has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldInfo {
    /// Such as `runtimes` or `labels.app`.
    pub field: String,
    /// Whether it matched.
    pub matched: bool,
    /// What the policy wants.
    pub wanted: String,
    /// What the workload has, if anything.
    pub actual: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventRecord {
    /// Counts from 1 at each start of the agent; a gap means that events were dropped.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// What kind of thing.
    pub kind: EventKind,
    /// For a human.
    pub message: String,
    /// The workload it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadId>,
    /// The companion it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub companion: Option<CompanionName>,
    /// The policy it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyName>,
    /// For `attached`: whether that was before the first instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_instruction: Option<FirstInstruction>,
    /// For `attached`: from the runtime's word to redirection in force, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach_millis: Option<u64>,
}

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EventKind {
    /// The agent is up.
    AgentStarted,
    /// The agent is going; attachments stay.
    AgentStopping,
    /// Policies were loaded.
    PolicyLoaded,
    /// A reload was refused.
    PolicyRefused,
    /// A source connected.
    SourceUp,
    /// A source went away.
    SourceDown,
    /// No policy selects a new workload.
    NotMatched,
    /// An attach began.
    Attaching,
    /// Companions ready, sockets redirected.
    Attached,
    /// An attachment of an earlier agent was taken over.
    Adopted,
    /// An attach failed.
    AttachFailed,
    /// A companion is not ready; `onFailure` acts.
    Degraded,
    /// All companions are ready again.
    Recovered,
    /// A companion is ready.
    CompanionReady,
    /// A companion ended.
    CompanionExited,
    /// A policy change was applied to a live attachment.
    PlanChanged,
    /// A detach began.
    Detaching,
    /// Nothing of Pillion is left at the workload.
    Detached,
    /// A detach failed; what is left is named.
    DetachFailed,
    /// `pillion detach` holds the workload detached.
    Held,
    /// `pillion attach` ended that.
    Released,
    /// The workload ended.
    WorkloadStopped,
    /// A journal record could not be used.
    JournalFault,
}

/// Manual override: `attach` ends a hold and attaches, `detach` holds the workload detached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverrideRequest {
    /// The workload.
    pub workload: WorkloadId,
    /// How long to wait for the outcome, in seconds, at most 300; 30 when absent. Afterwards the answer has the
    /// verdict `attaching` or `detaching` and the work goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<u16>,
}

/// The outcome of a reload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReloadResponse {
    /// Whether the files are now in force; else `policies.refused` says why not.
    pub accepted: bool,
    /// The policies in force.
    pub policies: PolicyStatus,
}

/// What to explain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExplainRequest {
    /// A workload that the agent knows.
    Workload(WorkloadId),
    /// A described one.
    Subject(Box<Subject>),
}

/// A decision and its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainResponse {
    /// What was decided upon.
    pub subject: Subject,
    /// The plan, if a policy selects it.
    pub plan: Option<Plan>,
    /// Policy by policy.
    pub reasons: Vec<ReasonInfo>,
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorResponse {
    /// What is wrong, lower case, no full stop.
    pub error: String,
}

/// A point in time; RFC 3339 in JSON, in UTC with milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(SystemTime);

impl Timestamp {
    /// The time by the wall clock, to the millisecond.
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// How long ago that was; zero when it lies ahead.
    pub fn age(self) -> Duration {
        self.0.elapsed().unwrap_or_default()
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        Self(SystemTime::UNIX_EPOCH + Duration::from_millis(millis))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&humantime::format_rfc3339_millis(self.0).to_string())
    }
}

impl From<Timestamp> for String {
    fn from(time: Timestamp) -> Self {
        time.to_string()
    }
}

impl TryFrom<String> for Timestamp {
    type Error = humantime::TimestampError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        humantime::parse_rfc3339(&text).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_survive_json() {
        let now = Timestamp::now();
        let text = serde_json::to_string(&now).unwrap();
        assert_eq!(serde_json::from_str::<Timestamp>(&text).unwrap(), now);
        assert!(text.ends_with("Z\""), "{text}");
        assert!(serde_json::from_str::<Timestamp>("\"yesterday\"").is_err());
    }

    #[test]
    fn verdicts_have_one_name_everywhere() {
        for verdict in Verdict::ALL {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
        }
    }

    #[test]
    fn requests_have_the_documented_shape() {
        let request: ExplainRequest = serde_json::from_str(r#"{"workload":"process/1-2"}"#).unwrap();
        assert_eq!(request, ExplainRequest::Workload("process/1-2".parse().unwrap()));
        let request: OverrideRequest =
            serde_json::from_str(r#"{"workload":"process/1-2","later":1}"#).unwrap();
        assert_eq!(request.wait_seconds, None);
    }
}
