//! Users and groups by name or number, as the host's user database knows them.

use std::{ffi::CString, io};

use nix::unistd::{Gid, Group, User, getgrouplist};
use pillion_workload::UserSpec;

use crate::launch::Identity;

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

fn by_name(name: &str) -> Result<(u32, u32, Vec<u32>), UserError> {
    let unknown = || UserError::Unknown { kind: "user", name: name.to_owned() };
    let failed =
        |error: nix::Error| UserError::Lookup { kind: "user", name: name.to_owned(), source: error.into() };
    let terminated = CString::new(name).map_err(|_| unknown())?;
    let user = User::from_name(name).map_err(failed)?.ok_or_else(unknown)?;
    let groups = getgrouplist(&terminated, user.gid).map_err(failed)?;
    Ok((user.uid.as_raw(), user.gid.as_raw(), groups.into_iter().map(Gid::as_raw).collect()))
}

fn resolve_group(name: &str) -> Result<u32, UserError> {
    if let Some(gid) = number(name) {
        return Ok(gid);
    }
    let unknown = || UserError::Unknown { kind: "group", name: name.to_owned() };
    if name.contains('\0') {
        return Err(unknown());
    }
    match Group::from_name(name) {
        Ok(group) => group.map(|group| group.gid.as_raw()).ok_or_else(unknown),
        Err(error) => Err(UserError::Lookup { kind: "group", name: name.to_owned(), source: error.into() }),
    }
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
