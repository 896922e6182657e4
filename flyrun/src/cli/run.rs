//! `flyrun run`: from an image's name to the exit code of its process.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use images::{Image, PullOptions, Reference};
use protocol::BootConfig;
use vmm::spec::DiskSpec;

use super::Context;
use crate::error::{Context as _, Error, Result, from_images};
use crate::exit_code::ExitCode;
use crate::foreground::{self, Foreground};
use crate::launch::{self, ImageDefaults, Wishes};
use crate::machine::{Ended, Owned, Record, State, VERSION, is_name, new_id};
use crate::paths::{Library, Part};
use crate::progress::Bars;
use crate::size::Size;
use crate::vm::{Input, Output, Streams, VmPlan};
use crate::{host, network, rootfs, terminal, trace};

/// The least memory, in MiB, that the kernel, guest-init and a small process fit into.
const MIN_MEMORY_MIB: u64 = 48;
/// The most memory, in MiB: what the VMM's memory map allows.
const MAX_MEMORY_MIB: u64 = 1 << 20;
const MIN_DISK: Size = Size::mib(64);
const MAX_DISK: Size = Size::gib(16 << 10);
/// Bytes of the host's randomness that each guest starts with.
const ENTROPY_BYTES: usize = 64;

/// Run an image's process in a new machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun run --rm alpine echo hello
  flyrun run -it debian bash
  echo hi | flyrun run --rm -i busybox cat
  flyrun run --rm --memory 1g --cpus 2 -e POSTGRES_PASSWORD=x postgres
  flyrun run --rm oci-archive:app.tar

IMAGE is a name (alpine, ghcr.io/a/b:1, localhost:5000/x), docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:TAG], docker-daemon:NAME, or the path of such a directory or file.")]
pub struct Arguments {
    /// Remove the machine and its disk when it ends
    #[arg(long)]
    rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable, or pass one of your own on
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read variables from a file, one on each line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Start in this directory; it is made if it does not exist
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run as this user, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Run this instead of the image's entrypoint; "" for none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The machine's host name [default: its id]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// A name to speak of the machine by [default: its id]
    #[arg(long)]
    name: Option<String>,
    /// Number of vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// Memory of the machine
    #[arg(short, long, value_name = "SIZE", default_value = "256m")]
    memory: Size,
    /// Size of the machine's own disk; it takes up only what is written
    #[arg(long, value_name = "SIZE", default_value = "10g")]
    disk: Size,
    /// Boot this kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    network: super::network::NetworkArguments,
    /// Leave the root filesystem read-only, without a disk of the machine's own
    #[arg(long)]
    read_only: bool,
    /// Mount a memory filesystem
    #[arg(long, value_name = "/PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// When to ask the image's source: missing, always or never
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pull: super::pull::When,
    /// Allow a registry without TLS (one on loopback is always allowed)
    #[arg(long)]
    plain_http: bool,
    /// Show guest-init's steps and the kernel's console on standard error
    #[arg(long)]
    init_log: bool,
    /// The image to run
    image: String,
    /// Command and arguments, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    check(arguments)?;
    let library = Library::find()?;
    host::ensure_kvm(&library)?;
    trace::step("host checked");
    let store = context.store()?;
    let image = find_or_pull(&store, arguments)?;
    trace::step("image found");
    let lease = rootfs::ensure(&store, &image, &library, &context.paths)?;
    trace::step("rootfs ready");

    let id = new_id()?;
    let boot = boot_config(&image, arguments, &id)?;
    let mut machine = context.machines().create(record(&image, arguments, &id))?;
    let started = start(context, &store, arguments, &library, boot, &machine, lease.path());
    let result = started.and_then(|(foreground, network)| {
        let end = foreground.wait();
        drop(network);
        end
    });
    trace::step("ended");
    conclude(&mut machine, &result)?;
    if arguments.rm {
        machine.remove()?;
    }
    // The slow part of keeping house is done when nobody waits for it any more.
    context.machines().remove_ended(Ended::Leftovers)?;
    context.paths.sweep_run_dirs();
    network::sweep(&context.paths, &|id| context.machines().is_owned(id))?;
    result.and_then(|end| end.report())
}

fn check(arguments: &Arguments) -> Result<()> {
    let memory = arguments.memory.to_mib();
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory) {
        return Err(Error::new(format!("--memory {} is out of range", arguments.memory))
            .advice(format!("Choose between {MIN_MEMORY_MIB}m and {}g.", MAX_MEMORY_MIB >> 10)));
    }
    if !(MIN_DISK..=MAX_DISK).contains(&arguments.disk) {
        return Err(Error::new(format!("--disk {} is out of range", arguments.disk))
            .advice("Choose between 64m and 16t."));
    }
    if let Some(name) = arguments.name.as_ref().filter(|name| !is_name(name)) {
        return Err(Error::new(format!("'{name}' cannot be a machine's name"))
            .advice("Use up to 63 letters, digits, '_', '.' and '-', a letter or digit first."));
    }
    if arguments.tty && arguments.interactive && !std::io::stdin().is_terminal() {
        return Err(Error::new("-t with -i needs a terminal, and standard input is none")
            .advice("Leave -t away to pass a pipe or a file on."));
    }
    Ok(())
}

fn find_or_pull(store: &images::Store, arguments: &Arguments) -> Result<Image> {
    let reference = Reference::parse(&arguments.image)
        .map_err(|error| Error::caused(format!("'{}' is not an image", arguments.image), &error))?;
    let options = PullOptions {
        policy: arguments.pull.into(),
        plain_http: arguments.plain_http,
        ..PullOptions::default()
    };
    let bars = Bars::on_stderr();
    images::pull(store, &reference, &options, &bars).map_err(|error| from_images(&error))
}

fn boot_config(image: &Image, arguments: &Arguments, id: &str) -> Result<BootConfig> {
    let config = &image.config;
    let defaults = ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        user: config.user.clone(),
        working_dir: config.working_dir.clone(),
    };
    let wishes = Wishes {
        entrypoint: arguments.entrypoint.clone(),
        command: arguments.command.clone(),
        env: variables(arguments)?,
        user: arguments.user.clone(),
        working_dir: arguments.workdir.clone(),
        hostname: arguments.hostname.clone().unwrap_or_else(|| id.to_string()),
        tty: arguments.tty.then(terminal::size),
        stdin: arguments.interactive,
        read_only: arguments.read_only,
        tmpfs: arguments.tmpfs.clone(),
        init_log: arguments.init_log,
    };
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy).context("the host has no random numbers")?;
    let own_env = |key: &str| std::env::var(key).ok();
    let config = launch::run_config(&defaults, &wishes, own_env, entropy)
        .map_err(|error| Error::new(error.to_string()))?;
    Ok(BootConfig::Run(Box::new(config)))
}

/// The variables of files come first, so that those on the command line win.
fn variables(arguments: &Arguments) -> Result<Vec<String>> {
    let mut variables = Vec::new();
    for file in &arguments.env_file {
        let text = std::fs::read_to_string(file)
            .context(format!("cannot read the environment file {}", file.display()))?;
        variables.extend(launch::env_file_lines(&text));
    }
    variables.extend(arguments.env.iter().cloned());
    Ok(variables)
}

fn record(image: &Image, arguments: &Arguments, id: &str) -> Record {
    Record {
        version: VERSION,
        id: id.to_string(),
        name: arguments.name.clone().unwrap_or_else(|| id.to_string()),
        image: image.name.clone(),
        chain_id: image.chain_id.to_string(),
        cpus: arguments.cpus,
        memory: arguments.memory,
        disk: (!arguments.read_only).then_some(arguments.disk),
        auto_remove: arguments.rm,
        state: State::Started,
        created_at: seconds_since_epoch(),
        outcome: None,
    }
}

fn start(
    context: &Context,
    store: &images::Store,
    arguments: &Arguments,
    library: &Library,
    mut boot: BootConfig,
    machine: &Owned,
    rootfs: &std::path::Path,
) -> Result<(Foreground, Option<network::Attached>)> {
    let record = machine.record();
    let mut network = network::set_up(&context.paths, &record.id, &record.name, &arguments.network.wishes())?;
    if let (BootConfig::Run(config), Some(network)) = (&mut boot, &network) {
        config.network = Some(network.config.clone());
    }
    trace::step("network made");
    let mut disks = vec![DiskSpec { files: vec![rootfs.to_path_buf()], read_only: true }];
    if !arguments.read_only {
        let disk = machine.directory().join("disk.ext4");
        store
            .copy_template(images::TemplateKind::Disk, arguments.disk.0, &disk)
            .map_err(|error| from_images(&error))?;
        disks.push(DiskSpec { files: vec![disk], read_only: false });
    }
    trace::step("disk made");
    let kernel = if arguments.cpus == 1 { Part::Kernel } else { Part::KernelSmp };
    let plan = VmPlan {
        vmm: library.path(Part::Vmm),
        kernel: arguments.kernel.clone().unwrap_or_else(|| library.path(kernel)),
        initramfs: library.path(Part::InitramfsRun),
        cpus: arguments.cpus,
        memory_mib: u32::try_from(arguments.memory.to_mib()).unwrap_or(u32::MAX),
        disks,
        nets: network.iter().map(|network| network.card.clone()).collect(),
        boot,
        console: (!arguments.init_log).then(|| machine.directory().join("console.log")),
        streams: Some(Streams {
            input: if arguments.interactive { Input::Own } else { Input::None },
            output: if arguments.tty { Output::Terminal } else { Output::Separate },
        }),
    };
    let run_dir = context.paths.make_run_dir(&machine.record().id)?;
    // A trace is written when the VMM ends by itself, so that is waited for too.
    let keeps_disk = !arguments.rm && !arguments.read_only;
    let foreground = foreground::start(&plan, run_dir, keeps_disk || trace::vmm_file().is_some())?;
    if let Some(network) = &mut network {
        network.wait_ready()?;
    }
    Ok((foreground, network))
}

/// Writes down how the machine ended, unless it is about to go.
fn conclude(machine: &mut Owned, result: &Result<foreground::End>) -> Result<()> {
    if machine.record().auto_remove {
        return Ok(());
    }
    let outcome = match result {
        Ok(end) => end.outcome(seconds_since_epoch()),
        Err(error) => foreground::outcome_of_error(error, seconds_since_epoch()),
    };
    machine.update(|record| {
        record.state = if outcome.error.is_some() { State::Failed } else { State::Stopped };
        record.outcome = Some(outcome);
    })
}

fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
