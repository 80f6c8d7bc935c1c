//! The journal: one JSON file for each attachment, and the list of workloads that are held detached.
//!
//! Owns `<state dir>/attachments/` and `<state dir>/held.json`. A file is replaced atomically (written beside it and
//! renamed), so that the agent can be killed at any instant; only what is to outlast a reboot waits for the disk. What is read is not trusted: a file
//! that cannot be used is moved aside to `*.corrupt` and reported, and the rest is used. Never decides what a record means.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use pillion_attachment::{BoxFuture, Ledger, Record};
use pillion_workload::WorkloadId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Of the files' layout. A file with another one is moved aside.
const VERSION: u32 = 1;
/// A record of the largest plan is some ten KiB.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// More workloads than a node can run.
const MAX_RECORDS: usize = 16_384;
/// The list of workloads that are held detached.
const HELD: &str = "held.json";
/// `NAME_MAX` is 255; the rest is for the affixes.
const MAX_STEM_BYTES: usize = 230;

/// The journal of one agent.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    directory: PathBuf,
    held: PathBuf,
    boot: String,
}

/// What an earlier agent left.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// Attachments of this boot.
    pub(crate) records: Vec<Record>,
    /// Workloads that are held detached.
    pub(crate) held: BTreeSet<WorkloadId>,
    /// Attachments from before the machine was booted: only files are left of them.
    pub(crate) outlived: Vec<Record>,
    /// Files that could not be used and were moved aside.
    pub(crate) faults: Vec<JournalFault>,
}

/// A file that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} was moved aside: {reason}", path.display())]
pub(crate) struct JournalFault {
    /// Where it was.
    pub(crate) path: PathBuf,
    /// Why.
    pub(crate) reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<T> {
    version: u32,
    /// `/proc/sys/kernel/random/boot_id` of the boot in which it was written.
    boot: String,
    body: T,
}

impl Journal {
    /// Makes its directory if need be.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Self::open_in_boot(state_dir, boot)
    }

    fn open_in_boot(state_dir: &Path, boot: String) -> io::Result<Self> {
        let directory = state_dir.join("attachments");
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        Ok(Self { directory, held: state_dir.join(HELD), boot })
    }

    /// Reads everything. An error means that the directory itself cannot be read.
    pub(crate) fn load(&self) -> io::Result<Loaded> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {}
                // Left by an agent that was killed while writing: the file beside it is still the earlier one.
                Some("tmp") => {
                    fs::remove_file(&path)?;
                    continue;
                }
                _ => continue,
            }
            if loaded.records.len() >= MAX_RECORDS {
                loaded.faults.push(set_aside(&path, format!("more than {MAX_RECORDS} records")));
                continue;
            }
            match read::<Record>(&path).and_then(|envelope| self.check(&path, envelope)) {
                Ok(Checked::Current(record)) => loaded.records.push(*record),
                Ok(Checked::Outlived(record)) => loaded.outlived.push(*record),
                Err(reason) => loaded.faults.push(set_aside(&path, reason)),
            }
        }
        if self.held.symlink_metadata().is_ok() {
            match read::<BTreeSet<WorkloadId>>(&self.held) {
                Ok(envelope) => loaded.held = envelope.body,
                Err(reason) => loaded.faults.push(set_aside(&self.held, reason)),
            }
        }
        loaded.records.sort_by(|a, b| a.workload.id.cmp(&b.workload.id));
        Ok(loaded)
    }

    fn check(&self, path: &Path, envelope: Envelope<Record>) -> Result<Checked, String> {
        let id = &envelope.body.workload.id;
        if *path != self.path_of(id) {
            return Err(format!("it is the record of {id}, which belongs in another file"));
        }
        if envelope.boot != self.boot {
            // The kernel's part is gone, and its numbers are others' by now.
            let record = Record { guard: None, ..envelope.body };
            return Ok(Checked::Outlived(Box::new(record)));
        }
        Ok(Checked::Current(Box::new(envelope.body)))
    }

    /// Keeps the record, so that a later agent of this boot finds it. Does not wait for the disk: a workload is held
    /// meanwhile, and what a record tells of is gone with the kernel that made it.
    pub(crate) fn write(&self, record: &Record) -> io::Result<()> {
        self.replace(&self.path_of(&record.workload.id), record, Until::Rename)
    }

    /// Forgets a workload. Forgetting an unknown one is not an error.
    pub(crate) fn remove(&self, workload: &WorkloadId) -> io::Result<()> {
        match fs::remove_file(self.path_of(workload)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Ok(()),
        }
    }

    /// Keeps the list of held workloads. Blocks until it is on the disk: it is meant to outlast a reboot.
    pub(crate) fn write_held(&self, held: &BTreeSet<WorkloadId>) -> io::Result<()> {
        self.replace(&self.held, held, Until::Disk)
    }

    fn replace<T: Serialize>(&self, path: &Path, body: &T, until: Until) -> io::Result<()> {
        let envelope = Envelope { version: VERSION, boot: self.boot.clone(), body };
        replace_file(path, &serde_json::to_vec(&envelope)?, until)
    }

    fn path_of(&self, workload: &WorkloadId) -> PathBuf {
        self.directory.join(format!("{}.json", file_stem(workload)))
    }
}

impl Ledger for Journal {
    fn save(&self, record: Record) -> BoxFuture<'_, io::Result<()>> {
        let journal = self.clone();
        Box::pin(async move { blocking(move || journal.write(&record)).await })
    }

    fn erase(&self, workload: &WorkloadId) -> BoxFuture<'_, io::Result<()>> {
        let (journal, workload) = (self.clone(), workload.clone());
        Box::pin(async move { blocking(move || journal.remove(&workload)).await })
    }
}

/// Workloads that are held detached, for those who are not the agent: nothing is made, moved or removed.
pub(crate) fn held_detached(state_dir: &Path) -> Result<BTreeSet<WorkloadId>, String> {
    let path = state_dir.join(HELD);
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        _ => read(&path).map(|envelope| envelope.body),
    }
}

enum Checked {
    Current(Box<Record>),
    Outlived(Box<Record>),
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A name for the workload's file: slashes become `+`, which no id has. An id that is too long for a file name is
/// shortened and told apart by a hash; ids begin with a letter or a digit, so that no name begins with a dot.
fn file_stem(workload: &WorkloadId) -> String {
    let name = workload.as_str().replace('/', "+");
    if name.len() <= MAX_STEM_BYTES {
        return name;
    }
    // FNV-1a, 64 bits: must stay the same in all versions, unlike the standard library's hasher.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{}~{hash:016x}", &name[..MAX_STEM_BYTES - 17])
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Envelope<T>, String> {
    // Neither a link nor a FIFO may make us read, or wait for, something else.
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|e| e.to_string())?;
    let metadata = file.metadata().map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it is larger than {MAX_FILE_BYTES} bytes"));
    }
    let envelope: Envelope<T> =
        serde_json::from_slice(&bytes).map_err(|error| format!("it is not a record: {error}"))?;
    if envelope.version != VERSION {
        return Err(format!("its layout has version {}, and this agent writes {VERSION}", envelope.version));
    }
    Ok(envelope)
}

fn set_aside(path: &Path, reason: String) -> JournalFault {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".corrupt");
    let reason = match fs::rename(path, &aside) {
        Ok(()) => reason,
        Err(error) => format!("{reason}; and it cannot be moved: {error}"),
    };
    JournalFault { path: path.to_owned(), reason }
}

/// How far a write goes before it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// It outlasts every process: enough for what is of no use after a reboot.
    Rename,
    /// It outlasts a loss of power.
    Disk,
}

/// Replaces a file so that a reader, and whoever looks after the writer was killed, sees either the earlier content or
/// the new one.
pub(crate) fn replace_file(path: &Path, bytes: &[u8], until: Until) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    // A leftover may be anything: never write through it.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    if until == Until::Disk {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    match until {
        Until::Disk => sync_directory(directory),
        Until::Rename => Ok(()),
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn record(id: &str) -> Record {
        let workload = serde_json::json!({
            "id": id,
            "subject": { "runtime": "containerd", "name": "web", "labels": { "app": "ä\u{0}\n" } },
            "instance": {
                "cgroup": { "id": 42, "path": "/sys/fs/cgroup/x" },
                "netns": { "device": 4, "inode": 4_026_531_840_u64 },
                "process": { "pid": 7, "started": 9 },
            },
        });
        let plan = serde_json::json!({
            "policy": "p", "companions": [], "redirect": { "outbound": null, "inbound": [] }, "onFailure": "open",
        });
        Record {
            workload: serde_json::from_value(workload).unwrap(),
            plan: serde_json::from_value(plan).unwrap(),
            redirect: None,
            companions: Vec::new(),
            guard: None,
            first_instruction: None,
            reset_due: false,
            gate: None,
        }
    }

    fn journal(directory: &tempfile::TempDir) -> Journal {
        Journal::open_in_boot(directory.path(), "boot-1".into()).unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_what_is_removed_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let journal = journal(&directory);
        let (a, b) = (record("containerd/default/a"), record("containerd/default/b"));
        journal.write(&a).unwrap();
        journal.write(&b).unwrap();
        journal.write(&a).unwrap();
        let held = BTreeSet::from([a.workload.id.clone()]);
        journal.write_held(&held).unwrap();
        let loaded = journal.load().unwrap();
        assert_eq!(held_detached(directory.path()), Ok(held.clone()));
        assert_eq!((loaded.records, loaded.held, loaded.faults), (vec![a.clone(), b.clone()], held, vec![]));
        journal.remove(&a.workload.id).unwrap();
        journal.remove(&a.workload.id).unwrap();
        assert_eq!(journal.load().unwrap().records, [b]);
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_the_earlier_record() {
        let directory = tempfile::tempdir().unwrap();
        let journal = journal(&directory);
        let a = record("process/1-2");
        journal.write(&a).unwrap();
        let temporary = journal.directory.join("process+1-2.json.tmp");
        fs::write(&temporary, b"{\"version\":1,").unwrap();
        let loaded = journal.load().unwrap();
        assert_eq!((loaded.records, loaded.faults), (vec![a.clone()], vec![]));
        assert!(!temporary.exists());
        // Even one that is a link to elsewhere is not written through.
        let elsewhere = directory.path().join("elsewhere");
        fs::write(&elsewhere, "precious").unwrap();
        symlink(&elsewhere, &temporary).unwrap();
        journal.write(&a).unwrap();
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "precious");
        assert_eq!(journal.load().unwrap().records, [a]);
    }

    #[test]
    fn a_reboot_outlives_every_record() {
        let directory = tempfile::tempdir().unwrap();
        let a = record("containerd/default/a");
        let before = journal(&directory);
        before.write(&a).unwrap();
        before.write_held(&BTreeSet::from([a.workload.id.clone()])).unwrap();
        let after = Journal::open_in_boot(directory.path(), "boot-2".into()).unwrap();
        let loaded = after.load().unwrap();
        assert_eq!((loaded.records.len(), loaded.outlived), (0, vec![a.clone()]));
        assert_eq!(loaded.held, BTreeSet::from([a.workload.id]), "a hold is an operator's word: it stays");
        after.write(&record("containerd/default/a")).unwrap();
        assert_eq!(after.load().unwrap().records.len(), 1);
    }

    #[test]
    fn files_that_cannot_be_used_are_moved_aside() {
        let directory = tempfile::tempdir().unwrap();
        let journal = journal(&directory);
        let good = record("process/1-2");
        journal.write(&good).unwrap();
        let text = fs::read_to_string(journal.path_of(&good.workload.id)).unwrap();
        let large = " ".repeat(usize::try_from(MAX_FILE_BYTES).unwrap() + 1);
        for (name, content, why) in [
            ("empty", "", "not a record"),
            ("half", &text[..text.len() / 2], "not a record"),
            ("later", &text.replace("\"version\":1", "\"version\":2"), "version 2"),
            ("unknown", &text.replace("\"boot\"", "\"boots\""), "not a record"),
            ("large", &large, "larger than"),
            ("other-name", &text, "belongs in another file"),
        ] {
            let path = journal.directory.join(format!("{name}.json"));
            fs::write(&path, content).unwrap();
            let loaded = journal.load().unwrap();
            assert_eq!(loaded.records, std::slice::from_ref(&good), "{name}");
            assert_eq!(loaded.faults.len(), 1, "{name}");
            assert!(loaded.faults[0].reason.contains(why), "{name}: {}", loaded.faults[0]);
            assert!(path.with_extension("json.corrupt").exists() && !path.exists(), "{name}");
        }
        symlink("/dev/zero", journal.directory.join("link.json")).unwrap();
        nix::unistd::mkfifo(&journal.directory.join("fifo.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(journal.directory.join("directory.json")).unwrap();
        assert_eq!(journal.load().unwrap().faults.len(), 3);
        assert_eq!(journal.load().unwrap().faults.len(), 0);
    }

    #[test]
    fn long_ids_get_names_of_their_own() {
        let long = |last: char| format!("containerd/default/{}{last}", "x".repeat(233));
        let (a, b): (WorkloadId, WorkloadId) = (long('a').parse().unwrap(), long('b').parse().unwrap());
        assert_ne!(file_stem(&a), file_stem(&b));
        assert!(file_stem(&a).len() <= MAX_STEM_BYTES);
        assert_eq!(file_stem(&"containerd/a.b/..".parse().unwrap()), "containerd+a.b+..");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_are_either_a_record_or_moved_aside(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let directory = tempfile::tempdir().unwrap();
            let journal = journal(&directory);
            fs::write(journal.directory.join("process+1-2.json"), &bytes).unwrap();
            fs::write(&journal.held, &bytes).unwrap();
            let loaded = journal.load().unwrap();
            prop_assert_eq!(loaded.faults.len(), 2);
        }

        #[test]
        fn a_record_with_any_byte_changed_never_panics(at in 0_usize..600, byte: u8) {
            let directory = tempfile::tempdir().unwrap();
            let journal = journal(&directory);
            let record = record("process/1-2");
            journal.write(&record).unwrap();
            let path = journal.path_of(&record.workload.id);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            fs::write(&path, &bytes).unwrap();
            let loaded = journal.load().unwrap();
            prop_assert_eq!(loaded.records.len() + loaded.faults.len() + loaded.outlived.len(), 1);
        }

        #[test]
        fn different_ids_never_share_a_file(a in "[a-z0-9][a-z0-9./_-]{0,252}", b in "[a-z0-9][a-z0-9./_-]{0,252}") {
            prop_assume!(a != b);
            prop_assert_ne!(file_stem(&a.parse().unwrap()), file_stem(&b.parse().unwrap()));
        }
    }
}
