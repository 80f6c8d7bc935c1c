//! Companions that somebody else runs: which process is one, and which listening sockets it has.
//!
//! Owns the looking. A socket counts only when it listens in the workload's network namespace *and* a process that matches
//! every given field holds it; what is handed out was checked after it was duplicated. Never touches the process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::fd::{AsFd as _, OwnedFd},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use pillion_workload::{
    Cgroup, CgroupId, ExternalSpec, Family, Glob, Listener, Pid, ProcessId, Protocol, UserSpec,
};
use procfs::process::FDTarget;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdGetfdFlags, pidfd_getfd},
};

use crate::{
    listeners::{self, Look},
    process,
    user::{UserError, resolve_user},
};

/// By what a companion is known.
#[derive(Debug)]
pub(crate) struct Owner {
    executables: Vec<Glob>,
    users: BTreeMap<u32, String>,
    /// Its name in the pod, and the ids of all containers with that name.
    container: Option<(String, Vec<String>)>,
    cgroup: Option<Glob>,
    /// Where cgroup2 is mounted.
    unified: PathBuf,
    /// This process, which holds duplicates of what it has found.
    never: Option<Pid>,
}

/// A process, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sight {
    executable: String,
    uid: u32,
    /// Below the mount, with a slash before it.
    cgroup: String,
}

impl fmt::Display for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { executable, uid, cgroup } = self;
        write!(f, "{executable} of user {uid} in cgroup {cgroup}")
    }
}

/// A process that is the companion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outsider {
    pub(crate) process: ProcessId,
    pub(crate) cgroup: Cgroup,
}

/// What a look has found.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) look: Look,
    /// There when it listens on every port.
    pub(crate) outsider: Option<Outsider>,
    /// Of all listening sockets on the ports.
    pub(crate) inodes: BTreeSet<u64>,
    /// Who else listens on one of the missing ports, if that was asked.
    pub(crate) stranger: Option<String>,
}

impl Owner {
    /// Looks users up; blocks on the user database. `containers` are the ids of those with the wanted name.
    pub(crate) fn new(
        spec: &ExternalSpec,
        containers: Vec<String>,
        unified: &Path,
    ) -> Result<Self, UserError> {
        let mut users = BTreeMap::new();
        for user in &spec.users {
            let identity = resolve_user(&UserSpec { user: user.clone(), group: None })?;
            users.insert(identity.uid, user.clone());
        }
        Ok(Self {
            executables: spec.executables.clone(),
            users,
            container: spec.container.clone().map(|name| (name, containers)),
            cgroup: spec.cgroup.clone(),
            unified: unified.to_owned(),
            never: i32::try_from(std::process::id()).ok().map(Pid),
        })
    }

    /// Why the process is not the companion.
    fn judge(&self, sight: &Sight) -> Result<(), String> {
        if !self.executables.is_empty()
            && !self.executables.iter().any(|glob| glob.matches(&sight.executable))
        {
            return Err("its executable is another".to_owned());
        }
        if !self.users.is_empty() && !self.users.contains_key(&sight.uid) {
            let users: Vec<&str> = self.users.values().map(String::as_str).collect();
            return Err(format!("its user is not {}", users.join(" or ")));
        }
        if let Some((name, ids)) = &self.container
            && !ids.iter().any(|id| is_of_container(&sight.cgroup, id))
        {
            return Err(format!("it is in no container named {name}"));
        }
        if let Some(glob) = &self.cgroup
            && !glob.matches(&sight.cgroup)
        {
            return Err("its cgroup is another".to_owned());
        }
        Ok(())
    }

    fn cgroup_of(&self, sight: &Sight) -> io::Result<Cgroup> {
        let path = match sight.cgroup.trim_start_matches('/') {
            "" => self.unified.clone(),
            below => self.unified.join(below),
        };
        Ok(Cgroup { id: CgroupId(fs::metadata(&path)?.ino()), path })
    }
}

/// Whether a cgroup is a container's or below it: runtimes name it after the id, perhaps with more around it.
fn is_of_container(cgroup: &str, id: &str) -> bool {
    !id.is_empty() && cgroup.split('/').any(|part| part.contains(id))
}

fn sight(pid: Pid) -> io::Result<Sight> {
    let directory = PathBuf::from(format!("/proc/{}", pid.0));
    let executable = fs::read_link(directory.join("exe"))?.to_string_lossy().into_owned();
    let cgroups = fs::read_to_string(directory.join("cgroup"))?;
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(Sight {
        // A program that was replaced by an upgrade still bears its name.
        executable: executable.strip_suffix(" (deleted)").unwrap_or(&executable).to_owned(),
        uid: effective_user(&fs::read_to_string(directory.join("status"))?)
            .ok_or(io::ErrorKind::InvalidData)?,
        cgroup: cgroup.ok_or(io::ErrorKind::Unsupported)?.to_owned(),
    })
}

/// `Uid:` of `/proc/PID/status` has the real, effective, saved and file system's.
fn effective_user(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Looks for the companion on `ports`. Must run on a thread in the workload's network namespace; ends soon after
/// `deadline` however many processes and descriptors there are.
pub(crate) fn look(
    ports: &BTreeSet<(u16, Protocol)>,
    owner: &Owner,
    name_strangers: bool,
    deadline: Instant,
) -> io::Result<Seen> {
    let wanted: BTreeMap<u64, (u16, Protocol)> = listeners::on(ports)?.into_iter().collect();
    let mut seen = Seen { inodes: wanted.keys().copied().collect(), ..Seen::default() };
    let mut left = wanted.clone();
    let mut found: Option<Outsider> = None;
    for pid in if wanted.is_empty() { Vec::new() } else { processes()? } {
        if left.is_empty() || Instant::now() >= deadline {
            break;
        }
        if owner.never == Some(pid) {
            continue;
        }
        // One that has just ended holds no socket.
        let _ = take(pid, owner, &mut left, &mut found, &mut seen.look.listeners, deadline);
    }
    let serves: BTreeSet<_> = seen
        .look
        .listeners
        .iter()
        .filter(|listener| listener.family != Family::V6)
        .map(|listener| (listener.port, listener.protocol))
        .collect();
    seen.look.missing = ports.difference(&serves).copied().collect();
    seen.look.foreign = left.values().filter(|port| seen.look.missing.contains(port)).copied().collect();
    if name_strangers && !seen.look.foreign.is_empty() {
        seen.stranger = stranger(owner, found.as_ref(), &left, deadline);
    }
    seen.outsider = found.filter(|_| seen.look.missing.is_empty());
    Ok(seen)
}

/// Duplicates what the process holds of the wanted sockets, if it is the companion. Workers of one companion may hold them
/// beside each other; they are in one cgroup.
fn take(
    pid: Pid,
    owner: &Owner,
    wanted: &mut BTreeMap<u64, (u16, Protocol)>,
    found: &mut Option<Outsider>,
    listeners: &mut Vec<Listener>,
    deadline: Instant,
) -> io::Result<()> {
    let Some(pidfd) = process::open(pid).map_err(io::Error::other)? else { return Ok(()) };
    let sight = sight(pid)?;
    if owner.judge(&sight).is_err() {
        return Ok(());
    }
    let outsider = Outsider {
        process: ProcessId { pid, started: process::start_time(pid)? },
        cgroup: owner.cgroup_of(&sight)?,
    };
    // All of that was read after the pidfd was opened: if its process still runs, it was read of that one.
    if has_ended(&pidfd) || found.as_ref().is_some_and(|first| first.cgroup != outsider.cgroup) {
        return Ok(());
    }
    for descriptor in process::descriptors(pid)? {
        if wanted.is_empty() || Instant::now() >= deadline {
            break;
        }
        let Ok(descriptor) = descriptor else { continue };
        let FDTarget::Socket(inode) = descriptor.target else { continue };
        if !wanted.contains_key(&inode) {
            continue;
        }
        let socket = pidfd_getfd(&pidfd, descriptor.fd, PidfdGetfdFlags::empty())?;
        if let Some(listener) = listeners::examine(socket, inode)? {
            wanted.remove(&inode);
            listeners.push(listener);
            found.get_or_insert_with(|| outsider.clone());
        }
    }
    Ok(())
}

/// Says who holds one of `sockets`, and why that is not the companion.
fn stranger(
    owner: &Owner,
    found: Option<&Outsider>,
    sockets: &BTreeMap<u64, (u16, Protocol)>,
    deadline: Instant,
) -> Option<String> {
    for pid in processes().ok()? {
        if Instant::now() >= deadline {
            break;
        }
        if owner.never == Some(pid) {
            continue;
        }
        let Ok(descriptors) = process::descriptors(pid) else { continue };
        let holds = descriptors.flatten().any(
            |descriptor| matches!(descriptor.target, FDTarget::Socket(inode) if sockets.contains_key(&inode)),
        );
        if let (true, Ok(sight)) = (holds, sight(pid)) {
            let why = match (owner.judge(&sight), found) {
                (Err(why), _) => why,
                (Ok(()), Some(first)) => {
                    format!(
                        "it is in another cgroup than process {}, which listens as well",
                        first.process.pid
                    )
                }
                (Ok(()), None) => continue,
            };
            return Some(format!("process {pid} listens there, {sight}, and {why}"));
        }
    }
    None
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut pidfd = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    poll(&mut pidfd, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Whether these sockets still listen on `ports`, and no others do. Must run on a thread in the namespace.
pub(crate) fn unchanged(ports: &BTreeSet<(u16, Protocol)>, inodes: &BTreeSet<u64>) -> io::Result<bool> {
    let now: BTreeSet<u64> = listeners::on(ports)?.into_iter().map(|(inode, _)| inode).collect();
    Ok(now == *inodes)
}

fn processes() -> io::Result<Vec<Pid>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| Some(Pid(entry.file_name().to_str()?.parse().ok()?))).collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn globs(patterns: &[&str]) -> Vec<Glob> {
        patterns.iter().map(|pattern| Glob::new(pattern).expect("a pattern")).collect()
    }

    #[test]
    fn every_given_field_must_match() {
        let sight = Sight {
            executable: "/usr/local/bin/envoy".to_owned(),
            uid: 1337,
            cgroup: "/kubepods.slice/pod1.slice/cri-containerd-abc123.scope".to_owned(),
        };
        let spec = |executables: &[&str], users: &[&str], container: Option<&str>, cgroup: Option<&str>| {
            ExternalSpec {
                executables: globs(executables),
                users: users.iter().map(ToString::to_string).collect(),
                container: container.map(str::to_owned),
                cgroup: cgroup.map(|glob| Glob::new(glob).expect("a pattern")),
            }
        };
        for (spec, ids, wanted) in [
            (spec(&["*/envoy"], &[], None, None), &[][..], Ok(())),
            (spec(&["/bin/nginx", "*/envoy"], &["0", "1337"], None, Some("*/pod1.slice/*")), &[], Ok(())),
            (spec(&["/envoy"], &[], None, None), &[], Err("its executable is another")),
            (spec(&["*/envoy"], &["0", "33"], None, None), &[], Err("its user is not 0 or 33")),
            (spec(&["*/envoy"], &[], None, Some("/system.slice/*")), &[], Err("its cgroup is another")),
            (spec(&[], &[], Some("mesh"), None), &["xyz", "abc123"], Ok(())),
            (spec(&[], &[], Some("mesh"), None), &["xyz"], Err("it is in no container named mesh")),
            (spec(&[], &[], Some("mesh"), None), &[""], Err("it is in no container named mesh")),
        ] {
            let ids = ids.iter().map(ToString::to_string).collect();
            let owner = Owner::new(&spec, ids, Path::new("/sys/fs/cgroup")).expect("numbers are users");
            assert_eq!(owner.judge(&sight), wanted.map_err(str::to_owned), "{spec:?}");
        }
    }

    #[test]
    fn own_listener_is_found_by_what_this_process_is() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = listener.local_addr().expect("bound").port();
        let pid = Pid(i32::try_from(std::process::id()).expect("a pid"));
        let Ok(own) = sight(pid) else { return };
        let mount = crate::cgroup::CgroupRoots::discover().expect("cgroups");
        let deadline = || Instant::now() + std::time::Duration::from_secs(10);
        for (executable, found) in [(own.executable.as_str(), true), ("/bin/another", false)] {
            let spec = ExternalSpec { executables: globs(&[executable]), ..ExternalSpec::default() };
            let mut owner = Owner::new(&spec, Vec::new(), mount.unified()).expect("no users");
            assert_eq!(owner.never.take(), Some(pid));
            let port = (port, Protocol::Tcp);
            let seen = look(&[port].into(), &owner, true, deadline()).expect("a look");
            assert_eq!(seen.outsider.map(|outsider| outsider.process.pid), found.then_some(pid));
            assert_eq!(seen.look.listeners.len(), usize::from(found));
            let told = seen.stranger.unwrap_or_default();
            assert_eq!(told.contains("its executable is another"), !found, "{told}");
            assert!(unchanged(&[port].into(), &seen.inodes).expect("a look"));
        }
        drop(listener);
        assert!(!unchanged(&[(port, Protocol::Tcp)].into(), &[1].into()).expect("a look"));
    }

    #[test]
    fn the_effective_user_counts() {
        assert_eq!(effective_user("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5"), Some(2));
        assert_eq!(effective_user("Uid:\t1"), None);
        assert_eq!(effective_user(""), None);
    }
}
