//! What an OCI runtime mounts over an image, and what it writes into it.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
};

use protocol::{FailureKind, NetworkConfig, RunConfig, Tmpfs};
use rustix::{
    fs::{CWD, Mode, OFlags, mkdir, open},
    io::Errno,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::early::COMMON;
use crate::{
    failure::{Failure, OrSetup},
    pid1::{ensure_directory, mount_at},
};

/// Files of guest-init's own that cover the image's /etc/hosts, /etc/hostname and /etc/resolv.conf, as docker does it: the image stays
/// as it is, it works on a read-only root, and a new boot has fresh ones.
#[derive(Debug)]
pub struct EtcFiles {
    files: Vec<(&'static str, OwnedFd)>,
}

impl EtcFiles {
    /// Writes them to the initramfs. Called before the process leaves it.
    ///
    /// # Errors
    /// [`FailureKind::Setup`].
    pub fn prepare(config: &RunConfig) -> Result<Self, Failure> {
        let contents = contents(&config.hostname, config.network.as_ref());
        let mut files = Vec::new();
        for (target, content) in contents {
            let path = target.replacen("/etc/", "/.", 1);
            let write = || -> rustix::io::Result<OwnedFd> {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
                rustix::io::write(open(&path, flags, Mode::from_raw_mode(0o644))?, content.as_bytes())?;
                open_tree(CWD, &path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            };
            files.push((target, write().or_setup(|| format!("prepare {target}"))?));
        }
        Ok(Self { files })
    }

    /// Mounts them in the new root.
    ///
    /// # Errors
    /// [`FailureKind::Setup`]; not for a read-only image that lacks the file, which then stays without it.
    pub fn mount(self) -> Result<(), Failure> {
        for (target, file) in self.files {
            let attempt = || move_mount(&file, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
            let result = match attempt() {
                Err(Errno::NOENT) => match make_empty_file(target) {
                    Err(Errno::ROFS) => continue,
                    made => made.and_then(|()| attempt()),
                },
                other => other,
            };
            result.or_setup(|| format!("mount {target}"))?;
        }
        Ok(())
    }
}

fn make_empty_file(path: &str) -> rustix::io::Result<()> {
    match ensure_directory("/etc") {
        Ok(()) => {}
        Err(errno) => return Err(errno),
    }
    open(path, OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o644)).map(drop)
}

/// Which files there are, and what they say.
fn contents(hostname: &str, network: Option<&NetworkConfig>) -> Vec<(&'static str, String)> {
    let mut contents =
        vec![("/etc/hosts", hosts(hostname, network)), ("/etc/hostname", format!("{hostname}\n"))];
    if let Some(network) = network.filter(|network| !network.resolv_conf.is_empty()) {
        contents.push(("/etc/resolv.conf", network.resolv_conf.join("\n") + "\n"));
    }
    contents
}

/// Has the files say what is true of another name or place in the network. Those that the workload has covered or taken away stay so.
pub fn rewrite_etc(hostname: &str, network: Option<&NetworkConfig>) {
    for (target, content) in contents(hostname, network) {
        let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let _ =
            open(target, flags, Mode::empty()).and_then(|file| rustix::io::write(file, content.as_bytes()));
    }
}

fn hosts(hostname: &str, network: Option<&NetworkConfig>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    let mut add = |address: IpAddr, name: &str| {
        if !name.is_empty() {
            text.push_str(&format!("{address}\t{name}\n"));
        }
    };
    for (address, name) in network.into_iter().flat_map(|network| &network.hosts) {
        add(*address, name);
    }
    match network.and_then(|network| network.ipv4) {
        Some((address, _)) => add(address.into(), hostname),
        None => add(Ipv4Addr::new(127, 0, 1, 1).into(), hostname),
    }
    if let Some((address, _)) = network.and_then(|network| network.ipv6) {
        add(address.into(), hostname);
    }
    text
}

/// Makes /run and /tmp, and mounts the memory filesystems that were asked for.
///
/// # Errors
/// [`FailureKind::Setup`] naming the mount, [`FailureKind::BadConfig`] for options or paths that are none.
pub fn mount_all(config: &RunConfig) -> Result<(), Failure> {
    for (path, mode) in [("/run", 0o755), ("/tmp", 0o1777)] {
        if config.disk.is_some() {
            // mkdir(2) obeys the umask, which is 0 here.
            match mkdir(path, Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno).or_setup(|| format!("make {path}")),
            }
        } else {
            // On a read-only root these two would be of no use, and most programs need them.
            let options = format!("mode={mode:o}");
            mount_at("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, &options)?;
        }
    }
    for tmpfs in &config.tmpfs {
        mount_tmpfs(tmpfs)?;
    }
    Ok(())
}

fn mount_tmpfs(tmpfs: &Tmpfs) -> Result<(), Failure> {
    let path = &tmpfs.path;
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        let message = format!("tmpfs path {path:?} is not an absolute path without \"..\"");
        return Err(Failure::new(FailureKind::BadConfig, message));
    }
    let (flags, options) = tmpfs_options(&tmpfs.options);
    mount_at("tmpfs", path, "tmpfs", flags, &options)
}

/// Splits the options of tmpfs(5) into what mount(2) takes as flags and as text. The defaults are docker's.
fn tmpfs_options(text: &str) -> (MountFlags, String) {
    let mut flags = COMMON;
    let mut rest = Vec::new();
    for option in text.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags -= MountFlags::RDONLY,
            "noexec" => flags |= MountFlags::NOEXEC,
            "exec" => flags -= MountFlags::NOEXEC,
            "nosuid" => flags |= MountFlags::NOSUID,
            "suid" => flags -= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "dev" => flags -= MountFlags::NODEV,
            "noatime" => flags |= MountFlags::NOATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            other => rest.push(other),
        }
    }
    if !rest.iter().any(|option| option.starts_with("mode=")) {
        rest.push("mode=1777");
    }
    (flags, rest.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_defaults_are_dockers() {
        assert_eq!(tmpfs_options(""), (COMMON, "mode=1777".into()));
    }

    #[test]
    fn tmpfs_options_become_flags_or_text() {
        let (flags, text) = tmpfs_options("size=64m,exec,ro,mode=755,dev");
        assert_eq!(flags, MountFlags::NOSUID | MountFlags::RDONLY);
        assert_eq!(text, "size=64m,mode=755");
    }

    #[test]
    fn hosts_names_the_machine() {
        assert!(hosts("web", None).ends_with("127.0.1.1\tweb\n"));
        assert!(!hosts("", None).contains("127.0.1.1"));
        let network = NetworkConfig {
            ipv4: Some((Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 1))),
            hosts: vec![(Ipv4Addr::new(192, 0, 2, 1).into(), "db".into())],
            ..NetworkConfig::default()
        };
        assert!(hosts("web", Some(&network)).ends_with("192.0.2.1\tdb\n10.0.0.2\tweb\n"));
    }

    #[test]
    fn a_tmpfs_path_must_be_absolute() {
        for path in ["tmp", "/a/../b", ""] {
            let failure = mount_tmpfs(&Tmpfs { path: path.into(), options: String::new() }).unwrap_err();
            assert_eq!(failure.kind, FailureKind::BadConfig);
        }
    }
}
