//! Companions' output: written by them to files, followed by the agent, handed on line by line.
//!
//! Files rather than pipes, because companions outlive the agent and must not get SIGPIPE meanwhile. What was handed on
//! is remembered in a file beside each log, so that nothing is lost or told twice when the agent restarts. The space
//! of what was handed on is given back by punching holes: a truncation could lose what is being appended.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    time::Duration,
};

use inotify::{Inotify, WatchDescriptor, WatchMask};
use pillion_workload::{CompanionName, WorkloadId};
use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{launch::Identity, watch};

/// Longer lines are handed on in pieces of this many bytes.
const LONGEST_LINE: usize = 16 * 1024;
/// Bytes that are read at once.
const CHUNK: usize = 64 * 1024;
/// Space is given back in steps of this many bytes.
const GIVE_BACK: u64 = 4 << 20;
/// A companion that writes faster than its output is taken loses what is beyond this many bytes.
const MOST_BEHIND: u64 = 64 << 20;
/// How long one file waits for the reader of the lines before the others get their turn.
const PATIENCE: Duration = Duration::from_millis(200);
/// The last lines of a companion that has ended have this long.
const FINISH: Duration = Duration::from_secs(2);

/// Which of a companion's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    #[serde(rename = "stdout")]
    Output,
    /// Standard error.
    #[serde(rename = "stderr")]
    Errors,
}

impl Stream {
    const ALL: [Self; 2] = [Self::Output, Self::Errors];

    /// `stdout` or `stderr`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Output => "stdout",
            Self::Errors => "stderr",
        }
    }
}

/// A line of a companion's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Whose companion.
    pub workload: WorkloadId,
    /// Which companion.
    pub companion: CompanionName,
    /// Where it was written.
    pub stream: Stream,
    /// Without its end; at most 16 KiB of what was written. What is not UTF-8 is replaced.
    pub line: String,
}

/// Opens the file that a companion writes to. It belongs to the companion's user: programs open `/dev/stdout` anew.
pub(crate) fn open_for_companion(
    directory: &Path,
    stream: Stream,
    identity: &Identity,
) -> io::Result<std::os::fd::OwnedFd> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(directory.join(stream.as_str()))?;
    fchown(&file, Some(identity.uid), Some(identity.gid))?;
    Ok(file.into())
}

/// The task that follows all companions' output; one inotify instance for all, as their number is limited per user.
#[derive(Debug)]
pub(crate) struct LogHub {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
enum Command {
    Follow {
        workload: WorkloadId,
        companion: CompanionName,
        directory: PathBuf,
        done: oneshot::Sender<io::Result<()>>,
    },
    Finish {
        directory: PathBuf,
        done: oneshot::Sender<()>,
    },
}

impl LogHub {
    /// Must be called within a tokio runtime.
    pub(crate) fn spawn(sink: mpsc::Sender<LogLine>) -> io::Result<Self> {
        let inotify = watch::readable(Inotify::init()?)?;
        let (commands, receiver) = mpsc::channel(16);
        let follower = Follower { inotify, sink, files: BTreeMap::new(), changed: BTreeSet::new() };
        tokio::spawn(follower.run(receiver));
        Ok(Self { commands })
    }

    /// Hands on what is written to the files in `directory`, from where it was left.
    pub(crate) async fn follow(
        &self,
        workload: &WorkloadId,
        companion: &CompanionName,
        directory: &Path,
    ) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        let lost = || io::Error::other("the task that follows companions' output has ended");
        let (workload, companion, directory) = (workload.clone(), companion.clone(), directory.to_owned());
        let command = Command::Follow { workload, companion, directory, done };
        self.commands.send(command).await.map_err(|_| lost())?;
        answer.await.map_err(|_| lost())?
    }

    /// Hands on what is left and forgets the files. Bounded in time; when nobody reads, the rest is lost.
    pub(crate) async fn finish(&self, directory: &Path) {
        let (done, answer) = oneshot::channel();
        let work = async {
            if self.commands.send(Command::Finish { directory: directory.to_owned(), done }).await.is_ok() {
                let _ = answer.await;
            }
        };
        let _ = timeout(FINISH * 2, work).await;
    }

    /// Like [`Self::finish`] for a caller that cannot wait.
    pub(crate) fn finish_later(&self, directory: &Path) {
        let (done, _) = oneshot::channel();
        let _ = self.commands.try_send(Command::Finish { directory: directory.to_owned(), done });
    }
}

struct Follower {
    inotify: AsyncFd<Inotify>,
    sink: mpsc::Sender<LogLine>,
    files: BTreeMap<PathBuf, Followed>,
    changed: BTreeSet<PathBuf>,
}

struct Followed {
    workload: WorkloadId,
    companion: CompanionName,
    stream: Stream,
    file: File,
    mark: File,
    /// Everything before it was handed on.
    offset: u64,
    /// Everything before it was given back.
    given_back: u64,
    watch: WatchDescriptor,
}

enum Progress {
    /// Nothing is left to hand on.
    Idle,
    /// More is there already.
    More,
    /// The reader of the lines is slow.
    Stalled,
}

impl Follower {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut buffer = vec![0; 4096];
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                ready = self.inotify.readable_mut() => {
                    let Ok(mut ready) = ready else { return };
                    let events = ready.try_io(|inotify| {
                        let events = inotify.get_mut().read_events(&mut buffer)?;
                        Ok(events.map(|event| event.wd).collect::<BTreeSet<_>>())
                    });
                    if let Ok(Ok(watches)) = events {
                        let paths = self.files.iter().filter(|(_, file)| watches.contains(&file.watch));
                        self.changed.extend(paths.map(|(path, _)| path.clone()));
                    }
                }
                () = std::future::ready(()), if !self.changed.is_empty() => self.hand_on().await,
            }
        }
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Follow { workload, companion, directory, done } => {
                let outcome = Stream::ALL
                    .into_iter()
                    .try_for_each(|stream| self.follow(&workload, &companion, &directory, stream));
                let _ = done.send(outcome);
            }
            Command::Finish { directory, done } => {
                let paths: Vec<_> =
                    Stream::ALL.iter().map(|stream| directory.join(stream.as_str())).collect();
                let _ = timeout(FINISH, async {
                    for path in &paths {
                        while let Some(file) = self.files.get_mut(path) {
                            match file.advance(&self.sink, true).await {
                                Progress::Idle => break,
                                Progress::More | Progress::Stalled => {}
                            }
                        }
                    }
                })
                .await;
                for path in &paths {
                    self.changed.remove(path);
                    if let Some(file) = self.files.remove(path) {
                        // Gone by itself when the file was removed before.
                        let _ = self.inotify.get_ref().watches().remove(file.watch);
                    }
                }
                let _ = done.send(());
            }
        }
    }

    fn follow(
        &mut self,
        workload: &WorkloadId,
        companion: &CompanionName,
        directory: &Path,
        stream: Stream,
    ) -> io::Result<()> {
        let path = directory.join(stream.as_str());
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path)?;
        let mark = options.open(directory.join(format!("{}.offset", stream.as_str())))?;
        let offset = read_mark(&mark).min(file.metadata()?.len());
        let watch = self.inotify.get_ref().watches().add(&path, WatchMask::MODIFY)?;
        let (workload, companion) = (workload.clone(), companion.clone());
        let followed = Followed { workload, companion, stream, file, mark, offset, given_back: 0, watch };
        self.files.insert(path.clone(), followed);
        self.changed.insert(path);
        Ok(())
    }

    /// One turn for each file in which something is new.
    async fn hand_on(&mut self) {
        for path in std::mem::take(&mut self.changed) {
            let Some(file) = self.files.get_mut(&path) else { continue };
            match file.advance(&self.sink, false).await {
                Progress::Idle => {}
                Progress::More | Progress::Stalled => {
                    self.changed.insert(path);
                }
            }
        }
    }
}

impl Followed {
    /// Hands on at most a chunk. An unfinished line waits for its end, unless it is the `last`.
    async fn advance(&mut self, sink: &mpsc::Sender<LogLine>, last: bool) -> Progress {
        let Ok(length) = self.file.metadata().map(|metadata| metadata.len()) else { return Progress::Idle };
        if length < self.offset {
            // The companion has truncated its own output.
            (self.offset, self.given_back) = (0, 0);
        }
        if length - self.offset > MOST_BEHIND {
            let dropped = length - self.offset;
            self.offset = length;
            let notice = format!("pillion: {dropped} bytes of output were dropped, as they came too fast");
            let _ = self.send(sink, notice).await;
        }
        let mut chunk = vec![0; CHUNK];
        let Ok(read) = self.file.read_at(&mut chunk, self.offset) else { return Progress::Idle };
        let mut rest = &chunk[..read];
        let mut stalled = false;
        while let Some((line, used)) = next_line(rest, last) {
            if !self.send(sink, String::from_utf8_lossy(line).into_owned()).await {
                stalled = true;
                break;
            }
            self.offset += u64::try_from(used).expect("a chunk's length");
            rest = &rest[used..];
        }
        // A plain write, not synced: it must survive the agent, not the machine, which takes the companions along.
        let _ = self.mark.write_all_at(format!("{:020}", self.offset).as_bytes(), 0);
        self.give_back(length);
        match (stalled, read == CHUNK) {
            (true, _) => Progress::Stalled,
            (false, true) => Progress::More,
            (false, false) => Progress::Idle,
        }
    }

    async fn send(&self, sink: &mpsc::Sender<LogLine>, line: String) -> bool {
        let (workload, companion, stream) = (self.workload.clone(), self.companion.clone(), self.stream);
        match timeout(PATIENCE, sink.reserve()).await {
            Ok(Ok(permit)) => {
                permit.send(LogLine { workload, companion, stream, line });
                true
            }
            // Nobody will ever read it.
            Ok(Err(_)) => true,
            Err(_) => false,
        }
    }

    fn give_back(&mut self, length: u64) {
        if self.offset - self.given_back < GIVE_BACK {
            return;
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, hole, 0, self.offset).is_ok() {
            self.given_back = self.offset;
        } else if self.offset == length && self.file.set_len(0).is_ok() {
            // A file system without holes: what was appended since the last look is the price.
            (self.offset, self.given_back) = (0, 0);
        }
    }
}

/// The first line and how many bytes it takes with its end; `None` when it is not finished.
fn next_line(text: &[u8], last: bool) -> Option<(&[u8], usize)> {
    let within = &text[..text.len().min(LONGEST_LINE + 1)];
    if let Some(end) = within.iter().position(|byte| *byte == b'\n') {
        let line = &text[..end];
        return Some((line.strip_suffix(b"\r").unwrap_or(line), end + 1));
    }
    if text.len() > LONGEST_LINE {
        return Some((&text[..LONGEST_LINE], LONGEST_LINE));
    }
    (last && !text.is_empty()).then_some((text, text.len()))
}

fn read_mark(mark: &File) -> u64 {
    let mut text = [0; 20];
    let read = mark.read_at(&mut text, 0).unwrap_or(0);
    std::str::from_utf8(&text[..read]).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::MetadataExt};

    use super::*;

    fn test_directory(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("pillion-logs-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("temporary directory");
        directory
    }

    fn append(directory: &Path, stream: Stream, text: impl AsRef<[u8]>) {
        let identity = Identity {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: Vec::new(),
        };
        let mut file = File::from(open_for_companion(directory, stream, &identity).expect("open"));
        file.write_all(text.as_ref()).expect("written");
    }

    async fn hub(directory: &Path, capacity: usize) -> (LogHub, mpsc::Receiver<LogLine>) {
        let (sink, lines) = mpsc::channel(capacity);
        let hub = LogHub::spawn(sink).expect("inotify");
        let (workload, companion) = ("a/b".parse().expect("valid"), "c".parse().expect("valid"));
        hub.follow(&workload, &companion, directory).await.expect("followed");
        (hub, lines)
    }

    async fn next(lines: &mut mpsc::Receiver<LogLine>) -> (Stream, String) {
        let line = timeout(Duration::from_secs(10), lines.recv()).await.expect("in time").expect("a line");
        (line.stream, line.line)
    }

    #[test]
    fn lines_are_cut_at_their_ends_and_at_their_bound() {
        let long = "x".repeat(LONGEST_LINE);
        let longer = format!("{long}y\n");
        let exact = format!("{long}\n");
        for (text, last, want) in [
            ("", true, None),
            ("a", false, None),
            ("a", true, Some(("a", 1))),
            ("a\nb", false, Some(("a", 2))),
            ("a\r\n", false, Some(("a", 3))),
            ("\n", false, Some(("", 1))),
            (exact.as_str(), false, Some((long.as_str(), LONGEST_LINE + 1))),
            (longer.as_str(), false, Some((long.as_str(), LONGEST_LINE))),
        ] {
            let want = want.map(|(line, used)| (line.as_bytes(), used));
            assert_eq!(next_line(text.as_bytes(), last), want, "{:?}", &text[..text.len().min(9)]);
        }
    }

    #[tokio::test]
    async fn output_is_handed_on_once_over_restarts_of_the_agent() {
        let directory = test_directory("restart");
        append(&directory, Stream::Output, "one\ntwo\nunfin");
        let (first, mut lines) = hub(&directory, 16).await;
        assert_eq!(next(&mut lines).await, (Stream::Output, "one".into()));
        assert_eq!(next(&mut lines).await, (Stream::Output, "two".into()));
        append(&directory, Stream::Errors, b"\xff!\n");
        assert_eq!(next(&mut lines).await, (Stream::Errors, "\u{fffd}!".into()));
        drop((first, lines));
        append(&directory, Stream::Output, "ished\nthree");
        let (second, mut lines) = hub(&directory, 16).await;
        assert_eq!(next(&mut lines).await, (Stream::Output, "unfinished".into()));
        second.finish(&directory).await;
        assert_eq!(next(&mut lines).await, (Stream::Output, "three".into()));
        fs::remove_dir_all(&directory).expect("removed");
    }

    #[tokio::test]
    async fn a_flood_is_handed_on_without_loss_and_its_space_is_given_back() {
        const LINES: usize = 200_000;
        let directory = test_directory("flood");
        let (hub, mut lines) = hub(&directory, 64).await;
        let writer = {
            let directory = directory.clone();
            tokio::task::spawn_blocking(move || {
                for block in 0..LINES / 1000 {
                    let text: Vec<_> = (0..1000).map(|i| format!("{:060}\n", block * 1000 + i)).collect();
                    append(&directory, Stream::Output, text.concat());
                }
            })
        };
        for number in 0..LINES {
            assert_eq!(next(&mut lines).await.1, format!("{number:060}"));
        }
        writer.await.expect("written");
        hub.finish(&directory).await;
        let metadata = fs::metadata(directory.join("stdout")).expect("there");
        assert!(metadata.blocks() * 512 <= 2 * GIVE_BACK, "{} blocks", metadata.blocks());
        fs::remove_dir_all(&directory).expect("removed");
    }

    #[tokio::test]
    async fn a_reader_that_is_slow_loses_nothing_and_blocks_no_finish() {
        let directory = test_directory("slow");
        let (hub, mut lines) = hub(&directory, 1).await;
        append(&directory, Stream::Output, "1\n2\n3\n");
        timeout(FINISH * 3, hub.finish(&directory)).await.expect("bounded");
        assert_eq!(next(&mut lines).await.1, "1");
        // The rest was not taken in time; the mark says so.
        assert_eq!(fs::read_to_string(directory.join("stdout.offset")).expect("there"), format!("{:020}", 2));
        fs::remove_dir_all(&directory).expect("removed");
    }

    #[tokio::test]
    async fn a_companion_may_truncate_its_own_output() {
        let directory = test_directory("truncate");
        append(&directory, Stream::Output, "a long first line\n");
        let (_hub, mut lines) = hub(&directory, 16).await;
        assert_eq!(next(&mut lines).await.1, "a long first line");
        fs::write(directory.join("stdout"), "x\n").expect("written");
        assert_eq!(next(&mut lines).await.1, "x");
        fs::remove_dir_all(&directory).expect("removed");
    }
}
