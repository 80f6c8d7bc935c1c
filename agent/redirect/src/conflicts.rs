//! The conflict doctor: programs of others that run for the same sockets as Pillion's, whose they are, which come first, and what
//! is at stake. Only looks: nothing that is not Pillion's is ever detached.
//!
//! Order within a cgroup tree is the kernel's: the programs of the cgroup itself first, in the order of attaching, then those
//! of the one above. So Pillion's, on the workload's own cgroup, come before a balancer's on the root, whoever was there first;
//! and after those that others have attached to that very cgroup before, or to one below.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_GETSOCKOPT, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET4_GETSOCKNAME, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME,
    BPF_CGROUP_INET6_GETSOCKNAME, BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG,
    BPF_CGROUP_UDP6_SENDMSG, BPF_SK_LOOKUP,
};
use serde::{Deserialize, Serialize};

use crate::{RedirectError, ownership, sys};

/// Cgroups that are looked at; a machine with more is told of those found first.
const MOST_CGROUPS: usize = 16_384;
/// Of `BPF_PROG_ATTACH`: a program below takes this one's place.
const ALLOW_OVERRIDE: u32 = 1;
/// Of `BPF_PROG_ATTACH`, and of every link: programs below run as well.
const ALLOW_MULTI: u32 = 2;

const OF_WORKLOADS: [(&str, bpf_attach_type); 10] = [
    ("connect4", BPF_CGROUP_INET4_CONNECT),
    ("connect6", BPF_CGROUP_INET6_CONNECT),
    ("getpeername4", BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeername6", BPF_CGROUP_INET6_GETPEERNAME),
    ("getsockname4", BPF_CGROUP_INET4_GETSOCKNAME),
    ("getsockname6", BPF_CGROUP_INET6_GETSOCKNAME),
    ("sendmsg4", BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", BPF_CGROUP_UDP6_SENDMSG),
    ("recvmsg4", BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg6", BPF_CGROUP_UDP6_RECVMSG),
];
const OF_COMPANIONS: [(&str, bpf_attach_type); 2] =
    [("getsockopt", BPF_CGROUP_GETSOCKOPT), ("sendmsg4", BPF_CGROUP_UDP4_SENDMSG)];
const LOOKUP: &str = "sk_lookup";
/// Where companions' cgroups are.
const SLICE: &str = "pillion.slice";

/// Which of the two runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Order {
    /// It runs before Pillion's.
    Before,
    /// It runs after Pillion's.
    After,
    /// It was attached so that one below takes its place: it does not run where Pillion's does.
    Replaced,
    /// It was attached so that nothing can be attached below.
    Exclusive,
}

/// A program of somebody else's that runs for the same sockets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Neighbour {
    /// The kernel's id.
    pub program: u32,
    /// Its name; the kernel cuts names to 15 bytes.
    pub name: String,
    /// Where in a socket's life it runs, such as `connect4`.
    pub attach_type: String,
    /// What it is attached to.
    pub at: String,
    /// When it runs.
    pub order: Order,
    /// Who holds it: pins, and processes with a descriptor of it or of its link. Nobody may: then it goes with its cgroup.
    pub owners: Vec<String>,
    /// What it can spoil; nothing when it comes where it does no harm.
    pub at_stake: Option<String>,
}

/// Those around one workload: on its cgroup, above it and below it; in its network namespace; on its companions' cgroups.
///
/// # Errors
/// When the kernel does not tell, for example without `CAP_NET_ADMIN` and `CAP_BPF`.
pub fn neighbours_of(cgroup: &Path, netns: &Path, companions: &[PathBuf]) -> io::Result<Vec<Neighbour>> {
    let mut found = Found::default();
    for (name, attach_type) in OF_WORKLOADS {
        found.along(cgroup, name, attach_type)?;
        for below in descendants(cgroup) {
            found.at(&below, name, attach_type, |_, _| Order::Before)?;
        }
    }
    for companion in companions {
        for (name, attach_type) in OF_COMPANIONS {
            found.along(companion, name, attach_type)?;
        }
    }
    found.in_namespace(netns)?;
    Ok(found.told())
}

/// Those on the whole machine: on any cgroup of the cgroup2 tree at `root`, and in any network namespace that has a process or a
/// name.
///
/// # Errors
/// As for [`neighbours_of`].
pub fn neighbours_on_machine(root: &Path) -> io::Result<Vec<Neighbour>> {
    let mut found = Found::default();
    let mut cgroups = vec![root.to_owned()];
    cgroups.extend(descendants(root));
    for cgroup in cgroups {
        let order = |multiple: bool, replaced: bool| match (multiple, replaced) {
            (true, _) if cgroup == root => Order::After,
            // For a workload in this very cgroup; below it, Pillion's come first.
            (true, _) => Order::Before,
            (false, true) => Order::Replaced,
            (false, false) => Order::Exclusive,
        };
        for (name, attach_type) in OF_WORKLOADS {
            found.at(&cgroup, name, attach_type, order)?;
        }
        // Those of companions are below these two, and in no other.
        if cgroup == root || cgroup == root.join(SLICE) {
            for (name, attach_type) in OF_COMPANIONS {
                found.at(&cgroup, name, attach_type, |multiple, replaced| match (multiple, replaced) {
                    (false, false) => Order::Exclusive,
                    (false, true) => Order::Replaced,
                    (true, _) => Order::After,
                })?;
            }
        }
    }
    for namespace in namespaces() {
        // A process that has ended meanwhile has none.
        match found.in_namespace(&namespace) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(found.told())
}

/// Names what keeps a program from being attached to a cgroup, where the error is the kernel's refusal because of another's.
pub(crate) fn explained(error: RedirectError, cgroup: &Path, attach_type: bpf_attach_type) -> RedirectError {
    let RedirectError::Sys { source, .. } = &error else { return error };
    let known = OF_WORKLOADS.iter().chain(&OF_COMPANIONS).find(|(_, known)| *known == attach_type);
    let (Some(libc::EPERM), Some((name, _))) = (source.raw_os_error(), known) else { return error };
    let mut found = Found::default();
    if found.along(cgroup, name, attach_type).is_err() {
        return error;
    }
    let alone = found.told().into_iter().filter(|neighbour| neighbour.order == Order::Exclusive);
    let programs: Vec<String> = alone
        .map(|neighbour| {
            let owners =
                if neighbour.owners.is_empty() { "nobody".into() } else { neighbour.owners.join(", ") };
            format!("{} (id {}) on {}, held by {owners}", neighbour.name, neighbour.program, neighbour.at)
        })
        .collect();
    if programs.is_empty() {
        return error;
    }
    RedirectError::Exclusive {
        attach_type: (*name).to_owned(),
        programs: programs.join("; "),
        source: Box::new(error),
    }
}

/// Programs and what is told of them, before their owners are looked for.
#[derive(Debug, Default)]
struct Found {
    names: BTreeMap<u32, String>,
    neighbours: BTreeSet<Neighbour>,
}

impl Found {
    /// Everything on a cgroup and above it.
    fn along(&mut self, cgroup: &Path, name: &'static str, attach_type: bpf_attach_type) -> io::Result<()> {
        let effective = sys::effective_programs(File::open(cgroup)?.as_fd(), attach_type)?;
        let ours = effective.iter().position(|id| self.is_ours(*id));
        for level in cgroup.ancestors().take_while(|level| is_cgroup(level)) {
            let (ids, flags) = sys::attached_programs(File::open(level)?.as_fd(), attach_type)?;
            for id in ids {
                let place = effective.iter().position(|running| *running == id);
                let multiple = flags & ALLOW_MULTI != 0;
                let order = if multiple && level == cgroup && place < ours.or(Some(usize::MAX)) {
                    // Where Pillion's are not there yet, their place will be the last one of this cgroup.
                    Order::Before
                } else if multiple {
                    Order::After
                } else if flags & ALLOW_OVERRIDE != 0 && level != cgroup {
                    Order::Replaced
                } else {
                    Order::Exclusive
                };
                self.add(id, name, format!("cgroup {}", level.display()), order);
            }
        }
        Ok(())
    }

    /// Everything on this cgroup itself. `order` is given whether several may be attached, and whether it can be replaced.
    fn at(
        &mut self,
        cgroup: &Path,
        name: &'static str,
        attach_type: bpf_attach_type,
        order: impl Fn(bool, bool) -> Order,
    ) -> io::Result<()> {
        // A cgroup that has been removed meanwhile has none.
        let Ok(directory) = File::open(cgroup) else { return Ok(()) };
        let (ids, flags) = match sys::attached_programs(directory.as_fd(), attach_type) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            other => other?,
        };
        let order = order(flags & ALLOW_MULTI != 0, flags & ALLOW_OVERRIDE != 0);
        for id in ids {
            self.add(id, name, format!("cgroup {}", cgroup.display()), order);
        }
        Ok(())
    }

    /// Of several programs the last one that selects a socket decides.
    fn in_namespace(&mut self, netns: &Path) -> io::Result<()> {
        let (ids, _) = sys::attached_programs(File::open(netns)?.as_fd(), BPF_SK_LOOKUP)?;
        let ours = ids.iter().position(|id| self.is_ours(*id));
        for (place, id) in ids.into_iter().enumerate() {
            let order = if ours.is_none_or(|ours| place < ours) { Order::Before } else { Order::After };
            self.add(id, LOOKUP, "the network namespace".to_owned() + &of(netns), order);
        }
        Ok(())
    }

    fn add(&mut self, program: u32, attach_type: &str, at: String, order: Order) {
        if self.is_ours(program) {
            return;
        }
        let name = self.names.get(&program).cloned().unwrap_or_default();
        let at_stake = at_stake(attach_type, order).map(str::to_owned);
        let attach_type = attach_type.to_owned();
        let owners = Vec::new();
        self.neighbours.insert(Neighbour { program, name, attach_type, at, order, owners, at_stake });
    }

    fn is_ours(&mut self, program: u32) -> bool {
        if !self.names.contains_key(&program) {
            let loaded = loaded_programs().flatten();
            self.names =
                loaded.map(|info| (info.id(), String::from_utf8_lossy(info.name()).into_owned())).collect();
        }
        self.names.get(&program).is_some_and(|name| name.starts_with(ownership::PROGRAM_PREFIX))
    }

    fn told(self) -> Vec<Neighbour> {
        let programs: BTreeSet<u32> = self.neighbours.iter().map(|neighbour| neighbour.program).collect();
        let owners = if programs.is_empty() { BTreeMap::new() } else { ownership::holders_of(&programs) };
        self.neighbours
            .into_iter()
            .map(|mut neighbour| {
                neighbour.owners = owners.get(&neighbour.program).cloned().unwrap_or_default();
                neighbour
            })
            .collect()
    }
}

/// What a program in this place can spoil.
fn at_stake(attach_type: &str, order: Order) -> Option<&'static str> {
    let connect = attach_type.starts_with("connect");
    match order {
        Order::Exclusive if attach_type != LOOKUP => Some(
            "it was attached without BPF_F_ALLOW_MULTI: the kernel lets nothing be attached below, so that workloads there \
             cannot be attached",
        ),
        Order::Replaced => Some(
            "it was attached with BPF_F_ALLOW_OVERRIDE: where Pillion's program is attached it does not run, so that what it \
             does (translating addresses, refusing) is not done for what Pillion passes on",
        ),
        Order::Before if connect => Some(
            "it sees connections before Pillion: a destination that it rewrites reaches rules and companions rewritten",
        ),
        Order::After if attach_type.starts_with("getpeername") || attach_type.starts_with("getsockname") => {
            None
        }
        Order::After if attach_type == "getsockopt" => Some(
            "it runs after Pillion's answer to SO_ORIGINAL_DST and can change it: companions would be told another destination",
        ),
        Order::After if attach_type == LOOKUP => Some(
            "it runs after Pillion's and can take connections to ports that a policy sends to a companion",
        ),
        Order::Before if attach_type == LOOKUP => Some(
            "it runs before Pillion's: while a companion is not there, it can take connections that a closed policy refuses",
        ),
        Order::Before | Order::After | Order::Exclusive => None,
    }
}

/// How a namespace is named: by its file, but for that of a process.
fn of(netns: &Path) -> String {
    fs::read_link(netns)
        .map_or_else(|_| format!(" {}", netns.display()), |link| format!(" {}", link.display()))
}

/// A file of each network namespace that can be found.
fn namespaces() -> Vec<PathBuf> {
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes =
        fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path().join("ns/net"));
    let mut seen = BTreeSet::new();
    processes
        .chain(names)
        .filter(|file| fs::metadata(file).is_ok_and(|found| seen.insert((found.dev(), found.ino()))))
        .collect()
}

fn is_cgroup(directory: &Path) -> bool {
    directory.join("cgroup.procs").exists()
}

/// All cgroups below, without following links.
fn descendants(cgroup: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![cgroup.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if found.len() == MOST_CGROUPS {
                return found;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
                found.push(entry.path());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_at_stake_depends_on_the_order() {
        for (attach_type, order, stake) in [
            ("connect4", Order::Before, true),
            ("connect6", Order::After, false),
            ("connect4", Order::Replaced, true),
            ("connect4", Order::Exclusive, true),
            ("getpeername4", Order::Before, false),
            ("getpeername4", Order::After, false),
            ("getsockopt", Order::Before, false),
            ("getsockopt", Order::After, true),
            (LOOKUP, Order::Before, true),
            (LOOKUP, Order::After, true),
        ] {
            assert_eq!(at_stake(attach_type, order).is_some(), stake, "{attach_type} {order:?}");
        }
    }
}
