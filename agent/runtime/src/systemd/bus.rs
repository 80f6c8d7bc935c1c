//! systemd's API on the system bus (`org.freedesktop.systemd1(5)`), as far as it is needed.
//!
//! Owns the connection; every question has a deadline. Never starts, stops or changes a unit; the only thing it asks
//! systemd to do is to read its unit files again.

use std::{path::Path, sync::Arc, time::Duration};

use pillion_workload::Pid;
use tokio::{sync::Semaphore, time::timeout};
use zbus::{
    Connection, DynamicType, Message, MessageStream,
    connection::Builder,
    match_rule::MatchRule,
    message::Type,
    names::OwnedUniqueName,
    wire::{Type as Typed, as_variant},
};

use super::unit::UnitName;

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
pub(super) const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
pub(super) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// systemd answers a reload when it is done; that takes seconds where there are thousands of units.
const RELOAD_LIMIT: Duration = Duration::from_secs(60);
/// Signals that wait to be taken by the task that does nothing else.
const QUEUE: std::num::NonZeroUsize = std::num::NonZeroUsize::new(256).expect("not zero");

/// Questions in flight at once. dbus-daemon refuses more than 128 of one connection (`max_replies_per_connection`), and systemd
/// answers one after the other anyway.
const AT_ONCE: usize = 32;

/// Why systemd did not answer.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The bus itself.
    #[error("cannot connect to the system bus at {path}")]
    Connect {
        /// Its socket.
        path: String,
        /// Why.
        source: zbus::Error,
    },
    /// A question.
    #[error("{method} of {subject} failed")]
    Call {
        /// What was asked.
        method: &'static str,
        /// About what.
        subject: String,
        /// Why.
        source: zbus::Error,
    },
    /// No answer within the deadline.
    #[error("{method} of {subject} was not answered within {limit:?}")]
    Silent {
        /// What was asked.
        method: &'static str,
        /// About what.
        subject: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection has ended.
    #[error("the connection to the system bus was lost")]
    Lost,
    /// systemd has restarted itself, and with it its connection to the bus.
    #[error("systemd has left the system bus")]
    Left,
}

/// One connection. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Bus {
    connection: Connection,
    owner: OwnedUniqueName,
    deadline: Duration,
    questions: Arc<Semaphore>,
}

/// What is known of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// Its own name, when it was asked for by an alias.
    pub(super) id: String,
    /// `loaded`, `not-found`, `masked` and so on.
    pub(super) load_state: String,
    /// `active`, `activating`, `inactive` and so on.
    pub(super) active_state: String,
    /// For a service `condition`, `start-pre`, `running` and so on.
    pub(super) sub_state: String,
    /// Differs for each start; empty before the first.
    pub(super) invocation: Vec<u8>,
    /// Path of its cgroup below the hierarchy's root; empty when it has none.
    pub(super) control_group: String,
    /// Program of the first `ExecStart=`.
    pub(super) program: Option<String>,
    /// `PrivateNetwork=` or `NetworkNamespacePath=` is set.
    pub(super) own_network: bool,
    /// How long its start may take; absent when for ever.
    pub(super) start_limit: Option<Duration>,
    /// Whether systemd orders it behind the basic system.
    pub(super) default_dependencies: bool,
    /// Whether it was made by a call and not by a file.
    pub(super) transient: bool,
}

/// `a(sasbttttuii)`: path, arguments, ignore failure, four times, pid, code and status of the last run.
type Exec = Vec<(String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32)>;
/// `a(ssssssouso)`: name, description, load state, active state, and what is not used here.
type Listed = Vec<(
    String,
    String,
    String,
    String,
    String,
    String,
    zbus::wire::OwnedObjectPath,
    u32,
    String,
    zbus::wire::OwnedObjectPath,
)>;

impl Bus {
    /// Connects, and asks systemd to send signals.
    pub(super) async fn connect(path: &Path, deadline: Duration) -> Result<Self, BusError> {
        let shown = path.display().to_string();
        let failed = |source| BusError::Connect { path: shown.clone(), source };
        let connecting = Builder::address(format!("unix:path={shown}").as_str()).build();
        let silent = || BusError::Silent { method: "connecting", subject: shown.clone(), limit: deadline };
        let connection = timeout(deadline, connecting).await.map_err(|_| silent())?.map_err(failed)?;
        let owner = call(&connection, deadline, BUS, BUS_PATH, BUS, "GetNameOwner", &(SYSTEMD,)).await?;
        let owner = answer("GetNameOwner", SYSTEMD, &owner)?;
        let bus = Self { connection, owner, deadline, questions: Arc::new(Semaphore::new(AT_ONCE)) };
        bus.manager("Subscribe", &(), deadline).await?;
        Ok(bus)
    }

    /// Signals of the manager, changes of units, and changes of systemd's place on the bus.
    pub(super) async fn signals(&self) -> Result<[MessageStream; 3], BusError> {
        let failed = |source| BusError::Call { method: "AddMatch", subject: SYSTEMD.to_owned(), source };
        let rule = || MatchRule::builder().msg_type(Type::Signal);
        let of_systemd = || rule().sender(self.owner.as_str());
        let manager = of_systemd().path(MANAGER_PATH).interface(MANAGER);
        let units = of_systemd().path_namespace("/org/freedesktop/systemd1/unit").interface(PROPERTIES);
        let owner = rule().sender(BUS).interface(BUS).member("NameOwnerChanged").add_arg(SYSTEMD);
        let stream = async |rule: zbus::match_rule::Builder<'_>| {
            let rule = rule.build().map_err(failed)?;
            let adding = MessageStream::for_match_rule(rule, &self.connection, Some(QUEUE));
            let silent = |_| BusError::Silent {
                method: "AddMatch",
                subject: SYSTEMD.to_owned(),
                limit: self.deadline,
            };
            timeout(self.deadline, adding).await.map_err(silent)?.map_err(failed)
        };
        Ok([stream(manager).await?, stream(units).await?, stream(owner).await?])
    }

    /// Whether systemd answers.
    pub(super) async fn ping(&self) -> Result<(), BusError> {
        let peer = "org.freedesktop.DBus.Peer";
        call(&self.connection, self.deadline, SYSTEMD, MANAGER_PATH, peer, "Ping", &()).await.map(drop)
    }

    /// The path of systemd's own cgroup, below which all units are.
    pub(super) async fn root(&self) -> Result<String, BusError> {
        self.property(MANAGER_PATH, MANAGER, "ControlGroup").await
    }

    /// The names of all loaded services, and whether each is active or about to be.
    pub(super) async fn loaded(&self) -> Result<Vec<(UnitName, bool)>, BusError> {
        let reply = self.manager("ListUnits", &(), self.deadline).await?;
        let units: Listed = answer("ListUnits", "systemd", &reply)?;
        let named = |(name, _, _, state, ..): &(String, String, String, String, _, _, _, _, _, _)| {
            Some((UnitName::try_from(name.as_str()).ok()?, !matches!(state.as_str(), "inactive" | "failed")))
        };
        Ok(units.iter().filter_map(named).collect())
    }

    /// The names of all services and templates that have a unit file.
    pub(super) async fn installed(&self) -> Result<Vec<UnitName>, BusError> {
        let reply = self.manager("ListUnitFiles", &(), self.deadline.max(RELOAD_LIMIT)).await?;
        let files: Vec<(String, String)> = answer("ListUnitFiles", "systemd", &reply)?;
        let files = files.iter().filter(|(_, state)| !state.starts_with("masked") && state != "alias");
        let names = files.filter_map(|(path, _)| Path::new(path).file_name()?.to_str());
        Ok(names.filter_map(|name| UnitName::try_from(name).ok()).collect())
    }

    /// Whether systemd has a unit loaded. What it has unloaded has ended, and nobody waits for it.
    pub(super) async fn is_loaded(&self, name: &UnitName) -> Result<bool, BusError> {
        match self.manager("GetUnit", &(name.as_str(),), self.deadline).await {
            Ok(_) => Ok(true),
            Err(BusError::Call { source: zbus::Error::MethodError(error, ..), .. })
                if error.as_str() == NO_SUCH_UNIT =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Looks at a unit. systemd loads it for that if it is not loaded, and says so by signals.
    pub(super) async fn unit(&self, name: &UnitName) -> Result<Unit, BusError> {
        let object = name.object();
        let path = object.as_str();
        let (id, load_state, active_state, sub_state, invocation, default_dependencies, transient) = tokio::try_join!(
            self.property(path, UNIT, "Id"),
            self.property(path, UNIT, "LoadState"),
            self.property(path, UNIT, "ActiveState"),
            self.property(path, UNIT, "SubState"),
            self.property(path, UNIT, "InvocationID"),
            self.property(path, UNIT, "DefaultDependencies"),
            self.property(path, UNIT, "Transient"),
        )?;
        let (control_group, exec, private, namespace, micros): (_, Exec, bool, String, u64) = tokio::try_join!(
            self.property(path, SERVICE, "ControlGroup"),
            self.property(path, SERVICE, "ExecStart"),
            self.property(path, SERVICE, "PrivateNetwork"),
            self.property(path, SERVICE, "NetworkNamespacePath"),
            self.property(path, SERVICE, "TimeoutStartUSec"),
        )?;
        Ok(Unit {
            id,
            load_state,
            active_state,
            sub_state,
            invocation,
            control_group,
            program: exec.into_iter().next().map(|(path, ..)| path),
            own_network: private || !namespace.is_empty(),
            start_limit: (micros != u64::MAX).then(|| Duration::from_micros(micros)),
            default_dependencies,
            transient,
        })
    }

    /// The state in detail of a loaded unit, and which start of it that is.
    pub(super) async fn start_of(&self, name: &UnitName) -> Result<(String, Vec<u8>), BusError> {
        let object = name.object();
        let path = object.as_str();
        tokio::try_join!(self.property(path, UNIT, "SubState"), self.property(path, UNIT, "InvocationID"))
    }

    /// Has unit files and drop-ins read again.
    pub(super) async fn reload(&self) -> Result<(), BusError> {
        self.manager("Reload", &(), RELOAD_LIMIT).await.map(drop)
    }

    async fn manager<B>(&self, method: &'static str, body: &B, limit: Duration) -> Result<Message, BusError>
    where
        B: serde::Serialize + DynamicType,
    {
        call(&self.connection, limit, SYSTEMD, MANAGER_PATH, MANAGER, method, body).await
    }

    async fn property<T>(&self, path: &str, interface: &str, name: &'static str) -> Result<T, BusError>
    where
        T: for<'de> serde::Deserialize<'de> + Typed,
    {
        // Each question has its deadline, so that a place is free again in time; nobody closes the places.
        let _place = self.questions.acquire().await.map_err(|_| BusError::Lost)?;
        let body = (interface, name);
        let reply = call(&self.connection, self.deadline, SYSTEMD, path, PROPERTIES, "Get", &body).await?;
        let failed = |source| BusError::Call { method: name, subject: path.to_owned(), source };
        let body = reply.body();
        body.deserialize_ignore_signature::<as_variant::Deserialize<'_, T>>()
            .map(|value| value.0)
            .map_err(failed)
    }
}

/// The process that is systemd: the one in `init.scope` below its root cgroup. The bus names it too, but by a number of the
/// bus's own PID namespace.
pub(super) fn manager_pid(init_scope: &Path) -> std::io::Result<Option<Pid>> {
    let text = std::fs::read_to_string(init_scope.join("cgroup.procs"))?;
    // 0 is a process that this PID namespace does not have.
    Ok(text.lines().filter_map(|line| line.parse().ok()).find(|pid| *pid > 0).map(Pid))
}

async fn call<B>(
    connection: &Connection,
    limit: Duration,
    destination: &str,
    path: &str,
    interface: &str,
    method: &'static str,
    body: &B,
) -> Result<Message, BusError>
where
    B: serde::Serialize + DynamicType,
{
    let calling = connection.call_method(Some(destination), path, Some(interface), method, body);
    let silent = |_| BusError::Silent { method, subject: path.to_owned(), limit };
    let failed = |source| BusError::Call { method, subject: path.to_owned(), source };
    timeout(limit, calling).await.map_err(silent)?.map_err(failed)
}

fn answer<T>(method: &'static str, subject: &str, message: &Message) -> Result<T, BusError>
where
    T: for<'de> serde::Deserialize<'de> + Typed,
{
    let failed = |source| BusError::Call { method, subject: subject.to_owned(), source };
    message.body().deserialize_ignore_signature().map_err(failed)
}
