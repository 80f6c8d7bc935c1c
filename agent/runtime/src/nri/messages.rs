//! The messages of ttrpc and of NRI, as far as Pillion reads or writes them.
//!
//! Own definitions of a part of `pkg/api/api.proto` of containerd/nri (v1alpha1) and of ttrpc's `request.proto`: field
//! numbers and types are the protocol's, fields that are not needed are left out, and unknown ones are skipped when read.
//! Never interprets anything.

use std::collections::BTreeMap;

use prost::Message;

/// The service that the runtime calls, and the one that the plug-in calls.
pub(super) const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
pub(super) const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";

/// Codes of gRPC's statuses, which ttrpc uses too.
pub(super) mod code {
    pub(in crate::nri) const INVALID_ARGUMENT: i32 = 3;
    /// Not one that NRI takes for a broken plug-in, as it does `DEADLINE_EXCEEDED`.
    pub(in crate::nri) const FAILED_PRECONDITION: i32 = 9;
    pub(in crate::nri) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(in crate::nri) const UNIMPLEMENTED: i32 = 12;
}

/// `Event` of NRI, as far as they are subscribed to.
pub(super) mod event {
    pub(in crate::nri) const RUN_POD_SANDBOX: i32 = 1;
    pub(in crate::nri) const START_CONTAINER: i32 = 6;
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Request {
    #[prost(string, tag = "1")]
    pub(super) service: String,
    #[prost(string, tag = "2")]
    pub(super) method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) payload: Vec<u8>,
    /// How long the caller waits; 0 for ever.
    #[prost(int64, tag = "4")]
    pub(super) timeout_nano: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Response {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Status {
    #[prost(int32, tag = "1")]
    pub(super) code: i32,
    #[prost(string, tag = "2")]
    pub(super) message: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct RegisterPluginRequest {
    #[prost(string, tag = "1")]
    pub(super) plugin_name: String,
    #[prost(string, tag = "2")]
    pub(super) plugin_idx: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ConfigureRequest {
    #[prost(string, tag = "2")]
    pub(super) runtime_name: String,
    #[prost(string, tag = "3")]
    pub(super) runtime_version: String,
    /// Milliseconds; absent in early versions.
    #[prost(int64, tag = "4")]
    pub(super) registration_timeout: i64,
    /// The same, for each request.
    #[prost(int64, tag = "5")]
    pub(super) request_timeout: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ConfigureResponse {
    /// A bit for each event: bit 0 is event 1.
    #[prost(int32, tag = "2")]
    pub(super) events: i32,
}

/// What is there when the plug-in registers, in one message or in several.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct SynchronizeRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) pods: Vec<PodSandbox>,
    #[prost(message, repeated, tag = "2")]
    pub(super) containers: Vec<Container>,
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct SynchronizeResponse {
    #[prost(bool, tag = "2")]
    pub(super) more: bool,
}

/// `RunPodSandboxRequest`, `StartContainerRequest` and all others that are about a pod and perhaps a container of it.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Subject {
    #[prost(message, optional, tag = "1")]
    pub(super) pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "2")]
    pub(super) container: Option<Container>,
}

/// How versions before 0.11 tell of most events.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct StateChangeEvent {
    #[prost(int32, tag = "1")]
    pub(super) event: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "3")]
    pub(super) container: Option<Container>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct PodSandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(string, tag = "3")]
    pub(super) uid: String,
    #[prost(string, tag = "4")]
    pub(super) namespace: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub(super) annotations: BTreeMap<String, String>,
    /// The sandbox's process.
    #[prost(uint32, tag = "9")]
    pub(super) pid: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Container {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) pod_sandbox_id: String,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    #[prost(string, repeated, tag = "7")]
    pub(super) args: Vec<String>,
    #[prost(uint32, tag = "12")]
    pub(super) pid: u32,
}
