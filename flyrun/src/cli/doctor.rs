//! `flyrun doctor`: what this host lacks, and the remedy for each.

use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::{Context, print_json, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::paths::{Library, Part, Paths, make_private_dir};
use crate::production::{self, Facts, Finding, Grade};
use crate::share::Daemon;
use crate::size::Size;
use crate::{cgroup, host, network, vm};

/// The least free memory and disk that a first machine is comfortable with.
const WANTED_MEMORY: Size = Size::mib(512);
const WANTED_DISK: Size = Size::gib(1);

/// Check whether this host can run machines, and say what to do where it cannot
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: 0 if machines can run (with --production: and this host keeps them apart), 1 if not; \
                        warnings do not count."
)]
pub struct Arguments {
    /// Check also whether the host is fit for guests that do not trust each other: SECURITY.md
    #[arg(long)]
    production: bool,

    /// Print the checks as JSON
    #[arg(long)]
    json: bool,
}

/// One check. The field names of `--json` are stable.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    result: Verdict,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Failed,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Check {
        Check { name, result: Verdict::Ok, message: message.into(), remedy: None }
    }

    fn warning(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, result: Verdict::Warning, message: message.into(), remedy: Some(remedy.into()) }
    }

    fn failed(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, result: Verdict::Failed, message: message.into(), remedy: Some(remedy.into()) }
    }
}

impl From<Finding> for Check {
    fn from(finding: Finding) -> Check {
        let Finding { name, grade, message, remedy } = finding;
        match grade {
            Grade::Good => Check::ok(name, message),
            Grade::Weak => Check::warning(name, message, remedy),
            Grade::Bad => Check::failed(name, message, remedy),
        }
    }
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let mut checks = all(&context.paths);
    if arguments.production {
        let facts = Facts::read(Path::new("/"), &context.paths.root);
        checks.extend(production::judge(&facts).into_iter().map(Check::from));
    }
    let healthy = checks.iter().all(|check| check.result != Verdict::Failed);
    if arguments.json {
        print_json(&checks)?;
    } else {
        for check in &checks {
            tell(check)?;
        }
    }
    Ok(if healthy { ExitCode::Success } else { ExitCode::Unhealthy })
}

fn tell(check: &Check) -> Result<()> {
    let mark = match check.result {
        Verdict::Ok => "ok     ",
        Verdict::Warning => "warning",
        Verdict::Failed => "FAILED ",
    };
    print_line(&format!("{mark}  {:<8} {}", check.name, check.message))?;
    match &check.remedy {
        Some(remedy) => print_line(&format!("                  {remedy}")),
        None => Ok(()),
    }
}

fn all(paths: &Paths) -> Vec<Check> {
    let library = Library::find();
    let mut checks = match &library {
        Ok(library) => vec![kvm(library), jail(library, paths), parts(library)],
        Err(error) => vec![Check::failed("parts", error.to_string(), "Install flyrun with `make install`.")],
    };
    checks.extend([
        vsock_room(paths),
        memory(),
        directory("root", &paths.root),
        directory("run", &paths.run),
    ]);
    checks.extend([disk(&paths.root), mke2fs(), cgroup(), virtiofsd()]);
    checks.extend(network::diagnose::diagnose().into_iter().map(|finding| match finding.remedy {
        None => Check::ok(finding.name, finding.message),
        Some(remedy) => Check::warning(finding.name, finding.message, remedy),
    }));
    checks
}

fn cgroup() -> Check {
    if cgroup::is_available() {
        return Check::ok("cgroup", "machines can be held to a share of the CPU");
    }
    let told = "there is no cgroup v2 with the cpu controller: machines cannot be held to a share of the CPU";
    Check::warning("cgroup", told, "Boot the host with systemd.unified_cgroup_hierarchy=1.")
}

fn virtiofsd() -> Check {
    match Daemon::find() {
        Ok(daemon) => Check::ok("virtiofs", daemon.program.display().to_string()),
        Err(error) => {
            let told = error.to_string();
            let (message, remedy) = told.split_once("\n  ").unwrap_or((&told, ""));
            Check::warning("virtiofs", message, remedy)
        }
    }
}

fn kvm(library: &Library) -> Check {
    match host::probe(library) {
        Ok(probe) if probe.usable => Check::ok("kvm", probe.message),
        Ok(probe) => Check::failed(
            "kvm",
            probe.message,
            "README.md, \"Install on real hardware\", says what a host needs.",
        ),
        Err(error) => Check::failed("kvm", error.to_string(), "Install flyrun and its parts from one build."),
    }
}

fn jail(library: &Library, paths: &Paths) -> Check {
    if vm::jail::is_on().is_ok_and(|on| !on) {
        let told = "flyrun-vmm is not jailed: whoever breaks out of a guest has this host";
        return Check::warning("jail", told, "Leave FLYRUN_JAIL=off away.");
    }
    match vm::jail::check(&library.path(Part::Vmm), paths) {
        Ok(told) => Check::ok("jail", told),
        Err(error) => {
            Check::failed("jail", error.to_string(), "ARCHITECTURE.md, \"Jail\", says what it takes.")
        }
    }
}

fn parts(library: &Library) -> Check {
    let missing: Vec<_> = Part::ALL.into_iter().filter(|part| !library.path(*part).is_file()).collect();
    if missing.is_empty() {
        return Check::ok("parts", library.directory().display().to_string());
    }
    let names: Vec<_> = missing.iter().map(|part| part.file_name()).collect();
    let message = format!("{} lacks {}", library.directory().display(), names.join(", "));
    Check::failed("parts", message, "Install flyrun with `make install`.")
}

/// The address of a unix socket holds 107 bytes (unix(7)).
fn vsock_room(paths: &Paths) -> Check {
    let longest = paths.run.join("unpack-00000000000000/j/s/v_4").as_os_str().len();
    if longest <= 107 {
        return Check::ok("sockets", format!("{} is short enough for sockets", paths.run.display()));
    }
    Check::failed(
        "sockets",
        format!("{} is too long for sockets", paths.run.display()),
        "Choose a shorter FLYRUN_RUN.",
    )
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match kib.map(|kib| Size(kib << 10)) {
        Some(size) if size >= WANTED_MEMORY => Check::ok("memory", format!("{size} available")),
        Some(size) => Check::warning(
            "memory",
            format!("{size} available"),
            "Small machines will run; end something for larger ones.",
        ),
        None => Check::warning("memory", "/proc/meminfo does not say", "Mount /proc."),
    }
}

fn directory(name: &'static str, path: &Path) -> Check {
    let probe = path.join(".doctor");
    let written = make_private_dir(path).is_ok() && std::fs::write(&probe, b"x").is_ok();
    let _ = std::fs::remove_file(&probe);
    if written {
        return Check::ok(name, format!("{} can be written", path.display()));
    }
    let remedy = "Run as a user who may write there, or choose another place with --root and FLYRUN_RUN.";
    Check::failed(name, format!("{} cannot be written", path.display()), remedy)
}

fn disk(path: &Path) -> Check {
    let Ok(stat) = rustix::fs::statvfs(path) else {
        return Check::warning(
            "disk",
            format!("cannot tell the room below {}", path.display()),
            "See the check above.",
        );
    };
    let free = Size(stat.f_bavail.saturating_mul(stat.f_frsize));
    if free >= WANTED_DISK {
        return Check::ok("disk", format!("{free} free below {}", path.display()));
    }
    Check::warning(
        "disk",
        format!("{free} free below {}", path.display()),
        "Make room, for instance with `flyrun prune --all`.",
    )
}

fn mke2fs() -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    match places.map(|place| place.join("mke2fs")).find(|file| file.is_file()) {
        Some(file) => Check::ok("mke2fs", file.display().to_string()),
        None => Check::failed("mke2fs", "mke2fs is not installed", "Install the package e2fsprogs."),
    }
}
