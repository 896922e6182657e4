//! Starting flyrun-vmm, and understanding its end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use protocol::BootConfig;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, pidfd_send_signal};
use vmm::exit::VmExit;
use vmm::spec::{ConsoleSpec, DiskSpec, NetSpec, ShareSpec, VmSpec, VsockSpec};

use super::events::{Event, Post, spawn as spawn_thread, start_process, watch_control};
use super::jail::{Draft, Jail, send_with, take_back};
use super::streams::{Entrance, Serving, Streams, listen};
use crate::cpio;
use crate::delivery::{Handing, Parcel};
use crate::error::{Context, Error, Result};
use crate::paths::{RunDir, make_private_dir};
use crate::session::printable;
use crate::trace;

/// The context id of every guest: each has a vsock device of its own, so they never meet.
const GUEST_CID: u64 = 3;

/// How long flyrun-vmm may take to answer, and how much it may say.
const LOST: &str = "flyrun-vmm does not answer";
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const MAX_ANSWER: u64 = 4096;

/// Variables that flyrun-vmm sees.
const KEPT: [&str; 3] = ["FLYRUN_HOLD", "FLYRUN_HOLD_FIFO", "RUST_BACKTRACE"];

/// How long the kernel may take to end flyrun-vmm.
const END_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// How long the threads that answer a guest are put off at most, while it has not connected.
const GUEST_LIMIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A disk that is to be made before the machine starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    pub file: PathBuf,
    pub bytes: u64,
}

/// All that is decided about a virtual machine before it starts.
#[derive(Debug)]
pub struct VmPlan {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub cpus: u8,
    pub memory_mib: u32,
    pub disks: Vec<DiskSpec>,
    /// That one of them which is the machine's own and not there yet.
    pub new_disk: Option<NewDisk>,
    pub nets: Vec<NetSpec>,
    pub shares: Vec<ShareSpec>,
    pub boot: BootConfig,
    /// What the guest is given beside that, over a connection of its own.
    pub delivery: Option<Parcel>,
    /// The file that keeps what the kernel says; `None` shows it on standard error while it comes.
    pub console: Option<PathBuf>,
    pub streams: Option<Streams>,
    /// The cgroup that flyrun-vmm is to be in.
    pub cgroup: Option<PathBuf>,
    /// The snapshot to go on from, instead of a boot.
    pub restore: Option<PathBuf>,
    /// Where the text of kernels is that a snapshot may share.
    pub text: Option<PathBuf>,
    /// The machine's lock, which flyrun-vmm holds too: a machine whose monitor was killed is owned until all of it has ended.
    pub lock: Option<File>,
}

/// A flyrun-vmm that was started, whose guest finds sockets to connect to and nobody who answers there yet. On one CPU the threads for
/// that would take their time from the start. Dropping it ends the machine at once.
#[derive(Debug)]
pub struct Unattended {
    vm: Vm,
    control: UnixListener,
    streams: Option<Entrance>,
    post: Post,
}

impl Unattended {
    /// Waits until the guest connects or flyrun-vmm has ended, a moment at most.
    pub fn wait_for_guest(&self) {
        let mut either =
            [PollFd::new(&self.control, PollFlags::IN), PollFd::new(&self.vm.pidfd, PollFlags::IN)];
        let _ = poll(&mut either, Some(&GUEST_LIMIT));
    }

    /// Answers the guest from now on.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn attend(self) -> Result<Vm> {
        let Unattended { mut vm, control, streams, post } = self;
        watch_control(control, post.clone()).context("cannot start a thread")?;
        vm.serving = streams.map(|streams| streams.serve(&post)).transpose()?;
        Ok(vm)
    }
}

/// A running flyrun-vmm. Dropping it ends the machine at once.
#[derive(Debug)]
pub struct Vm {
    pid: u32,
    /// Where flyrun-vmm takes requests.
    control: UnixStream,
    pidfd: rustix::fd::OwnedFd,
    run_dir: Arc<RunDir>,
    jail: Option<Jail>,
    console: Option<PathBuf>,
    serving: Option<Serving>,
    _handing: Option<Handing>,
}

impl Vm {
    /// Starts the machine; what happens to it is posted as events.
    ///
    /// # Errors
    /// A file cannot be written, a socket not made, or flyrun-vmm not started.
    pub fn start(plan: &mut VmPlan, run_dir: Arc<RunDir>, post: &Post) -> Result<Unattended> {
        run_dir.clear_sockets();
        let control = listen(&run_dir, protocol::port::CONTROL)?;
        let streams = plan.streams.as_ref().map(|streams| streams.listen(&run_dir)).transpose()?;
        let parcel = plan.delivery.take();
        let handing = parcel.map(|parcel| parcel.hand_over(&run_dir)).transpose()?;
        let spec = write_start_files(plan, &run_dir)?;
        trace::step("sockets");
        let jail = Jail::prepare(&run_dir)?;
        let (command, requests) = command(plan, &spec, &run_dir, jail.as_ref())?;
        let own_pids = jail.as_ref().is_some_and(Jail::has_own_pids);
        let (pid, pidfd) = start_process(command, own_pids, post.clone())
            .context(format!("cannot start {}", plan.vmm.display()))?;
        trace::step("vmm spawned");
        let console = plan.console.clone();
        let vm =
            Vm { pid, control: requests, pidfd, run_dir, jail, console, serving: None, _handing: handing };
        Ok(Unattended { vm, control, streams, post: post.clone() })
    }

    /// The process id of flyrun-vmm.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Stops the guest between two instructions; its devices finish what they were asked for.
    ///
    /// # Errors
    /// It stands already, or flyrun-vmm does not answer.
    pub fn pause(&self) -> Result<()> {
        self.ask("pause")
    }

    /// Lets it run on.
    ///
    /// # Errors
    /// It runs already, or flyrun-vmm does not answer.
    pub fn resume(&self) -> Result<()> {
        self.ask("resume")
    }

    /// Writes a snapshot of the paused machine; how that ended is posted as [`Event::Snapshotted`].
    ///
    /// # Errors
    /// flyrun-vmm cannot be asked.
    pub fn snapshot(&self, directory: &Path, post: &Post) -> Result<()> {
        self.begin_snapshot("snapshot", directory, post, || Ok(()))
    }

    /// The same, with something that is done meanwhile and belongs to it.
    ///
    /// # Errors
    /// flyrun-vmm cannot be asked.
    pub fn snapshot_with(
        &self,
        directory: &Path,
        post: &Post,
        beside: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.begin_snapshot("snapshot", directory, post, beside)
    }

    /// A snapshot of a machine that has not read its disks, and may go on with others.
    ///
    /// # Errors
    /// flyrun-vmm cannot be asked.
    pub fn base_snapshot(&self, directory: &Path, post: &Post) -> Result<()> {
        self.begin_snapshot("base-snapshot", directory, post, || Ok(()))
    }

    fn begin_snapshot(
        &self,
        request: &str,
        directory: &Path,
        post: &Post,
        beside: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let stream = self.control.try_clone().context(LOST)?;
        let post = post.clone();
        // Guest memory may be large and the disk slow.
        stream.set_read_timeout(None).context(LOST)?;
        let request = format!("{request} {}", directory.display());
        make_private_dir(directory)?;
        let lent = self.jail.as_ref().map(|jail| jail.lend(directory)).transpose()?;
        match &lent {
            Some(lent) => send_with(&self.control, &format!("{request}\n"), lent).context(LOST)?,
            None => self.tell(&request)?,
        }
        let lent = lent.map(|_| directory.to_path_buf());
        spawn_thread("snapshot", move || {
            let done = beside();
            let written = read_answer(&stream).map(drop);
            // Whatever came of it; nobody else looks into it before this is told.
            let taken = lent.map_or(Ok(()), |directory| take_back(&directory));
            let written = written.and(taken).and(done);
            post.send(Event::Snapshotted(written.map_err(|error| error.to_string())));
        })
        .context("cannot start a thread")
    }

    /// Tells flyrun-vmm that guest-init was heard of. Nothing is lost where that fails but time.
    pub fn read_ahead(&self) {
        let _ = self.tell("read-ahead");
    }

    /// Has what the machine has touched of its memory until now read ahead when another goes on from the snapshot in this
    /// directory.
    ///
    /// # Errors
    /// The list cannot be written, or flyrun-vmm does not answer.
    pub fn note_working_set(&self, snapshot: &Path) -> Result<()> {
        let request = format!("working-set {}", snapshot.display());
        if self.jail.is_none() {
            return self.ask(&request);
        }
        let draft = Draft::new(snapshot)?;
        self.control.set_read_timeout(Some(ANSWER_LIMIT)).context(LOST)?;
        send_with(&self.control, &format!("{request}\n"), &draft.file).context(LOST)?;
        let answer = read_answer(&self.control)?;
        draft.settle(&answer)
    }

    /// Lets the machine run on although its snapshot is not complete; that, too, is posted as [`Event::Snapshotted`], and
    /// [`Self::await_resume`] is to be called then.
    ///
    /// # Errors
    /// flyrun-vmm cannot be asked.
    pub fn cancel_snapshot(&self) -> Result<()> {
        self.tell("resume")
    }

    /// Waits for the answer to [`Self::cancel_snapshot`].
    ///
    /// # Errors
    /// flyrun-vmm does not answer, or does not run on.
    pub fn await_resume(&self) -> Result<()> {
        self.control.set_read_timeout(Some(ANSWER_LIMIT)).context(LOST)?;
        read_answer(&self.control).map(drop)
    }

    /// Whether flyrun-vmm has closed its end of the conversation: it has ended, and writes nothing any more.
    pub fn is_lost(&self) -> bool {
        matches!(recv(&self.control, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT), Ok((0, _)))
    }

    /// Lets the guest connect its streams once more.
    pub fn streams_again(&self) {
        if let Some(serving) = &self.serving {
            serving.again();
        }
    }

    fn ask(&self, request: &str) -> Result<()> {
        self.control.set_read_timeout(Some(ANSWER_LIMIT)).context(LOST)?;
        self.tell(request)?;
        read_answer(&self.control).map(drop)
    }

    fn tell(&self, request: &str) -> Result<()> {
        let mut stream = &self.control;
        stream.write_all(format!("{request}\n").as_bytes()).context(LOST)
    }

    /// Ends the machine as pulling its plug would.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Ends the machine and waits until its process is gone, and with it its hold on the disks. A process that the kernel
    /// cannot end in time keeps its locks on them, which the next owner will meet.
    pub fn end(&self) {
        self.kill();
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&END_LIMIT));
    }

    /// Where the user finds what the kernel said last.
    fn see_console(&self) -> String {
        match &self.console {
            // Goes with the machine.
            Some(path) if path.starts_with(self.run_dir.path()) => {
                "Run it again; if it stays so, `flyrun doctor` checks this host.".to_string()
            }
            Some(path) => format!("The kernel's last words are in {}.", path.display()),
            None => "The kernel's last words are above.".to_string(),
        }
    }

    /// Why flyrun-vmm ended, where that was not the guest's orderly reset.
    pub fn failure(&self, status: &io::Result<ExitStatus>) -> Option<Error> {
        let code = match status {
            Ok(status) => status.code(),
            Err(error) => return Some(Error::caused("cannot wait for flyrun-vmm", error)),
        };
        let told = last_line(&self.run_dir.path().join("vmm.log"));
        match code.and_then(VmExit::from_code) {
            Some(VmExit::Reset) => None,
            Some(exit) => Some(explain(exit, told, &self.see_console())),
            None => {
                let how = match status {
                    Ok(status) => status.to_string(),
                    Err(error) => error.to_string(),
                };
                Some(Error::new(format!("flyrun-vmm ended unexpectedly ({how}){}", prefixed(": ", &told))))
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
impl Vm {
    /// A process that only waits in the place of flyrun-vmm, and the other end of its conversation.
    pub fn example(run_dir: RunDir) -> (Vm, UnixStream) {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        #[allow(clippy::zombie_processes)] // Killed with the Vm; the test's process ends soon after.
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (control, theirs) = UnixStream::pair().unwrap();
        let run_dir = Arc::new(run_dir);
        (
            Vm {
                pid: child.id(),
                control,
                pidfd,
                run_dir,
                jail: None,
                console: None,
                serving: None,
                _handing: None,
            },
            theirs,
        )
    }
}

/// Nothing follows an answer before the next request, but for that to [`Vm::cancel_snapshot`]: not a byte more is read.
/// Returns what stands behind its `ok`.
pub fn read_answer(stream: &UnixStream) -> Result<String> {
    let mut answer = String::new();
    BufReader::with_capacity(1, stream.take(MAX_ANSWER)).read_line(&mut answer).context(LOST)?;
    match answer.trim_end().split_once(' ') {
        None if answer.trim_end() == "ok" => Ok(String::new()),
        Some(("ok", told)) => Ok(told.to_string()),
        Some(("error", reason)) => Err(Error::new(format!("flyrun-vmm: {}", printable(reason)))),
        _ => Err(Error::new(LOST)),
    }
}

fn write_start_files(plan: &VmPlan, run_dir: &RunDir) -> Result<PathBuf> {
    let config_file = run_dir.path().join("config.cpio");
    if plan.restore.is_none() {
        let config = protocol::encode_config(&plan.boot).context("cannot encode the boot configuration")?;
        write(&config_file, &cpio::archive_of_one_file(protocol::CONFIG_PATH, &config))?;
    }
    let spec = VmSpec {
        cpus: plan.cpus,
        memory_mib: plan.memory_mib,
        kernel: plan.kernel.clone(),
        initrd: vec![plan.initramfs.clone(), config_file],
        command_line: String::new(),
        disks: plan.disks.clone(),
        nets: plan.nets.clone(),
        vsock: Some(VsockSpec { guest_cid: GUEST_CID, socket: run_dir.vsock() }),
        shares: plan.shares.clone(),
        console: match &plan.console {
            Some(file) => ConsoleSpec::File(file.clone()),
            None => ConsoleSpec::Stdio,
        },
        balloon: true,
    };
    let spec_file = run_dir.path().join("spec.json");
    write(&spec_file, &serde_json::to_vec(&spec).context("cannot write the VmSpec")?)?;
    Ok(spec_file)
}

/// Writes a file that only its owner reads: environment variables are often secrets.
fn write(path: &Path, contents: &[u8]) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let told = || format!("cannot write {}", path.display());
    let mut options = File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path).context(told())?;
    file.write_all(contents).context(told())
}

fn command(
    plan: &VmPlan,
    spec: &Path,
    run_dir: &RunDir,
    jail: Option<&Jail>,
) -> Result<(Command, UnixStream)> {
    let log = run_dir.path().join("vmm.log");
    let log = File::create(&log).context(format!("cannot write {}", log.display()))?;
    let (ours, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
    for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
        set(&ours, Some(ANSWER_LIMIT)).context("cannot limit the time of a socket")?;
    }
    let mut command = Command::new(&plan.vmm);
    // What flyrun was told by its environment is no machine's business.
    let kept = KEPT.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    command
        .env_clear()
        .envs(kept)
        .arg("--spec")
        .arg(spec)
        .arg("--owner")
        .arg(std::process::id().to_string())
        .arg("--control")
        .stdin(OwnedFd::from(theirs))
        .stderr(log);
    match (&plan.console, &plan.lock) {
        // Nothing is written there.
        (Some(_), Some(lock)) => command.stdout(lock.try_clone().context("cannot share the machine's lock")?),
        (Some(_), None) => command.stdout(Stdio::null()),
        (None, _) => {
            command.stdout(io::stderr().as_fd().try_clone_to_owned().context("cannot use standard error")?)
        }
    };
    if let Some(cgroup) = &plan.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    if let Some(directory) = &plan.restore {
        command.arg("--restore").arg(directory);
        if let Some(text) = &plan.text {
            command.arg("--text").arg(text);
        }
    }
    if let Some(file) = trace::vmm_file() {
        command.arg("--trace").arg(file);
    }
    if let Some(jail) = jail {
        jail.apply(&mut command, run_dir);
    }
    Ok((command, ours))
}

/// What flyrun-vmm said last. It may have been in its guest's hands: not much is read, and no control character passed on.
fn last_line(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_ANSWER)))?;
        let mut bytes = Vec::new();
        file.take(MAX_ANSWER).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim_start_matches("flyrun-vmm: ").replace(char::is_control, " ")
}

fn prefixed(prefix: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{prefix}{text}") }
}

fn explain(exit: VmExit, told: String, see_console: &str) -> Error {
    let fact = |fallback: &str| if told.is_empty() { fallback.to_string() } else { told.clone() };
    match exit {
        VmExit::Reset => Error::new("the guest asked for a reset"),
        VmExit::Setup | VmExit::Usage => Error::new(fact("the virtual machine could not be set up")),
        VmExit::NoKvm => Error::new(fact("KVM cannot be used")).advice("`flyrun doctor` says what to do."),
        VmExit::TripleFault | VmExit::Panic => {
            Error::new(fact("the guest's kernel crashed")).advice(see_console)
        }
        VmExit::Forbidden => Error::new(fact("flyrun-vmm made a system call that its seccomp filter does not allow"))
            .advice("The guest may have attacked flyrun-vmm. If it did not, this is an error of flyrun: please report it."),
        VmExit::Refused => Error::new(fact("the machine's snapshot cannot be resumed")),
        VmExit::KvmInternal => {
            Error::new(fact("KVM could not go on")).advice("`flyrun doctor` checks this host's KVM.")
        }
        VmExit::Terminated => Error::new("the virtual machine was ended by a signal to flyrun-vmm"),
        VmExit::HostIo => Error::new(fact("the host's disk failed while the guest was writing"))
            .advice("Make room, for instance with `flyrun prune`, and run it again."),
    }
}
