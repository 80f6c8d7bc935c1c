//! The systemd source and its gate: watches the services of one systemd over the system bus, and has those that policies
//! select ask the agent before they run anything.
//!
//! Owns the connection, its recovery, what is known of units, and the drop-ins. Never starts, stops or changes a unit
//! otherwise.
//!
//! **Source.** Signals say which unit to look at; what is told comes from looking (`look.rs`). A workload is a service that has a
//! cgroup; its `Instance.process` is systemd itself, because a service has no process of its own yet when it is held,
//! and may have several later. Scopes are not told: whoever makes one (a login, a container engine) starts what is in it.
//!
//! **Gate.** A drop-in `50-pillion.conf` with `ExecCondition=+pillion-hook systemd %n`:
//! - `ExecCondition=` and not `ExecStartPre=`: conditions run before every `ExecStartPre=` (systemd 243), while a drop-in
//!   could only append to the latter, behind the unit's own, or copy them and become wrong when they change.
//! - `+`: with all privileges and outside the unit's mount namespace, but in its cgroup and its network namespace.
//! - An exit with 255 fails the unit; 1 to 254 would only skip it.
//! - In `/run/systemd/system`, so that nothing outlives a reboot without the agent knowing; a copy in the state directory is put
//!   back early in the next boot by a generator that the packages bring, for units that start before the agent.
//! - One for each unit, template or prefix of names that a policy selects; never one for all services.

mod bus;
mod dropin;
mod hold;
mod install;
mod look;
mod session;
mod signals;
mod source;
mod unit;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use pillion_workload::Subject;

pub use bus::BusError;
pub use dropin::{DropInError, DropIns, GENERATOR_DIRECTORY, RUNTIME_DIRECTORY};
pub use hold::{UnitError, Units};
pub use install::UnitSelection;
pub use look::LookError;
pub use source::SystemdSource;
pub use unit::{InvalidUnitName, UnitName};

/// Where systemd is, and how patient to be with it.
#[derive(Debug, Clone)]
pub struct SystemdConfig {
    /// The socket of the system bus.
    pub bus: PathBuf,
    /// For connecting and for each question: systemd answers none while it reads its units again.
    pub deadline: Duration,
    /// How often to ask whether it still answers.
    pub health_interval: Duration,
    /// The first and the longest pause between attempts to connect.
    pub backoff: (Duration, Duration),
    /// The drop-ins by which units are held; without them units are only told.
    pub drop_ins: DropIns,
}

/// The socket of the system bus, unless it is told otherwise.
pub const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

impl SystemdConfig {
    /// The defaults for a systemd on this bus.
    pub fn at(bus: impl Into<PathBuf>, drop_ins: DropIns) -> Self {
        Self {
            bus: bus.into(),
            deadline: Duration::from_secs(30),
            health_interval: Duration::from_secs(10),
            backoff: (Duration::from_millis(100), Duration::from_secs(5)),
            drop_ins,
        }
    }
}

/// Whether this machine, or container, was booted by systemd (`sd_booted(3)`).
pub fn is_booted_by_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// What policies select on, of a unit that need not run. For a hook that finds no agent.
pub async fn unit_subject(bus: &Path, name: &str, deadline: Duration) -> Result<Subject, UnitError> {
    let name = UnitName::try_from(name)?;
    let look = async { bus::Bus::connect(bus, deadline).await?.unit(&name).await };
    let unit = look.await.map_err(LookError::from)?;
    Ok(look::subject(&name, &unit))
}

/// Has systemd read its unit files again, after drop-ins were removed without an agent.
pub async fn reload_units(bus: &Path, deadline: Duration) -> Result<(), BusError> {
    bus::Bus::connect(bus, deadline).await?.reload().await
}
