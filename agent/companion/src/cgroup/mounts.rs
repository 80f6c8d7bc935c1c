//! Which cgroup hierarchies are mounted where, from the text of mountinfo. Pure.

use std::{collections::BTreeMap, ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use super::Controller;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mounts {
    pub(super) v2: Option<PathBuf>,
    pub(super) v1: BTreeMap<Controller, PathBuf>,
    /// The other v1 hierarchies that are shown from their root, by each controller or name that they have.
    pub(super) rest: BTreeMap<String, PathBuf>,
}

/// Reads `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS…] - TYPE SOURCE SUPEROPTIONS` (proc(5)). The first mount
/// of a hierarchy counts, unless a later one shows it from its root.
pub(super) fn parse(mountinfo: &str) -> Mounts {
    let mut mounts = Mounts::default();
    let mut v2_whole = false;
    for line in mountinfo.lines() {
        let Some((mount, file_system)) = line.split_once(" - ") else { continue };
        let mount: Vec<&str> = mount.split(' ').collect();
        let file_system: Vec<&str> = file_system.split(' ').collect();
        let (&[_, _, _, root, point, ..], &[kind, .., options]) = (mount.as_slice(), file_system.as_slice())
        else {
            continue;
        };
        match kind {
            "cgroup2" if mounts.v2.is_none() || (root == "/" && !v2_whole) => {
                v2_whole = root == "/";
                mounts.v2 = Some(unescape(point));
            }
            "cgroup" => {
                let limits = |option: &str| Controller::ALL.iter().any(|limit| limit.name() == option);
                if root == "/" && !options.split(',').any(limits) {
                    for option in options.split(',') {
                        mounts.rest.entry(option.to_owned()).or_insert_with(|| unescape(point));
                    }
                }
                for controller in Controller::ALL {
                    if options.split(',').any(|option| option == controller.name()) {
                        mounts.v1.entry(controller).or_insert_with(|| unescape(point));
                    }
                }
            }
            _ => {}
        }
    }
    mounts
}

impl Mounts {
    /// The roots of those other hierarchies in which a process is not at the root, by the text of its `/proc/PID/cgroup`
    /// (cgroups(7)): `ID:CONTROLLERS:PATH`.
    pub(super) fn to_leave(&self, membership: &str) -> Vec<PathBuf> {
        let below_the_root = membership.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            (path != "/").then(|| controllers.split(',').next().unwrap_or_default())
        });
        below_the_root.filter_map(|controller| self.rest.get(controller).cloned()).collect()
    }
}

/// mountinfo writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        if let (b'\\', Some(digits)) = (first, digits) {
            bytes.push(digits.iter().fold(0u8, |value, digit| (value << 3) | (digit - b'0')));
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (&'static str, Option<&'static str>, &'static [(Controller, &'static str)]);

    #[test]
    fn hierarchies_are_found() {
        let pure = "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let hybrid = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
36 31 0:32 / /sys/fs/cgroup/memory rw shared:1 master:2 - cgroup cgroup rw,memory
37 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let bound = "1 0 0:1 /kubepods /a rw - cgroup2 c rw\n2 0 0:1 / /b\\040c\\134 rw - cgroup2 c rw\n3 0 0:1 / /d rw - cgroup2 c rw";
        let hostile = "\n - \n1 2 - cgroup2\n - cgroup2 x rw\n1 0 0:1 / /x rw - tmpfs tmpfs rw,memory";
        let cases: [Case; 4] = [
            (pure, Some("/sys/fs/cgroup"), &[]),
            (
                hybrid,
                Some("/sys/fs/cgroup/unified"),
                &[
                    (Controller::Memory, "/sys/fs/cgroup/memory"),
                    (Controller::Cpu, "/sys/fs/cgroup/cpu,cpuacct"),
                    (Controller::Pids, "/sys/fs/cgroup/pids"),
                ],
            ),
            (bound, Some("/b c\\"), &[]),
            (hostile, None, &[]),
        ];
        for (text, v2, v1) in cases {
            let want = Mounts {
                v2: v2.map(PathBuf::from),
                v1: v1.iter().map(|(controller, path)| (*controller, PathBuf::from(path))).collect(),
                rest: BTreeMap::new(),
            };
            let found = Mounts { rest: BTreeMap::new(), ..parse(text) };
            assert_eq!(found, want, "{text}");
        }
    }

    #[test]
    fn what_a_companion_is_to_leave_is_where_the_agent_is_not_at_the_root() {
        let mounts = parse(
            "35 31 0:31 / /c/devices rw - cgroup cgroup rw,devices
36 31 0:32 / /c/memory rw - cgroup cgroup rw,memory
38 31 0:33 / /c/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio
39 31 0:34 /pod /c/blkio rw - cgroup cgroup rw,blkio
40 31 0:37 / /c/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /c/unified rw - cgroup2 cgroup2 rw",
        );
        for (membership, left) in [
            ("5:devices:/pod/a\n4:memory:/pod/a\n0::/pod/a\n", &["/c/devices"][..]),
            (
                "6:net_cls,net_prio:/pod\n1:name=systemd:/x:y\n3:blkio:/pod",
                &["/c/net_cls,net_prio", "/c/systemd"],
            ),
            ("5:devices:/\n1:name=systemd:/\n0::/", &[]),
            ("nonsense\n:\n5:freezer:/a\n", &[]),
        ] {
            assert_eq!(
                mounts.to_leave(membership),
                left.iter().map(PathBuf::from).collect::<Vec<_>>(),
                "{membership}"
            );
        }
    }
}
