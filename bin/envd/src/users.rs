//! Users and groups of the guest, from `/etc/passwd` and `/etc/group`.
//!
//! The files are read for each call, because commands in the guest may change them.

use std::{collections::HashMap, fs, io};

/// User of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Ids of the user's other groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Parses a line of `/etc/passwd` (`passwd(5)`). The result has no groups. Returns `None` if the
/// line is invalid.
#[must_use]
pub fn parse_passwd_line(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let mut next = || fields.next();
    let (name, _password) = (next()?, next()?);
    let (uid, gid) = (next()?.parse().ok()?, next()?.parse().ok()?);
    let (_comment, home, shell) = (next()?, next()?, next()?);
    Some(User {
        name: name.to_owned(),
        uid,
        gid,
        groups: vec![],
        home: if home.is_empty() { "/" } else { home }.to_owned(),
        shell: shell.trim_end().to_owned(),
    })
}

/// Parses a line of `/etc/group` (`group(5)`) to name, id and members. Returns `None` if the line
/// is invalid.
#[must_use]
pub fn parse_group_line(line: &str) -> Option<(&str, u32, Vec<&str>)> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let gid = fields.next()?.parse().ok()?;
    let members = fields.next()?.trim_end().split(',');
    Some((name, gid, members.filter(|m| !m.is_empty()).collect()))
}

/// Returns the user with a name, including all groups, or `None` if there is no such user.
///
/// # Errors
/// Fails if the files cannot be read.
pub fn find(name: &str) -> io::Result<Option<User>> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    let user = passwd
        .lines()
        .filter_map(parse_passwd_line)
        .find(|u| u.name == name);
    let Some(mut user) = user else {
        return Ok(None);
    };
    let groups = fs::read_to_string("/etc/group")?;
    user.groups = groups
        .lines()
        .filter_map(parse_group_line)
        .filter(|(_, gid, members)| *gid != user.gid && members.contains(&name))
        .map(|(_, gid, _)| gid)
        .collect();
    Ok(Some(user))
}

/// Names of user and group ids. Looks up each id once, for one response in which the same few ids
/// occur many times.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Returns the name of a user id, or the number if it has no name.
    pub fn user(&mut self, uid: u32) -> String {
        let name = self.users.entry(uid).or_insert_with(|| user_name(uid));
        name.clone()
    }

    /// Returns the name of a group id, or the number if it has no name.
    pub fn group(&mut self, gid: u32) -> String {
        let name = self.groups.entry(gid).or_insert_with(|| group_name(gid));
        name.clone()
    }
}

fn user_name(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = passwd
        .lines()
        .filter_map(parse_passwd_line)
        .find(|u| u.uid == uid);
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

fn group_name(gid: u32) -> String {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let group = groups
        .lines()
        .filter_map(parse_group_line)
        .find(|g| g.1 == gid);
    group.map_or_else(|| gid.to_string(), |group| group.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_both_files_are_understood() {
        let user = parse_passwd_line("user:x:1000:1001:,,,:/home/user:/bin/bash").expect("a line");
        assert_eq!(
            (user.uid, user.gid, user.home.as_str()),
            (1000, 1001, "/home/user")
        );
        assert_eq!(
            parse_group_line("sudo:x:27:user,other"),
            Some(("sudo", 27, vec!["user", "other"]))
        );
        assert_eq!(parse_group_line("empty:x:5:"), Some(("empty", 5, vec![])));
        assert_eq!(parse_passwd_line("# comment"), None);
        assert_eq!(parse_passwd_line("name:x:notanumber:0::/:"), None);
    }

    #[test]
    fn root_is_known_and_nonsense_is_not() {
        assert_eq!(find("root").expect("readable").expect("there").uid, 0);
        assert_eq!(find("no-such-user").expect("readable"), None);
        assert_eq!(
            (user_name(0), group_name(0)),
            ("root".into(), "root".into())
        );
        assert_eq!(user_name(3_999_999_999), "3999999999");
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parsers_panic(line in ".*") {
            let _ = parse_passwd_line(&line);
            let _ = parse_group_line(&line);
        }
    }
}
