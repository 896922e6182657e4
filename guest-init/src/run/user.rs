//! Who the workload runs as, from the image's own /etc/passwd and /etc/group.
//!
//! Never through the C library's name service: a static one cannot load its modules, and the image's must not be.

use protocol::FailureKind;

use crate::failure::Failure;

/// A user, as the kernel knows one, and where it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Home directory; `/` when the image names none.
    pub home: String,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// More groups than the kernel takes (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// Finds the user that `spec` (`user[:group]`, each by name or number; empty is root) means in these files.
///
/// The rules are those of docker: a number need not be in the files; without a group the primary one of the passwd
/// entry is taken together with all groups that list the user; a group that is given replaces both.
///
/// # Errors
/// [`FailureKind::UnknownUser`] when a name is in neither file, or a number is no id.
pub fn resolve(spec: &str, passwd: &[u8], group: &[u8]) -> Result<User, Failure> {
    let (user_part, group_part) = spec.split_once(':').unwrap_or((spec, ""));
    let (passwd, group) = (String::from_utf8_lossy(passwd), String::from_utf8_lossy(group));

    let wanted_uid = if user_part.is_empty() { Some(0) } else { user_part.parse::<u32>().ok() };
    let entry = passwd
        .lines()
        .filter_map(parse_passwd_line)
        .find(|entry| wanted_uid.map_or(entry.name == user_part, |uid| entry.uid == uid));
    let mut user = match (&entry, wanted_uid) {
        (Some(entry), _) => User {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            home: if entry.home.is_empty() { "/".into() } else { entry.home.into() },
        },
        (None, Some(uid)) if uid != u32::MAX => User { uid, gid: 0, groups: Vec::new(), home: "/".into() },
        (None, _) => return Err(unknown("user", user_part, "/etc/passwd")),
    };

    let mut groups = group.lines().filter_map(parse_group_line);
    if !group_part.is_empty() {
        let wanted_gid = group_part.parse::<u32>().ok();
        let found = groups.find(|entry| wanted_gid.map_or(entry.name == group_part, |gid| entry.gid == gid));
        user.gid = match found.map(|entry| entry.gid).or(wanted_gid) {
            Some(gid) if gid != u32::MAX => gid,
            _ => return Err(unknown("group", group_part, "/etc/group")),
        };
    } else if let Some(entry) = entry {
        let lists_user = |group: &GroupEntry| group.members.split(',').any(|member| member == entry.name);
        user.groups = groups.filter(lists_user).map(|group| group.gid).take(MAX_GROUPS).collect();
    }
    Ok(user)
}

fn unknown(what: &str, name: &str, file: &str) -> Failure {
    Failure::new(FailureKind::UnknownUser, format!("{what} {name:?} is not in the image's {file}"))
}

/// `name:password:uid:gid:gecos:home:shell`; anything else is skipped, as every reader of the file does.
fn parse_passwd_line(line: &str) -> Option<PasswdEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).unwrap_or("");
    Some(PasswdEntry { name, uid, gid, home })
}

/// `name:password:gid:member,member`
fn parse_group_line(line: &str) -> Option<GroupEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        # a comment:x:7:7::/:\n\
        broken line\n\
        postgres:x:999:998:PostgreSQL:/var/lib/postgresql:/bin/bash\n\
        twice:x:999:5::/twice:\n\
        homeless:x:12:13::";
    const GROUP: &[u8] = b"root:x:0:\nssl-cert:x:101:postgres,other\nwheel:x:10:root\n\
        postgres:x:998:\nadm:x:4:other,postgres\nbroken\n";

    fn user(spec: &str) -> User {
        resolve(spec, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn nothing_means_root_with_its_groups() {
        let root = User { uid: 0, gid: 0, groups: vec![10], home: "/root".into() };
        assert_eq!(user(""), root);
        assert_eq!(user("root"), root);
        assert_eq!(user("0"), root);
    }

    #[test]
    fn a_name_brings_its_primary_and_supplementary_groups() {
        let postgres = User { uid: 999, gid: 998, groups: vec![101, 4], home: "/var/lib/postgresql".into() };
        assert_eq!(user("postgres"), postgres);
    }

    #[test]
    fn a_number_takes_the_first_entry_with_that_id() {
        assert_eq!(user("999"), user("postgres"));
    }

    #[test]
    fn a_number_need_not_be_in_the_file() {
        assert_eq!(user("4711"), User { uid: 4711, gid: 0, groups: vec![], home: "/".into() });
        assert_eq!(user("4711:4712").gid, 4712);
    }

    #[test]
    fn a_group_that_is_given_replaces_all_others() {
        assert_eq!(user("postgres:adm"), User { gid: 4, groups: vec![], ..user("postgres") });
        assert_eq!(user("postgres:77").gid, 77);
        assert_eq!(user(":adm").gid, 4);
    }

    #[test]
    fn names_that_are_nowhere_are_refused() {
        for spec in ["nobody2", "postgres:nogroup", "-1", "4294967295", "0:4294967295", "99999999999", "1:x"]
        {
            let failure = resolve(spec, PASSWD, GROUP).unwrap_err();
            assert_eq!(failure.kind, FailureKind::UnknownUser, "{spec}");
        }
    }

    #[test]
    fn an_image_without_the_files_has_root_and_numbers() {
        let root = User { uid: 0, gid: 0, groups: vec![], home: "/".into() };
        assert_eq!(resolve("", b"", b"").unwrap(), root);
        assert_eq!(resolve("5:6", b"", b"").unwrap().uid, 5);
        assert!(resolve("root", b"", b"").is_err());
    }

    #[test]
    fn a_user_without_a_home_lives_in_the_root() {
        assert_eq!(user("homeless").home, "/");
    }

    proptest! {
        #[test]
        fn hostile_files_are_read_to_the_end(
            spec in "[a-z0-9:]{0,6}",
            passwd in proptest::collection::vec(any::<u8>(), 0..200),
            group in "([a-z:0-9,\n]{0,40}){0,5}",
        ) {
            if let Ok(user) = resolve(&spec, &passwd, group.as_bytes()) {
                prop_assert_ne!(user.uid, u32::MAX);
            }
        }
    }
}
