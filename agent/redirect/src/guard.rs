//! What is in force for one workload: links and map entries, with one owner.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use aya_obj::generated::bpf_attach_type::BPF_SK_LOOKUP;
use pillion_common::{AF_INET, AF_INET6, ListenerKey, Share};
use pillion_workload::{
    Cgroup, CgroupId, CompanionName, FailureMode, Family, Protocol, ReadyCompanion, RedirectSpec,
};
use serde::{Deserialize, Serialize};

use crate::{
    Dataplane, RedirectError, conflicts,
    links::{Link, directory_name, open_directory, remove_if_there},
    object::{COMPANION_PROGRAMS, CgroupProgram, STEER_PROGRAM, WORKLOAD_PROGRAMS},
    rules::{Rules, first_table},
    steer::Steer,
};

/// The addresses that getsockname shows for a redirected socket that the application has not bound: those that the
/// kernel would have chosen towards the default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// For IPv4 destinations.
    pub v4: Ipv4Addr,
    /// For IPv6 destinations.
    pub v6: Ipv6Addr,
}

impl Default for Sources {
    fn default() -> Self {
        Self { v4: Ipv4Addr::LOCALHOST, v6: Ipv6Addr::LOCALHOST }
    }
}

/// What is to be put in force.
#[derive(Debug)]
pub struct AttachRequest<'a> {
    /// The workload's cgroup; everything below it is covered.
    pub cgroup: &'a Cgroup,
    /// Its network namespace.
    pub netns: BorrowedFd<'a>,
    /// Which sockets go where; every target has a port.
    pub spec: &'a RedirectSpec,
    /// What happens while a companion is not there.
    pub on_failure: FailureMode,
    /// See [`Sources`].
    pub sources: Sources,
    /// Companions that are ready now. Others follow by [`RedirectGuard::companion_ready`]; until then the failure mode
    /// acts. Taken by value, because a listening socket that the agent keeps would outlive its companion.
    pub companions: Vec<ReadyCompanion>,
}

/// What is needed to take up a guard after a restart of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectRecord {
    /// Number of the workload in the maps.
    pub number: u32,
    /// Which of its two tables is in force: 0 or 1.
    pub table: u32,
    /// The workload's cgroup.
    pub cgroup: Cgroup,
    /// What is in force.
    pub spec: RedirectSpec,
    /// What happens while a companion is not there.
    pub on_failure: FailureMode,
    /// See [`Sources`].
    pub sources: Sources,
    /// The cgroup of each companion that was attached.
    pub companions: BTreeMap<CompanionName, CgroupId>,
    /// Companions within the workload, whose own connections are left alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exempt: BTreeMap<CompanionName, Cgroup>,
}

/// Redirection in force. [`RedirectGuard::detach`] ends it, [`RedirectGuard::leave`] keeps it for the next agent;
/// dropping it, on a path that failed, detaches.
#[derive(Debug)]
pub struct RedirectGuard {
    dataplane: Arc<Dataplane>,
    cgroup: Cgroup,
    spec: RedirectSpec,
    on_failure: FailureMode,
    sources: Sources,
    rules: Rules,
    /// The other table may have entries: of an update in which an earlier agent was killed.
    other_table: bool,
    outbound: Vec<(&'static str, Link)>,
    inbound: Option<Link>,
    companions: BTreeMap<CompanionName, (CgroupId, Vec<Link>)>,
    exempt: BTreeMap<CompanionName, Cgroup>,
    done: bool,
}

impl Dataplane {
    /// Puts redirection in force. On an error nothing is left.
    pub fn attach(self: &Arc<Self>, request: AttachRequest<'_>) -> Result<RedirectGuard, RedirectError> {
        let steer = if request.spec.inbound.is_empty() { None } else { Some(self.steer(None)?) };
        let number = steer.as_ref().map_or_else(|| self.take_number(), |steer| steer.number);
        let mut guard = RedirectGuard {
            dataplane: Arc::clone(self),
            cgroup: request.cgroup.clone(),
            spec: request.spec.clone(),
            on_failure: request.on_failure,
            sources: request.sources,
            rules: Rules::new(first_table(number), request.spec, request.on_failure, &request.sources)?,
            other_table: false,
            outbound: Vec::new(),
            inbound: None,
            companions: BTreeMap::new(),
            exempt: BTreeMap::new(),
            done: false,
        };
        self.enter(number, request.cgroup)?;
        guard.create_directory("")?;
        guard.dataplane.maps().begin_share(number)?;
        guard.write_entries(&guard.rules)?;
        for ready in request.companions {
            guard.companion_ready(ready)?;
        }
        guard.connect_links(request.netns, steer)?;
        self.settle_in(number)?;
        Ok(guard)
    }

    /// Takes up what an earlier agent has left in force, and lets it run this agent's programs. What has been lost of
    /// it is attached again. Listeners stay as they are in the kernel.
    pub fn adopt(
        self: &Arc<Self>,
        record: &RedirectRecord,
        netns: BorrowedFd<'_>,
    ) -> Result<RedirectGuard, RedirectError> {
        let mut guard = self.restore(record)?;
        for (name, cgroup) in &record.exempt {
            self.exempt(record.number, name, cgroup)?;
        }
        guard.exempt.clone_from(&record.exempt);
        guard.create_directory("")?;
        guard.dataplane.maps().begin_share(record.number)?;
        guard.write_entries(&guard.rules)?;
        let wanted = guard.workload_programs().count();
        for program in &WORKLOAD_PROGRAMS {
            if let Ok(link) = Link::adopt(&guard.pin(program.name)) {
                if link.has_cgroup() && guard.wants(program) {
                    link.run(self.program(program.name)?)?;
                    guard.outbound.push((program.name, link));
                } else {
                    link.detach()?;
                }
            }
        }
        if guard.outbound.len() < wanted {
            for (_, link) in guard.outbound.drain(..) {
                link.detach()?;
            }
        }
        let steer =
            if guard.rules.inbound.is_empty() { None } else { Some(self.steer(Some(record.number))?) };
        if let (Some(steer), Ok(link)) = (&steer, Link::adopt(&guard.pin(STEER_PROGRAM))) {
            match link.run(&steer.program) {
                Ok(()) => guard.inbound = Some(link),
                Err(_) => link.detach()?,
            }
        }
        guard.connect_links(netns, steer)?;
        for (name, cgroup) in &record.companions {
            let mut links = Vec::new();
            for program in &COMPANION_PROGRAMS {
                let pin = guard.companion_pin(name, program.name);
                if let Ok(link) = Link::adopt(&pin) {
                    if link.has_cgroup() && guard.wants(program) {
                        link.run(self.program(program.name)?)?;
                        links.push(link);
                    } else {
                        link.detach()?;
                    }
                }
            }
            if links.len() == guard.companion_programs().count() {
                let ports = guard.rules.companion_ports.get(name).into_iter().flatten();
                let ports = ports.map(|(port, _)| *port).collect();
                self.answers(record.number, name, *cgroup, &ports);
                guard.companions.insert(name.clone(), (*cgroup, links));
            }
        }
        self.settle_in(record.number)?;
        Ok(guard)
    }

    /// Ends what an earlier agent has left in force for a workload that is gone.
    pub fn discard(self: &Arc<Self>, record: &RedirectRecord) -> Result<(), RedirectError> {
        let mut guard = self.restore(record)?;
        for program in &WORKLOAD_PROGRAMS {
            let link = Link::adopt(&guard.pin(program.name));
            guard.outbound.extend(link.map(|link| (program.name, link)));
        }
        guard.inbound = Link::adopt(&guard.pin(STEER_PROGRAM)).ok();
        for (name, cgroup) in &record.companions {
            let links = COMPANION_PROGRAMS
                .iter()
                .filter_map(|program| Link::adopt(&guard.companion_pin(name, program.name)).ok())
                .collect();
            guard.companions.insert(name.clone(), (*cgroup, links));
        }
        guard.detach()
    }

    fn restore(self: &Arc<Self>, record: &RedirectRecord) -> Result<RedirectGuard, RedirectError> {
        self.enter(record.number, &record.cgroup)?;
        Ok(RedirectGuard {
            dataplane: Arc::clone(self),
            cgroup: record.cgroup.clone(),
            spec: record.spec.clone(),
            on_failure: record.on_failure,
            sources: record.sources,
            rules: Rules::new(
                first_table(record.number) | (record.table & 1),
                &record.spec,
                record.on_failure,
                &record.sources,
            )?,
            other_table: true,
            outbound: Vec::new(),
            inbound: None,
            companions: BTreeMap::new(),
            exempt: BTreeMap::new(),
            // An error on the way leaves in force what is there.
            done: true,
        })
    }
}

impl RedirectGuard {
    /// What the journal keeps.
    pub fn record(&self) -> RedirectRecord {
        RedirectRecord {
            number: self.rules.config.workload,
            table: self.rules.config.table & 1,
            cgroup: self.cgroup.clone(),
            spec: self.spec.clone(),
            on_failure: self.on_failure,
            sources: self.sources,
            companions: self.companions.iter().map(|(name, (cgroup, _))| (name.clone(), *cgroup)).collect(),
            exempt: self.exempt.clone(),
        }
    }

    /// Sends connections to a companion from now on: after its first start, or after a restart.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "its listening sockets must be closed here, see `AttachRequest`"
    )]
    pub fn companion_ready(&mut self, ready: ReadyCompanion) -> Result<(), RedirectError> {
        let name = ready.name().clone();
        let Some(ports) = self.rules.companion_ports.get(&name).cloned() else { return Ok(()) };
        let numbers: BTreeSet<u16> = ports.iter().map(|(port, _)| *port).collect();
        self.exempt.remove(&name);
        if self.dataplane.exempt(self.rules.config.workload, &name, ready.cgroup())? {
            self.exempt.insert(name.clone(), ready.cgroup().clone());
        }
        self.attach_companion(&name, ready.cgroup())?;
        let workload = self.rules.config.workload;
        self.dataplane.answer(workload, &name, ready.cgroup().id, &numbers)?;
        let mut maps = self.dataplane.maps();
        for (port, protocol) in ports {
            let mut listens = false;
            for (family, key) in
                [Family::V4, Family::V6].into_iter().zip(listener_keys(workload, port, protocol))
            {
                match ready.listener(port, protocol, family) {
                    Some(listener) => {
                        maps.add_listener(key, &listener.socket)?;
                        listens = true;
                    }
                    None => maps.remove_listener(key)?,
                }
            }
            if !listens {
                return Err(RedirectError::NotListening { companion: name, port, protocol });
            }
        }
        Ok(())
    }

    /// Lets the failure mode act for what goes to this companion. The kernel does so by itself when the companion's
    /// sockets are closed; this is for one that is to be stopped.
    pub fn companion_gone(&mut self, name: &CompanionName) -> Result<(), RedirectError> {
        let Some(ports) = self.rules.companion_ports.get(name) else { return Ok(()) };
        let workload = self.rules.config.workload;
        let mut maps = self.dataplane.maps();
        for (port, protocol) in ports {
            for key in listener_keys(workload, *port, *protocol) {
                maps.remove_listener(key)?;
            }
        }
        Ok(())
    }

    /// Puts other rules in force without touching open connections. A companion or port that is new needs
    /// [`RedirectGuard::companion_ready`] afterwards.
    pub fn update(
        &mut self,
        netns: BorrowedFd<'_>,
        spec: &RedirectSpec,
        on_failure: FailureMode,
        sources: Sources,
    ) -> Result<(), RedirectError> {
        let number = self.rules.config.workload;
        // The other table: a connection is decided by the old rules or by the new ones, never by some of each.
        let table = self.rules.config.table ^ 1;
        let new = Rules::new(table, spec, on_failure, &sources)?;
        self.clear_other_table()?;
        if let Err(error) = self.write_entries(&new) {
            // Nobody looks at it: the old rules stay in force.
            let _ = self.dataplane.maps().remove_table(&new);
            return Err(error);
        }
        let old = std::mem::replace(&mut self.rules, new);
        self.spec = spec.clone();
        self.on_failure = on_failure;
        self.sources = sources;
        let steer = match (&self.inbound, self.rules.inbound.is_empty()) {
            (None, false) => Some(self.dataplane.steer(Some(number))?),
            _ => None,
        };
        self.connect_links(netns, steer)?;
        // Its programs stay: it may have accepted connections that it has not asked for yet.
        for name in old.companion_ports.keys().filter(|name| !self.rules.companion_ports.contains_key(*name))
        {
            self.dataplane.include(number, name)?;
            self.exempt.remove(name);
        }
        let mut maps = self.dataplane.maps();
        maps.remove_table(&old)?;
        for port in old.inbound.keys().filter(|port| !self.rules.inbound.contains_key(port)) {
            maps.leave_port(old.port_key(*port))?;
        }
        for (name, ports) in &old.companion_ports {
            let kept = self.rules.companion_ports.get(name);
            for (port, protocol) in ports.iter().filter(|port| !kept.is_some_and(|kept| kept.contains(port)))
            {
                for key in listener_keys(number, *port, *protocol) {
                    maps.remove_listener(key)?;
                }
            }
        }
        Ok(())
    }

    /// What the workload has of what all of them share, if that is counted.
    pub fn share(&self) -> Option<Share> {
        self.dataplane.maps().share(self.rules.config.workload)
    }

    /// Redirects no new connection from now on, but still answers companions, which may not have asked for all of those
    /// that were made before. Returns how many they have not asked for.
    pub fn drain(&mut self) -> Result<usize, RedirectError> {
        self.stop_redirecting()?;
        self.dataplane.maps().waiting(self.rules.config.workload)
    }

    /// Ends redirection. Open connections stay with the companion. Goes on after an error and returns the first.
    ///
    /// To lose no connection that a companion has not asked for yet, [`RedirectGuard::drain`] until there is none.
    pub fn detach(mut self) -> Result<(), RedirectError> {
        self.undo()
    }

    /// Leaves everything in force for the next agent.
    pub fn leave(mut self) {
        self.done = true;
    }

    /// Ends the links of the workload: one write turns redirection off, then they go one by one.
    fn stop_redirecting(&mut self) -> Result<(), RedirectError> {
        let number = self.rules.config.workload;
        self.dataplane.maps().note_out_of_force(self.cgroup.id, number);
        // From now on it is the matter of the workloads around it.
        let mut result = self.dataplane.move_out(number);
        if self.outbound.iter().any(|(_, link)| link.has_cgroup()) {
            result = result.and(self.dataplane.configure(number, None));
        }
        let outbound = self.outbound.drain(..).rev().map(|(_, link)| link);
        for link in self.inbound.take().into_iter().chain(outbound) {
            result = result.and(link.detach());
        }
        result
    }

    fn undo(&mut self) -> Result<(), RedirectError> {
        self.done = true;
        let mut first = None;
        let mut note = |result: Result<(), RedirectError>| {
            if let Err(error) = result {
                first.get_or_insert(error);
            }
        };
        note(self.stop_redirecting());
        let directory = self.dataplane.links(self.rules.config.workload);
        for name in self.companions.keys().cloned().collect::<Vec<_>>() {
            note(self.part_with(&name));
        }
        note(self.remove_entries());
        note(self.dataplane.forget(self.rules.config.workload));
        note(self.dataplane.maps().forget_connections(self.rules.config.workload));
        note(
            remove_if_there(fs::remove_dir(&directory))
                .map_err(RedirectError::sys("cannot remove", &directory)),
        );
        first.map_or(Ok(()), Err)
    }

    /// Detaches a companion's programs. Goes on after an error and returns the first.
    fn part_with(&mut self, name: &CompanionName) -> Result<(), RedirectError> {
        let Some((cgroup, links)) = self.companions.remove(name) else { return Ok(()) };
        let number = self.rules.config.workload;
        let mut result = self.dataplane.include(number, name);
        self.exempt.remove(name);
        for link in links {
            result = result.and(link.detach());
        }
        result = result.and(self.dataplane.answer_no_more(number, name, cgroup));
        let path = self.dataplane.links(number).join(directory_name(name.as_str()));
        let removed = remove_if_there(fs::remove_dir(&path));
        result.and(removed.map_err(RedirectError::sys("cannot remove", &path)))
    }

    fn clear_other_table(&mut self) -> Result<(), RedirectError> {
        if self.other_table {
            let other = self.rules.config.table ^ 1;
            self.dataplane.maps().remove_tables(|table| table == other)?;
            self.other_table = false;
        }
        Ok(())
    }

    fn remove_entries(&mut self) -> Result<(), RedirectError> {
        self.clear_other_table()?;
        let workload = self.rules.config.workload;
        let mut maps = self.dataplane.maps();
        maps.remove_table(&self.rules)?;
        for port in self.rules.inbound.keys() {
            maps.leave_port(self.rules.port_key(*port))?;
        }
        for (port, protocol) in self.rules.companion_ports.values().flatten() {
            for key in listener_keys(workload, *port, *protocol) {
                maps.remove_listener(key)?;
            }
        }
        Ok(())
    }

    fn write_entries(&self, rules: &Rules) -> Result<(), RedirectError> {
        let mut maps = self.dataplane.maps();
        maps.write_table(rules)?;
        for (port, rule) in &rules.inbound {
            maps.steer_port(rules.port_key(*port), *rule)?;
        }
        Ok(())
    }

    /// Attaches or detaches so that the links are those that the rules want, and writes the configuration.
    fn connect_links(&mut self, netns: BorrowedFd<'_>, steer: Option<Steer>) -> Result<(), RedirectError> {
        if !self.rules.executables.is_empty() && !self.dataplane.tells_executables {
            return Err(RedirectError::Btf("programs cannot be told apart on this kernel".into()));
        }
        self.dataplane.maps().note_in_force(self.cgroup.id, self.rules.config.table, &self.spec);
        let wanted: Vec<CgroupProgram> = self.workload_programs().copied().collect();
        let cgroup = if wanted.is_empty() { None } else { Some(open_directory(&self.cgroup.path)?) };
        for (index, program) in wanted.iter().enumerate() {
            if index == 1 {
                // The first program has made the cgroup's storage; connect programs come after this.
                self.dataplane.configure(self.rules.config.workload, Some(self.rules.config))?;
            }
            if let Some(cgroup) = &cgroup
                && !self.outbound.iter().any(|(name, _)| *name == program.name)
            {
                let loaded = self.dataplane.program(program.name)?;
                let pin = self.pin(program.name);
                let link = Link::attach(loaded, cgroup.as_fd(), program.attach_type, pin);
                let blame = |error| conflicts::explained(error, &self.cgroup.path, program.attach_type);
                self.outbound.push((program.name, link.map_err(blame)?));
            }
        }
        if wanted.is_empty() && !self.outbound.is_empty() {
            self.dataplane.configure(self.rules.config.workload, Some(self.rules.config))?;
        }
        let is_wanted = |name: &str| wanted.iter().any(|program| program.name == name);
        while let Some(at) = self.outbound.iter().rposition(|(name, _)| !is_wanted(name)) {
            self.outbound.remove(at).1.detach()?;
        }
        if self.rules.inbound.is_empty() {
            if let Some(link) = self.inbound.take() {
                link.detach()?;
            }
        } else if let (None, Some(steer)) = (&self.inbound, steer) {
            self.inbound = Some(Link::attach(&steer.program, netns, BPF_SK_LOOKUP, self.pin(STEER_PROGRAM))?);
        }
        Ok(())
    }

    fn attach_companion(&mut self, name: &CompanionName, cgroup: &Cgroup) -> Result<(), RedirectError> {
        if let Some((attached, links)) = self.companions.get(name)
            && *attached == cgroup.id
            && links.len() == self.companion_programs().count()
            && links.iter().all(Link::has_cgroup)
        {
            return Ok(());
        }
        if let Some((before, _)) = self.companions.get(name) {
            self.dataplane.answer_no_more(self.rules.config.workload, name, *before)?;
        }
        self.create_directory(&directory_name(name.as_str()))?;
        let target = open_directory(&cgroup.path)?;
        let mut links = Vec::new();
        for program in self.companion_programs() {
            let loaded = self.dataplane.program(program.name)?;
            let pin = self.companion_pin(name, program.name);
            let link = Link::attach(loaded, target.as_fd(), program.attach_type, pin);
            links.push(link.map_err(|error| conflicts::explained(error, &cgroup.path, program.attach_type))?);
        }
        for program in COMPANION_PROGRAMS.iter().filter(|program| !self.wants(program)) {
            if let Ok(link) = Link::adopt(&self.companion_pin(name, program.name)) {
                link.detach()?;
            }
        }
        self.companions.insert(name.clone(), (cgroup.id, links));
        Ok(())
    }

    fn wants(&self, program: &CgroupProgram) -> bool {
        self.spec.redirects_udp() || !program.for_datagrams
    }

    fn workload_programs(&self) -> impl Iterator<Item = &'static CgroupProgram> {
        let any = self.spec.redirects_outbound();
        WORKLOAD_PROGRAMS.iter().filter(move |program| any && self.wants(program))
    }

    fn companion_programs(&self) -> impl Iterator<Item = &'static CgroupProgram> {
        COMPANION_PROGRAMS.iter().filter(|program| self.wants(program))
    }

    fn create_directory(&self, below: &str) -> Result<(), RedirectError> {
        let path = self.dataplane.links(self.rules.config.workload).join(below);
        fs::create_dir_all(&path).map_err(RedirectError::sys("cannot create", &path))
    }

    fn pin(&self, program: &str) -> std::path::PathBuf {
        self.dataplane.links(self.rules.config.workload).join(program)
    }

    fn companion_pin(&self, name: &CompanionName, program: &str) -> std::path::PathBuf {
        self.dataplane.links(self.rules.config.workload).join(directory_name(name.as_str())).join(program)
    }
}

/// For IPv4 and IPv6.
pub(crate) fn listener_keys(workload: u32, port: u16, protocol: Protocol) -> [ListenerKey; 2] {
    [AF_INET, AF_INET6].map(|family| ListenerKey {
        workload,
        port,
        family: family.to_le_bytes()[0],
        protocol: protocol.number(),
    })
}

impl Drop for RedirectGuard {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.undo()
        {
            tracing::error!(cgroup = %self.cgroup.path.display(), error = &error as &dyn std::error::Error, "redirection could not be taken back");
        }
    }
}
