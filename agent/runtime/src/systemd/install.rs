//! Which drop-ins there are to be, kept so while policies and unit files change.
//!
//! Owns the question and its pace: changes are taken together, and systemd reads its units again only when a file has
//! changed. Never decides what a policy selects: that is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use pillion_workload::Subject;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use super::{
    DropIns,
    bus::{Bus, BusError},
    dropin::Content,
    look::subject,
    unit::{Cover, UnitName, cover},
};
use crate::chain;

/// Changes that come within this time are taken together.
const QUIET: Duration = Duration::from_millis(50);
/// systemd is not made to read its units more often than this (it has a limit of its own from version 255 on).
const PAUSE: Duration = Duration::from_secs(1);
/// What has failed is tried again after this.
const RETRY: Duration = Duration::from_secs(10);
/// Units looked at at once.
const AT_ONCE: usize = 4;
/// More would slow down systemd's reading.
const MOST: usize = 4096;

/// What policies say of units.
pub trait UnitSelection: fmt::Debug + Send + Sync {
    /// Whether a unit with this name could be selected, whatever it runs. Cheap: saves looking at units.
    fn may_select(&self, unit: &str) -> bool;
    /// Whether this unit is selected.
    fn selects(&self, unit: &Subject) -> bool;
    /// The patterns of unit names, for units that do not exist yet.
    fn patterns(&self) -> Vec<String>;
}

/// Keeps the drop-ins.
#[derive(Debug)]
pub(super) struct Installer {
    bus: Bus,
    drop_ins: DropIns,
    selection: watch::Receiver<Option<Arc<dyn UnitSelection>>>,
    /// Patterns that have been told of as not to be covered.
    uncovered: BTreeSet<String>,
    /// What was last told of as failed.
    told: Option<String>,
    /// A file was changed, and systemd has not read it yet.
    reload: bool,
}

impl Installer {
    pub(super) fn new(
        bus: Bus,
        drop_ins: DropIns,
        selection: watch::Receiver<Option<Arc<dyn UnitSelection>>>,
    ) -> Self {
        Self { bus, drop_ins, selection, uncovered: BTreeSet::new(), told: None, reload: false }
    }

    /// Keeps them for ever. `files` is notified when unit files may have changed.
    pub(super) async fn run(mut self, files: &Notify) {
        loop {
            let selection = self.selection.borrow_and_update().clone();
            let mut retry = None;
            if let Some(selection) = selection
                && !self.keep(&*selection).await
            {
                retry = Some(RETRY);
            }
            let mut gone = false;
            let changed = async {
                tokio::select! {
                    () = files.notified() => {}
                    changed = self.selection.changed() => gone = changed.is_err(),
                }
            };
            match retry {
                Some(retry) => _ = timeout(retry, changed).await,
                None => changed.await,
            }
            if gone {
                // The agent ends, and the drop-ins stay.
                std::future::pending::<()>().await;
            }
            sleep(QUIET).await;
        }
    }

    /// Makes them be as they are to be. False when something has failed that may succeed later.
    async fn keep(&mut self, selection: &dyn UnitSelection) -> bool {
        let wanted = match self.wanted(selection).await {
            Ok(wanted) => wanted,
            Err(error) => return self.failed(&chain(&error)),
        };
        let drop_ins = self.drop_ins.clone();
        let count = wanted.len();
        let set = tokio::task::spawn_blocking(move || drop_ins.set(&wanted)).await;
        let (changed, problems) = match set {
            Ok(set) => set,
            Err(error) => return self.failed(&error.to_string()),
        };
        self.reload |= changed;
        let mut well = true;
        if !problems.is_empty() {
            let problems: Vec<String> = problems.iter().map(|problem| chain(problem)).collect();
            well = self.failed(&problems.join("; "));
        }
        if self.reload {
            if let Err(error) = self.bus.reload().await {
                return self.failed(&chain(&error));
            }
            self.reload = false;
            tracing::info!(drop_ins = count, "systemd knows which units are held at their start");
            sleep(PAUSE).await;
        }
        if well {
            self.told = None;
        }
        well
    }

    /// Says so, once for each cause.
    fn failed(&mut self, error: &str) -> bool {
        if self.told.as_deref() != Some(error) {
            tracing::warn!(error, "units that policies select are not all held at their start; trying again");
            self.told = Some(error.to_owned());
        }
        false
    }

    async fn wanted(&mut self, selection: &dyn UnitSelection) -> Result<BTreeMap<String, Content>, BusError> {
        let mut wanted = BTreeMap::new();
        for pattern in selection.patterns() {
            match cover(&pattern) {
                // Which of these come before the basic system is not known.
                Cover::Name(name) => _ = wanted.insert(name, Content { behind_agent: false }),
                Cover::Nothing => {}
                Cover::Impossible => {
                    if self.uncovered.insert(pattern.clone()) {
                        tracing::warn!(
                            pattern,
                            "no dash precedes the first wildcard: units of the pattern are held only from the moment on \
                             that their unit file was seen, and transient ones not at all"
                        );
                    }
                }
            }
        }
        let loaded = self.bus.loaded().await?.into_iter().map(|(name, _)| name);
        let known: BTreeSet<UnitName> = loaded.chain(self.bus.installed().await?).collect();
        let candidates =
            known.into_iter().filter(|unit| unit.may_be_held() && selection.may_select(unit.as_str()));
        let (templates, units): (Vec<_>, Vec<_>) = candidates.partition(UnitName::is_template);
        // Asking costs the others little, and which instances there will be is not known.
        for template in templates {
            wanted.entry(template.to_string()).or_insert(Content { behind_agent: false });
        }
        let bus = &self.bus;
        let mut looks = stream::iter(units)
            .map(|name| async move { bus.unit(&name).await.map(|unit| (name, unit)) })
            .buffer_unordered(AT_ONCE);
        while let Some(looked) = looks.next().await {
            let (name, unit) = looked?;
            let real = unit.id == name.as_str() && unit.load_state == "loaded" && !unit.transient;
            if real && selection.selects(&subject(&name, &unit)) && wanted.len() < MOST {
                wanted.insert(name.to_string(), Content { behind_agent: unit.default_dependencies });
            }
        }
        Ok(wanted)
    }
}
