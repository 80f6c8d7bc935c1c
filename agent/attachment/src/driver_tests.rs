//! The walk and its roll-back, on companions and redirection that only keep a diary.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pillion_companion::CompanionRecord;
use pillion_redirect::{RedirectRecord, Sources};
use pillion_workload::{
    Cgroup, CgroupId, CompanionKind, CompanionName, ExistingConnections, ExternalSpec, FailureMode,
    FirstInstruction, Instance, NetnsId, Pid, Plan, ProcessId, RuntimeKind, StartTime, Subject, Target,
    Workload, WorkloadId,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    Happening, Ledger, Record, Report, State, Wish, Witness,
    claims::Claims,
    driver::{Driver, Kept},
    machinery::{CompanionNews, Fault, LaunchOf, Machinery, Rules},
    namespace::Settled,
    ports::{Resolved, resolve},
    record::BoxFuture,
    testing::{companion, inbound, outbound, plan},
};

type News = mpsc::Receiver<CompanionNews<String>>;

/// What goes wrong, and what was done.
#[derive(Default)]
struct Diary {
    done: Mutex<Vec<String>>,
    /// How many starts of this companion fail.
    failing_starts: Mutex<BTreeMap<String, u32>>,
    failing: Mutex<Vec<&'static str>>,
    /// Whether starts take a while; the end of one that is given up is noted.
    slow_starts: AtomicBool,
    /// Connections that companions have not asked for: one less at each look.
    waiting: Mutex<usize>,
    /// Whether the workload had begun when it was told of.
    has_begun: AtomicBool,
    /// Through which the tests speak as companions.
    voices: Mutex<BTreeMap<String, mpsc::Sender<CompanionNews<String>>>>,
}

struct Fake {
    name: CompanionName,
    news: News,
}

/// A start under way. Dropped, it was given up.
struct Unfinished<'a>(&'a Diary, &'a CompanionName);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Removing what was made takes a while.
        std::thread::sleep(Duration::from_millis(50));
        self.0.note(format!("given up {}", self.1));
    }
}

impl Diary {
    fn note(&self, text: impl Into<String>) {
        self.done.lock().unwrap().push(text.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.done.lock().unwrap())
    }

    fn step(&self, name: &'static str, text: impl Into<String>) -> Result<(), Fault> {
        self.note(text);
        if self.failing.lock().unwrap().contains(&name) { Err(Fault(format!("no {name}"))) } else { Ok(()) }
    }

    fn fail(self: &Arc<Self>, step: &'static str) -> Arc<Self> {
        self.failing.lock().unwrap().push(step);
        self.clone()
    }

    fn say(&self, name: &str, news: CompanionNews<String>) {
        self.voices.lock().unwrap()[name].try_send(news).unwrap();
    }

    fn fake(&self, name: &CompanionName) -> Fake {
        let (voice, news) = mpsc::channel(8);
        self.voices.lock().unwrap().insert(name.to_string(), voice);
        Fake { name: name.clone(), news }
    }
}

impl Machinery for Diary {
    type Companion = Fake;
    type Ready = String;
    type Guard = Vec<String>;

    async fn settle(
        &self,
        _: &Workload,
        _: Arc<OwnedFd>,
        plan: Arc<Plan>,
        previous: Option<Resolved>,
    ) -> Result<Settled, Fault> {
        if self.failing.lock().unwrap().contains(&"settle") {
            return Err(Fault("no settle".into()));
        }
        let resolved = resolve(&plan, previous.as_ref(), |_| true).map_err(|error| Fault::of(&error))?;
        Ok(Settled { resolved, claims: Claims::default(), sources: Sources::default() })
    }

    async fn claim_again(&self, _: &Workload, _: Arc<OwnedFd>, _: &Resolved) -> Claims {
        Claims::default()
    }

    async fn start(&self, launch: LaunchOf) -> Result<(Fake, String), Fault> {
        let name = launch.spec.name;
        self.note(format!("start {name}"));
        if self.slow_starts.load(Ordering::Relaxed) {
            let unfinished = Unfinished(self, &name);
            tokio::time::sleep(Duration::from_millis(200)).await;
            std::mem::forget(unfinished);
        }
        let failing = {
            let mut failing = self.failing_starts.lock().unwrap();
            let left = failing.entry(name.to_string()).or_default();
            let fails = *left > 0;
            *left = left.saturating_sub(1);
            fails
        };
        if failing {
            Err(Fault("not ready in time".into()))
        } else {
            Ok((self.fake(&name), name.to_string()))
        }
    }

    async fn adopt(&self, launch: LaunchOf, _: CompanionRecord) -> Result<Fake, Fault> {
        self.note(format!("adopt {}", launch.spec.name));
        Ok(self.fake(&launch.spec.name))
    }

    fn poll_event(&self, fake: &mut Fake, context: &mut Context<'_>) -> Poll<Option<CompanionNews<String>>> {
        fake.news.poll_recv(context)
    }

    fn companion_record(&self, fake: &Fake) -> CompanionRecord {
        CompanionRecord {
            workload: workload().id,
            name: fake.name.clone(),
            process: Some(ProcessId { pid: Pid(1), started: StartTime(1) }),
            starts: 1,
        }
    }

    async fn stop(&self, fake: Fake, _: Duration) -> Result<(), Fault> {
        self.step("stop", format!("stop {}", fake.name))
    }

    fn leave(&self, fake: Fake) {
        self.note(format!("leave {}", fake.name));
    }

    fn redirect(
        &self,
        _: &Workload,
        _: &OwnedFd,
        _: Rules<'_>,
        ready: Vec<String>,
    ) -> Result<Vec<String>, Fault> {
        self.step("redirect", format!("redirect to [{}]", ready.join(" ")))?;
        Ok(ready)
    }

    fn adopt_redirect(&self, _: &RedirectRecord, _: &OwnedFd) -> Result<Vec<String>, Fault> {
        self.step("adopt redirect", "adopt redirect")?;
        Ok(Vec::new())
    }

    fn redirect_record(&self, _: &Vec<String>) -> RedirectRecord {
        RedirectRecord {
            table: 0,
            number: 1,
            cgroup: workload().instance.cgroup,
            spec: pillion_workload::RedirectSpec::default(),
            on_failure: FailureMode::Open,
            sources: Sources::default(),
            companions: BTreeMap::new(),
            exempt: BTreeMap::new(),
        }
    }

    fn companion_ready(&self, _: &mut Vec<String>, ready: String) -> Result<(), Fault> {
        self.step("connect", format!("connect {ready}"))
    }

    fn companion_gone(&self, _: &mut Vec<String>, name: &CompanionName) -> Result<(), Fault> {
        self.step("disconnect", format!("disconnect {name}"))
    }

    fn update(&self, _: &mut Vec<String>, _: &OwnedFd, rules: Rules<'_>) -> Result<(), Fault> {
        self.step("update", format!("update {:?}", rules.mode))
    }

    async fn reset(&self, _: &Workload, _: &OwnedFd, _: Rules<'_>) -> Result<usize, Fault> {
        self.step("reset", "reset").map(|()| 3)
    }

    fn drain(&self, _: &mut Vec<String>) -> Result<usize, Fault> {
        self.step("drain", "drain")?;
        let mut waiting = self.waiting.lock().unwrap();
        let now = *waiting;
        *waiting = waiting.saturating_sub(1);
        Ok(now)
    }

    fn detach(&self, _: Vec<String>) -> Result<(), Fault> {
        self.step("detach", "detach")
    }

    fn leave_redirect(&self, _: Vec<String>) {
        self.note("leave redirect");
    }
}

/// Keeps the latest record.
#[derive(Default)]
struct Book(Mutex<Option<Record>>, Mutex<bool>);

impl Ledger for Book {
    fn save(&self, record: Record) -> BoxFuture<'_, io::Result<()>> {
        let full = *self.1.lock().unwrap();
        *self.0.lock().unwrap() = Some(record);
        Box::pin(async move { if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) } })
    }

    fn erase(&self, _: &WorkloadId) -> BoxFuture<'_, io::Result<()>> {
        *self.0.lock().unwrap() = None;
        Box::pin(async { Ok(()) })
    }
}

struct Begun;

impl Witness for Begun {
    fn look(&self) -> BoxFuture<'_, FirstInstruction> {
        Box::pin(async { FirstInstruction::Before })
    }

    fn judge(&self, _: FirstInstruction, after: FirstInstruction) -> FirstInstruction {
        after
    }
}

fn workload() -> Workload {
    Workload {
        id: "process/1-1".parse().unwrap(),
        subject: Subject::new(RuntimeKind::Process, "x"),
        instance: Instance {
            cgroup: Cgroup { id: CgroupId(1), path: "/x".into() },
            netns: NetnsId { device: 1, inode: 1 },
            process: ProcessId { pid: Pid(1), started: StartTime(1) },
        },
    }
}

/// An attachment under test.
struct Test {
    book: Arc<Book>,
    wish: watch::Sender<Wish>,
    reports: mpsc::Receiver<Report>,
    task: JoinHandle<()>,
}

impl Test {
    fn begin(diary: &Arc<Diary>, plan: Plan, earlier: Option<Record>) -> Self {
        Self::begin_with(diary, plan, earlier, Arc::new(Book::default()))
    }

    fn begin_with(diary: &Arc<Diary>, plan: Plan, earlier: Option<Record>, book: Arc<Book>) -> Self {
        let plan = Arc::new(plan);
        let (wish, wished) = watch::channel(Wish::Attached(plan.clone()));
        let (sender, reports) = mpsc::channel(64);
        let driver = Driver {
            machinery: diary.clone(),
            ledger: book.clone(),
            workload: Arc::new(workload()),
            netns: Arc::new(std::fs::File::open("/dev/null").unwrap().into()),
            witness: Arc::new(Begun),
            told_first: if diary.has_begun.load(Ordering::Relaxed) {
                FirstInstruction::After
            } else {
                FirstInstruction::Before
            },
            serial: 1,
            reports: sender,
            plan: earlier.as_ref().map_or(plan, |record| Arc::new(record.plan.clone())),
            wish: wished,
            kept: Kept::default(),
        };
        Self { book, wish, reports, task: tokio::spawn(driver.run(earlier)) }
    }

    async fn until(&mut self, wanted: impl Fn(&Happening) -> bool) -> Report {
        loop {
            let report = timeout(Duration::from_secs(600), self.reports.recv()).await.unwrap().unwrap();
            if wanted(&report.happening) {
                return report;
            }
        }
    }

    fn record(&self) -> Option<Record> {
        self.book.0.lock().unwrap().clone()
    }
}

fn two() -> Plan {
    let mut plan = plan(&["a", "b"]);
    plan.redirect.outbound = vec![outbound(Target { companion: "a".parse().unwrap(), port: None })];
    plan
}

#[tokio::test(start_paused = true)]
async fn companions_in_order_then_redirection_and_back_in_reverse() {
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, two(), None);
    let report = test.until(|happening| *happening == Happening::Attached).await;
    assert_eq!(report.view.state, State::Attached { missing: [].into() });
    assert_eq!(report.view.first_instruction, Some(FirstInstruction::Before));
    assert_eq!(diary.take(), ["start a", "start b", "redirect to [a b]"]);
    let record = test.record().unwrap();
    assert_eq!((record.companions.len(), record.guard.is_some()), (2, true));
    test.wish.send(Wish::Detached).unwrap();
    let report = test.until(|happening| *happening == Happening::Detached).await;
    assert_eq!(report.view.state, State::Detached);
    assert_eq!(diary.take(), ["drain", "stop b", "stop a", "detach"]);
    assert_eq!(test.record(), None);
    test.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_what_somebody_else_runs() {
    let diary = Arc::new(Diary::default());
    let mut plan = two();
    plan.companions[0].kind = CompanionKind::External(ExternalSpec::default());
    let mut test = Test::begin(&diary, plan, None);
    let report = test.until(|happening| *happening == Happening::Attached).await;
    assert_eq!(report.view.state, State::Attached { missing: ["a".parse().unwrap()].into() });
    let [external, own] = &report.view.companions[..] else { panic!("two companions") };
    assert_eq!((external.external, external.ready), (true, false));
    assert_eq!((own.external, own.ready), (false, true));
    assert_eq!(diary.take(), ["adopt a", "start b", "redirect to [b]"]);
    for (pid, restarted) in [(7, false), (8, true)] {
        diary.say("a", CompanionNews::Ready { ready: "a".into(), pid: Pid(pid) });
        let told = Happening::CompanionReady { companion: "a".parse().unwrap(), restarted };
        let report = test.until(|happening| *happening == told).await;
        assert_eq!(report.view.state, State::Attached { missing: [].into() });
        assert_eq!(diary.take(), ["connect a"]);
    }
    test.wish.send(Wish::Detached).unwrap();
    test.until(|happening| *happening == Happening::Detached).await;
    assert_eq!(diary.take(), ["drain", "stop b", "stop a", "detach"]);
}

#[tokio::test(start_paused = true)]
async fn companions_are_stopped_when_they_have_asked_for_all_connections_or_will_not() {
    // So many connections wait; one less at each look.
    for (waiting, looks) in [(0, 1..=1), (2, 3..=3), (100_000, 50..=200)] {
        let diary = Arc::new(Diary::default());
        let mut test = Test::begin(&diary, two(), None);
        test.until(|happening| *happening == Happening::Attached).await;
        diary.take();
        *diary.waiting.lock().unwrap() = waiting;
        test.wish.send(Wish::Detached).unwrap();
        test.until(|happening| *happening == Happening::Detached).await;
        let done = diary.take();
        let drained = done.iter().take_while(|step| *step == "drain").count();
        assert!(looks.contains(&drained), "{waiting} waiting: {drained} looks");
        assert_eq!(done[drained..], ["stop b", "stop a", "detach"]);
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_is_rolled_back_in_reverse() {
    for (failing, done) in [
        ("settle", &[][..]),
        ("redirect", &["start a", "start b", "redirect to [a b]", "stop b", "stop a"][..]),
    ] {
        let diary = Arc::new(Diary::default()).fail(failing);
        let mut test = Test::begin(&diary, two(), None);
        let report = test.until(|happening| *happening == Happening::Failed).await;
        assert_eq!(report.view.state, State::Failed { reason: format!("no {failing}") });
        assert_eq!(diary.take(), done, "{failing}");
        assert_eq!(test.record(), None, "{failing}");
        test.task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_recorded_is_not_begun() {
    let diary = Arc::new(Diary::default());
    let book = Arc::new(Book(Mutex::default(), Mutex::new(true)));
    let mut test = Test::begin_with(&diary, two(), None, book);
    let report = test.until(|happening| *happening == Happening::Failed).await;
    let State::Failed { reason } = report.view.state else { panic!() };
    assert!(reason.starts_with("cannot write the journal"), "{reason}");
    assert!(diary.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_taken_back_is_named_and_stays_recorded() {
    let diary = Arc::new(Diary::default()).fail("detach").fail("stop");
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    test.wish.send(Wish::Detached).unwrap();
    let report = test.until(|happening| *happening == Happening::Failed).await;
    let State::Failed { reason } = report.view.state else { panic!() };
    for left in ["redirection: no detach", "companion b: no stop", "companion a: no stop"] {
        assert!(reason.contains(left), "{reason}");
    }
    assert!(test.record().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_companion_that_is_not_ready_is_missed_and_tried_until_it_is() {
    // Closed: nothing passes from the beginning, and each companion is connected when it is ready.
    for (mode, done) in [
        (FailureMode::Open, &["start a", "start b", "redirect to [b]"][..]),
        (FailureMode::Closed, &["redirect to []", "start a", "start b", "connect b"][..]),
    ] {
        let diary = Arc::new(Diary::default());
        diary.failing_starts.lock().unwrap().insert("a".into(), 3);
        let mut test = Test::begin(&diary, Plan { on_failure: mode, ..two() }, None);
        let report = test.until(|happening| *happening == Happening::Attached).await;
        assert_eq!(report.view.state, State::Attached { missing: ["a".parse().unwrap()].into() });
        assert_eq!(report.view.companions[0].error.as_deref(), Some("not ready in time"));
        assert_eq!(diary.take(), done);
        let report = test.until(|happening| matches!(happening, Happening::CompanionReady { .. })).await;
        assert_eq!(report.view.state, State::Attached { missing: [].into() });
        assert_eq!(diary.take(), ["start a", "start a", "start a", "connect a"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_companion_that_ends_is_disconnected_and_connected_again() {
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    diary.take();
    diary.say("a", CompanionNews::Exited { how: "signal 9".into() });
    let report = test.until(|happening| matches!(happening, Happening::CompanionExited { .. })).await;
    assert_eq!(report.view.state, State::Attached { missing: ["a".parse().unwrap()].into() });
    diary.say("a", CompanionNews::Ready { ready: "a".into(), pid: Pid(2) });
    let report = test.until(|happening| matches!(happening, Happening::CompanionReady { .. })).await;
    assert_eq!(
        report.happening,
        Happening::CompanionReady { companion: "a".parse().unwrap(), restarted: true }
    );
    assert_eq!((report.view.companions[0].restarts, report.view.companions[0].pid), (1, Some(Pid(2))));
    assert_eq!(diary.take(), ["disconnect a", "connect a"]);
}

#[tokio::test(start_paused = true)]
async fn a_changed_plan_touches_only_what_changed() {
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    diary.take();
    // Another failure mode: no companion is touched.
    let mut changed = Plan { on_failure: FailureMode::Closed, ..two() };
    test.wish.send(Wish::Attached(Arc::new(changed.clone()))).unwrap();
    test.until(|happening| *happening == Happening::Replanned).await;
    assert_eq!(diary.take(), ["update Closed"]);
    // Another b, and a new c: a is not touched.
    changed.companions[1].stop_grace = Duration::from_secs(1);
    changed.companions.push(companion("c"));
    test.wish.send(Wish::Attached(Arc::new(changed.clone()))).unwrap();
    let report = test.until(|happening| *happening == Happening::Replanned).await;
    let missing = ["b".parse().unwrap(), "c".parse().unwrap()].into();
    assert_eq!(report.view.state, State::Attached { missing });
    for _ in 0..2 {
        test.until(|happening| matches!(happening, Happening::CompanionReady { .. })).await;
    }
    let done = diary.take();
    assert_eq!(done[..3], ["update Closed", "disconnect b", "stop b"]);
    assert_eq!(done.iter().filter(|line| line.ends_with(" a")).count(), 0, "{done:?}");
    assert_eq!(test.record().unwrap().plan, changed);
    // One that cannot be put in force leaves the one of before.
    diary.fail("update");
    test.wish.send(Wish::Attached(Arc::new(two()))).unwrap();
    let report = test.until(|happening| matches!(happening, Happening::ReplanFailed { .. })).await;
    assert_eq!((&*report.view.plan, report.view.refused.as_deref()), (&changed, Some("no update")));
    assert_eq!(diary.take(), ["update Open", "update Closed"]);
    // Until it can be.
    diary.failing.lock().unwrap().clear();
    let report = test.until(|happening| *happening == Happening::Replanned).await;
    assert_eq!((&*report.view.plan, report.view.refused), (&two(), None));
}

#[tokio::test(start_paused = true)]
async fn a_wish_to_detach_ends_a_start_that_hangs() {
    let diary = Arc::new(Diary::default());
    diary.failing_starts.lock().unwrap().insert("a".into(), u32::MAX);
    diary.failing_starts.lock().unwrap().insert("b".into(), u32::MAX);
    let mut test = Test::begin(&diary, two(), None);
    test.wish.send(Wish::Detached).unwrap();
    test.until(|happening| *happening == Happening::Detached).await;
    assert!(!diary.take().iter().any(|line| line.starts_with("redirect")));
}

#[tokio::test(start_paused = true)]
async fn the_next_agent_takes_over_without_a_gap() {
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    let record = test.record().unwrap();
    test.wish.send(Wish::Left).unwrap();
    test.task.await.unwrap();
    let mut done = diary.take().split_off(3);
    done.sort();
    assert_eq!(done, ["leave a", "leave b", "leave redirect"]);

    let mut next = Test::begin(&diary, Plan { on_failure: FailureMode::Closed, ..two() }, Some(record));
    next.until(|happening| *happening == Happening::Started).await;
    while diary.voices.lock().unwrap().values().any(mpsc::Sender::is_closed) {
        tokio::task::yield_now().await;
    }
    for name in ["a", "b"] {
        diary.say(name, CompanionNews::Ready { ready: name.into(), pid: Pid(1) });
    }
    let report = next.until(|happening| *happening == Happening::Adopted).await;
    assert_eq!(report.view.first_instruction, Some(FirstInstruction::Before));
    // The plan that changed meanwhile needs no companion: it was put in force as soon as redirection was adopted.
    let mut done = diary.take();
    done.sort();
    let wanted = ["adopt a", "adopt b", "adopt redirect", "connect a", "connect b", "update Closed"];
    assert_eq!(done, wanted);
    assert_eq!(next.record().unwrap().plan.on_failure, FailureMode::Closed);
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_agent_only_intended_is_done_anew() {
    let diary = Arc::new(Diary::default());
    let record = Record {
        workload: workload(),
        plan: two(),
        redirect: None,
        companions: Vec::new(),
        guard: None,
        first_instruction: None,
        gate: None,
        reset_due: false,
    };
    let mut test = Test::begin(&diary, two(), Some(record));
    test.until(|happening| *happening == Happening::Attached).await;
    assert_eq!(diary.take(), ["start a", "start b", "redirect to [a b]"]);
}

#[tokio::test(start_paused = true)]
async fn a_closed_plan_whose_redirection_was_lost_is_closed_before_companions_are_waited_for() {
    let closed = Plan { on_failure: FailureMode::Closed, ..two() };
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, closed.clone(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    let record = test.record().unwrap();
    test.wish.send(Wish::Left).unwrap();
    test.task.await.unwrap();
    // Killed before it was recorded; recorded, but not to be adopted.
    for (guard, failing, done) in [
        (None, "", &["redirect to []"][..]),
        (record.guard.clone(), "adopt redirect", &["adopt redirect", "redirect to []"][..]),
    ] {
        let diary = Arc::new(Diary::default()).fail(failing);
        let record = Record { guard, ..record.clone() };
        let mut next = Test::begin(&diary, closed.clone(), Some(record));
        next.until(|happening| *happening == Happening::Started).await;
        let happened = diary.take();
        assert_eq!(happened.into_iter().filter(|step| step.contains("redirect")).collect::<Vec<_>>(), done);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_becomes_closed_while_companions_start_is_closed_at_once() {
    let diary = Arc::new(Diary::default());
    diary.slow_starts.store(true, Ordering::Relaxed);
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Started).await;
    while diary.take().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut closed = Plan { on_failure: FailureMode::Closed, ..two() };
    closed.companions[0].stop_grace = Duration::from_secs(1);
    test.wish.send(Wish::Attached(Arc::new(closed))).unwrap();
    test.until(|happening| *happening == Happening::Attached).await;
    // The start that was given up has ended before the next one of the same name begins.
    let wanted =
        ["redirect to []", "disconnect a", "given up a", "start a", "connect a", "start b", "connect b"];
    assert_eq!(diary.take(), wanted);
}

fn resetting() -> Plan {
    Plan { existing_connections: ExistingConnections::Reset, ..two() }
}

fn is_reset(happening: &Happening) -> bool {
    matches!(happening, Happening::ConnectionsReset { count: 3 })
}

#[tokio::test(start_paused = true)]
async fn open_connections_are_reset_when_the_workload_has_begun_and_the_policy_says_so() {
    for (has_begun, plan, resets) in
        [(true, resetting(), 1), (false, resetting(), 0), (true, two(), 0), (false, two(), 0)]
    {
        let diary = Arc::new(Diary::default());
        diary.has_begun.store(has_begun, Ordering::Relaxed);
        let mut test = Test::begin(&diary, plan, None);
        test.until(|happening| *happening == Happening::Attached).await;
        if resets > 0 {
            test.until(is_reset).await;
            assert!(!test.record().unwrap().reset_due);
        }
        // Nor once more, or later.
        test.wish.send(Wish::Detached).unwrap();
        test.until(|happening| *happening == Happening::Detached).await;
        let done = diary.take();
        assert_eq!(done.iter().filter(|step| *step == "reset").count(), resets, "{done:?}");
        assert_eq!(resets > 0, done.get(3).is_some_and(|step| step == "reset"), "{done:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn open_connections_are_reset_when_there_is_something_to_go_to_or_nothing_may_pass() {
    for (mode, done) in [
        (FailureMode::Open, &["start a", "start b", "redirect to [b]", "start a", "connect a", "reset"][..]),
        (
            FailureMode::Closed,
            &["redirect to []", "start a", "reset", "start b", "connect b", "start a", "connect a"][..],
        ),
    ] {
        let diary = Arc::new(Diary::default());
        diary.has_begun.store(true, Ordering::Relaxed);
        diary.failing_starts.lock().unwrap().insert("a".into(), 1);
        let mut test = Test::begin(&diary, Plan { on_failure: mode, ..resetting() }, None);
        test.until(|happening| match mode {
            FailureMode::Open => is_reset(happening),
            FailureMode::Closed => matches!(
                happening,
                Happening::CompanionReady { companion, .. } if companion.as_str() == "a"
            ),
        })
        .await;
        let mut steps = diary.take();
        // The start is a task of its own: which of the two is first does not matter.
        if mode == FailureMode::Closed && steps[1] == "reset" {
            steps.swap(1, 2);
        }
        assert_eq!(steps, done);
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_comes_to_reset_does_so_once() {
    let diary = Arc::new(Diary::default());
    let mut test = Test::begin(&diary, two(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    diary.take();
    let mut plan = resetting();
    test.wish.send(Wish::Attached(Arc::new(plan.clone()))).unwrap();
    test.until(is_reset).await;
    assert_eq!(diary.take(), ["update Open", "reset"]);
    // Something else changes: open connections may be direct for a reason.
    plan.on_failure = FailureMode::Closed;
    test.wish.send(Wish::Attached(Arc::new(plan.clone()))).unwrap();
    test.until(|happening| *happening == Happening::Replanned).await;
    // More is redirected than before.
    plan.redirect.inbound =
        vec![inbound(&[8080], Target { companion: "a".parse().unwrap(), port: Some(15001) })];
    test.wish.send(Wish::Attached(Arc::new(plan))).unwrap();
    test.until(is_reset).await;
    assert_eq!(diary.take().iter().filter(|step| *step == "reset").count(), 1);
}

#[tokio::test(start_paused = true)]
async fn connections_that_cannot_be_reset_are_told_of() {
    let diary = Arc::new(Diary::default()).fail("reset");
    diary.has_begun.store(true, Ordering::Relaxed);
    let mut test = Test::begin(&diary, resetting(), None);
    let report = test.until(|happening| matches!(happening, Happening::ConnectionsKept { .. })).await;
    assert_eq!(report.view.state, State::Attached { missing: [].into() });
    assert_eq!(report.view.unreset.as_deref(), Some("no reset"));
}

#[tokio::test(start_paused = true)]
async fn a_reset_that_is_due_when_the_agent_is_killed_is_done_by_the_next() {
    let diary = Arc::new(Diary::default());
    diary.has_begun.store(true, Ordering::Relaxed);
    diary.failing_starts.lock().unwrap().insert("a".into(), u32::MAX);
    let mut test = Test::begin(&diary, resetting(), None);
    test.until(|happening| *happening == Happening::Attached).await;
    let record = test.record().unwrap();
    assert!(record.reset_due);
    test.wish.send(Wish::Left).unwrap();
    test.task.await.unwrap();
    assert!(!diary.take().contains(&"reset".to_owned()));
    diary.failing_starts.lock().unwrap().clear();
    let mut next = Test::begin(&diary, resetting(), Some(record));
    next.until(|happening| *happening == Happening::Started).await;
    while diary.voices.lock().unwrap().get("b").is_none_or(mpsc::Sender::is_closed) {
        tokio::task::yield_now().await;
    }
    diary.say("b", CompanionNews::Ready { ready: "b".into(), pid: Pid(1) });
    next.until(is_reset).await;
}
