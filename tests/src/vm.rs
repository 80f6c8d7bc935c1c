//! A virtual machine with another kernel: what is brought into it, and what it printed.
//!
//! Owns one boot. What is done there a script in `tests/vm` says; this judges nothing.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Machine, ProcessGuard, first, lab, programs};

/// Where the server is, see `tests/vm/lib.sh`.
pub const SERVER: &str = "10.77.0.2:8080";
/// Of the time limit, for what the script that runs the machine has to do after it.
const AFTER: Duration = Duration::from_secs(10);
const STRIP_LIMIT: Duration = Duration::from_secs(60);

/// The kernels that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// 5.10, of Debian 11: the oldest that is supported.
    Oldest,
    /// 6.1, of Debian 12.
    Debian12,
}

impl Kernel {
    /// As its release begins.
    pub fn version(self) -> &'static str {
        match self {
            Self::Oldest => "5.10",
            Self::Debian12 => "6.1",
        }
    }
}

/// What it printed, by section.
#[derive(Debug)]
pub struct Guest {
    sections: BTreeMap<String, Section>,
    /// All of it.
    pub printed: String,
}

/// What one command printed.
#[derive(Debug)]
pub struct Section {
    /// Its exit code.
    pub code: i32,
    /// Its stdout and stderr.
    pub text: String,
}

impl Guest {
    /// Boots a machine and has it run `tests/vm/SCRIPT`, with Pillion's programs, the program whose first instruction connects to
    /// [`SERVER`], its image, and `files`; an error unless it is done within `limit`.
    pub fn run(
        machine: &Machine,
        kernel: Kernel,
        script: &str,
        files: Vec<PathBuf>,
        limit: Duration,
    ) -> Result<Self> {
        let (directory, scripts) = (machine.directory(), programs::checkout().join("tests/vm"));
        let program = first::build(directory, "first", SERVER.parse()?)?;
        let image = directory.join("first.tar");
        fs::copy(lab::image("first:1", &program)?, &image)?;
        let mut command = Command::new(programs::checkout().join("tests/lab/vm.sh"));
        command.arg("run").arg(scripts.join(script)).arg(scripts.join("lib.sh"));
        command.arg(strip(&programs::pillion()?, directory)?).arg(strip(&programs::hook()?, directory)?);
        command.args([program, image]).args(files);
        command.env("LAB", lab::DIRECTORY).env("VM_KERNEL", kernel.version());
        command.env("VM_TIMEOUT", limit.saturating_sub(AFTER).as_secs().to_string());
        Self::parse(ProcessGuard::finish("the virtual machine", &mut command, limit)?.success()?.stdout)
    }

    fn parse(printed: String) -> Result<Self> {
        let mut sections = BTreeMap::new();
        let mut text = String::new();
        for line in printed.lines() {
            let Some(mark) = line.trim_end().strip_prefix("== ") else {
                text.push_str(line);
                text.push('\n');
                continue;
            };
            if let Some((name, code)) = mark.strip_prefix("end ").and_then(|end| end.split_once(' ')) {
                let code = code.parse().with_context(|| format!("the exit code of {mark}"))?;
                sections.insert(name.to_owned(), Section { code, text: std::mem::take(&mut text) });
            } else {
                text.clear();
            }
        }
        Ok(Self { sections, printed })
    }

    /// What a command printed, however it ended.
    pub fn section(&self, name: &str) -> Result<&Section> {
        self.sections.get(name).with_context(|| format!("the guest did not come to {name}"))
    }

    /// What a command printed that ended with `code`.
    pub fn with_code(&self, name: &str, code: i32) -> Result<&str> {
        let section = self.section(name)?;
        ensure!(section.code == code, "{name} ended with {}, not {code}: {}", section.code, section.text);
        Ok(&section.text)
    }

    /// What a command printed that ended well.
    pub fn ok(&self, name: &str) -> Result<&str> {
        self.with_code(name, 0)
    }

    /// The JSON that a command printed that ended well.
    pub fn json(&self, name: &str) -> Result<Value> {
        let text = self.ok(name)?;
        // What went to stderr comes before.
        let from = text.find('{').with_context(|| format!("no JSON in {name}: {text}"))?;
        serde_json::Deserializer::from_str(&text[from..])
            .into_iter()
            .next()
            .with_context(|| format!("no JSON in {name}"))?
            .with_context(|| format!("{name}: {text}"))
    }
}

/// The relay's records among other lines: bare, as `pillion run` prints them, or within a line of the agent's log.
pub fn records(text: &str) -> Vec<Value> {
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok();
    text.lines()
        .filter_map(|line| {
            let line = parse(line.trim_end())?;
            let within = line["message"].as_str().and_then(parse);
            within.or(Some(line)).filter(|record| record["outcome"].is_string())
        })
        .collect()
}

/// Without what only a debugger reads, which would be copied into the guest.
fn strip(program: &Path, directory: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let stripped = directory.join(name);
    let mut command = Command::new("strip");
    command.arg("-o").arg(&stripped).arg(program);
    ProcessGuard::finish("strip", &mut command, STRIP_LIMIT)?.success()?;
    Ok(stripped)
}
