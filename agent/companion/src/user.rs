//! Users and groups by name or number, as the host's user database knows them.
//!
//! A static program cannot ask that by the C library: glibc would load the host's modules for it, which were made for
//! another C library than the one in the program, and crash. It reads the files.

#[cfg(any(test, target_feature = "crt-static"))]
mod files;
#[cfg(not(target_feature = "crt-static"))]
mod system;

use std::io;

#[cfg(target_feature = "crt-static")]
use files as database;
use pillion_workload::UserSpec;
#[cfg(not(target_feature = "crt-static"))]
use system as database;

use crate::launch::Identity;

/// A user by its name: uid, primary group, all groups.
type Found = (u32, u32, Vec<u32>);

/// Why a companion's user cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// There is no such user or group.
    #[error("there is no {kind} {name:?}")]
    Unknown {
        /// `user` or `group`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The database does not answer.
    #[error("cannot look up the {kind} {name:?}")]
    Lookup {
        /// `user` or `group`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

/// Looks up user and group. May block on the host's user database.
///
/// A name brings its supplementary groups, unless a group is given. A number is taken as it is and brings none.
pub fn resolve_user(spec: &UserSpec) -> Result<Identity, UserError> {
    let (uid, primary, supplementary) = match number(&spec.user) {
        Some(uid) => (uid, uid, vec![uid]),
        None => by_name(&spec.user)?,
    };
    match &spec.group {
        None => Ok(Identity { uid, gid: primary, groups: supplementary }),
        Some(group) => {
            let gid = resolve_group(group)?;
            Ok(Identity { uid, gid, groups: vec![gid] })
        }
    }
}

/// The highest number stands for "leave it as it is" in setresuid(2), which would mean root.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != u32::MAX)
}

fn by_name(name: &str) -> Result<Found, UserError> {
    let failed = |source| UserError::Lookup { kind: "user", name: name.to_owned(), source };
    let unknown = || UserError::Unknown { kind: "user", name: name.to_owned() };
    database::user(name).map_err(failed)?.ok_or_else(unknown)
}

fn resolve_group(name: &str) -> Result<u32, UserError> {
    if let Some(gid) = number(name) {
        return Ok(gid);
    }
    let failed = |source| UserError::Lookup { kind: "group", name: name.to_owned(), source };
    let unknown = || UserError::Unknown { kind: "group", name: name.to_owned() };
    database::group(name).map_err(failed)?.ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_name_and_number() {
        let identity = |uid, gid, groups: &[u32]| Some(Identity { uid, gid, groups: groups.to_vec() });
        let cases = [
            ("root", None, identity(0, 0, &[0])),
            ("12345", None, identity(12345, 12345, &[12345])),
            ("12345", Some("root"), identity(12345, 0, &[0])),
            ("root", Some("77"), identity(0, 77, &[77])),
            ("no-such-user", None, None),
            ("root", Some("no-such-group"), None),
            ("-1", None, None),
            ("4294967296", None, None),
            ("4294967295", None, None),
            ("root", Some("4294967295"), None),
            ("a\0b", None, None),
            ("root", Some("a\0b"), None),
        ];
        for (user, group, want) in cases {
            let spec = UserSpec { user: user.into(), group: group.map(str::to_owned) };
            let got = resolve_user(&spec).ok();
            assert_eq!(
                got.as_ref().map(|i| (i.uid, i.gid)),
                want.as_ref().map(|i| (i.uid, i.gid)),
                "{spec:?}"
            );
            if user != "root" || group.is_some() {
                assert_eq!(got, want, "{spec:?}");
            }
        }
    }
}
