//! The loaded programs and the pinned maps of one agent, or of one `pillion run`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SockHash, lpm_trie::Key},
    programs::ProgramFd,
};
use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use pillion_common::{
    BySource, BySourceKey, CONNECTIONS, CompanionConfig, Counter, ExecutableKey, ExemptKey, InboundRule,
    LAYOUT_VERSION, ListenerKey, Network4, Network6, PEER_IDLE, PeerKey, PeerSlot, PortKey, Redirected,
    Route, RouteKey, SLOTS, Share, Slot, UserKey, WORKLOADS, WorkloadConfig, tag,
};
use pillion_workload::CgroupId;

use crate::{
    Bpffs, Counters, RedirectError,
    answering::Answering,
    btf::Offsets,
    features::Kernel,
    links::remove_if_there,
    nesting::Nesting,
    object::{self, COMPANION_PROGRAMS, Constants, MAPS, WORKLOAD_PROGRAMS},
    rules::{Rules, words4, words6},
    steer::{Steer, SteerPool},
    sys,
    tables::Ports,
    trace::Tracing,
};

/// How a data plane is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Directory for the pins, in a BPF file system. Nobody else may load from it at the same time.
    pub pin_root: PathBuf,
    /// How many connections may wait for their companion's question at once, for all workloads, and how many
    /// destinations datagrams may have; at most 65,536.
    pub slots: u32,
    /// How many of them one workload may have.
    pub slots_per_workload: u32,
    /// How many redirected connections may be open at once, for all workloads, and as many kept by source. Of maps that
    /// are pinned already it stays what it was.
    pub connections: u32,
    /// How many of them one workload may have.
    pub connections_per_workload: u32,
    /// How many networks of a family, and how many ports by class, all rules together may have; as `connections` of
    /// maps that are new.
    pub table_entries: u32,
    /// How long one may wait before its slot can be given to another connection. Longer than any companion stalls.
    pub slot_expiry: Duration,
    /// Whether policies may exclude programs: their paths are read from kernel structures, whose form is looked up then.
    pub executables: bool,
    /// Does without whatever a supported kernel may lack, although this one has it: for tests.
    pub as_on_the_oldest_kernel: bool,
}

impl LoadOptions {
    /// The usual limits: 65,536 slots, 262,144 connections, of both half for one workload; 15 minutes.
    pub fn new(pin_root: impl Into<PathBuf>) -> Self {
        Self {
            pin_root: pin_root.into(),
            slots: SLOTS,
            slots_per_workload: SLOTS / 2,
            connections: CONNECTIONS,
            connections_per_workload: CONNECTIONS / 2,
            table_entries: 1 << 20,
            slot_expiry: Duration::from_secs(900),
            executables: true,
            as_on_the_oldest_kernel: false,
        }
    }

    /// The same for a single workload, which may have everything.
    #[must_use]
    pub fn for_one_workload(self) -> Self {
        Self { slots_per_workload: self.slots, connections_per_workload: self.connections, ..self }
    }
}

/// Programs and maps. Shared by all guards made from it; maps and links outlive it in their pins.
pub struct Dataplane {
    directory: PathBuf,
    programs: BTreeMap<&'static str, ProgramFd>,
    maps: Mutex<Maps>,
    /// Locked before the maps.
    nesting: Mutex<Nesting>,
    /// Likewise.
    answering: Mutex<Answering>,
    next_number: AtomicU32,
    steers: SteerPool,
    /// The programs can read which program a process executes.
    pub(crate) tells_executables: bool,
    /// The programs can tell of their decisions.
    pub(crate) tells_decisions: bool,
    bpffs: Bpffs,
}

pub(crate) struct Maps {
    pub(crate) workloads: Map,
    companions: Map,
    slots: Array<MapData, Slot>,
    fresh: Array<MapData, u64>,
    by_source: HashMap<MapData, BySourceKey, BySource>,
    redirected: HashMap<MapData, u64, Redirected>,
    shares: Array<MapData, Share>,
    peers: Array<MapData, Slot>,
    peer_of: HashMap<MapData, PeerKey, PeerSlot>,
    pub(crate) networks4: LpmTrie<MapData, Network4, u32>,
    pub(crate) networks6: LpmTrie<MapData, Network6, u32>,
    pub(crate) routes: LpmTrie<MapData, RouteKey, Route>,
    users: HashMap<MapData, UserKey, u32>,
    executables: HashMap<MapData, ExecutableKey, u32>,
    pub(crate) listeners: SockHash<MapData, ListenerKey>,
    pub(crate) inbound: HashMap<MapData, PortKey, InboundRule>,
    exempt: HashMap<MapData, ExemptKey, u32>,
    pub(crate) tracing: Tracing,
    counters: PerCpuArray<MapData, u64>,
}

impl std::fmt::Debug for Dataplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataplane").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Dataplane {
    /// Loads every program, onto the maps that are pinned below the root or new ones. Takes tens of milliseconds:
    /// once at start, never in a gate.
    pub fn load(options: &LoadOptions) -> Result<Arc<Self>, RedirectError> {
        let bpffs = Bpffs::ensure(&options.pin_root)?;
        let directory = options.pin_root.join(format!("v{LAYOUT_VERSION}"));
        for part in ["maps", "links"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(RedirectError::sys("cannot create", &path))?;
        }
        let kernel = if options.as_on_the_oldest_kernel { Kernel::OLDEST } else { Kernel::find()? };
        kernel
            .make_room()
            .map_err(RedirectError::sys("cannot raise the limit of locked memory for", &directory))?;
        let constants = Constants {
            kernel,
            usable_slots: options.slots.clamp(1, SLOTS),
            slots_per_workload: options.slots_per_workload.max(1),
            connections_per_workload: options.connections_per_workload.max(1),
            connections: options.connections.max(1),
            table_entries: options.table_entries.max(1),
            // Units of 2^30 ns; see `pillion_common::tag`.
            slot_expiry: u32::try_from(options.slot_expiry.as_nanos() >> 30).unwrap_or(u32::MAX >> 2).max(1),
            steer_workload: 0,
        };
        let pins = directory.join("maps");
        let offsets = if options.executables && constants.kernel.atomics {
            Some(Offsets::of_this_kernel(&object::MEMBERS, &[]))
        } else {
            None
        };
        let offsets = match offsets.transpose() {
            Ok(offsets) => offsets,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "policies that exclude programs cannot be put in force"
                );
                None
            }
        };
        let mut object = object::open(Some(&pins), &constants, offsets.as_ref())?;
        let mut programs = BTreeMap::new();
        for program in WORKLOAD_PROGRAMS.iter().chain(&COMPANION_PROGRAMS) {
            programs.insert(program.name, object::load_program(&mut object, program.name)?);
        }
        let next_number = AtomicU32::new(highest_number(&directory.join("links")) + 1);
        Ok(Arc::new(Self {
            programs,
            maps: Mutex::new(Maps::take(&mut object)?),
            nesting: Mutex::default(),
            answering: Mutex::default(),
            next_number,
            steers: SteerPool::new(pins, constants),
            tells_executables: offsets.is_some(),
            tells_decisions: constants.kernel.atomics,
            directory,
            bpffs,
        }))
    }

    /// Whether loading has mounted the BPF file system.
    pub fn mounted_bpffs(&self) -> bool {
        self.bpffs.was_mounted_here()
    }

    /// Keeps `count` instances of the inbound program ready. Call it outside of gates, when a policy with inbound
    /// rules is in force.
    pub fn prepare_inbound(&self, count: usize) -> Result<(), RedirectError> {
        while self.steers.len() < count {
            self.steers.put(self.steers.load(self.take_number())?);
        }
        Ok(())
    }

    /// What the kernel side has counted. Reads every slot: not for a hot path.
    pub fn counters(&self) -> Result<Counters, RedirectError> {
        let maps = self.maps();
        let mut counters = Counters::default();
        for counter in Counter::ALL {
            let values =
                maps.counters.get(&(counter as u32), 0).map_err(RedirectError::map("PL_COUNTERS"))?;
            counters.set(counter, values.iter().sum());
        }
        maps.for_each_busy_slot(|_| counters.slots_busy += 1)?;
        counters.by_source = maps.by_source.keys().count() as u64;
        counters.connections = maps.redirected.keys().count() as u64;
        Ok(counters)
    }

    /// Ends everything: for `pillion run`, when its workload has ended. Guards must have been detached before.
    pub fn unpin(&self) -> Result<(), RedirectError> {
        for map in MAPS {
            let path = self.directory.join("maps").join(map);
            remove_if_there(fs::remove_file(&path)).map_err(RedirectError::sys("cannot unpin", &path))?;
        }
        let root = self.directory.parent().unwrap_or(&self.directory);
        for path in [
            self.directory.join("maps"),
            self.directory.join("links"),
            self.directory.clone(),
            root.to_owned(),
        ] {
            remove_if_there(fs::remove_dir(&path)).map_err(RedirectError::sys("cannot remove", &path))?;
        }
        Ok(())
    }

    pub(crate) fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn nesting(&self) -> MutexGuard<'_, Nesting> {
        self.nesting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn answering(&self) -> MutexGuard<'_, Answering> {
        self.answering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a directory for each workload.
    pub(crate) fn all_links(&self) -> PathBuf {
        self.directory.join("links")
    }

    pub(crate) fn links(&self, number: u32) -> PathBuf {
        self.all_links().join(number.to_string())
    }

    pub(crate) fn program(&self, name: &'static str) -> Result<&ProgramFd, RedirectError> {
        self.programs.get(name).ok_or(RedirectError::Missing(name))
    }

    pub(crate) fn take_number(&self) -> u32 {
        let maps = self.maps();
        // One whose place in the shares is free.
        let free =
            |number: &u32| maps.shares.get(&(number % WORKLOADS), 0).is_ok_and(|share| share.owner == 0);
        let next = || self.next_number.fetch_add(1, Ordering::Relaxed);
        (0..WORKLOADS).map(|_| next()).find(free).unwrap_or_else(next)
    }

    /// An instance of the inbound program: a ready one, or for `number` if that is given, or a new one.
    pub(crate) fn steer(&self, number: Option<u32>) -> Result<Steer, RedirectError> {
        match number {
            Some(number) => self.steers.load(number),
            None => match self.steers.take() {
                Some(steer) => Ok(steer),
                None => self.steers.load(self.take_number()),
            },
        }
    }
}

/// The highest number that has links; 0 if none has.
fn highest_number(links: &Path) -> u32 {
    let Ok(entries) = fs::read_dir(links) else { return 0 };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(0)
}

impl Maps {
    fn take(object: &mut Ebpf) -> Result<Self, RedirectError> {
        fn typed<T: TryFrom<Map, Error = MapError>>(
            object: &mut Ebpf,
            map: &'static str,
        ) -> Result<T, RedirectError> {
            object
                .take_map(map)
                .ok_or(RedirectError::Missing(map))?
                .try_into()
                .map_err(|source| RedirectError::Layout { map, source: Box::new(source) })
        }
        let mut plain = |map| object.take_map(map).ok_or(RedirectError::Missing(map));
        Ok(Self {
            workloads: plain("PL_WORKLOADS")?,
            companions: plain("PL_COMPANIONS")?,
            slots: typed(object, "PL_SLOTS")?,
            fresh: typed(object, "PL_FRESH")?,
            by_source: typed(object, "PL_BY_SOURCE")?,
            redirected: typed(object, "PL_REDIRECTED")?,
            shares: typed(object, "PL_SHARES")?,
            peers: typed(object, "PL_PEERS")?,
            peer_of: typed(object, "PL_PEER_OF")?,
            networks4: typed(object, "PL_NETS4")?,
            networks6: typed(object, "PL_NETS6")?,
            routes: typed(object, "PL_ROUTES")?,
            users: typed(object, "PL_USERS")?,
            executables: typed(object, "PL_EXECUTABLES")?,
            listeners: typed(object, "PL_LISTENERS")?,
            inbound: typed(object, "PL_INBOUND")?,
            exempt: typed(object, "PL_EXEMPT")?,
            tracing: Tracing::new(
                typed(object, "PL_TRACE")?,
                typed(object, "PL_TRACED")?,
                typed(object, "PL_TRACE_STATE")?,
            )?,
            counters: typed(object, "PL_COUNTERS")?,
        })
    }

    pub(crate) fn configure_workload(
        &mut self,
        cgroup: CgroupId,
        config: &WorkloadConfig,
    ) -> Result<(), RedirectError> {
        let config = self.tracing.mark(cgroup, config);
        write_storage(&self.workloads, "PL_WORKLOADS", cgroup, &config)
    }

    pub(crate) fn configure_companion(
        &self,
        cgroup: CgroupId,
        config: &CompanionConfig,
    ) -> Result<(), RedirectError> {
        write_storage(&self.companions, "PL_COMPANIONS", cgroup, config)
    }

    /// How many connections of a workload wait for their companion's question.
    pub(crate) fn waiting(&self, workload: u32) -> Result<usize, RedirectError> {
        let mut waiting = 0;
        self.for_each_busy_slot(|slot| waiting += usize::from(slot.workload == workload))?;
        if waiting == 0 {
            return Ok(0);
        }
        // A datagram socket keeps its slot while it is open, asked for or not.
        let keeps = |socket: &Redirected| {
            socket.workload == workload
                && socket.flags & Redirected::DATAGRAMS != 0
                && socket.slot != Redirected::NO_SLOT
        };
        let kept = self.redirected.iter().flatten().filter(|(_, socket)| keeps(socket)).count();
        Ok(waiting.saturating_sub(kept))
    }

    /// Looks only at slots that were ever taken: a lookup is a system call.
    fn for_each_busy_slot(&self, mut visit: impl FnMut(&Slot)) -> Result<(), RedirectError> {
        let taken = self.fresh.get(&0, 0).map_err(RedirectError::map("PL_FRESH"))?;
        let ever = u32::try_from(taken).unwrap_or(u32::MAX).min(self.slots.len());
        for number in 0..ever {
            let slot = self.slots.get(&number, 0).map_err(RedirectError::map("PL_SLOTS"))?;
            if tag::is_busy(slot.tag) {
                visit(&slot);
            }
        }
        Ok(())
    }

    /// Forgets the connections of a workload whose programs are detached and will not do it.
    pub(crate) fn forget_connections(&mut self, workload: u32) -> Result<(), RedirectError> {
        // A walk looks at the entries of all workloads, which may be many: where this one has none, there is none.
        let share = self.share(workload);
        let has = |part: usize| share.is_none_or(|share| share.taken[part] != 0);
        let mut cookies = Vec::new();
        if has(Share::CONNECTIONS) {
            let own = |(key, value): (u64, Redirected)| (value.workload == workload).then_some(key);
            cookies.extend(self.redirected.iter().flatten().filter_map(own));
        }
        for cookie in cookies {
            absent_is_fine(self.redirected.remove(&cookie), "PL_REDIRECTED")?;
        }
        let mut sources = Vec::new();
        if has(Share::BY_SOURCE) {
            let own = |(key, value): (BySourceKey, BySource)| (value.workload == workload).then_some(key);
            sources.extend(self.by_source.iter().flatten().filter_map(own));
        }
        for source in sources {
            absent_is_fine(self.by_source.remove(&source), "PL_BY_SOURCE")?;
        }
        let mut peers = Vec::new();
        if has(Share::PEERS) {
            peers.extend(self.peer_of.keys().flatten().filter(|key| key.workload == workload));
        }
        for peer in peers {
            self.forget_peer(&peer)?;
        }
        self.end_share(workload)
    }

    /// Forgets a destination of datagrams, and gives back what stands for it.
    fn forget_peer(&mut self, key: &PeerKey) -> Result<(), RedirectError> {
        let Ok(known) = self.peer_of.get(key, 0) else { return Ok(()) };
        let slot = self.peers.get(&known.slot, 0).map_err(RedirectError::map("PL_PEERS"))?;
        // One that was not used for long may be claimed for another destination at this moment, which frees it as well.
        let age = tag::age(slot.tag, now());
        if tag::is_busy(slot.tag) && tag::generation(slot.tag) == known.generation && age < PEER_IDLE - 10 {
            let freed = Slot { tag: tag::freed(slot.tag), ..slot };
            self.peers.set(known.slot, freed, 0).map_err(RedirectError::map("PL_PEERS"))?;
        }
        absent_is_fine(self.peer_of.remove(key), "PL_PEER_OF")
    }

    /// Begins to count what a workload has, unless that is counted already. Where another one has its place, which
    /// [`Dataplane::take_number`] avoids, it is not counted, and has no bound of its own.
    pub(crate) fn begin_share(&mut self, workload: u32) -> Result<(), RedirectError> {
        let place = workload % WORKLOADS;
        let known = self.shares.get(&place, 0).map_err(RedirectError::map("PL_SHARES"))?;
        if known.owner != 0 {
            return Ok(());
        }
        let share = Share { owner: workload.into(), ..Share::default() };
        self.shares.set(place, share, 0).map_err(RedirectError::map("PL_SHARES"))
    }

    fn end_share(&mut self, workload: u32) -> Result<(), RedirectError> {
        if self.share(workload).is_some() {
            let nobody = Share::default();
            self.shares.set(workload % WORKLOADS, nobody, 0).map_err(RedirectError::map("PL_SHARES"))?;
        }
        Ok(())
    }

    /// What a workload has of what all of them share, if that is counted.
    pub(crate) fn share(&self, workload: u32) -> Option<Share> {
        let share = self.shares.get(&(workload % WORKLOADS), 0).ok()?;
        (share.owner == u64::from(workload)).then_some(share)
    }

    /// Forgets every workload but these.
    pub(crate) fn keep_only(&mut self, known: &BTreeSet<u32>) -> Result<(), RedirectError> {
        let strange = |workload: u32| !known.contains(&workload);
        self.remove_tables(|table| strange(table / 2))?;
        let ports: Vec<_> = self.inbound.keys().flatten().filter(|key| strange(key.workload)).collect();
        for key in ports {
            self.leave_port(key)?;
        }
        let listeners: Vec<_> = self.listeners.keys().flatten().filter(|key| strange(key.workload)).collect();
        for key in listeners {
            self.remove_listener(key)?;
        }
        // An inner workload's number stands in the value.
        let exempt: Vec<_> = self.exempt.iter().flatten().collect();
        for (key, inner) in exempt {
            if strange(key.workload) || (inner != ExemptKey::COMPANION && strange(inner)) {
                self.include_cgroup(key.workload, CgroupId(key.cgroup))?;
            }
        }
        let redirected = self.redirected.iter().flatten().map(|(_, connection)| connection.workload);
        // A companion keeps answers longer than the application its socket.
        let kept = self.by_source.iter().flatten().map(|(_, answer)| answer.workload);
        let peers = self.peer_of.keys().flatten().map(|key| key.workload);
        let owners = self.shares.iter().flatten().filter_map(|share| u32::try_from(share.owner).ok());
        let shares = owners.filter(|owner| *owner != 0);
        let gone: BTreeSet<u32> =
            redirected.chain(kept).chain(peers).chain(shares).filter(|workload| strange(*workload)).collect();
        gone.into_iter().try_for_each(|workload| self.forget_connections(workload))
    }

    /// Writes the entries of a table that nobody looks at yet, or again those that it has.
    pub(crate) fn write_table(&mut self, rules: &Rules) -> Result<(), RedirectError> {
        let table = rules.config.table;
        for (network, class) in &rules.tables.networks {
            match network_key(table, network) {
                NetworkKey::V4(key) => {
                    self.networks4.insert(&key, class, 0).map_err(RedirectError::map("PL_NETS4"))
                }
                NetworkKey::V6(key) => {
                    self.networks6.insert(&key, class, 0).map_err(RedirectError::map("PL_NETS6"))
                }
            }?;
        }
        for (ports, route) in &rules.tables.routes {
            self.routes
                .insert(&route_key(table, ports), route, 0)
                .map_err(RedirectError::map("PL_ROUTES"))?;
        }
        for user in &rules.users {
            let key = UserKey { table, user: *user };
            self.users.insert(key, 1, 0).map_err(RedirectError::map("PL_USERS"))?;
        }
        for (name, next) in &rules.executables {
            self.executables.insert(name, next, 0).map_err(RedirectError::map("PL_EXECUTABLES"))?;
        }
        Ok(())
    }

    /// Removes the entries of a table that nobody looks at any more.
    pub(crate) fn remove_table(&mut self, rules: &Rules) -> Result<(), RedirectError> {
        let table = rules.config.table;
        for network in rules.tables.networks.keys() {
            match network_key(table, network) {
                NetworkKey::V4(key) => absent_is_fine(self.networks4.remove(&key), "PL_NETS4"),
                NetworkKey::V6(key) => absent_is_fine(self.networks6.remove(&key), "PL_NETS6"),
            }?;
        }
        for ports in rules.tables.routes.keys() {
            absent_is_fine(self.routes.remove(&route_key(table, ports)), "PL_ROUTES")?;
        }
        for user in &rules.users {
            absent_is_fine(self.users.remove(&UserKey { table, user: *user }), "PL_USERS")?;
        }
        for name in rules.executables.keys() {
            absent_is_fine(self.executables.remove(name), "PL_EXECUTABLES")?;
        }
        Ok(())
    }

    /// Removes all entries of some tables. Looks at every entry of the maps: for an agent's start.
    pub(crate) fn remove_tables(&mut self, of: impl Fn(u32) -> bool) -> Result<(), RedirectError> {
        let networks: Vec<_> = self.networks4.keys().flatten().filter(|key| of(key.data().table)).collect();
        for key in networks {
            absent_is_fine(self.networks4.remove(&key), "PL_NETS4")?;
        }
        let networks: Vec<_> = self.networks6.keys().flatten().filter(|key| of(key.data().table)).collect();
        for key in networks {
            absent_is_fine(self.networks6.remove(&key), "PL_NETS6")?;
        }
        let routes: Vec<_> = self.routes.keys().flatten().filter(|key| of(key.data().table)).collect();
        for key in routes {
            absent_is_fine(self.routes.remove(&key), "PL_ROUTES")?;
        }
        let users: Vec<_> = self.users.keys().flatten().filter(|key| of(key.table)).collect();
        for key in users {
            absent_is_fine(self.users.remove(&key), "PL_USERS")?;
        }
        let executables: Vec<_> = self.executables.keys().flatten().filter(|key| of(key.table)).collect();
        for key in executables {
            absent_is_fine(self.executables.remove(&key), "PL_EXECUTABLES")?;
        }
        Ok(())
    }

    pub(crate) fn steer_port(&mut self, key: PortKey, rule: InboundRule) -> Result<(), RedirectError> {
        let flags = rule.flags | self.tracing.flag_of(key.workload);
        let rule = InboundRule { flags, ..rule };
        self.inbound.insert(key, rule, 0).map_err(RedirectError::map("PL_INBOUND"))
    }

    pub(crate) fn leave_port(&mut self, key: PortKey) -> Result<(), RedirectError> {
        absent_is_fine(self.inbound.remove(&key), "PL_INBOUND")
    }

    /// The cgroups that a workload's programs leave alone, with the numbers of the inner workloads.
    pub(crate) fn exempted(&self, workload: u32) -> BTreeMap<CgroupId, u32> {
        let own = self.exempt.iter().flatten().filter(|(key, _)| key.workload == workload);
        own.map(|(key, inner)| (CgroupId(key.cgroup), inner)).collect()
    }

    pub(crate) fn exempt_cgroup(
        &mut self,
        workload: u32,
        cgroup: CgroupId,
        inner: u32,
    ) -> Result<(), RedirectError> {
        let key = ExemptKey { cgroup: cgroup.0, workload, pad: 0 };
        self.exempt.insert(key, inner, 0).map_err(RedirectError::map("PL_EXEMPT"))
    }

    pub(crate) fn include_cgroup(&mut self, workload: u32, cgroup: CgroupId) -> Result<(), RedirectError> {
        absent_is_fine(self.exempt.remove(&ExemptKey { cgroup: cgroup.0, workload, pad: 0 }), "PL_EXEMPT")
    }

    pub(crate) fn add_listener(&mut self, key: ListenerKey, socket: &OwnedFd) -> Result<(), RedirectError> {
        self.listeners.insert(key, socket.as_raw_fd(), 0).map_err(RedirectError::map("PL_LISTENERS"))
    }

    pub(crate) fn remove_listener(&mut self, key: ListenerKey) -> Result<(), RedirectError> {
        absent_is_fine(self.listeners.remove(&key), "PL_LISTENERS")
    }
}

pub(crate) enum NetworkKey {
    V4(Key<Network4>),
    V6(Key<Network6>),
}

pub(crate) fn network_key(table: u32, network: &IpNet) -> NetworkKey {
    let bits = u32::BITS + u32::from(network.prefix_len());
    match network {
        IpNet::V4(net) => NetworkKey::V4(Key::new(bits, Network4 { table, address: words4(net.addr()) })),
        IpNet::V6(net) => NetworkKey::V6(Key::new(bits, Network6 { table, address: words6(net.addr()) })),
    }
}

pub(crate) fn route_key(table: u32, ports: &Ports) -> Key<RouteKey> {
    let key = RouteKey {
        table,
        class: ports.class,
        protocol: ports.protocol.number().into(),
        port_be: ports.port.to_be(),
    };
    Key::new(RouteKey::FIXED_BITS + ports.length, key)
}

fn write_storage<V: aya::Pod>(
    map: &Map,
    name: &'static str,
    cgroup: CgroupId,
    value: &V,
) -> Result<(), RedirectError> {
    let (Map::CgroupStorage(data) | Map::Unsupported(data)) = map else {
        return Err(RedirectError::Missing(name));
    };
    sys::write_cgroup_storage(data.fd().as_fd(), cgroup.0, value)
        .map_err(RedirectError::sys("cannot configure", Path::new(name)))
}

/// The time of tags, see [`pillion_common::tag`].
fn now() -> u32 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u32::try_from((now.as_nanos() >> 30) & 0x7fff_ffff).unwrap_or(0)
}

pub(crate) fn absent_is_fine(result: Result<(), MapError>, map: &'static str) -> Result<(), RedirectError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(RedirectError::map(map)(error)),
    }
}
