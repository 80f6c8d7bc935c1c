//! The protocol from both ends.

use alloc::{borrow::ToOwned as _, collections::BTreeMap, string::ToString as _, vec};

use proptest::prelude::*;

use super::*;

fn container() -> Container {
    Container {
        point: Point::Start,
        id: ContainerId {
            id: "web".into(),
            bundle: "/run/containerd/io.containerd.runtime.v2.task/default/web".into(),
            root: Some("/run/containerd/runc/default".into()),
        },
        pid: 4711,
        started: Some(90210),
        spec: Spec {
            annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            program: Some("/bin/sh".into()),
            cgroups_path: Some("/default/web".into()),
        },
    }
}

fn request(question: Question) -> Request {
    Request { patience_ms: 30_000, question }
}

fn there_and_back<T: Message>(message: &T) -> Result<T, FrameError> {
    let frame = encode(message)?;
    let (header, body) = frame.split_first_chunk().ok_or(FrameError::NotAFrame)?;
    assert_eq!(body_length::<T>(header)?, body.len());
    decode(body)
}

#[test]
fn messages_arrive_as_they_were_sent() {
    let stopped = Stopped { id: container().id, spec: Spec::default() };
    for question in [
        Question::Container(container()),
        Question::Container(Container { spec: Spec::default(), ..container() }),
        Question::Unit(Unit { name: "payments@a.service".into(), pid: 3 }),
        Question::Stopped(stopped),
    ] {
        let request = request(question);
        assert_eq!(there_and_back(&request).as_ref(), Ok(&request));
    }
    for answer in [
        Answer::Admit { message: None },
        Answer::Admit { message: Some("open".into()) },
        Answer::Refuse { message: "pillion: no".into() },
        Answer::Undecided { message: "ending".into(), leaving: true },
    ] {
        assert_eq!(there_and_back(&answer).as_ref(), Ok(&answer));
    }
}

/// Hook and agent of different releases understand each other only while these bytes stay as they are.
#[test]
fn the_form_on_the_wire() {
    let frame = encode(&request(Question::Container(container()))).expect("valid");
    assert_eq!(frame[..8], *b"PLGA\x00\x01\x00\x00");
    assert_eq!(
        core::str::from_utf8(&frame[HEADER..]).expect("JSON"),
        concat!(
            r#"{"patienceMs":30000,"question":{"container":{"point":"start","id":"web","#,
            r#""bundle":"/run/containerd/io.containerd.runtime.v2.task/default/web","#,
            r#""root":"/run/containerd/runc/default","pid":4711,"started":90210,"#,
            r#""spec":{"annotations":{"a":"b"},"program":"/bin/sh","cgroupsPath":"/default/web"}}}}"#,
        )
    );
    let later = br#"{"patienceMs":1,"new":[1],"question":{"unit":{"name":"a.service","pid":1,"new":{}}}}"#;
    let unit = Question::Unit(Unit { name: "a.service".into(), pid: 1 });
    assert_eq!(decode::<Request>(later), Ok(Request { patience_ms: 1, question: unit }));
}

#[test]
fn headers_are_distrusted() {
    let good = encode(&Answer::Admit { message: None }).expect("valid");
    let header: [u8; HEADER] = *good.first_chunk().expect("longer");
    let with = |at: usize, byte: u8| {
        let mut header = header;
        header[at] = byte;
        body_length::<Answer>(&header)
    };
    assert_eq!(with(0, b'G'), Err(FrameError::NotAFrame));
    assert_eq!(with(5, 2), Err(FrameError::Version { theirs: 2 }));
    assert!(matches!(with(8, 1), Err(FrameError::TooLong { .. })));
    assert!(with(6, 1).is_ok(), "reserved for later");
}

#[test]
fn values_that_cannot_be_are_refused() {
    let id = |change: &dyn Fn(&mut Container)| {
        let mut container = container();
        change(&mut container);
        encode(&request(Question::Container(container)))
    };
    let field = |result: Result<Vec<u8>, FrameError>| match result {
        Err(FrameError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(id(&|it| it.pid = 0)), "pid");
    assert_eq!(field(id(&|it| it.id.id = String::new())), "id");
    assert_eq!(field(id(&|it| it.id.id = "../x".into())), "id");
    assert_eq!(field(id(&|it| it.id.id = "x".repeat(256))), "id");
    assert_eq!(field(id(&|it| it.id.bundle = "relative".into())), "bundle");
    assert_eq!(field(id(&|it| it.id.root = Some("/a\0b".into()))), "root");
    assert_eq!(field(id(&|it| it.spec.program = Some("x".repeat(5000)))), "program");
    let unit = |name: &str| encode(&request(Question::Unit(Unit { name: name.into(), pid: 1 })));
    assert_eq!(field(unit("a/b")), "name");
    assert_eq!(field(unit("")), "name");
    assert!(matches!(
        id(&|it| _ = it.spec.annotations.insert("x".into(), "y".repeat(1 << 20))),
        Err(FrameError::TooLong { .. })
    ));
}

#[test]
fn the_file_for_hooks_without_an_agent() {
    let policy = |name: &str, on_failure| GatePolicy { name: name.into(), on_failure };
    let policies = vec![policy("a", OnFailure::Open), policy("b", OnFailure::Closed)];
    let file = GateFile::new(vec!["/usr/bin/pillion".into()], policies, 30_000);
    let text = file.to_json().expect("valid");
    assert_eq!(GateFile::parse(&text), Ok(file.clone()));
    assert_eq!(file.closed().collect::<Vec<_>>(), ["b"]);
    assert_eq!(GateFile::parse(br#"{"version":2,"other":1}"#), Err(GateFileError::Version(2)));
    for bad in
        ["", "{}", "[]", r#"{"version":1}"#, r#"{"version":1,"command":["x"],"policies":[],"patienceMs":1}"#]
    {
        let error = GateFile::parse(bad.as_bytes()).expect_err(bad);
        assert!(
            matches!(error, GateFileError::Malformed(_)) && !error.to_string().is_empty(),
            "{bad}: {error}"
        );
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_an_error_or_a_valid_message(header: [u8; HEADER], body: Vec<u8>) {
        let _ = (body_length::<Request>(&header), body_length::<Answer>(&header), GateFile::parse(&body));
        if let Ok(request) = decode::<Request>(&body) {
            prop_assert!(request.check().is_ok());
        }
        let _ = decode::<Answer>(&body);
    }

    #[test]
    fn what_is_encoded_is_decoded(
        id in "[^/\0]{1,60}", bundle in "/[^\0]{0,60}", root in proptest::option::of("/[^\0]{0,60}"),
        pid in 1..i32::MAX, annotations in proptest::collection::btree_map(".*", ".*", 0..5), patience_ms: u32,
    ) {
        let spec = Spec { annotations, ..Spec::default() };
        let container = Container {
            point: Point::CreateRuntime, id: ContainerId { id, bundle, root }, pid, started: None, spec,
        };
        let request = Request { patience_ms, question: Question::Container(container) };
        prop_assert_eq!(there_and_back(&request), Ok(request));
    }
}
