//! `guest-init`: sets the machine up, runs the workload, reports its end.

use std::{io::Read, os::fd::AsFd};

use protocol::{BootConfig, FailureKind, FromGuest, RunConfig};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    process::umask,
};

use crate::{
    control::Control,
    failure::{Failure, OrSetup},
    pid1::ensure_directory,
    session::{Beside, Sessions},
    step_log::StepLog,
    sys,
};

pub mod cgroup;
pub mod clock;
pub mod command;
pub mod connections;
pub mod delivery;
pub mod early;
pub mod filesystems;
pub mod network;
pub mod relay;
pub mod root;
pub mod shares;
pub mod spawn;
pub mod stdio;
pub mod supervise;
pub mod suspend;
pub mod user;
pub mod volumes;
pub mod wait;

/// No /etc/passwd that is used as one is longer.
const MAX_ACCOUNT_FILE_BYTES: u64 = 16 << 20;

/// The whole life of a machine, from its boot configuration to the last byte of its workload.
///
/// # Errors
/// [`Failure`] when the workload could not be started; nothing fails afterwards.
pub fn run(config: BootConfig, control: &mut Control) -> Result<(), Failure> {
    let mut log = StepLog::new(matches!(&config, BootConfig::Run(config) if config.init_log));
    log.step("config read");
    if let BootConfig::Unpack(_) = config {
        let message = "this initramfs runs workloads, and was told to unpack an image";
        return Err(Failure::new(FailureKind::BadConfig, message));
    }
    umask(Mode::empty());
    let early = early::prepare()?;
    log.step("kernel's filesystems mounted");
    let disk = match &config {
        BootConfig::WaitWithDisk(device) => Some(root::Disk::mount(device)?),
        _ => None,
    };
    let config = match config {
        BootConfig::Run(config) => *config,
        _ => wait::for_config(control, disk.as_ref())?,
    };
    let outcome = start_and_supervise(&config, early, disk, control, &mut log);
    log.flush();
    outcome
}

fn start_and_supervise(
    config: &RunConfig,
    early: early::Early,
    disk: Option<root::Disk>,
    control: &mut Control,
    log: &mut StepLog,
) -> Result<(), Failure> {
    if config.argv.is_empty() {
        return Err(Failure::new(FailureKind::BadConfig, "the boot configuration has no command"));
    }
    suspend::renew_random(&config.entropy)?;
    let connections = stdio::Connections::start(config)?;
    let delivery = delivery::Pending::start(config)?;
    set_hostname(&config.hostname)?;
    let etc = filesystems::EtcFiles::prepare(config)?;
    log.step("host asked for streams");
    let root = root::enter(config, disk, log)?;
    log.step("root entered");
    let (cgroup, lease) = early.show()?;
    filesystems::mount_all(config)?;
    let mut disks = volumes::mount_all(&config.volumes, &config.shares)?;
    disks.extend(root);
    let busy = lease.show();
    etc.mount()?;
    log.step("filesystems mounted");
    if let Some(most) = config.pids_limit {
        cgroup.limit_processes(most).or_setup(|| "limit the workload's processes".into())?;
    }
    if let Some(network) = &config.network {
        network::set_up(network)?;
        log.step("network up");
    }
    let user = user::resolve(&config.user, &account_file("/etc/passwd"), &account_file("/etc/group"))?;
    let protocol::Delivery { env: delivered, files } = delivery.receive()?;
    delivery::place(&files, &user)?;
    drop(files);
    let env = delivery::environment(config.env.clone(), delivered);
    let workload = spawn::Workload {
        argv: config.argv.clone(),
        env: command::environment(&env, config, &user),
        workdir: make_workdir(&config.workdir)?,
        user,
    };
    let sessions = Sessions::listen(Beside {
        env,
        hostname: config.hostname.clone(),
        workdir: workload.workdir.clone(),
        user: workload.user.clone(),
    })?;
    root::seal(config)?;
    log.step("workload resolved");
    control.establish()?;
    connections.wait()?;
    log.step("host connected");
    let (stdio, child_stdio) = stdio::open(config, workload.user.uid, connections)?;
    let children = sys::child_signal_fd().or_setup(|| "watch for ended processes".into())?;
    let pid = spawn::spawn(&workload, child_stdio, &cgroup)?;
    control.send(&FromGuest::Started { pid: pid.as_raw_nonzero().get().unsigned_abs() });
    log.step("workload started");
    log.flush();
    let mut ground = supervise::Ground { disks, network: config.network.clone() };
    supervise::Supervisor::new(control, children, pid, stdio, cgroup, (sessions, busy), &mut ground).run();
    for disk in &ground.disks {
        // The overlay keeps it mounted, but with the journal empty the next boot has nothing to recover.
        let _ = rustix::fs::syncfs(disk);
        let _ = sys::freeze_filesystem(disk.as_fd());
    }
    Ok(())
}

fn set_hostname(hostname: &str) -> Result<(), Failure> {
    if hostname.is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(hostname.as_bytes()).or_setup(|| format!("set the host name {hostname:?}"))
}

/// The content of a file of the image, empty when there is none. Only a regular file is read, and only so much.
pub(crate) fn account_file(path: &str) -> Vec<u8> {
    let mut content = Vec::new();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if let Ok(fd) = openat(CWD, path, flags, Mode::empty())
        && fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    {
        let _ = std::fs::File::from(fd).take(MAX_ACCOUNT_FILE_BYTES).read_to_end(&mut content);
    }
    content
}

fn make_workdir(workdir: &str) -> Result<String, Failure> {
    let path = format!("/{}", workdir.trim_matches('/'));
    if path != "/" {
        ensure_directory(&path).or_setup(|| format!("make the working directory {path}"))?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_file_that_is_no_file_reads_as_empty() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("passwd");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert_eq!(account_file(fifo.to_str().unwrap()), b"");
        assert_eq!(account_file("/dev/zero"), b"");
        assert_eq!(account_file("/nonexistent"), b"");
    }

    #[test]
    fn missing_working_directories_are_made() {
        let directory = tempfile::tempdir().unwrap();
        let wanted = directory.path().join("a/b/c");
        let made = make_workdir(&format!("{}/", wanted.display())).unwrap();
        assert_eq!(made, wanted.to_str().unwrap());
        assert!(wanted.is_dir());
        assert_eq!(make_workdir("").unwrap(), "/");
        assert_eq!(make_workdir("/").unwrap(), "/");
    }
}
