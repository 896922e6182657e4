//! `flyrun-vmm`: the process that is one machine.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use vmm::{
    args::{self, Command, Machine, Process, Run},
    channel::Channel,
    ending::End,
    exit::VmExit,
    probe,
    spec::VmSpec,
    trace::{self, Trace},
    vm::Vm,
};

fn main() -> ExitCode {
    let started_us = trace::now_us();
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    let end = match args::parse(arguments) {
        Ok(Command::Help) => print(args::HELP),
        Ok(Command::Version) => print(concat!("flyrun-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Probe { json }) => probe(json),
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
    ExitCode::from(end.exit as u8)
}

fn print(text: &str) -> End {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => End { exit: VmExit::Reset, reason: String::new() },
        Err(e) => End { exit: VmExit::Setup, reason: format!("standard output: {e}") },
    }
}

fn probe(json: bool) -> End {
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

/// Has the kernel end this process when its parent does, which must be the owner and alive.
fn end_with(owner: u32) -> Result<(), String> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| format!("--owner: {e}"))?;
    // The parent may have ended just before; then the kernel has nothing to tell any more.
    match getppid().map(|parent| parent.as_raw_nonzero().get()) {
        Some(parent) if u32::try_from(parent) == Ok(owner) => Ok(()),
        _ => Err(format!("--owner {owner}: that process is not the parent of flyrun-vmm, or has ended")),
    }
}

/// Moves this process into a cgroup. Threads of the kernel that it has made later, vhost's, follow it there.
fn enter(cgroup: &Path) -> Result<(), String> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .map_err(|e| format!("--cgroup {}: {e}", cgroup.display()))
}

/// What comes before all else; returns the stream of the owner's requests.
fn prepare(process: &Process) -> Result<Option<UnixStream>, String> {
    if let Some(owner) = process.owner {
        end_with(owner)?;
    }
    if let Some(cgroup) = &process.cgroup {
        enter(cgroup)?;
    }
    let stream = process.control.then(Channel::from_stdin).transpose();
    stream.map_err(|e| format!("--control: standard input: {e}"))
}

fn run(run: Run, owner: Option<UnixStream>, started_us: u64) -> End {
    let trace = match run.process.trace.as_deref().map_or(Ok(Trace::off()), Trace::to) {
        Ok(trace) => Arc::new(trace),
        Err(e) => return End { exit: VmExit::Setup, reason: format!("--trace: {e}") },
    };
    trace.step_at("start", started_us);
    let spec = match read_spec(run.machine) {
        Ok(spec) => spec,
        Err(reason) => return End { exit: VmExit::Usage, reason },
    };
    trace.step("spec read");
    let started = Vm::new(&spec, Arc::clone(&trace)).and_then(|mut vm| {
        if let Some(owner) = owner {
            vm.serve_owner(owner);
        }
        vm.start().map(|()| vm)
    });
    let end = match started {
        Ok(vm) => vm.serve(),
        Err(error) => End { exit: error.exit(), reason: error.to_string() },
    };
    trace.flush();
    end
}

fn read_spec(machine: Machine) -> Result<VmSpec, String> {
    let path = match machine {
        Machine::Options(spec) => return Ok(*spec),
        Machine::File(path) => path,
    };
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(&path).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.map_err(|e| format!("--spec {}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("--spec {}: {e}", path.display()))
}
