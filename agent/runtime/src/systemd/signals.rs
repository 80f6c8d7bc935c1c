//! What systemd's signals point at: which units to look at, and whether unit files may have changed.
//!
//! Owns the receiving, in a task that does nothing else, so that the connection never waits for anybody. A signal says only
//! where to look; so they may be late, doubled or in any order. Never looks.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{StreamExt, stream::select_all};
use tokio::{sync::Notify, task::JoinHandle};
use zbus::{Message, MessageStream};

use super::{
    bus::{BusError, MANAGER, PROPERTIES},
    unit::UnitName,
};

/// More units than a node has; beyond it everything is looked at.
const LIMIT: usize = 16_384;

/// What has been pointed at since it was last taken.
#[derive(Debug, Default)]
pub(super) struct Pointed {
    /// Units that have changed.
    pub(super) units: BTreeSet<UnitName>,
    /// Too many to remember, or systemd has read everything again.
    pub(super) everything: bool,
    /// Unit files may be others.
    pub(super) files: bool,
    /// Why no more signals will come.
    pub(super) ended: Option<BusError>,
}

/// The receiving end. Dropping it ends the task.
#[derive(Debug)]
pub(super) struct Signals {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    pointed: Mutex<Pointed>,
    news: Notify,
}

impl Signals {
    /// Begins to receive.
    pub(super) fn receive(streams: [MessageStream; 3]) -> Self {
        let shared = Arc::<Shared>::default();
        let task = tokio::spawn(receive(streams, shared.clone()));
        Self { shared, task }
    }

    /// Waits until there is something, and takes it. Cancel-safe.
    pub(super) async fn next(&mut self) -> Pointed {
        self.shared.news.notified().await;
        std::mem::take(&mut *self.shared.pointed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn receive(streams: [MessageStream; 3], shared: Arc<Shared>) {
    let mut messages = select_all(streams);
    loop {
        let pointer = match messages.next().await {
            Some(Ok(message)) => Pointer::of(&message),
            Some(Err(_)) | None => Some(Pointer::End(BusError::Lost)),
        };
        let Some(pointer) = pointer else { continue };
        let last = matches!(pointer, Pointer::End(_));
        shared.pointed.lock().unwrap_or_else(PoisonError::into_inner).add(pointer);
        shared.news.notify_one();
        if last {
            return;
        }
    }
}

/// What one signal points at.
#[derive(Debug)]
enum Pointer {
    Unit(UnitName),
    Reloaded,
    Files,
    End(BusError),
}

impl Pointer {
    fn of(message: &Message) -> Option<Self> {
        let header = message.header();
        let member = header.member()?.as_str();
        let body = message.body();
        match header.interface()?.as_str() {
            PROPERTIES => UnitName::of_object(header.path()?.as_str()).map(Self::Unit),
            MANAGER => match member {
                // `so`: name, object.
                "UnitNew" | "UnitRemoved" => {
                    let (name, _): (&str, zbus::wire::ObjectPath<'_>) = body.deserialize().ok()?;
                    UnitName::try_from(name).ok().map(Self::Unit)
                }
                // `uoss`: number, object, unit, result.
                "JobRemoved" => {
                    let (_, _, name, _): (u32, zbus::wire::ObjectPath<'_>, &str, &str) =
                        body.deserialize().ok()?;
                    UnitName::try_from(name).ok().map(Self::Unit)
                }
                // `b`: begins or has ended.
                "Reloading" => (!body.deserialize::<bool>().ok()?).then_some(Self::Reloaded),
                "UnitFilesChanged" => Some(Self::Files),
                _ => None,
            },
            _ if member == "NameOwnerChanged" => Some(Self::End(BusError::Left)),
            _ => None,
        }
    }
}

impl Pointed {
    fn add(&mut self, pointer: Pointer) {
        match pointer {
            Pointer::Unit(unit) if self.units.len() < LIMIT => _ = self.units.insert(unit),
            Pointer::Unit(_) => self.everything = true,
            Pointer::Reloaded => (self.everything, self.files) = (true, true),
            Pointer::Files => self.files = true,
            Pointer::End(error) => self.ended = Some(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer<B: serde::Serialize + zbus::DynamicType>(
        path: &str,
        interface: &str,
        member: &str,
        body: &B,
    ) -> Option<Pointer> {
        let message = Message::signal(path, interface, member).build(body).expect("valid");
        Pointer::of(&message)
    }

    #[test]
    fn signals_point_at_units() {
        let manager = "/org/freedesktop/systemd1";
        let object = zbus::wire::ObjectPath::try_from("/x").expect("valid");
        let unit = |found: Option<Pointer>| match found {
            Some(Pointer::Unit(unit)) => Some(unit.to_string()),
            _ => None,
        };
        let new = pointer(manager, MANAGER, "UnitNew", &("a.service", &object));
        assert_eq!(unit(new).as_deref(), Some("a.service"));
        let removed = pointer(manager, MANAGER, "UnitRemoved", &("a.socket", &object));
        assert_eq!(unit(removed), None);
        let job = pointer(manager, MANAGER, "JobRemoved", &(7_u32, &object, "b.service", "done"));
        assert_eq!(unit(job).as_deref(), Some("b.service"));
        let path = "/org/freedesktop/systemd1/unit/c_2eservice";
        let changed = pointer(path, PROPERTIES, "PropertiesChanged", &("ignored",));
        assert_eq!(unit(changed).as_deref(), Some("c.service"));
    }

    #[test]
    fn others_point_at_everything_or_at_nothing() {
        let manager = "/org/freedesktop/systemd1";
        assert!(matches!(pointer(manager, MANAGER, "Reloading", &(false,)), Some(Pointer::Reloaded)));
        assert!(pointer(manager, MANAGER, "Reloading", &(true,)).is_none());
        assert!(matches!(pointer(manager, MANAGER, "UnitFilesChanged", &()), Some(Pointer::Files)));
        assert!(pointer(manager, MANAGER, "StartupFinished", &(1_u64,)).is_none());
        assert!(pointer(manager, MANAGER, "UnitNew", &(1_u64,)).is_none(), "malformed");
        let owner = pointer("/org/freedesktop/DBus", "org.freedesktop.DBus", "NameOwnerChanged", &("x",));
        assert!(matches!(owner, Some(Pointer::End(BusError::Left))));
    }
}
