//! What a request of the runtime means, and how an answer is put.
//!
//! Owns the names of the methods. Pure: never does IO.

use prost::Message;

use super::messages::{
    ConfigureRequest, ConfigureResponse, Container, PLUGIN_SERVICE, PodSandbox, Request, Response,
    StateChangeEvent, Status, Subject, SynchronizeRequest, SynchronizeResponse, code, event,
};

/// What a request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    /// About the plug-in.
    Setup(Setup),
    /// About a pod or a container, and to be answered when the gate has its answer.
    Hold(Event),
    /// To be answered without a thought.
    Nothing,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Setup {
    Configure(ConfigureRequest),
    Synchronize(SynchronizeRequest),
    Shutdown,
}

/// What the gate is there for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// A pod's sandbox is there.
    RunPodSandbox(Box<PodSandbox>),
    /// A container is about to be started.
    StartContainer(Box<PodSandbox>, Box<Container>),
}

/// Reads a request, or says what is wrong with it.
pub(super) fn call(request: Request) -> Result<Call, Status> {
    let Request { service, method, payload, .. } = request;
    if service != PLUGIN_SERVICE {
        return Err(unimplemented(format!("pillion: no service {service:.100}")));
    }
    match method.as_str() {
        "Configure" => Ok(Call::Setup(Setup::Configure(read(&payload)?))),
        "Synchronize" => Ok(Call::Setup(Setup::Synchronize(read(&payload)?))),
        "Shutdown" => Ok(Call::Setup(Setup::Shutdown)),
        "RunPodSandbox" => {
            let Subject { pod, .. } = read(&payload)?;
            about(event::RUN_POD_SANDBOX, pod, None)
        }
        "StartContainer" => {
            let Subject { pod, container } = read(&payload)?;
            about(event::START_CONTAINER, pod, container)
        }
        "StateChange" => {
            let StateChangeEvent { event, pod, container } = read(&payload)?;
            about(event, pod, container)
        }
        // Not subscribed to; a runtime that asks all the same is not kept waiting. An empty answer changes nothing.
        "CreateContainer"
        | "PostCreateContainer"
        | "PostStartContainer"
        | "UpdateContainer"
        | "PostUpdateContainer"
        | "StopContainer"
        | "RemoveContainer"
        | "UpdatePodSandbox"
        | "PostUpdatePodSandbox"
        | "StopPodSandbox"
        | "RemovePodSandbox"
        | "ValidateContainerAdjustment" => Ok(Call::Nothing),
        _ => Err(unimplemented(format!("pillion: no method {method:.100}"))),
    }
}

/// A ttrpc request, if that is what the bytes are.
pub(super) fn decoded(payload: &[u8]) -> Option<Request> {
    Request::decode(payload).ok()
}

fn about(event: i32, pod: Option<PodSandbox>, container: Option<Container>) -> Result<Call, Status> {
    let lacking = |what: &str| invalid(format!("pillion: event {event} without its {what}"));
    match event {
        event::RUN_POD_SANDBOX => {
            Ok(Call::Hold(Event::RunPodSandbox(pod.ok_or_else(|| lacking("pod"))?.into())))
        }
        event::START_CONTAINER => {
            let pod = pod.ok_or_else(|| lacking("pod"))?;
            let container = container.ok_or_else(|| lacking("container"))?;
            Ok(Call::Hold(Event::StartContainer(pod.into(), container.into())))
        }
        _ => Ok(Call::Nothing),
    }
}

fn read<T: Message + Default>(payload: &[u8]) -> Result<T, Status> {
    T::decode(payload).map_err(|error| invalid(format!("pillion: cannot read the request: {error}")))
}

fn invalid(message: String) -> Status {
    Status { code: code::INVALID_ARGUMENT, message }
}

fn unimplemented(message: String) -> Status {
    Status { code: code::UNIMPLEMENTED, message }
}

/// What the runtime is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Go on.
    Empty,
    /// A message of its own.
    Message(Vec<u8>),
    /// Do not go on.
    Error(Status),
}

impl Answer {
    /// To `Configure`: the events that are wanted.
    pub(super) fn subscribed() -> Self {
        let events = [event::RUN_POD_SANDBOX, event::START_CONTAINER];
        let events = events.iter().fold(0, |mask, event| mask | 1 << (event - 1));
        Self::Message(ConfigureResponse { events }.encode_to_vec())
    }

    /// To `Synchronize`; `more` is given back when more was announced.
    pub(super) fn synchronized(more: bool) -> Self {
        Self::Message(SynchronizeResponse { more }.encode_to_vec())
    }

    /// The container is not to be started, for this reason.
    pub(super) fn refused(message: String) -> Self {
        Self::Error(Status { code: code::FAILED_PRECONDITION, message })
    }

    pub(super) fn into_response(self) -> Response {
        match self {
            Self::Empty => Response::default(),
            Self::Message(payload) => Response { status: None, payload },
            Self::Error(status) => Response { status: Some(status), payload: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(method: &str, payload: Vec<u8>) -> Request {
        let (service, method) = (PLUGIN_SERVICE.to_owned(), method.to_owned());
        Request { service, method, payload, timeout_nano: 0 }
    }

    #[test]
    fn knows_what_to_hold_in_both_dialects() {
        let pod = PodSandbox { id: "s1".into(), ..PodSandbox::default() };
        let container = Container { id: "c1".into(), pid: 7, ..Container::default() };
        let state =
            |event, container| StateChangeEvent { event, pod: Some(pod.clone()), container }.encode_to_vec();
        let subject = |container| Subject { pod: Some(pod.clone()), container }.encode_to_vec();
        let run = Call::Hold(Event::RunPodSandbox(pod.clone().into()));
        let start = Call::Hold(Event::StartContainer(pod.clone().into(), container.clone().into()));
        for (method, payload, call_) in [
            ("RunPodSandbox", subject(None), run.clone()),
            ("StartContainer", subject(Some(container.clone())), start.clone()),
            ("StateChange", state(1, None), run),
            ("StateChange", state(6, Some(container.clone())), start),
            ("StateChange", state(2, None), Call::Nothing),
            ("StateChange", state(-5, None), Call::Nothing),
            ("StopContainer", subject(Some(container)), Call::Nothing),
            ("CreateContainer", vec![0xff], Call::Nothing),
            ("Shutdown", Vec::new(), Call::Setup(Setup::Shutdown)),
        ] {
            assert_eq!(call(request(method, payload)), Ok(call_), "{method}");
        }
        for (wrong, code) in [
            (request("StartContainer", subject(None)), code::INVALID_ARGUMENT),
            (request("StartContainer", vec![0x0a, 0xff]), code::INVALID_ARGUMENT),
            (request("StateChange", state(6, None)), code::INVALID_ARGUMENT),
            (request("Evict", Vec::new()), code::UNIMPLEMENTED),
            (Request { service: "x".into(), ..request("Shutdown", Vec::new()) }, code::UNIMPLEMENTED),
        ] {
            assert_eq!(call(wrong.clone()).map_err(|status| status.code), Err(code), "{wrong:?}");
        }
    }

    #[test]
    fn subscribes_to_pods_and_starts_and_nothing_else() {
        let Answer::Message(bytes) = Answer::subscribed() else { panic!("a message") };
        assert_eq!(ConfigureResponse::decode(bytes.as_slice()).expect("ours").events, 0b10_0001);
    }

    proptest! {
        #[test]
        fn arbitrary_requests_never_panic(method in 0..6_usize, payload: Vec<u8>, bytes: Vec<u8>) {
            let methods = ["Configure", "Synchronize", "StateChange", "StartContainer", "RunPodSandbox", "x"];
            let _ = call(request(methods[method], payload));
            let _ = decoded(&bytes).map(call);
        }
    }
}
