//! What `flyrun run` and `flyrun create` share: the flags, and the way from them to a machine in the store.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use images::{Image, PullOptions, Reference, Store};

use super::Context;
use super::limits::{PidsLimit, RateArguments, cpu_shares};
use crate::cpus::Cpus;
use crate::error::{Context as _, Error, Result, from_images};
use crate::guest_files::Contents;
use crate::launch::{self, ImageDefaults, Wishes};
use crate::machine::restart::RestartPolicy;
use crate::machine::{
    Config, Limits, LogLimits, MAX_DISK, MAX_LOG_FILES, MAX_STOP_TIMEOUT_S, MIN_LOG, Owned, Record, State,
    is_name, new_id,
};
use crate::mounts::Mounts;
use crate::paths::Library;
use crate::progress::Bars;
use crate::secrets::{Name, Secrets};
use crate::signal::Signal;
use crate::size::Size;
use crate::{host, image_limits, rootfs, share, terminal, trace, volume};

/// The least memory, in MiB, that the kernel, guest-init and a small process fit into.
pub const MIN_MEMORY_MIB: u64 = 48;
/// The most memory, in MiB: what the VMM's memory map allows.
const MAX_MEMORY_MIB: u64 = 1 << 20;
const MIN_DISK: Size = Size::mib(64);

/// A new machine
#[derive(Debug, Args)]
pub struct Flags {
    /// Remove the machine and its disk when it ends
    #[arg(long)]
    pub rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
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
    pub hostname: Option<String>,
    /// A name to speak of the machine by [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// CPUs, 0.01 to 32; with 1.5 the machine has two vCPUs and three quarters of their time
    #[arg(long, value_name = "N", default_value_t)]
    cpus: Cpus,
    /// Share of the CPU when machines compete for it, 2 to 262144 [default: 1024]
    #[arg(long, value_name = "N", value_parser = cpu_shares)]
    cpu_shares: Option<u32>,
    /// Most processes and threads of the workload; -1 for no limit
    #[arg(long, value_name = "N", default_value = "-1", allow_hyphen_values = true)]
    pids_limit: PidsLimit,
    #[command(flatten)]
    rates: RateArguments,
    /// Memory of the machine
    #[arg(short, long, value_name = "SIZE", default_value = "256m")]
    memory: Size,
    /// Size of the machine's own disk; it takes up only what is written
    #[arg(long, value_name = "SIZE", default_value = "10g")]
    disk: Size,
    /// Boot this kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Boot the kernel also where a base snapshot, of a machine of this size that has just booted, could take its place
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    pub network: super::network::NetworkArguments,
    /// Leave the root filesystem read-only, without a disk of the machine's own; the image's volumes are in memory then
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
    /// Mount a volume, made if there is none of this name, or a directory of the host (/DIR or ./DIR, by virtiofsd)
    #[arg(short, long, value_name = "NAME|/DIR:/PATH[:ro]")]
    volume: Vec<String>,
    /// Mount something: type=tmpfs,target=/PATH[,size=SIZE], type=volume,source=NAME,target=/PATH[,readonly] or
    /// type=bind,source=/DIR,target=/PATH[,readonly]
    #[arg(long, value_name = "KEY=VALUE,…")]
    mount: Vec<String>,
    /// Give the process the secrets of an app as variables, over others of the same name (`flyrun secrets`)
    #[arg(long, value_name = "APP")]
    secrets: Option<String>,
    #[command(flatten)]
    files: super::files::FileArguments,
    /// Start the machine again when it ends: no, on-failure[:N], always or unless-stopped
    #[arg(long, value_name = "POLICY", default_value_t)]
    restart: RestartPolicy,
    #[command(flatten)]
    health: super::health::HealthArguments,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// The signal that asks the process to end [default: the image's, or TERM]
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<Signal>,
    /// Seconds until a process that was asked to end is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=MAX_STOP_TIMEOUT_S as i64))]
    stop_timeout: u32,
    /// Where the output is kept: json-file or none
    #[arg(long, value_name = "DRIVER", default_value = "json-file")]
    log_driver: LogDriver,
    /// How much of it: max-size=SIZE, max-file=N
    #[arg(long, value_name = "KEY=VALUE")]
    log_opt: Vec<String>,
    /// Go on from a snapshot instead of an image, with what its process has in memory. Beside it only such flags can be given as
    /// change nothing in there: the name, --rm, the host name, labels, the network and its published ports
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = super::from_snapshot::FIXED)]
    pub from_snapshot: Option<String>,
    /// The image to run
    #[arg(required_unless_present = "from_snapshot")]
    image: Option<String>,
    /// Command and arguments, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// `--log-driver`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogDriver {
    JsonFile,
    None,
}

/// A machine that was made and is owned, with what starting it needs.
#[derive(Debug)]
pub struct Made {
    pub library: Library,
    pub store: Store,
    pub machine: Owned,
    /// Keeps the root filesystem until the machine itself holds it.
    pub _lease: images::RootfsLease,
}

/// Makes a machine: finds or pulls its image, unpacks it if that was never done, writes it down in this state.
///
/// # Errors
/// A flag cannot be followed, the image is not to be had, or this host cannot run machines.
pub fn make(context: &Context, flags: &Flags, state: State) -> Result<Made> {
    if let Some(snapshot) = &flags.from_snapshot {
        return super::from_snapshot::make(context, flags, snapshot);
    }
    check(flags)?;
    check_secrets(context, flags)?;
    share::prepare(&mounts(flags)?.shares)?;
    let library = Library::find()?;
    host::ensure_kvm(&library)?;
    trace::step("host checked");
    let store = context.store()?;
    let image = find_or_pull(&store, flags)?;
    trace::step("image found");
    let id = new_id()?;
    let record = Record { state, ..record(&image, flags, &id)? };
    make_volumes(context, &store, &record.config.volumes)?;
    let lease = rootfs::ensure(&store, &image, &library, &context.paths)?;
    trace::step("rootfs ready");
    let machine = context.machines().create(record)?;
    Ok(Made { library, store, machine, _lease: lease })
}

fn check(flags: &Flags) -> Result<()> {
    check_memory(flags.memory)?;
    if !(MIN_DISK..=MAX_DISK).contains(&flags.disk) {
        return Err(Error::new(format!("--disk {} is out of range", flags.disk))
            .advice("Choose between 64m and 16t."));
    }
    if let Some(name) = &flags.name {
        check_name(name)?;
    }
    limits(flags).check_network(&flags.network.wishes(&[])?).map_err(Error::new)?;
    if flags.rm && flags.restart != RestartPolicy::No {
        return Err(Error::new("--rm and --restart exclude each other")
            .advice("A machine that goes when it ends is not started again."));
    }
    Ok(())
}

/// What cannot be read or is not there is told before anything is made.
fn check_secrets(context: &Context, flags: &Flags) -> Result<()> {
    let files = flags.files.files()?;
    let secret = files.iter().find(|file| matches!(file.contents, Contents::Secret(_)));
    let Some(app) = &flags.secrets else {
        return match secret {
            Some(file) => {
                Err(Error::new(format!("{} is to be a secret, and of which app is not said", file.path))
                    .advice("Give --secrets APP too."))
            }
            None => Ok(()),
        };
    };
    let values = Secrets::new(&context.paths).read(app)?;
    if values.is_empty() {
        return Err(Error::new(format!("app '{app}' has no secrets"))
            .advice(format!("Set some: flyrun secrets set -a {app} NAME=- < FILE")));
    }
    let value = |name: &Name| Some(values.get(name)?.expose().as_bytes().to_vec());
    files.iter().try_for_each(|file| file.bytes(value).map(drop))
}

/// Whether a machine can have so much memory.
///
/// # Errors
/// It cannot.
pub fn check_memory(memory: Size) -> Result<()> {
    if (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory.to_mib()) {
        return Ok(());
    }
    Err(Error::new(format!("--memory {memory} is out of range"))
        .advice(format!("Choose between {MIN_MEMORY_MIB}m and {}g.", MAX_MEMORY_MIB >> 10)))
}

fn find_or_pull(store: &images::Store, flags: &Flags) -> Result<Image> {
    let name = flags.image.as_deref().unwrap_or_default();
    let reference =
        Reference::parse(name).map_err(|error| Error::caused(format!("'{name}' is not an image"), &error))?;
    let options = PullOptions {
        policy: flags.pull.into(),
        plain_http: flags.plain_http,
        ..image_limits::pull_options()?
    };
    let bars = Bars::on_stderr();
    images::pull(store, &reference, &options, &bars).map_err(|error| from_images(&error))
}

fn run_config(image: &Image, flags: &Flags, id: &str) -> Result<protocol::RunConfig> {
    let config = &image.config;
    let defaults = ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        user: config.user.clone(),
        working_dir: config.working_dir.clone(),
    };
    let wishes = Wishes {
        entrypoint: flags.entrypoint.clone(),
        command: flags.command.clone(),
        env: variables(&flags.env_file, &flags.env)?,
        user: flags.user.clone(),
        working_dir: flags.workdir.clone(),
        hostname: flags.hostname.clone().unwrap_or_else(|| id.to_string()),
        tty: flags.tty.then(terminal::size),
        stdin: flags.interactive,
        read_only: flags.read_only,
        tmpfs: tmpfs(image, flags)?,
    };
    let own_env = |key: &str| std::env::var(key).ok();
    launch::run_config(&defaults, &wishes, own_env).map_err(|error| Error::new(error.to_string()))
}

/// What was asked for, and where the image keeps data but cannot have its disk written.
fn tmpfs(image: &Image, flags: &Flags) -> Result<Vec<String>> {
    let mounts = mounts(flags)?;
    let mut tmpfs: Vec<String> = flags.tmpfs.iter().chain(&mounts.tmpfs).cloned().collect();
    let taken = |path: &str| {
        mounts.paths().any(|used| used == path)
            || tmpfs
                .iter()
                .any(|text| text.split(':').next().is_some_and(|own| own.trim_end_matches('/') == path))
    };
    let data = image.config.volumes.iter().map(|path| path.trim_end_matches('/'));
    let own: Vec<String> =
        data.filter(|path| flags.read_only && path.len() > 1 && !taken(path)).map(str::to_string).collect();
    tmpfs.extend(own);
    Ok(tmpfs)
}

/// The variables of files come first, so that those on the command line win.
pub fn variables(files: &[PathBuf], own: &[String]) -> Result<Vec<String>> {
    let mut variables = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file)
            .context(format!("cannot read the environment file {}", file.display()))?;
        variables.extend(launch::env_file_lines(&text));
    }
    variables.extend(own.iter().cloned());
    Ok(variables)
}

fn record(image: &Image, flags: &Flags, id: &str) -> Result<Record> {
    let Mounts { volumes, shares, .. } = mounts(flags)?;
    let config = Config {
        cpus: flags.cpus.count(),
        memory: flags.memory,
        disk: (!flags.read_only).then_some(flags.disk),
        kernel: flags.kernel.clone(),
        cold: flags.cold,
        run: run_config(image, flags, id)?,
        tty: flags.tty,
        auto_remove: flags.rm,
        restart: flags.restart,
        stop_signal: stop_signal(image, flags)?.0,
        stop_timeout_s: flags.stop_timeout,
        log: log_limits(flags)?,
        labels: labels(image, flags)?,
        volumes,
        shares,
        network: flags.network.wishes(&image.config.exposed_ports)?,
        secrets: flags.secrets.clone(),
        files: flags.files.files()?,
        health: flags.health.healthcheck(image.config.healthcheck.as_ref(), flags.network.has_network())?,
        limits: limits(flags),
    };
    let record = Record::new(id, &image.name, &image.chain_id.to_string(), config, State::Created);
    Ok(Record { name: flags.name.clone().unwrap_or_else(|| id.to_string()), ..record })
}

fn limits(flags: &Flags) -> Limits {
    let mut limits = Limits {
        cpu_milli: flags.cpus.quota_milli(),
        cpu_shares: flags.cpu_shares,
        pids: flags.pids_limit.0,
        ..Limits::default()
    };
    flags.rates.rates().apply(&mut limits);
    limits
}

/// What `--volume` and `--mount` ask for.
fn mounts(flags: &Flags) -> Result<Mounts> {
    let mut mounts = Mounts::default();
    let current = std::env::current_dir().context("there is no current directory")?;
    for text in &flags.volume {
        mounts.add_volume(text, &current)?;
    }
    for text in &flags.mount {
        mounts.add(text, &current)?;
    }
    let mut paths: Vec<_> = mounts.paths().collect();
    paths.sort_unstable();
    if let Some(twice) = paths.windows(2).find(|two| two.first() == two.last()).and_then(|two| two.first()) {
        return Err(Error::new(format!("two volumes or directories are to be mounted at {twice}"))
            .advice("Choose another path."));
    }
    let mut names: Vec<_> = mounts.volumes.iter().map(|used| used.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|two| two.first() == two.last()).and_then(|two| two.first()) {
        return Err(Error::new(format!("volume '{twice}' is to be mounted twice"))
            .advice("A volume has one place in a machine; use a symbolic link for the other."));
    }
    Ok(mounts)
}

fn make_volumes(context: &Context, store: &Store, wanted: &[volume::Use]) -> Result<()> {
    for used in wanted {
        if context.volumes().find(&used.name).is_err()
            && let Err(error) = context.volumes().create(store, &used.name, volume::DEFAULT_SIZE)
            // Another flyrun may have made it in this moment.
            && context.volumes().find(&used.name).is_err()
        {
            return Err(error);
        }
    }
    Ok(())
}

fn stop_signal(image: &Image, flags: &Flags) -> Result<Signal> {
    match (flags.stop_signal, &image.config.stop_signal) {
        (Some(signal), _) => Ok(signal),
        (None, None) => Ok(Signal::TERM),
        (None, Some(text)) => text.parse().map_err(|error| {
            Error::caused("the image's stop signal", &error).advice("Give another with --stop-signal.")
        }),
    }
}

/// The image's labels, and the user's over them.
fn labels(image: &Image, flags: &Flags) -> Result<BTreeMap<String, String>> {
    let mut labels = image.config.labels.clone();
    labels.extend(parse_labels(&flags.label)?);
    Ok(labels)
}

/// What `--label` says.
///
/// # Errors
/// One has no key.
pub fn parse_labels(words: &[String]) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for label in words {
        let (key, value) = label.split_once('=').unwrap_or((label, ""));
        if key.is_empty() {
            return Err(
                Error::new(format!("--label '{label}' has no key")).advice("Write KEY=VALUE, or KEY.")
            );
        }
        labels.insert(key.to_string(), value.to_string());
    }
    Ok(labels)
}

fn log_limits(flags: &Flags) -> Result<Option<LogLimits>> {
    let mut limits = LogLimits::default();
    for option in &flags.log_opt {
        let bad = |what: &str| {
            Error::new(format!("--log-opt '{option}': {what}"))
                .advice("Write max-size=SIZE (at least 16k) or max-file=N (1 to 100).")
        };
        match option.split_once('=') {
            Some(("max-size", size)) => {
                let size: Size = size.parse().map_err(|_| bad("not a size"))?;
                limits.max_size = if size >= MIN_LOG { size } else { return Err(bad("too small")) };
            }
            Some(("max-file", count)) => {
                let count = count.parse().ok().filter(|count| (1..=MAX_LOG_FILES).contains(count));
                limits.max_files = count.ok_or_else(|| bad("not a number of files"))?;
            }
            _ => return Err(bad("there is no such option")),
        }
    }
    Ok((flags.log_driver == LogDriver::JsonFile).then_some(limits))
}

/// Whether a machine may be called so.
///
/// # Errors
/// It may not.
pub fn check_name(name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(Error::new(format!("{name:?} cannot be a machine's name"))
        .advice("Use up to 63 letters, digits, '_', '.' and '-', a letter or digit first."))
}

/// A terminal needs one on this side too, where the workload is to be typed to.
pub fn check_terminal(interactive: bool, tty: bool) -> Result<()> {
    if tty && interactive && !std::io::stdin().is_terminal() {
        return Err(Error::new("-t with -i needs a terminal, and standard input is none")
            .advice("Leave -t away to pass a pipe or a file on."));
    }
    Ok(())
}
