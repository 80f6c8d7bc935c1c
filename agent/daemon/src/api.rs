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
//! | `POST /v1/connections` | [`ConnectionsRequest`] | [`ConnectionsResponse`] |
//! | `GET /v1/trace?workload=ID&rate=N&sample=N&seconds=N` | | one [`TraceLine`](crate::trace::TraceLine) a line (NDJSON) |
//!
//! Every answer with a status of 400 and above has an [`ErrorResponse`] as its body.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use pillion_redirect::Neighbour;
use pillion_workload::{
    CompanionName, FailureMode, FirstInstruction, Gate, Instance, Plan, PolicyName, RuntimeKind, Subject,
    WorkloadId,
};
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, ConnectionInfo, Sender};

/// The paths of the API.
pub(crate) mod path {
    /// `GET`: [`super::StatusResponse`].
    pub(crate) const STATUS: &str = "/v1/status";
    /// `GET`: [`super::WorkloadsResponse`]; with `/{id}` behind it: [`super::WorkloadDetail`].
    pub(crate) const WORKLOADS: &str = "/v1/workloads";
    /// `GET`: lines of [`super::EventRecord`].
    pub(crate) const EVENTS: &str = "/v1/events";
    /// `POST` [`super::OverrideRequest`]: [`super::WorkloadSummary`].
    pub(crate) const ATTACH: &str = "/v1/attach";
    /// `POST` [`super::OverrideRequest`]: [`super::WorkloadSummary`].
    pub(crate) const DETACH: &str = "/v1/detach";
    /// `POST`: [`super::ReloadResponse`].
    pub(crate) const RELOAD: &str = "/v1/reload";
    /// `POST` [`super::ExplainRequest`]: [`super::ExplainResponse`].
    pub(crate) const EXPLAIN: &str = "/v1/explain";
    /// `POST` [`super::ConnectionsRequest`]: [`super::ConnectionsResponse`].
    pub(crate) const CONNECTIONS: &str = "/v1/connections";
    /// `GET`: lines of [`crate::trace::TraceLine`].
    pub(crate) const TRACE: &str = "/v1/trace";
}

/// The agent as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StatusResponse {
    /// Version of the agent.
    pub(crate) version: String,
    /// Its pid.
    pub(crate) pid: i32,
    /// When it started.
    pub(crate) started_at: Timestamp,
    /// `ok` when `problems` is empty.
    pub(crate) health: Health,
    /// What is not as it should be, most severe first.
    pub(crate) problems: Vec<Problem>,
    /// Loaded policies and the last reload.
    pub(crate) policies: PolicyStatus,
    /// Runtime sources.
    pub(crate) sources: Vec<SourceStatus>,
    /// The kernel side.
    pub(crate) dataplane: DataplaneStatus,
    /// Number of workloads by verdict; every verdict is present.
    pub(crate) workloads: BTreeMap<Verdict, usize>,
}

/// Whether somebody should look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Health {
    /// Nothing to see.
    Ok,
    /// Something in `problems` needs attention; what works is left working. Exit code 5.
    Degraded,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Problem {
    /// Which part: `policy`, `source`, `workload`, `journal`, `dataplane`.
    pub(crate) area: String,
    /// What is wrong, with its subject.
    pub(crate) message: String,
}

/// The policies in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyStatus {
    /// The directory that is watched.
    pub(crate) directory: PathBuf,
    /// Counts accepted changes; 0 while nothing has been loaded.
    pub(crate) generation: u64,
    /// When the policies in force were loaded.
    pub(crate) loaded_at: Option<Timestamp>,
    /// The policies in force, by descending priority.
    pub(crate) policies: Vec<PolicySummary>,
    /// Why the newest reload was refused; the policies in force are those of before.
    pub(crate) refused: Option<RefusedReload>,
    /// Those in force are an earlier agent's, because none could be loaded since.
    #[serde(default)]
    pub(crate) of_earlier_agent: bool,
}

/// A policy in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicySummary {
    /// `metadata.name`.
    pub(crate) name: PolicyName,
    /// `spec.priority`.
    pub(crate) priority: i64,
    /// The workloads whose plan comes from it.
    pub(crate) workloads: usize,
}

/// A reload that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RefusedReload {
    /// When.
    pub(crate) at: Timestamp,
    /// All faults, as `pillion validate` prints them. Several lines.
    pub(crate) message: String,
}

/// A runtime source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SourceStatus {
    /// Such as `containerd`.
    pub(crate) name: String,
    /// Whether it is connected.
    pub(crate) state: SourceState,
    /// Since when it is in that state.
    pub(crate) since: Timestamp,
    /// Why it is down.
    pub(crate) error: Option<String>,
    /// Workloads that it told of.
    pub(crate) workloads: usize,
}

/// Whether a source is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum SourceState {
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
pub(crate) struct DataplaneStatus {
    /// Where links and maps are pinned.
    pub(crate) pin_root: PathBuf,
    /// Counters of the eBPF programs, by name, since the maps were made.
    pub(crate) counters: BTreeMap<String, u64>,
}

/// What has become of a workload. Every known workload has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
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
    /// A gate has not let it run, as `onFailure: closed` says: `reason` says why. It is about to end.
    Refused,
    /// A policy selects it, but redirection cannot reach it: `reason` says why.
    CannotAttach,
    /// No policy selects it.
    NotMatched,
}

impl Verdict {
    /// All verdicts, in the order in which they are shown.
    pub(crate) const ALL: [Self; 9] = [
        Self::Attached,
        Self::Attaching,
        Self::Degraded,
        Self::Failed,
        Self::Detaching,
        Self::Held,
        Self::Refused,
        Self::CannotAttach,
        Self::NotMatched,
    ];

    /// Whether it needs somebody's attention.
    pub(crate) fn is_problem(self) -> bool {
        match self {
            Self::Degraded | Self::Failed | Self::Refused | Self::CannotAttach => true,
            Self::Attached | Self::Attaching | Self::Detaching | Self::Held | Self::NotMatched => false,
        }
    }

    /// The name used in JSON, tables and metric labels.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Attaching => "attaching",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Detaching => "detaching",
            Self::Held => "held",
            Self::Refused => "refused",
            Self::CannotAttach => "cannotAttach",
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
pub(crate) struct WorkloadsResponse {
    /// Sorted by id.
    pub(crate) workloads: Vec<WorkloadSummary>,
}

/// One line of `pillion list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WorkloadSummary {
    /// Its id.
    pub(crate) id: WorkloadId,
    /// Where it comes from.
    pub(crate) runtime: RuntimeKind,
    /// The runtime's name for it.
    pub(crate) name: String,
    /// The runtime's namespace.
    pub(crate) namespace: Option<String>,
    /// Its first process.
    pub(crate) pid: i32,
    /// What has become of it.
    pub(crate) verdict: Verdict,
    /// Since when.
    pub(crate) since: Timestamp,
    /// Why, where the verdict does not say it all.
    pub(crate) reason: Option<String>,
    /// The policy that selects it.
    pub(crate) policy: Option<PolicyName>,
    /// Its companions, in order.
    pub(crate) companions: Vec<CompanionStatus>,
    /// Whether redirection was in force before its first instruction; absent while never attached.
    pub(crate) first_instruction: Option<FirstInstruction>,
    /// Which gate has held it; absent when none has: then it is attached after it was told of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gate: Option<Gate>,
    /// From the moment it was to be attached (the runtime's word of it, a policy that selects it, `pillion attach`) to
    /// redirection in force, in milliseconds; absent while never attached and when adopted from an earlier agent.
    pub(crate) attach_millis: Option<u64>,
}

/// A companion of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CompanionStatus {
    /// Its name in the policy.
    pub(crate) name: CompanionName,
    /// What it is doing.
    pub(crate) state: CompanionState,
    /// Its first process, while it has one.
    pub(crate) pid: Option<i32>,
    /// Whether somebody else runs it.
    #[serde(default)]
    pub(crate) external: bool,
    /// How often it was started again since the attach, by this agent.
    pub(crate) restarts: u64,
    /// Why it is not ready.
    pub(crate) error: Option<String>,
}

/// What a companion is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum CompanionState {
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
pub(crate) struct WorkloadDetail {
    /// What `list` shows.
    #[serde(flatten)]
    pub(crate) summary: WorkloadSummary,
    /// What policies select on.
    pub(crate) subject: Subject,
    /// Which one it is; absent for one that cannot be attached.
    pub(crate) instance: Option<Instance>,
    /// The plan in force or in the making.
    pub(crate) plan: Option<Plan>,
    /// What happens while a companion is missing.
    pub(crate) on_failure: Option<FailureMode>,
    /// The ports that companions listen on for it.
    pub(crate) ports: Option<PortsInUse>,
    /// The decision, policy by policy.
    pub(crate) reasons: Vec<ReasonInfo>,
    /// Its latest events, oldest first.
    pub(crate) events: Vec<EventRecord>,
    /// eBPF programs of others that run for the same sockets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) neighbours: Vec<Neighbour>,
}

/// Companion ports in the workload's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortsInUse {
    /// Where outbound connections go, rule by rule, each port once.
    pub(crate) outbound: Vec<u16>,
    /// Where questions to resolvers go.
    pub(crate) dns: Option<u16>,
    /// Where inbound connections go: companion port by application port.
    pub(crate) inbound: BTreeMap<u16, u16>,
}

/// What one policy said about a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReasonInfo {
    /// Its name.
    pub(crate) policy: PolicyName,
    /// Its priority.
    pub(crate) priority: i64,
    /// How it came out.
    pub(crate) outcome: ReasonOutcome,
    /// For `shadowed`: the policy that won.
    pub(crate) shadowed_by: Option<PolicyName>,
    /// Every field of its selector.
    pub(crate) fields: Vec<FieldInfo>,
}

/// How a policy came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum ReasonOutcome {
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
pub(crate) struct FieldInfo {
    /// Such as `runtimes` or `labels.app`.
    pub(crate) field: String,
    /// Whether it matched.
    pub(crate) matched: bool,
    /// What the policy wants.
    pub(crate) wanted: String,
    /// What the workload has, if anything.
    pub(crate) actual: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EventRecord {
    /// Counts from 1 at each start of the agent; a gap means that events were dropped.
    pub(crate) sequence: u64,
    /// When.
    pub(crate) at: Timestamp,
    /// What kind of thing.
    pub(crate) kind: EventKind,
    /// For a human.
    pub(crate) message: String,
    /// The workload it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<WorkloadId>,
    /// The companion it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) companion: Option<CompanionName>,
    /// The policy it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<PolicyName>,
    /// For `attached`: whether that was before the first instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first_instruction: Option<FirstInstruction>,
    /// For `attached`: as [`WorkloadSummary::attach_millis`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attach_millis: Option<u64>,
    /// For `admitted`, `admittedOpen` and `refused`: which gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gate: Option<Gate>,
    /// For the same: how long the agent took to answer it, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) held_micros: Option<u64>,
}

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum EventKind {
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
    /// Connections that were open before were reset, as the policy says.
    ConnectionsReset,
    /// They could not be.
    ConnectionsKept,
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
    /// A gate has let the workload run, with all in force.
    Admitted,
    /// A gate has let the workload run without some of it, as `onFailure: open` says.
    AdmittedOpen,
    /// A gate has refused the workload, as `onFailure: closed` says.
    Refused,
    /// A policy selects a workload that redirection cannot reach.
    CannotAttach,
    /// The workload ended.
    WorkloadStopped,
    /// A journal record could not be used.
    JournalFault,
}

/// Manual override: `attach` ends a hold and attaches, `detach` holds the workload detached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OverrideRequest {
    /// The workload.
    pub(crate) workload: WorkloadId,
    /// How long to wait for the outcome, in seconds, at most 300; 30 when absent. Afterwards the answer has the
    /// verdict `attaching` or `detaching` and the work goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) wait_seconds: Option<u16>,
}

/// The outcome of a reload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReloadResponse {
    /// Whether the files are now in force; else `policies.refused` says why not.
    pub(crate) accepted: bool,
    /// The policies in force.
    pub(crate) policies: PolicyStatus,
}

/// What to explain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum ExplainRequest {
    /// A workload that the agent knows.
    Workload(WorkloadId),
    /// A described one.
    Subject(Box<Subject>),
}

/// A decision and its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ExplainResponse {
    /// What was decided upon.
    pub(crate) subject: Subject,
    /// The plan, if a policy selects it.
    pub(crate) plan: Option<Plan>,
    /// Policy by policy.
    pub(crate) reasons: Vec<ReasonInfo>,
    /// The connections that were asked about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) connections: Vec<ConnectionInfo>,
}

/// What would become of some connections of a workload?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConnectionsRequest {
    /// Whose.
    pub(crate) workload: WorkloadId,
    /// Which.
    pub(crate) connections: Vec<Connection>,
    /// Who makes them.
    #[serde(default)]
    pub(crate) sender: Sender,
}

/// The answer, in the order of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConnectionsResponse {
    /// Empty when no policy selects the workload.
    pub(crate) connections: Vec<ConnectionInfo>,
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ErrorResponse {
    /// What is wrong, lower case, no full stop.
    pub(crate) error: String,
}

/// A point in time; RFC 3339 in JSON, in UTC with milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Timestamp(SystemTime);

impl Timestamp {
    /// The time by the wall clock, to the millisecond.
    pub(crate) fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// How long ago that was; zero when it lies ahead.
    pub(crate) fn age(self) -> Duration {
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
