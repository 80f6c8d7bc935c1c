//! The user database by its files: passwd(5), group(5). What other services of nsswitch.conf(5) know is not seen.

use std::{fs, io};

use super::Found;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

pub(super) fn user(name: &str) -> io::Result<Option<Found>> {
    Ok(user_in(&read(PASSWD)?, &read(GROUP)?, name))
}

pub(super) fn group(name: &str) -> io::Result<Option<u32>> {
    Ok(group_in(&read(GROUP)?, name))
}

/// A full name need not be UTF-8.
fn read(path: &str) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

fn user_in(passwd: &str, groups: &str, name: &str) -> Option<Found> {
    let (uid, gid) = entries(passwd, name).find_map(|fields| numbers(fields.first()?, fields.get(1)?))?;
    // As getgrouplist(3) does: the primary group, then those that name the user as a member.
    let member =
        |line: &&str| line.rsplit(':').next().is_some_and(|list| list.split(',').any(|one| one == name));
    let others = groups.lines().filter(member).filter_map(|line| line.split(':').nth(2)?.parse().ok());
    let mut all = vec![gid];
    for other in others {
        if !all.contains(&other) {
            all.push(other);
        }
    }
    Some((uid, gid, all))
}

fn group_in(groups: &str, name: &str) -> Option<u32> {
    entries(groups, name).find_map(|fields| fields.first()?.parse().ok())
}

/// What follows name and password in the lines of this name.
fn entries<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = Vec<&'a str>> {
    text.lines().filter_map(move |line| {
        let mut fields = line.split(':');
        // A name that is empty or begins so is a comment, or a word to other services.
        let own =
            fields.next().filter(|own| *own == name && !own.is_empty() && !own.starts_with(['#', '+', '-']));
        own.map(|_| fields.skip(1).collect())
    })
}

fn numbers(uid: &str, gid: &str) -> Option<(u32, u32)> {
    Some((uid.parse().ok()?, gid.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "# local\nroot:x:0:0:root:/root:/bin/sh\nweb:x:33:34:Web, server:/var/www:/bin/false\n\
                         broken:x:no:1::/:\nbroken:x:7:8::/:\n+::::::\n";
    const GROUPS: &str =
        "root:x:0:\nadm:x:4:web,root\nweb:x:34:\nlast:x:50:webby,web\nagain:x:4:web\nbad:x:-3:web\n";

    #[test]
    fn users_and_groups_are_found_in_their_files() {
        for (name, wanted) in [
            ("root", Some((0, 0, vec![0, 4]))),
            ("web", Some((33, 34, vec![34, 4, 50]))),
            // The line that can be read counts.
            ("broken", Some((7, 8, vec![8]))),
            ("webby", None),
            ("+", None),
            ("", None),
            ("# local", None),
            ("web:x", None),
        ] {
            assert_eq!(user_in(USERS, GROUPS, name), wanted, "{name}");
        }
        for (name, wanted) in
            [("adm", Some(4)), ("last", Some(50)), ("bad", None), ("", None), ("none", None)]
        {
            assert_eq!(group_in(GROUPS, name), wanted, "{name}");
        }
        // This machine's own: root is in every database.
        assert_eq!(user("root").expect("readable").map(|(uid, gid, _)| (uid, gid)), Some((0, 0)));
        assert_eq!(group("root").expect("readable"), Some(0));
    }
}
