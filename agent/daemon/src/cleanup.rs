//! `pillion cleanup`: removes everything of Pillion and proves it by looking before and after.
//!
//! Goes by what is there, not by the journal, so that it works when that is lost. Order matters: first the pins, after
//! which connections pass as if Pillion were not there; then companions; then what they leave. Never touches policy
//! files, other instances, or anything that Pillion has not made.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{SigSet, Signal},
};
use pillion_redirect::{Bpffs, MOUNT_SOURCE, let_go_left};
use pillion_runtime::{OwnCgroup, SYSTEM_BUS, is_booted_by_systemd, reload_units};
use procfs::process::MountInfo;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde::Serialize;

use crate::{
    cli::CleanupArgs,
    config::Paths,
    hooks,
    inventory::{self, Inventory, Item, Kind, Locks, User, cgroups, files},
    render::{self, Cell, Format, Paint, Table, Tone, View, count, note},
};

/// The kernel frees eBPF objects and killed processes a little later; nothing takes longer in practice than 1 s.
const SETTLE: Duration = Duration::from_secs(10);
/// For connecting to the system bus.
const BUS_LIMIT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    dry_run: bool,
    before: Inventory,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Inventory>,
    /// What should be gone and is not.
    remaining: Vec<Item>,
    /// Of other instances, left alone.
    elsewhere: Vec<Item>,
    /// In our directories, but not of Pillion, left alone.
    strange: Vec<PathBuf>,
}

impl View for Report {
    fn text(&self, wide: bool, paint: Paint) -> String {
        let mut out = String::new();
        match &self.after {
            None => {
                let mut table = Table::new(&["KIND", "NAME", "DETAIL"]);
                for item in &self.before.ours {
                    table.row(row(item, Tone::Plain));
                }
                out.push_str(&table.render(paint));
            }
            Some(after) => {
                let (before, after) = (self.before.counts(), after.counts());
                let mut table = Table::new(&["KIND", "BEFORE", "AFTER"]);
                for kind in Kind::ALL {
                    let tone = if after[&kind] == 0 { Tone::Good } else { Tone::Bad };
                    table.row(vec![kind.into(), before[&kind].into(), Cell::toned(after[&kind], tone)]);
                }
                out.push_str(&table.render(paint));
            }
        }
        let mut more = |title: &str, items: &[Item], tone| {
            if items.is_empty() {
                return;
            }
            let mut table = Table::new(&["KIND", "NAME", "DETAIL"]);
            for item in items {
                table.row(row(item, tone));
            }
            let _ = write!(out, "\n{title}:\n{}", render::indent(&table.render(paint), 2));
        };
        more("Remaining", &self.remaining, Tone::Bad);
        if wide {
            more("Of other instances, left alone", &self.elsewhere, Tone::Plain);
        }
        out
    }

    fn names(&self) -> Vec<String> {
        let items = if self.dry_run { &self.before.ours } else { &self.remaining };
        items.iter().map(|item| format!("{}/{}", item.kind, item.name)).collect()
    }
}

fn row(item: &Item, tone: Tone) -> Vec<Cell> {
    vec![item.kind.into(), Cell::toned(&item.name, tone), Cell::optional(item.detail.as_ref())]
}

/// `pillion cleanup`.
pub(crate) fn main(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("cleanup must see and remove what root made\nrun it as root: sudo pillion cleanup");
    }
    refuse_unsafe_places(&args.paths)?;
    let code = clean(args)?;
    if args.stay && code == ExitCode::SUCCESS {
        wait_for_the_end()?;
    }
    Ok(code)
}

/// Without a lock: nothing keeps an agent from starting any more.
fn wait_for_the_end() -> anyhow::Result<()> {
    let ends = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // As the first process of a container, which no signal ends that it does not ask for. There is one thread.
    ends.thread_block().context("cannot block signals")?;
    note("waiting for SIGTERM");
    ends.wait().context("cannot wait for a signal")?;
    Ok(())
}

fn clean(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    // Held to the end, so that no agent starts meanwhile. The file itself is among what is removed.
    let mut locks = lock(&args.paths)?;
    let before = inventory::take(&args.paths, &BTreeSet::new())?;
    if args.dry_run {
        note(format_args!("{} would be removed", count(before.ours.len(), "thing")));
        return report(args, before, None);
    }
    if before.ours.is_empty() {
        note("nothing to remove");
        return report(args, before.clone(), Some(before));
    }
    if !args.yes && !confirmed(&before)? {
        note("nothing was removed");
        return Ok(ExitCode::FAILURE);
    }
    let problems = remove(&args.paths, &before.workloads, &mut locks);
    for problem in problems {
        note(format_args!("{problem:#}"));
    }
    let after = settled(&args.paths, &before.workloads)?;
    report(args, before, Some(after))
}

fn report(args: &CleanupArgs, before: Inventory, after: Option<Inventory>) -> anyhow::Result<ExitCode> {
    let last = after.as_ref().unwrap_or(&before);
    let report = Report {
        dry_run: args.dry_run,
        remaining: after.as_ref().map(|after| after.ours.clone()).unwrap_or_default(),
        elsewhere: last.elsewhere.clone(),
        strange: last.strange.clone(),
        before,
        after,
    };
    for path in &report.strange {
        note(format_args!("{} is not of Pillion and was left alone", render::plain(&path.to_string_lossy())));
    }
    if !report.elsewhere.is_empty() && args.output.format == Format::Table {
        note(format_args!(
            "{} of other instances were left alone (-o wide lists them)",
            report.elsewhere.len()
        ));
    }
    render::print(&report, args.output.format)?;
    if report.remaining.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    note(format_args!("{} could not be removed", count(report.remaining.len(), "thing")));
    Ok(ExitCode::FAILURE)
}

/// Everything below these directories that has the right name goes: they must not be the system's own.
fn refuse_unsafe_places(paths: &Paths) -> anyhow::Result<()> {
    for (flag, path) in
        [("--run-dir", &paths.run_dir), ("--state-dir", &paths.state_dir), ("--pin-root", &paths.pin_root)]
    {
        if !path.is_absolute() || path.components().any(|part| part == std::path::Component::ParentDir) {
            bail!("{flag} {}: must be an absolute path without ..", path.display());
        }
    }
    let mounts = inventory::mounts()?;
    if let Some(mount) = mounts.iter().find(|mount| mount.mount_point == paths.pin_root) {
        bail!(
            "--pin-root {}: is the {} file system itself, which others use too\nname a directory below it",
            paths.pin_root.display(),
            mount.fs_type
        );
    }
    Ok(())
}

/// Keeps an agent from starting meanwhile; refuses when one runs, or a `pillion run`.
fn lock(paths: &Paths) -> anyhow::Result<Locks> {
    match inventory::user(paths)? {
        User::Nobody(locks) => Ok(locks),
        User::Agent(pid) => {
            let who = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
            bail!(
                "an agent is running{who} and would put back what is removed\n\
                 stop it first: systemctl stop pillion, or: kill the process that holds {} or {}",
                paths.run_dir.join("agent.lock").display(),
                paths.state_dir.display()
            )
        }
        User::Runs(pids) => {
            let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
            bail!(
                "`pillion run` is running (pid {}) and removes its things by itself\nlet it end first, or: kill {}",
                pids.join(", "),
                pids.join(" ")
            )
        }
    }
}

fn confirmed(before: &Inventory) -> anyhow::Result<bool> {
    use std::io::IsTerminal as _;
    if !io::stdin().is_terminal() {
        bail!(
            "stdin is not a terminal, so nobody can be asked\npass --yes to go ahead, or --dry-run to look"
        );
    }
    let things: Vec<String> = before
        .counts()
        .into_iter()
        .filter(|(_, number)| *number > 0)
        .map(|(kind, number)| format!("{kind}: {number}"))
        .collect();
    note(things.join(", "));
    let _ = io::Write::write_all(&mut io::stderr(), b"Remove all of this? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Removes what can be removed, in order; what cannot is told, and the look afterwards shows it.
fn remove(paths: &Paths, workloads: &BTreeSet<String>, locks: &mut Locks) -> Vec<anyhow::Error> {
    let mut problems = Vec::new();
    let mut attempt = |result: anyhow::Result<()>| problems.extend(result.err());
    // Before anything that they would ask for.
    attempt(hooks::clean_up(paths));
    // First of all: a unit with a drop-in could not start once the hook or the file that it reads is gone.
    for problem in remove_drop_ins(paths) {
        attempt(Err(problem));
    }
    // While it is still known what is stopped.
    attempt(let_go_left(&paths.pin_root).map(drop).context("cannot let go what was held at its exec"));
    attempt(remove_tree(&paths.pin_root));
    for own in OwnCgroup::all_of(&paths.state_dir).unwrap_or_default() {
        let place = own.path().display().to_string();
        attempt(own.give_back().with_context(|| format!("cannot move the processes out of {place}")));
    }
    match inventory::mounts() {
        Ok(mounts) => {
            attempt(remove_cgroups(workloads, &mounts));
            // The last mount lies on top.
            for mount in mounts.iter().rev() {
                let point = &mount.mount_point;
                if point.starts_with(&paths.run_dir) || point.starts_with(&paths.state_dir) {
                    attempt(
                        umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                            .with_context(|| format!("cannot unmount {}", point.display())),
                    );
                }
            }
        }
        Err(error) => attempt(Err(error.into())),
    }
    locks.let_go(&paths.pin_root);
    attempt(release_bpffs(paths));
    match files::contents(paths) {
        Ok(directories) => {
            for (directory, contents) in directories {
                contents.ours.iter().for_each(|path| attempt(remove_tree(path)));
                attempt(remove_empty(&directory));
            }
        }
        Err(error) => attempt(Err(error.into())),
    }
    problems
}

/// Has systemd start units without asking anybody.
fn remove_drop_ins(paths: &Paths) -> Vec<anyhow::Error> {
    let (changed, problems) = paths.drop_ins(Path::new("/")).clear();
    let mut problems: Vec<anyhow::Error> = problems.into_iter().map(Into::into).collect();
    if changed && is_booted_by_systemd() {
        let reload = || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime
                .block_on(reload_units(Path::new(SYSTEM_BUS), BUS_LIMIT))
                .context("systemd has not read its units again: systemctl daemon-reload")
        };
        problems.extend(reload().err());
    }
    problems
}

/// Unmounts what Pillion mounted, once nothing is pinned there any more.
fn release_bpffs(paths: &Paths) -> anyhow::Result<()> {
    let ours = inventory::mounts()?.iter().any(|mount| {
        mount.fs_type == "bpf"
            && mount.mount_source.as_deref() == Some(MOUNT_SOURCE)
            && paths.pin_root.starts_with(&mount.mount_point)
    });
    if ours {
        // False when others have pins in it: then it is theirs to remove.
        Bpffs::release()?;
    }
    Ok(())
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A directory that holds something else stays.
fn remove_empty(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Kills what runs in our cgroups and removes them, again and again until none is left or time is up: a process that
/// forks while it is being killed, and v1 hierarchies have nothing like cgroup.kill.
fn remove_cgroups(workloads: &BTreeSet<String>, mounts: &[MountInfo]) -> anyhow::Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let groups = cgroups::of(workloads, mounts)?;
        let mut directories = 0;
        for group in groups {
            for directory in &group.directories {
                // cgroup2 only, Linux 5.14; elsewhere the signals below do it.
                let _ = fs::write(directory.join("cgroup.kill"), "1");
                kill_all_in(directory);
            }
            for directory in &group.directories {
                directories +=
                    usize::from(fs::remove_dir(directory).is_err_and(|error| is_still_there(&error)));
            }
        }
        if directories == 0 {
            // Not empty while another instance has cgroups in it.
            for slice in cgroups::slices(mounts) {
                let _ = fs::remove_dir(slice);
            }
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{} did not become empty within {SETTLE:?}", count(directories, "cgroup"));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn is_still_there(error: &io::Error) -> bool {
    error.kind() != io::ErrorKind::NotFound
}

/// The pidfd is taken before the second look, so that a number that was given to another process meanwhile is spared.
fn kill_all_in(directory: &Path) {
    for pid in cgroups::processes(directory) {
        let Some(handle) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            continue;
        };
        if cgroups::processes(directory).contains(&pid) {
            // Fails only when it is gone already.
            let _ = pidfd_send_signal(&handle, rustix::process::Signal::KILL);
        }
    }
}

/// Looks until nothing is left, or nothing more can be hoped for.
fn settled(paths: &Paths, workloads: &BTreeSet<String>) -> anyhow::Result<Inventory> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let inventory = inventory::take(paths, workloads)?;
        let fleeting = |item: &Item| {
            matches!(item.kind, Kind::Link | Kind::Program | Kind::Map | Kind::Process | Kind::Cgroup)
        };
        if !inventory.ours.iter().any(fleeting) || Instant::now() > deadline {
            return Ok(inventory);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
