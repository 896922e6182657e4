//! `flyrun pull`.

use clap::{Args, ValueEnum};
use images::{Platform, PullOptions, PullPolicy, Reference};
use serde::Serialize;

use super::{Context, print_json, print_line};
use crate::error::{Error, Result, from_images};
use crate::exit_code::ExitCode;
use crate::paths::Library;
use crate::progress::Bars;
use crate::{host, image_limits, rootfs};

/// Fetch an image and make it ready to run
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun pull alpine
  flyrun pull ghcr.io/me/app@sha256:0123…
  flyrun pull --plain-http registry.lan:5000/app
  flyrun pull docker-archive:saved.tar

Credentials come from docker's and podman's files and helpers (DOCKER_CONFIG, REGISTRY_AUTH_FILE).

Limits, from the environment:
  FLYRUN_PULL_STALL=30            seconds that a registry may be silent
  FLYRUN_PULL_MIN_RATE=1k         bytes per second that it has to send, on an average over these
  FLYRUN_PULL_REDIRECTS=HOST,…    hosts that it may send flyrun to although they are nearer to this host than it is itself
  FLYRUN_ROOTFS_MAX=64g           of an unpacked image's filesystem, 256m at least
  FLYRUN_UNPACK_TIMEOUT=3600      seconds that unpacking may take")]
pub struct Arguments {
    /// Fetch only: unpack the layers when the image first runs
    #[arg(long)]
    no_unpack: bool,
    /// Choose from a multi-platform image
    #[arg(long, value_name = "OS/ARCH", default_value = "linux/amd64")]
    platform: String,
    /// Allow a registry without TLS (one on loopback is always allowed)
    #[arg(long)]
    plain_http: bool,
    /// Print what was pulled as JSON
    #[arg(long)]
    json: bool,
    /// The image
    image: String,
}

/// When to ask an image's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum When {
    Missing,
    Always,
    Never,
}

impl From<When> for PullPolicy {
    fn from(when: When) -> PullPolicy {
        match when {
            When::Missing => PullPolicy::Missing,
            When::Always => PullPolicy::Always,
            When::Never => PullPolicy::Never,
        }
    }
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Pulled {
    name: String,
    manifest_digest: String,
    config_digest: String,
    chain_id: String,
    layers: usize,
    layer_bytes: u64,
    unpacked: bool,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let reference = Reference::parse(&arguments.image)
        .map_err(|error| Error::caused(format!("'{}' is not an image", arguments.image), &error))?;
    let platform = arguments.platform.parse::<Platform>().map_err(|error| from_images(&error))?;
    let store = context.store()?;
    let options = PullOptions {
        platform,
        plain_http: arguments.plain_http,
        policy: PullPolicy::Always,
        ..image_limits::pull_options()?
    };
    let image = images::pull(&store, &reference, &options, &Bars::on_stderr())
        .map_err(|error| from_images(&error))?;
    if !arguments.no_unpack {
        let library = Library::find()?;
        host::ensure_kvm(&library)?;
        rootfs::ensure(&store, &image, &library, &context.paths)?;
    }
    let pulled = Pulled {
        name: image.name.clone(),
        manifest_digest: image.manifest_digest.to_string(),
        config_digest: image.config_digest.to_string(),
        chain_id: image.chain_id.to_string(),
        layers: image.layers.len(),
        layer_bytes: image.layer_bytes(),
        unpacked: !arguments.no_unpack,
    };
    if arguments.json {
        return print_json(&pulled);
    }
    print_line(&format!("{}@{}", pulled.name, pulled.manifest_digest))?;
    Ok(ExitCode::Success)
}
