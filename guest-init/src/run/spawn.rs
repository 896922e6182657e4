//! Starts the workload's process, and the commands beside it.

use std::{ffi::CString, os::fd::AsFd};

use protocol::FailureKind;
use rustix::{
    fs::{Gid, Mode, Uid},
    io::Errno,
    process::{Pid, Resource, Rlimit, chdir, ioctl_tiocsctty, setrlimit, setsid},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{cgroup::Cgroup, command, stdio::ChildStdio, user::User};
use crate::{
    failure::{Failure, OrSetup},
    sys,
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

/// The steps of the child that can fail.
#[derive(Clone, Copy, Debug)]
enum Step {
    Session,
    Stdio,
    Cgroup,
    Limits,
    Workdir,
    User,
    Exec,
}

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
    // Written by the child, unless it becomes the program.
    let mut failed = None;
    let pid = sys::spawn(&mut || {
        failed = Some(match prepare(workload, &stdio, cgroup) {
            Ok(()) => (Step::Exec, exec_first(&c_candidates, &argv, &env)),
            Err(failed) => failed,
        });
    });
    let pid = pid.or_setup(|| "start a process".into())?;
    drop(stdio);
    let Some((step, errno)) = failed else { return Ok(pid) };
    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    let what = match step {
        Step::Session => "make a session for the workload".into(),
        Step::Stdio => "set the workload's standard streams".into(),
        Step::Cgroup => "move the workload into its cgroup".into(),
        Step::Limits => "set the workload's limits".into(),
        Step::Workdir => format!("enter the working directory {}", workload.workdir),
        Step::User => "become the workload's user".into(),
        Step::Exec => return Err(command::diagnose(program, &candidates, &workload.workdir, errno)),
    };
    Err(Failure::new(FailureKind::Setup, format!("cannot {what}: {errno}")))
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>, Failure> {
    let convert = |text: &String| {
        // What it is may be a secret.
        let told = "a NUL byte in the command or environment";
        CString::new(text.as_bytes()).map_err(|_| Failure::new(FailureKind::BadConfig, told))
    };
    strings.iter().map(convert).collect()
}

/// Everything before the program, in the child.
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
