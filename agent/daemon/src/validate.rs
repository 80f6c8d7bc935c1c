//! `pillion validate`: checks policy files without an agent and shows every fault.
//!
//! Owns the reading of files that are named on a command line: whoever names them answers for them, so that nobody asks
//! to whom they belong. What a policy may say is the policy crate's matter.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use pillion_policy::{Fault, Faults, MAX_FILE_BYTES, PolicySet, SourceFile};
use serde::Serialize;

use crate::{
    cli::ValidateArgs,
    render::{self, Format, Paint, Tone, View, count, note},
};

/// Exit code 3.
pub(crate) const INVALID: u8 = 3;

/// More files than any set of policies has.
const MAX_FILES: usize = 10_000;

#[derive(Debug, Serialize)]
struct Report<'a> {
    valid: bool,
    policies: Vec<Summary<'a>>,
    faults: &'a [Fault],
    /// Faults beyond those that are listed.
    omitted: usize,
}

#[derive(Debug, Serialize)]
struct Summary<'a> {
    name: &'a str,
    priority: i32,
    path: &'a Path,
    line: usize,
}

impl View for Report<'_> {
    fn text(&self, _wide: bool, paint: Paint) -> String {
        let ok = paint.tone(Tone::Good, "ok");
        let line = |policy: &Summary<'_>| {
            let path = render::plain(&policy.path.to_string_lossy());
            format!("{ok}: {} (priority {}) {path}:{}\n", policy.name, policy.priority, policy.line)
        };
        self.policies.iter().map(line).collect()
    }

    fn names(&self) -> Vec<String> {
        self.policies.iter().map(|policy| policy.name.to_owned()).collect()
    }
}

/// `pillion validate`.
pub(crate) fn main(args: &ValidateArgs) -> anyhow::Result<ExitCode> {
    let input = read(&args.paths)?;
    match input.parse() {
        Ok(set) => {
            let policies: Vec<Summary<'_>> = set.policies().iter().map(summary).collect();
            if policies.is_empty() {
                note(format_args!("there is no policy in {}", count(input.files.len(), "file")));
            }
            let report = Report { valid: true, policies, faults: &[], omitted: 0 };
            render::print(&report, args.output.format)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(faults) => {
            if matches!(args.output.format, Format::Json | Format::Yaml) {
                let Faults { faults, omitted } = &faults;
                let report = Report { valid: false, policies: Vec::new(), faults, omitted: *omitted };
                render::print(&report, args.output.format)?;
            } else {
                note(&faults);
            }
            Ok(ExitCode::from(INVALID))
        }
    }
}

fn summary(policy: &pillion_policy::Policy) -> Summary<'_> {
    Summary {
        name: policy.name().as_str(),
        priority: policy.priority(),
        path: &policy.place().path,
        line: policy.place().line,
    }
}

/// Reads and parses; faults are printed, and then there is an exit code instead of policies.
pub(crate) fn load(paths: &[PathBuf]) -> anyhow::Result<Result<PolicySet, ExitCode>> {
    Ok(read(paths)?.parse().map_err(|faults| {
        note(&faults);
        ExitCode::from(INVALID)
    }))
}

/// What was read: the parser takes only text, so that a file which is none has its fault already.
#[derive(Debug, Default)]
struct Input {
    files: Vec<SourceFile>,
    faults: Vec<Fault>,
}

impl Input {
    fn parse(&self) -> Result<PolicySet, Faults> {
        match pillion_policy::parse(&self.files) {
            Ok(set) if self.faults.is_empty() => Ok(set),
            result => {
                let Faults { faults, omitted } = result.err().unwrap_or_default();
                Err(Faults { faults: self.faults.iter().cloned().chain(faults).collect(), omitted })
            }
        }
    }

    fn add(&mut self, path: PathBuf, reader: impl io::Read) -> anyhow::Result<()> {
        match bytes_of(reader, &path).map(decode)? {
            Ok(text) => self.files.push(SourceFile { path, text }),
            Err(line) => self.faults.push(Fault {
                path,
                line,
                column: 1,
                message: "not UTF-8".to_owned(),
                cure: "save the file in that encoding".to_owned(),
                snippet: String::new(),
                note: None,
            }),
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.files.len() + self.faults.len()
    }
}

/// The named files, the policy files in named directories (not in directories below them), and stdin for `-`.
fn read(paths: &[PathBuf]) -> anyhow::Result<Input> {
    let mut input = Input::default();
    let mut stdin_was_read = false;
    for path in paths {
        if path.as_os_str() == "-" {
            if std::mem::replace(&mut stdin_was_read, true) {
                bail!("- (stdin) can be read only once");
            }
            input.add("<stdin>".into(), io::stdin().lock())?;
        } else if path.is_dir() {
            let found = policy_files_in(path)?;
            if found.is_empty() {
                note(format_args!("there is no *.yaml or *.yml in {}", path.display()));
            }
            for path in found {
                read_file(&mut input, path)?;
            }
        } else {
            read_file(&mut input, path.clone())?;
        }
        if input.len() > MAX_FILES {
            bail!("more than {MAX_FILES} files");
        }
    }
    Ok(input)
}

fn policy_files_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let failed = || format!("cannot read the directory {}", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if crate::policy_files::is_policy_file(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_file(input: &mut Input, path: PathBuf) -> anyhow::Result<()> {
    let file = fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    input.add(path, file)
}

/// The text of a file or pipe, up to a little more than a policy file may have: the parser says that it is too much.
pub(crate) fn text_of(reader: impl io::Read, path: &Path) -> anyhow::Result<String> {
    decode(bytes_of(reader, path)?).map_err(|line| {
        anyhow::anyhow!("{}:{line}: not UTF-8: save the file in that encoding", path.display())
    })
}

fn bytes_of(reader: impl io::Read, path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader
        .take(MAX_FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}

/// The text, or the line where it is not UTF-8.
fn decode(bytes: Vec<u8>) -> Result<String, usize> {
    if bytes.len() > MAX_FILE_BYTES {
        // Cut within a character, the error would be about that.
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        error.as_bytes()[..at].split(|&byte| byte == b'\n').count()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_encoding_is_told_with_its_line() {
        let error = text_of(&b"a: b\nc: \xff\n"[..], Path::new("p.yaml")).unwrap_err();
        assert_eq!(error.to_string(), "p.yaml:2: not UTF-8: save the file in that encoding");
    }

    #[test]
    fn bad_encoding_does_not_hide_the_faults_of_other_files() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.yaml"), b"spec: \xff\n").unwrap();
        fs::write(directory.path().join("b.yaml"), "spec: 1\n").unwrap();
        let faults = read(&[directory.path().to_owned()]).unwrap().parse().unwrap_err();
        let names: Vec<_> =
            faults.iter().map(|fault| fault.path.file_name().unwrap().to_string_lossy()).collect();
        assert_eq!(names, ["a.yaml", "b.yaml"]);
        assert_eq!((faults.faults[0].line, faults.faults[0].message.as_str()), (1, "not UTF-8"));
    }

    #[test]
    fn directories_give_their_policy_files_in_order() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", ".hidden.yaml", "notes.txt"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        fs::create_dir(directory.path().join("below")).unwrap();
        fs::write(directory.path().join("below/c.yaml"), "").unwrap();
        let found = read(&[directory.path().to_owned()]).unwrap();
        let names: Vec<_> =
            found.files.iter().map(|file| file.path.file_name().unwrap().to_string_lossy()).collect();
        assert_eq!(names, ["a.yml", "b.yaml"]);
        assert!(read(&[directory.path().join("absent.yaml")]).is_err());
    }
}
