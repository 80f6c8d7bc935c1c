//! Which runtime a wrapper stands for.
//!
//! Owns the search. The wrapper's name decides: `pillion-runc`, a link to `pillion-hook`, stands for the `runc` in PATH. A file
//! `/etc/pillion/runtimes.d/<name>.json`, named like the link, says otherwise, and makes any other name a wrapper, too:
//!
//! ```json
//! { "runtime": "/usr/sbin/runc", "runDir": "/run/pillion", "stateDir": "/var/lib/pillion" }
//! ```
//!
//! `runtime` is an absolute path; the directories are the agent's and may be left out.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::places::Places;

/// Where the configuration of wrappers is.
const DIRECTORY: &str = "/etc/pillion/runtimes.d";
/// In front of the real runtime's name.
const PREFIX: &[u8] = b"pillion-";
/// Where runtimes are when PATH says nothing.
const USUAL: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longer files are something else.
const LIMIT: u64 = 64 << 10;

/// A real runtime, and the agent that watches over it.
#[derive(Debug)]
pub(crate) struct Real {
    /// Its program.
    pub(crate) program: PathBuf,
    /// Where the agent is.
    pub(crate) places: Places,
}

/// Why the real runtime cannot be told.
#[derive(Debug)]
pub(crate) enum RealError {
    /// Nothing says what this name stands for.
    Unknown { name: OsString },
    /// The configuration cannot be used.
    Config { path: PathBuf, why: String },
    /// There is none in PATH.
    NotFound { runtime: OsString, path: OsString, config: PathBuf },
    /// It is this very program, which would call itself for ever.
    Itself { program: PathBuf },
}

impl fmt::Display for RealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { name } => write!(
                f,
                "pillion-hook is called as {0}, and nothing says which runtime that stands for; name the link pillion-RUNTIME, or \
                 write {DIRECTORY}/{0}.json",
                crate::shown(name)
            ),
            Self::Config { path, why } => write!(f, "cannot use {}: {why}", path.display()),
            Self::NotFound { runtime, path, config } => write!(
                f,
                "there is no {} in {}; name it in {}",
                crate::shown(runtime),
                crate::shown(path),
                config.display()
            ),
            Self::Itself { program } => {
                write!(f, "{} is pillion-hook itself and not a runtime", program.display())
            }
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Config {
    runtime: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
}

impl Real {
    /// The runtime for which a program of this name stands.
    pub(crate) fn behind(name: &OsStr) -> Result<Self, RealError> {
        let path = env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| USUAL.into());
        Self::find(name, Path::new(DIRECTORY), &path, Path::new("/proc/self/exe"))
    }

    fn find(name: &OsStr, directory: &Path, path: &OsStr, own: &Path) -> Result<Self, RealError> {
        let mut file = name.to_owned();
        file.push(".json");
        let file = directory.join(file);
        let config = read(&file).map_err(|why| RealError::Config { path: file.clone(), why })?;
        let (named, places) = match config {
            Some(config) => (config.runtime, Places::new(config.run_dir, config.state_dir)),
            None => (None, Places::new(None, None)),
        };
        let own = fs::metadata(own).ok().map(|own| (own.dev(), own.ino()));
        let is_own = |program: &Path| {
            own.is_some() && fs::metadata(program).ok().map(|found| (found.dev(), found.ino())) == own
        };
        let program = match named {
            Some(program) if !program.is_absolute() => {
                let why = "`runtime` must be an absolute path".to_owned();
                return Err(RealError::Config { path: file, why });
            }
            Some(program) if is_own(&program) => return Err(RealError::Itself { program }),
            Some(program) => program,
            None => {
                let Some(runtime) = name.as_bytes().strip_prefix(PREFIX).filter(|rest| !rest.is_empty())
                else {
                    return Err(RealError::Unknown { name: name.to_owned() });
                };
                let runtime = OsStr::from_bytes(runtime);
                let mut found = env::split_paths(path).map(|directory| directory.join(runtime));
                let found =
                    found.find(|program| program.is_absolute() && is_executable(program) && !is_own(program));
                found.ok_or_else(|| RealError::NotFound {
                    runtime: runtime.to_owned(),
                    path: path.to_owned(),
                    config: file,
                })?
            }
        };
        Ok(Self { program, places })
    }

    /// Where it keeps its containers unless it is told otherwise.
    pub(crate) fn default_root(&self) -> PathBuf {
        Path::new("/run").join(self.program.file_name().unwrap_or_default())
    }
}

fn is_executable(program: &Path) -> bool {
    fs::metadata(program).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn read(path: &Path) -> Result<Option<Config>, String> {
    use io::Read as _;
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut text = Vec::new();
    file.take(LIMIT).read_to_end(&mut text).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn program(&self, path: &str) -> PathBuf {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        }

        fn find(&self, name: &str) -> Result<Real, RealError> {
            let path = format!("relative:{0}/a:{0}/b", self.0.path().display());
            Real::find(
                name.as_ref(),
                &self.0.path().join("etc"),
                path.as_ref(),
                &self.0.path().join("a/hook"),
            )
        }
    }

    #[test]
    fn the_runtime_in_path_that_is_not_this_program() {
        let machine = Machine(tempfile::tempdir().unwrap());
        let own = machine.program("a/hook");
        assert!(matches!(machine.find("pillion-runc"), Err(RealError::NotFound { .. })));
        let runc = machine.program("b/runc");
        let found = machine.find("pillion-runc").unwrap();
        assert_eq!(found.program, runc);
        assert_eq!(found.default_root(), PathBuf::from("/run/runc"));
        // Somebody put this program in the real one's place, first in PATH.
        fs::hard_link(&own, machine.0.path().join("a/runc")).unwrap();
        assert_eq!(machine.find("pillion-runc").unwrap().program, runc);
        for unknown in ["runc", "pillion-", "hook"] {
            assert!(matches!(machine.find(unknown), Err(RealError::Unknown { .. })), "{unknown}");
        }
    }

    #[test]
    fn a_file_says_otherwise() {
        let machine = Machine(tempfile::tempdir().unwrap());
        let own = machine.program("a/hook");
        machine.program("b/runc");
        fs::create_dir(machine.0.path().join("etc")).unwrap();
        let with = |name: &str, text: &str| {
            fs::write(machine.0.path().join("etc").join(format!("{name}.json")), text).unwrap();
            machine.find(name)
        };
        let real =
            with("pillion-runc", r#"{"runtime":"/opt/runc-1.3","runDir":"/r","stateDir":"/s"}"#).unwrap();
        assert_eq!(real.program, PathBuf::from("/opt/runc-1.3"));
        assert_eq!(real.places, Places { run: "/r".into(), state: "/s".into() });
        let real = with("pillion-runc", r#"{"runDir":"/r"}"#).unwrap();
        assert_eq!(real.program, machine.0.path().join("b/runc"));
        assert_eq!(with("runc", r#"{"runtime":"/opt/runc"}"#).unwrap().program, PathBuf::from("/opt/runc"));
        for bad in ["", "{}}", r#"{"runtime":"runc"}"#, r#"{"other":1}"#, r#"{"runtime":7}"#] {
            let error = with("pillion-runc", bad).unwrap_err();
            assert!(matches!(error, RealError::Config { .. }), "{bad}: {error}");
            assert!(error.to_string().contains("etc/pillion-runc.json"), "{error}");
        }
        let itself = format!(r#"{{"runtime":"{}"}}"#, own.display());
        assert!(matches!(with("pillion-runc", &itself), Err(RealError::Itself { .. })));
    }
}
