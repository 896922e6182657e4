//! `flyrun-vmm`: the process that is one machine.
#![no_main]

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
};

use vmm::{
    args::{self, Command, Machine, Process, Run},
    channel::Channel,
    ending::End,
    error::SetupError,
    exit::VmExit,
    hold,
    jail::{Jail, limits::Limits},
    owner::Owner,
    parts::{Parts, Purpose},
    probe,
    seccomp::{self, Thread},
    snapshot::{self, files::Files, refusal::Refusal, restore::Snapshot, text::Texts},
    spec::VmSpec,
    trace::{self, Trace},
    vm::Vm,
};

vmm::main!(program);

fn program() -> u8 {
    let started_us = trace::now_us();
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    let end = match args::parse(arguments) {
        Ok(Command::Help) => print(args::HELP),
        Ok(Command::Version) => print(concat!("flyrun-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Probe { json }) => probe(json),
        Ok(Command::Seccomp { json: true }) => print(&format!("{}\n", seccomp::json())),
        Ok(Command::Seccomp { json: false }) => print(&seccomp::table()),
        Ok(Command::TryJail(jail)) => try_jail(&jail),
        Ok(Command::Inspect { dir, verify }) => inspect(&dir, verify),
        Ok(Command::Run(run)) => match prepare(&run.process) {
            Ok(owner) => self::run(*run, owner, started_us),
            Err(reason) => End { exit: VmExit::Setup, reason },
        },
        Err(mistake) => End { exit: VmExit::Usage, reason: mistake },
    };
    if !end.reason.is_empty() {
        // Nobody is left to tell if standard error is closed.
        let _closed = writeln!(std::io::stderr(), "flyrun-vmm: {}", end.reason.replace('\n', " "));
    }
    end.exit.code()
}

fn print(text: &str) -> End {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => End { exit: VmExit::Reset, reason: String::new() },
        Err(e) => End { exit: VmExit::Setup, reason: format!("standard output: {e}") },
    }
}

fn probe(json: bool) -> End {
    if let Err(error) = seccomp::enforce() {
        return unconfined(error);
    }
    let verdict = probe::probe();
    let reason = if verdict.usable() { String::new() } else { verdict.message() };
    let printed = match json {
        true => {
            let mut value = serde_json::to_value(&verdict).unwrap_or_default();
            value["usable"] = verdict.usable().into();
            value["message"] = verdict.message().into();
            print(&format!("{value}\n"))
        }
        false if verdict.usable() => print(&format!("{}\n", verdict.message())),
        false => print(""),
    };
    match verdict.usable() {
        true => printed,
        false => End { exit: VmExit::NoKvm, reason },
    }
}

/// Moves this process into a cgroup. Threads of the kernel that it has made later, vhost's, follow it there.
fn enter(cgroup: &Path) -> Result<(), String> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .map_err(|e| format!("--cgroup {}: {e}", cgroup.display()))
}

fn unconfined(error: std::io::Error) -> End {
    End { exit: VmExit::Setup, reason: format!("seccomp: {error}") }
}

/// Who the machine belongs to, and the stream of the owner's requests.
type Ownership = (Option<Owner>, Option<UnixStream>);

/// What comes before all else.
fn prepare(process: &Process) -> Result<Ownership, String> {
    let stream = process.control.then(Channel::from_stdin).transpose();
    let stream = stream.map_err(|e| format!("--control: standard input: {e}"))?;
    let owner = process.owner.map(|owner| Owner::end_with(owner, stream.as_ref())).transpose()?;
    if let Some(cgroup) = &process.cgroup {
        enter(cgroup)?;
    }
    match process.no_seccomp {
        false => seccomp::enforce().map_err(|e| format!("seccomp: {e}"))?,
        true => eprintln!("flyrun-vmm: --no-seccomp: threads may make any system call. For debugging only"),
    }
    Ok((owner, stream))
}

fn try_jail(jail: &Jail) -> End {
    match jail.enter(&Limits::default()) {
        Ok(()) => print("this host grants the jail\n"),
        Err(error) => End { exit: VmExit::Setup, reason: error.to_string() },
    }
}

fn inspect(dir: &Path, verify: bool) -> End {
    if let Err(error) = seccomp::enforce().and_then(|()| seccomp::confine(Thread::Main)) {
        return unconfined(error);
    }
    let verified = match verify {
        false => Ok(()),
        true => {
            Snapshot::open(dir).and_then(|it| it.memory(it.header.spec.memory_mib, true, None)).map(|_| ())
        }
    };
    let header = verified.and_then(|()| snapshot::restore::header(dir));
    match header.map(|header| header.to_json()) {
        Ok(Ok(json)) => print(&format!("{}\n", String::from_utf8_lossy(&json))),
        Ok(Err(error)) => End { exit: VmExit::Setup, reason: error.to_string() },
        Err(refusal) => refused(refusal),
    }
}

fn refused(refusal: Refusal) -> End {
    let error = SetupError::from(refusal);
    End { exit: error.exit(), reason: error.to_string() }
}

fn run(run: Run, (owner, stream): Ownership, started_us: u64) -> End {
    let trace = match run.process.trace.as_deref().map_or(Ok(Trace::off()), Trace::to) {
        Ok(trace) => Arc::new(trace),
        Err(e) => return End { exit: VmExit::Setup, reason: format!("--trace: {e}") },
    };
    trace.step_at("start", started_us);
    let confine = |parts: Parts| confine(parts, &run.process, owner, stream.as_ref(), &trace);
    let made = match run.machine {
        Machine::Snapshot { dir, spec, text, paused, verify } => {
            let files = match Files::open(&dir) {
                Ok(files) => files,
                Err(refusal) => return refused(refusal),
            };
            // Without a jail and of somebody's own, as the help says.
            let spec = spec.map_or_else(|| own_spec(&dir), |path| Ok(read_spec(path)));
            let spec = match spec {
                Ok(Ok(spec)) => spec,
                Ok(Err(reason)) => return End { exit: VmExit::Usage, reason },
                Err(refusal) => return refused(refusal),
            };
            trace.step("spec read");
            let texts = text.as_deref().map(Texts::open).unwrap_or_default();
            let parts = Parts::open(&spec, Purpose::Restore, &trace).and_then(confine);
            parts.and_then(|parts| {
                let snapshot = Snapshot::read(files)?;
                trace.step("snapshot read");
                Ok((Vm::go_on(parts, snapshot, texts, verify, Arc::clone(&trace))?, paused))
            })
        }
        machine @ (Machine::Options(_) | Machine::File(_)) => {
            let spec = match machine {
                Machine::Options(spec) => Ok(*spec),
                Machine::File(path) => read_spec(path),
                Machine::Snapshot { .. } => Err("a snapshot has no options".to_owned()),
            };
            let spec = match spec {
                Ok(spec) => spec,
                Err(reason) => return End { exit: VmExit::Usage, reason },
            };
            trace.step("spec read");
            let parts = Parts::open(&spec, Purpose::Boot, &trace).and_then(confine);
            parts.and_then(|parts| Ok((Vm::boot(parts, Arc::clone(&trace))?, false)))
        }
    };
    let started = made.and_then(|(mut vm, paused)| {
        if let Some(stream) = stream {
            vm.serve_owner(stream, owner);
        }
        if paused { vm.start_paused() } else { vm.start() }?;
        vm.confine().map(|()| vm)
    });
    let end = match started {
        Ok(vm) => vm.serve(),
        Err(error) => End { exit: error.exit(), reason: error.to_string() },
    };
    trace.flush();
    end
}

/// Goes to the jail, if the process is to, with all that is open.
fn confine(
    parts: Parts,
    process: &Process,
    owner: Option<Owner>,
    stream: Option<&UnixStream>,
    trace: &Trace,
) -> Result<Parts, SetupError> {
    let Some(jail) = &process.jail else { return Ok(parts) };
    hold::prepare();
    let parts = parts.lock_up(jail, trace)?;
    let ended = |reason| SetupError::Io { what: reason, source: std::io::ErrorKind::BrokenPipe.into() };
    owner.map_or(Ok(()), |owner| owner.still_end_with(stream)).map_err(ended)?;
    Ok(parts)
}

fn own_spec(dir: &Path) -> Result<Result<VmSpec, String>, Refusal> {
    snapshot::restore::header(dir).map(|header| Ok(header.spec))
}

fn read_spec(path: PathBuf) -> Result<VmSpec, String> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(&path).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.map_err(|e| format!("--spec {}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("--spec {}: {e}", path.display()))
}
