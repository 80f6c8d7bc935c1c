//! Removal of a directory that a hostile process has filled: no link is followed, no depth can exhaust us.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, fchmod, fchown, openat, renameat_with,
        unlinkat,
    },
    io::Errno,
    process::{Gid, Uid},
};

/// Entries that are removed at most; more is a companion at work while it is being removed.
const MOST_ENTRIES: u64 = 4_000_000;

/// Removes a directory with all that is in it. One that is not there is no error.
///
/// Subdirectories are not descended into but moved up into the directory itself, one level at a time, so that neither
/// the stack nor the number of open descriptors grows with their depth.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let top = match open(CWD, path) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    seize(top.as_fd())?;
    let mut removed = 0_u64;
    loop {
        let mut empty = true;
        for entry in Dir::read_from(&top)? {
            let entry = entry?;
            if is_dot(entry.file_name()) {
                continue;
            }
            empty = false;
            removed += 1;
            if removed > MOST_ENTRIES {
                return Err(io::Error::other("the directory keeps filling"));
            }
            remove_entry(top.as_fd(), entry.file_name(), &mut removed)?;
        }
        if empty {
            break;
        }
    }
    match rustix::fs::rmdir(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes a file, or empties a directory of all but directories, moves those up and removes it.
fn remove_entry(top: BorrowedFd<'_>, name: &CStr, removed: &mut u64) -> io::Result<()> {
    match unlinkat(top, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = open(top, name)?;
    seize(directory.as_fd())?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let child = entry.file_name();
        if is_dot(child) {
            continue;
        }
        *removed += 1;
        let outcome = if entry.file_type() == FileType::Directory {
            move_up(directory.as_fd(), child, top, removed)
        } else {
            unlinkat(&directory, child, AtFlags::empty())
        };
        match outcome {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match unlinkat(top, name, AtFlags::REMOVEDIR) {
        // Filled again meanwhile: the next round finds it.
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Under the first name that is free: the companion may have taken any.
fn move_up(
    from: BorrowedFd<'_>,
    name: &CStr,
    top: BorrowedFd<'_>,
    removed: &mut u64,
) -> rustix::io::Result<()> {
    loop {
        *removed += 1;
        let free = format!(".pillion-removed-{removed}");
        match renameat_with(from, name, top, free, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) if *removed <= MOST_ENTRIES => {}
            outcome => return outcome,
        }
    }
}

/// Makes the directory ours alone, so that no other process of the same user adds to it.
fn seize(directory: BorrowedFd<'_>) -> io::Result<()> {
    match fchown(directory, Some(Uid::ROOT), Some(Gid::ROOT)) {
        // Without privileges everything in it is ours anyway, or cannot be removed.
        Ok(()) | Err(Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    fchmod(directory, Mode::RWXU)?;
    Ok(())
}

fn open(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_hostile_tree_is_removed_and_nothing_else() {
        let base = std::env::temp_dir().join(format!("pillion-tree-{}", std::process::id()));
        let (victim, outside) = (base.join("victim"), base.join("outside"));
        fs::create_dir_all(&victim).expect("temporary directory");
        fs::create_dir_all(&outside).expect("temporary directory");
        fs::write(outside.join("precious"), "x").expect("written");
        symlink(&outside, victim.join("link")).expect("linked");
        fs::write(victim.join("file"), "x").expect("written");
        fs::write(victim.join(".pillion-removed-1"), "x").expect("written");
        // Deeper than PATH_MAX and than a usual limit on descriptors.
        let mut at = open(CWD, &victim).expect("open");
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).expect("made");
            rustix::fs::symlinkat("/etc", &at, "link")
                .or_else(|e| if e == Errno::EXIST { Ok(()) } else { Err(e) })
                .expect("linked");
            at = open(at.as_fd(), "deep").expect("open");
        }
        remove(&victim).expect("removed");
        assert!(!victim.exists());
        assert!(outside.join("precious").exists());
        remove(&victim).expect("gone already");
        remove(&base).expect("removed");
        assert!(!base.exists());
    }
}
