//! What the demo shows: numbered chapters, commands as a user would type them, and their real output, indented.
#![expect(clippy::print_stdout, reason = "a command line program")]

use std::{
    env,
    io::{IsTerminal as _, stdout},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::{Finished, ProcessGuard};

/// No command of the demo takes as long.
const DEADLINE: Duration = Duration::from_secs(60);
/// Set when the user wants an end; the next command is not begun, and everything is taken down.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Prints the story.
#[derive(Debug)]
pub(super) struct Screen {
    colours: bool,
    chapter: u32,
    began: Instant,
}

impl Screen {
    /// Colours only for a terminal, and not with `NO_COLOR`.
    pub(super) fn new() -> Self {
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colours: stdout().is_terminal() && !unwanted, chapter: 0, began: Instant::now() }
    }

    /// Opens the next chapter.
    pub(super) fn chapter(&mut self, title: &str) -> Result<()> {
        go_on()?;
        self.chapter += 1;
        println!("\n{}", self.paint("1", &format!("{}. {title}", self.chapter)));
        Ok(())
    }

    /// A command, typed at `place`.
    pub(super) fn typed(&self, place: &str, command: &str) {
        println!("\n   {}", self.paint("36", &format!("{place} # {command}")));
    }

    /// A check that has passed.
    pub(super) fn proven(&self, text: &str) {
        println!("   {} {text}", self.paint("32", "✓"));
    }

    /// Shows `typed`, runs `command` to its end, and shows what it printed. An error unless it ends with `code`.
    pub(super) fn run(&self, place: &str, typed: &str, command: &mut Command, code: i32) -> Result<Finished> {
        go_on()?;
        self.typed(place, typed);
        let done = ProcessGuard::finish(typed, command, DEADLINE)?;
        finished(done, code)
    }

    /// How long it took.
    pub(super) fn took(&self) -> Duration {
        self.began.elapsed()
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\u{1b}[{colour}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Lines of the story; an empty one first is kept.
pub(super) fn say(text: &str) {
    println!("{}", indent(text, "   "));
}

/// What a command printed.
pub(super) fn output(text: &str) {
    if !text.trim().is_empty() {
        println!("{}", indent(text.trim_matches('\n'), "     "));
    }
}

/// Shows the output of a command that [`Screen::typed`] has shown. An error unless it ended with `code`.
pub(super) fn finished(done: Finished, code: i32) -> Result<Finished> {
    output(&done.stdout);
    output(&done.stderr);
    go_on()?;
    done.code(code)
}

/// From now on SIGINT, SIGTERM and SIGHUP end the story at its next step, so that guards take everything down. By
/// handlers and not by a blocked mask, which children would inherit.
pub(super) fn heed_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
        // The handlers stay: a second signal must not cut the taking down short.
    });
    Ok(())
}

/// An error once the user wants an end.
pub(super) fn go_on() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

fn indent(text: &str, margin: &str) -> String {
    let line = |line: &str| if line.is_empty() { String::new() } else { format!("{margin}{line}") };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
