//! The kernel: eBPF, its file system, cgroups, pidfds.

use std::{
    fs,
    io::Read as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        statfs::{BPF_FS_MAGIC, statfs},
    },
    unistd::{AccessFlags, access, geteuid},
};
use pillion_redirect::{KernelFeature, Support};
use procfs::process::MountInfo;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::{Finding, RUN_AS_ROOT};
use crate::{config::Paths, inventory};

const BTF: &str = "/sys/kernel/btf/vmlinux";
/// First bytes of raw BTF, in the byte order of the machine (Documentation/bpf/btf.rst).
const BTF_MAGIC: u16 = 0xeb9f;
/// The controllers that limits of companions need.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

const GRANT: &str = "grant CAP_BPF and CAP_NET_ADMIN, and use a kernel with CONFIG_BPF_SYSCALL=y and \
                     CONFIG_CGROUP_BPF=y; in a container, is bpf(2) filtered by seccomp?";

/// Everything about the kernel.
pub(super) fn checks(paths: &Paths) -> Vec<Finding> {
    let mut findings = vec![release(), btf()];
    findings.extend(kernel_features());
    findings.extend(programs());
    findings.extend(memlock());
    findings.extend([jit(), bpffs(&paths.pin_root)]);
    match inventory::mounts() {
        Ok(mounts) => findings.extend(cgroups(&mounts)),
        Err(error) => {
            findings.push(Finding::fail("cgroup2", "not known", error.to_string(), "is /proc mounted?"));
        }
    }
    findings.push(pidfd());
    findings
}

/// For the reader of the report only: what the kernel can do is tried out.
fn release() -> Finding {
    let text = nix::sys::utsname::uname()
        .map(|name| format!("{} {}", name.release().to_string_lossy(), name.machine().to_string_lossy()));
    Finding::ok("kernel", text.unwrap_or_else(|errno| format!("not known: {errno}")))
}

fn btf() -> Finding {
    const CHECK: &str = "btf";
    let mut head = [0; 2];
    match fs::File::open(BTF).and_then(|mut file| file.read_exact(&mut head)) {
        Ok(()) if u16::from_ne_bytes(head) == BTF_MAGIC => Finding::ok(CHECK, BTF),
        Ok(()) => Finding::fail(
            CHECK,
            format!("{BTF} is not BTF"),
            format!("it begins with {head:02x?}"),
            "is something mounted over /sys/kernel?",
        ),
        Err(error) => Finding::fail(
            CHECK,
            format!("no {BTF}"),
            format!(
                "{error}; the eBPF object's maps are described by type information, which this kernel does not know"
            ),
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y; the kernels of all current distributions have it",
        ),
    }
}

/// What programs use and not every kernel has, each with what is different without it.
fn kernel_features() -> Vec<Finding> {
    let features = match pillion_redirect::kernel_features() {
        Ok(features) => features,
        Err(error) => {
            return vec![Finding::fail(
                "kernel features",
                "not known",
                format!("{:#}", anyhow::Error::from(error)),
                if geteuid().is_root() { GRANT } else { RUN_AS_ROOT },
            )];
        }
    };
    features
        .into_iter()
        .map(|feature| {
            let KernelFeature { name, purpose, since, support } = feature;
            match support {
                Support::There => Finding::ok(name, format!("there: {purpose}")),
                Support::Fallback(differs) => Finding::warn(
                    name,
                    format!("fallback: {purpose}"),
                    format!("this kernel has it not: {differs}"),
                    format!("none is needed; Linux {since} and later have it"),
                ),
                Support::Missing => Finding::fail(
                    name,
                    format!("missing: {purpose}"),
                    "this kernel has it not, and there is no substitute",
                    format!("use Linux 5.10 or later (this came with {since})"),
                ),
            }
        })
        .collect()
}

/// Every program is loaded and every map made, and dropped again. One finding when all is well, else one for each that
/// the kernel refuses.
fn programs() -> Vec<Finding> {
    let features = pillion_redirect::probe();
    let number = features.len();
    let mut refused: Vec<Finding> = features
        .into_iter()
        .filter_map(|feature| {
            let error = anyhow::Error::from(feature.result.err()?);
            Some(Finding::fail(
                format!("ebpf {}", feature.name),
                format!("no {}", feature.purpose),
                // The verifier's log is long and its end tells most.
                last_lines(&format!("{error:#}"), 12),
                if geteuid().is_root() { GRANT } else { RUN_AS_ROOT },
            ))
        })
        .collect();
    if refused.is_empty() {
        refused
            .push(Finding::ok("ebpf", format!("the kernel takes all {} programs and the maps", number - 1)));
    }
    refused
}

fn last_lines(text: &str, number: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(number)..].join("\n")
}

/// Before Linux 5.11 eBPF memory counts as locked memory. Where eBPF works, trying it with that limit at zero tells.
fn memlock() -> Option<Finding> {
    const CHECK: &str = "locked memory";
    let works = || pillion_redirect::probe().iter().any(|feature| feature.result.is_ok());
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    if !works() || setrlimit(Resource::RLIMIT_MEMLOCK, 0, hard).is_err() {
        return None;
    }
    let works_without = works();
    // Back to where it was: up to the hard limit this needs no privilege.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard);
    Some(if works_without {
        Finding::ok(CHECK, "eBPF does not count against the limit")
    } else if hard == nix::libc::RLIM_INFINITY {
        Finding::ok(CHECK, "no limit")
    } else {
        Finding::warn(
            CHECK,
            format!("{hard} bytes at most"),
            "this kernel counts eBPF maps as locked memory",
            "raise it: LimitMEMLOCK=infinity in the unit, or ulimit -Hl unlimited",
        )
    })
}

fn jit() -> Finding {
    const CHECK: &str = "ebpf jit";
    match fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").map(|text| text.trim().to_owned()) {
        Ok(value) if value == "0" => Finding::warn(
            CHECK,
            "off",
            "eBPF programs are interpreted: every new connection takes longer",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        // Absent with CONFIG_BPF_JIT_ALWAYS_ON in some kernels, and hidden in containers.
        Ok(_) => Finding::ok(CHECK, "on"),
        Err(_) => Finding::ok(CHECK, "cannot be switched off here"),
    }
}

fn bpffs(pin_root: &Path) -> Finding {
    const CHECK: &str = "bpffs";
    let existing = pin_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match statfs(existing) {
        Ok(status) if status.filesystem_type() == BPF_FS_MAGIC => {
            Finding::ok(CHECK, format!("{} is on it", pin_root.display()))
        }
        Ok(_) if pin_root.starts_with("/sys/fs/bpf") && Path::new("/sys/fs/bpf").is_dir() => {
            Finding::ok(CHECK, "not mounted yet; the agent mounts it at /sys/fs/bpf")
        }
        Ok(_) => Finding::fail(
            CHECK,
            format!("{} is not on bpffs", existing.display()),
            "links and maps must be pinned to outlive the agent",
            format!("mount -t bpf bpf {}", existing.display()),
        ),
        Err(errno) => Finding::fail(
            CHECK,
            format!("{} cannot be inspected", existing.display()),
            errno.to_string(),
            RUN_AS_ROOT,
        ),
    }
}

fn cgroups(mounts: &[MountInfo]) -> Vec<Finding> {
    let v1: Vec<&MountInfo> = mounts.iter().filter(|mount| mount.fs_type == "cgroup").collect();
    let Some(v2) = mounts.iter().find(|mount| mount.fs_type == "cgroup2") else {
        return vec![Finding::fail(
            "cgroup2",
            if v1.is_empty() { "no cgroups at all are mounted" } else { "only cgroup v1 is mounted" },
            "eBPF programs are attached to cgroup2 directories",
            "boot with systemd.unified_cgroup_hierarchy=1, or: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        )];
    };
    let point = v2.mount_point.display();
    let kind = if v1.is_empty() { "pure" } else { "hybrid: v1 as well" };
    // Asks for the mount, which may be read-only, and for our rights; writes nothing.
    let mut findings = vec![match access(&v2.mount_point, AccessFlags::W_OK) {
        Ok(()) => Finding::ok("cgroup2", format!("{point} ({kind})")),
        Err(errno) => Finding::fail(
            "cgroup2",
            format!("{point} ({kind}) cannot be written"),
            format!("{}; companions get cgroups of their own below it", errno.desc()),
            if errno == Errno::EROFS {
                format!("in a container: mount the host's {point} read-write")
            } else {
                RUN_AS_ROOT.to_owned()
            },
        ),
    }];
    let offered = fs::read_to_string(v2.mount_point.join("cgroup.controllers")).unwrap_or_default();
    findings.extend(CONTROLLERS.map(|name| controller(name, &offered, &v2.mount_point, &v1)));
    findings
}

fn controller(name: &'static str, offered: &str, v2: &Path, v1: &[&MountInfo]) -> Finding {
    let check = format!("{name} limits");
    if offered.split_whitespace().any(|word| word == name) {
        return Finding::ok(check, format!("cgroup2 at {}", v2.display()));
    }
    if let Some(mount) = v1.iter().find(|mount| mount.super_options.contains_key(name)) {
        return Finding::ok(check, format!("cgroup v1 at {}", mount.mount_point.display()));
    }
    Finding::warn(
        check,
        "none",
        format!("no hierarchy has the controller {name}: a companion with such a limit is not started"),
        format!(
            "enable the controller (kernel command line: cgroup_enable={name}), or leave `resources.{name}` out"
        ),
    )
}

/// Processes are pidfds, and listening sockets are fetched from companions by `pidfd_getfd` (Linux 5.6): fetches one
/// of our own descriptors from ourselves.
fn pidfd() -> Finding {
    const CHECK: &str = "pidfd";
    let fetched = pidfd_open(getpid(), PidfdFlags::empty()).and_then(|own| {
        let file: PathBuf = "/proc/self/stat".into();
        let target: OwnedFd = rustix::fs::open(file, rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&target);
        pidfd_getfd(&own, number, PidfdGetfdFlags::empty()).map(drop)
    });
    match fetched {
        Ok(()) => Finding::ok(CHECK, "pidfd_open and pidfd_getfd work"),
        Err(errno) => Finding::fail(
            CHECK,
            "pidfd_open or pidfd_getfd does not work",
            errno.to_string(),
            "use Linux 5.6 or later; in a container, allow both in the seccomp profile",
        ),
    }
}
