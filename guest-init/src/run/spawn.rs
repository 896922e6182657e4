//! Starts the workload's process, and the commands beside it.

use std::{
    ffi::CString,
    os::fd::{AsFd, OwnedFd},
};

use protocol::FailureKind;
use rustix::{
    fs::{Gid, Mode, Uid},
    io::{Errno, read, write},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Resource, Rlimit, chdir, ioctl_tiocsctty, setrlimit, setsid},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{cgroup::Cgroup, command, stdio::ChildStdio, user::User};
use crate::{
    failure::{Failure, OrSetup},
    sys::{self, Fork},
};

/// Docker's limit of open files, which is also the kernel's bound (fs.nr_open).
const MAX_OPEN_FILES: u64 = 1 << 20;

/// All that is needed to start the workload.
#[derive(Debug)]
pub struct Workload {
    /// Program and arguments, never empty.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<String>,
    /// An existing directory.
    pub workdir: String,
    /// Who it runs as.
    pub user: User,
}

/// The steps of the child that can fail, as it names them to its parent.
#[derive(Clone, Copy, Debug)]
enum Step {
    Session = 1,
    Stdio,
    Cgroup,
    Limits,
    Workdir,
    User,
    Exec,
}

const STEPS: [(Step, &str); 6] = [
    (Step::Session, "make a session for the workload"),
    (Step::Stdio, "set the workload's standard streams"),
    (Step::Cgroup, "move the workload into its cgroup"),
    (Step::Limits, "set the workload's limits"),
    (Step::Workdir, "enter the working directory"),
    (Step::User, "become the workload's user"),
];

/// Starts the workload and returns when its `execve` has succeeded.
///
/// # Errors
/// [`FailureKind::CommandNotFound`], [`FailureKind::CommandNotExecutable`], or the step that failed.
pub fn spawn(workload: &Workload, stdio: ChildStdio, cgroup: &Cgroup) -> Result<Pid, Failure> {
    let program = workload.argv.first().map_or("", String::as_str);
    let path = command::variable(&workload.env, "PATH").unwrap_or_default();
    let candidates = command::candidates(program, path);
    let argv = c_strings(&workload.argv)?;
    let env = c_strings(&workload.env)?;
    let c_candidates = c_strings(&candidates)?;
    // Closed by a successful exec; otherwise the child tells the step and the error.
    let (report, child_report) = pipe_with(PipeFlags::CLOEXEC).or_setup(|| "make a pipe".into())?;

    let pid = match sys::fork().or_setup(|| "start a process".into())? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            let (step, errno) = match prepare(workload, &stdio, cgroup) {
                Ok(()) => (Step::Exec, exec_first(&c_candidates, &argv, &env)),
                Err(failed) => failed,
            };
            let mut message = [step as u8; 5];
            message[1..].copy_from_slice(&errno.raw_os_error().to_le_bytes());
            let _ = write(&child_report, &message);
            sys::exit_now(127)
        }
    };
    drop(child_report);
    drop(stdio);
    match read_report(&report) {
        None => Ok(pid),
        Some((step, errno)) => {
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            Err(match STEPS.iter().find(|(known, _)| *known as u8 == step) {
                Some((Step::Workdir, what)) => {
                    Failure::new(FailureKind::Setup, format!("cannot {what} {}: {errno}", workload.workdir))
                }
                Some((_, what)) => Failure::new(FailureKind::Setup, format!("cannot {what}: {errno}")),
                None => command::diagnose(program, &candidates, &workload.workdir, errno),
            })
        }
    }
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>, Failure> {
    let convert = |text: &String| {
        // What it is may be a secret.
        let told = "a NUL byte in the command or environment";
        CString::new(text.as_bytes()).map_err(|_| Failure::new(FailureKind::BadConfig, told))
    };
    strings.iter().map(convert).collect()
}

fn read_report(report: &OwnedFd) -> Option<(u8, Errno)> {
    let mut message = [0; 5];
    loop {
        match read(report, &mut message[..]) {
            Ok(5) => {
                let [step, errno @ ..] = message;
                return Some((step, Errno::from_raw_os_error(i32::from_le_bytes(errno))));
            }
            Err(Errno::INTR) => {}
            _ => return None,
        }
    }
}

/// Everything between fork and exec, in the child.
fn prepare(workload: &Workload, stdio: &ChildStdio, cgroup: &Cgroup) -> Result<(), (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    setsid().map_err(at(Step::Session))?;
    if stdio.is_terminal {
        ioctl_tiocsctty(&stdio.stdin).map_err(at(Step::Session))?;
    }
    sys::set_stdio(stdio.stdin.as_fd(), stdio.stdout.as_fd(), stdio.stderr.as_fd())
        .map_err(at(Step::Stdio))?;
    // Behind the move: the workload is to see its own cgroup as the root of the hierarchy.
    cgroup.enter().and_then(|()| sys::unshare_cgroup_namespace()).map_err(at(Step::Cgroup))?;
    for (resource, limit) in [(Resource::Nofile, Some(MAX_OPEN_FILES)), (Resource::Nproc, None)] {
        setrlimit(resource, Rlimit { current: limit, maximum: limit }).map_err(at(Step::Limits))?;
    }
    // As root, and so even where the user may not look: docker does the same.
    chdir(workload.workdir.as_str()).map_err(at(Step::Workdir))?;
    become_user(&workload.user).map_err(at(Step::User))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    sys::reset_signals();
    Ok(())
}

fn become_user(user: &User) -> rustix::io::Result<()> {
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups)?;
    set_thread_gid(Gid::from_raw(user.gid))?;
    set_thread_uid(Uid::from_raw(user.uid))
}

/// As execvp(3), but a file of unknown format is not given to a shell. Returns the error that tells most.
fn exec_first(candidates: &[CString], argv: &[CString], env: &[CString]) -> Errno {
    let mut denied = None;
    let mut last = Errno::NOENT;
    for candidate in candidates {
        match sys::exec(candidate, argv, env) {
            Errno::ACCESS => denied = Some(Errno::ACCESS),
            errno @ (Errno::NOENT | Errno::NOTDIR) => last = errno,
            errno => return errno,
        }
    }
    denied.unwrap_or(last)
}
