//! The user database by the C library: nsswitch.conf(5) says what that is.

use std::{ffi::CString, io};

use nix::unistd::{Gid, Group, User, getgrouplist};

use super::Found;

pub(super) fn user(name: &str) -> io::Result<Option<Found>> {
    let Ok(terminated) = CString::new(name) else { return Ok(None) };
    let Some(user) = User::from_name(name)? else { return Ok(None) };
    let groups = getgrouplist(&terminated, user.gid)?;
    Ok(Some((user.uid.as_raw(), user.gid.as_raw(), groups.into_iter().map(Gid::as_raw).collect())))
}

pub(super) fn group(name: &str) -> io::Result<Option<u32>> {
    if name.contains('\0') {
        return Ok(None);
    }
    Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()))
}
