//! From an app's file and its image to the record of a machine: what `flyrun create` does with flags.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use app::config::model::{App, CpuKind, Group, Vm};
use images::{Image, PullOptions, PullPolicy, Reference};
use sha2::{Digest, Sha256};

use super::host::Host;
use crate::apps::AppFile;
use crate::error::{Error, Result, from_images};
use crate::launch::{self, ImageDefaults, Wishes};
use crate::machine::restart::RestartPolicy;
use crate::machine::{Config, Limits, LogLimits, Record, State, is_name};
use crate::progress::Bars;
use crate::secrets::{Listed, Secrets};
use crate::size::Size;
use crate::{guest_files, image_limits, network, rootfs, volume};

/// Labels that tell whose a machine is.
pub const APP: &str = "flyrun.app";
/// The group of `[processes]`.
pub const GROUP: &str = "flyrun.group";
/// Its number in the group, from 0.
pub const SLOT: &str = "flyrun.slot";
/// Which [`Template::version`] it was made from.
pub const MACHINE_VERSION: &str = "flyrun.version";

/// The size of a machine's own disk; it takes up only what is written.
const DISK: Size = Size::gib(10);
/// A performance CPU's weight against other machines'; a shared one has the kernel's own, 1024.
const PERFORMANCE_SHARES: u32 = 8192;
/// The host name in a template; each machine has its own.
const NO_NAME: &str = "machine";
/// The group that a machine of `release_command` is told to be of.
const RELEASE: &str = "release";
const VERSION_DIGITS: usize = 16;

/// What all machines of a group are made from.
#[derive(Clone, Debug)]
pub struct Template {
    pub app: Arc<str>,
    pub group: Arc<str>,
    /// Tells whether two templates make the same machines: a digest of all that is in them.
    pub version: String,
    /// The number of the first slot's machine: those of a deploy have other names than those that they replace.
    pub first: usize,
    region: String,
    image: String,
    chain_id: String,
    config: Config,
    /// Volumes with the size that they are made in.
    volumes: Vec<(String, Size)>,
}

/// What an app's machines are made from.
#[derive(Clone, Debug)]
pub struct Templates {
    /// By the group's name.
    pub groups: BTreeMap<Arc<str>, Template>,
    /// For `[deploy] release_command`.
    pub release: Option<Template>,
}

/// The templates of an app's groups. Fetches and unpacks its image where that was never done. Blocks.
///
/// # Errors
/// The image is not to be had, or makes no process together with the file, or the file wants what cannot be done.
pub fn of_app(host: &Host, file: &AppFile, policy: PullPolicy) -> Result<Templates> {
    let app = &file.app;
    let reference = Reference::parse(&app.image)
        .map_err(|error| Error::caused(format!("'{}' is not an image", app.image), &error))?;
    let bars = Bars::on_stderr();
    let options = PullOptions { policy, ..image_limits::pull_options()? };
    let image =
        images::pull(&host.store, &reference, &options, &bars).map_err(|error| from_images(&error))?;
    drop(rootfs::ensure(&host.store, &image, &host.library, &host.context.paths)?);
    let secrets = Secrets::new(&host.context.paths).list(&app.name)?;
    let template = |name: &str, group: &Group| Template::new(file, name, group, &image, &secrets);
    let groups =
        app.groups.iter().map(|(name, group)| Ok((Arc::from(name.as_str()), template(name, group)?)));
    let release = match (&app.deploy.release_command, app.groups.values().next()) {
        (Some(command), Some(group)) => {
            let group = Group { command: command.clone(), mounts: Vec::new(), ..group.clone() };
            Some(template(RELEASE, &group)?)
        }
        _ => None,
    };
    Ok(Templates { groups: groups.collect::<Result<_>>()?, release })
}

impl Template {
    fn new(file: &AppFile, name: &str, group: &Group, image: &Image, secrets: &[Listed]) -> Result<Template> {
        let app = &file.app;
        let mut config = config(app, name, group, image)?;
        config.secrets = (!secrets.is_empty()).then(|| app.name.clone());
        config.files = guest_files::of_group(group, Path::new(&file.name))?;
        let mut template = Template {
            app: Arc::from(app.name.as_str()),
            group: Arc::from(name),
            version: String::new(),
            first: 0,
            region: app.primary_region.clone(),
            image: image.name.clone(),
            chain_id: image.chain_id.to_string(),
            config,
            volumes: group
                .mounts
                .iter()
                .map(|mount| (mount.source.clone(), Size(mount.initial_size.0)))
                .collect(),
        };
        template.version = template.digest(secrets)?;
        Ok(template)
    }

    /// Secrets are told by their digests, so that machines with other values are replaced.
    fn digest(&self, secrets: &[Listed]) -> Result<String> {
        let secrets: Vec<_> = secrets.iter().map(|secret| (&secret.name, &secret.digest)).collect();
        let told = (&self.region, &self.image, &self.chain_id, &self.config, secrets);
        let bytes = serde_json::to_vec(&told).map_err(|error| Error::caused("cannot write JSON", &error))?;
        let digest = Sha256::digest(&bytes);
        let mut text: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        text.truncate(VERSION_DIGITS);
        Ok(text)
    }

    /// What each machine takes of the host's memory, in MiB.
    pub fn memory_mib(&self) -> u64 {
        self.config.memory.to_mib()
    }

    pub fn cpus(&self) -> u8 {
        self.config.cpus
    }

    /// What a slot's machine is called.
    pub fn name(&self, slot: usize) -> String {
        self.name_of(self.first + slot)
    }

    /// What a machine of this number is called.
    pub fn name_of(&self, number: usize) -> String {
        machine_name(&self.app, &self.group, number)
    }

    /// Whether its machines have volumes, which one machine can have at a time.
    pub fn has_volumes(&self) -> bool {
        !self.volumes.is_empty()
    }

    /// What the snapshot is called that further machines begin with.
    pub fn snapshot_name(&self) -> String {
        let name = format!("{}-{}-{}", self.app, self.group, self.version);
        // Where that is no name, the version alone tells.
        if is_name(&name) { name } else { self.version.clone() }
    }

    /// Makes the volumes that there are not.
    ///
    /// # Errors
    /// The system's.
    pub fn make_volumes(&self, host: &Host) -> Result<()> {
        let volumes = host.context.volumes();
        for (name, size) in &self.volumes {
            if volumes.find(name).is_err()
                && let Err(error) = volumes.create(&host.store, name, *size)
                // Another flyrun may have made it in this moment.
                && volumes.find(name).is_err()
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// The record of a slot's machine, which is about to start.
    pub fn record(&self, slot: usize, id: &str) -> Record {
        let mut config = self.config.clone();
        config.run.hostname = id.to_string();
        for entry in config.run.env.iter_mut().filter(|entry| **entry == format!("HOSTNAME={NO_NAME}")) {
            *entry = format!("HOSTNAME={id}");
        }
        self.own_env(id).into_iter().for_each(|entry| launch::set(&mut config.run.env, entry));
        for (label, value) in [
            (APP, self.app.to_string()),
            (GROUP, self.group.to_string()),
            (SLOT, (self.first + slot).to_string()),
            (MACHINE_VERSION, self.version.clone()),
        ] {
            config.labels.insert(label.to_string(), value);
        }
        let record = Record::new(id, &self.image, &self.chain_id, config, State::Starting);
        Record { name: self.name(slot), ..record }
    }

    /// What Fly.io tells each machine about itself. Its addresses are not among it: they can differ from one start to the next.
    fn own_env(&self, id: &str) -> Vec<String> {
        vec![
            format!("FLY_APP_NAME={}", self.app),
            format!("FLY_MACHINE_ID={id}"),
            format!("FLY_ALLOC_ID={id}"),
            format!("FLY_REGION={}", self.region),
            format!("PRIMARY_REGION={}", self.region),
            format!("FLY_IMAGE_REF={}", self.image),
            format!("FLY_MACHINE_VERSION={}", self.version),
            format!("FLY_PROCESS_GROUP={}", self.group),
            format!("FLY_VM_MEMORY_MB={}", self.memory_mib()),
        ]
    }

    /// Makes a record that was copied from another machine's this slot's: what a process is told when it boots the next time.
    pub fn adapt(&self, record: &mut Record, slot: usize) {
        let own = self.record(slot, &record.id);
        record.name = own.name;
        record.config.labels = own.config.labels;
        record.config.run.hostname = own.config.run.hostname;
        record.config.run.env = own.config.run.env;
    }
}

/// What a slot's machine is called: short enough for a name, and another for each slot.
fn machine_name(app: &str, group: &str, slot: usize) -> String {
    let name = format!("{app}-{group}-{slot}");
    if is_name(&name) {
        return name;
    }
    let digest = Sha256::digest(format!("{app}/{group}").as_bytes());
    let digits: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // An app's name is of letters, digits and dashes.
    let app: String = app.chars().take(40).collect();
    format!("{app}-{digits}-{slot}")
}

fn config(app: &App, name: &str, group: &Group, image: &Image) -> Result<Config> {
    let told = |error: launch::LaunchError| Error::new(format!("app {}, group {name}: {error}", app.name));
    let defaults = ImageDefaults {
        entrypoint: image.config.entrypoint.clone(),
        cmd: image.config.cmd.clone(),
        env: image.config.env.clone(),
        user: image.config.user.clone(),
        working_dir: image.config.working_dir.clone(),
    };
    let wishes = Wishes {
        command: group.command.clone(),
        env: app.env.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        hostname: NO_NAME.to_string(),
        ..Wishes::default()
    };
    let run = launch::run_config(&defaults, &wishes, |_| None).map_err(told)?;
    let Vm { cpu_kind, cpus, memory } = group.vm;
    let volumes = group.mounts.iter().map(|mount| volume::Use {
        name: mount.source.clone(),
        path: mount.destination.clone(),
        read_only: false,
    });
    Ok(Config {
        cpus,
        memory: Size(memory.0),
        disk: Some(DISK),
        kernel: None,
        cold: false,
        run,
        tty: false,
        auto_remove: false,
        // Whether and when it starts again its pool decides.
        restart: RestartPolicy::No,
        stop_signal: app.kill_signal.number(),
        stop_timeout_s: u32::try_from(app.kill_timeout.as_millis().div_ceil(1000)).unwrap_or(u32::MAX),
        log: Some(LogLimits::default()),
        labels: image.config.labels.clone(),
        volumes: volumes.collect(),
        shares: Vec::new(),
        network: network::Wishes::default(),
        secrets: None,
        files: Vec::new(),
        // The services' checks take the place of the image's own.
        health: None,
        limits: Limits {
            cpu_shares: (cpu_kind == CpuKind::Performance).then_some(PERFORMANCE_SHARES),
            ..Limits::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The template of the group `app` of a file with these lines.
    fn template(more: &str) -> Template {
        let text = format!("app = 'web'\nbuild.image = 'nginx'\n{more}");
        let file = app::config::read("fly.toml", text.as_bytes()).unwrap();
        let digest = || format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let config = images::ImageConfig {
            entrypoint: vec!["/nginx".to_string()],
            env: vec!["FLY_REGION=mars".to_string(), "A=1".to_string()],
            ..images::ImageConfig::default()
        };
        let image = Image {
            name: "docker.io/library/nginx:latest".to_string(),
            manifest_digest: digest(),
            config_digest: digest(),
            config,
            layers: Vec::new(),
            chain_id: digest(),
        };
        Template::new(&file, "app", &file.app.groups["app"], &image, &[]).unwrap()
    }

    #[test]
    fn a_machine_is_told_who_it_is() {
        let record = template("primary_region = 'fra'\nenv.A = '2'").record(3, "0123456789abcd");
        assert_eq!((record.name.as_str(), record.state), ("web-app-3", State::Starting));
        let env = &record.config.run.env;
        for variable in [
            "A=2",
            "HOSTNAME=0123456789abcd",
            "FLY_MACHINE_ID=0123456789abcd",
            "FLY_REGION=fra",
            "FLY_APP_NAME=web",
        ] {
            assert_eq!(env.iter().filter(|known| *known == variable).count(), 1, "{variable}: {env:?}");
        }
        assert!(!env.iter().any(|known| known == "FLY_REGION=mars"), "{env:?}");
        assert_eq!(record.config.labels[SLOT], "3");
        assert_eq!(record.config.restart, RestartPolicy::No);
    }

    #[test]
    fn what_makes_other_machines_is_another_version_and_nothing_else_is() {
        let version = |more: &str| template(more).version;
        let plain = version("");
        assert_eq!(plain.len(), VERSION_DIGITS);
        for same in
            ["flyrun.idle_timeout = 7", "[http_service]\ninternal_port = 7", "flyrun.max_machines = 3"]
        {
            assert_eq!(version(same), plain, "{same}");
        }
        for other in ["env.A = '2'", "vm.memory = 512", "kill_timeout = 9", "primary_region = 'fra'"] {
            assert_ne!(version(other), plain, "{other}");
        }
    }

    #[test]
    fn a_record_that_was_another_slot_s_becomes_this_one_s() {
        let template = template("");
        let mut record = template.record(0, "0123456789abcd");
        record.id = "fedcba98765432".to_string();
        record.config.labels.insert("flyrun.golden".to_string(), String::new());
        template.adapt(&mut record, 2);
        let own = template.record(2, "fedcba98765432");
        assert_eq!((record.name, record.config.labels), (own.name, own.config.labels));
        assert_eq!(record.config.run, own.config.run);
    }

    #[test]
    fn machines_are_called_by_app_group_and_slot() {
        assert_eq!(machine_name("web", "app", 0), "web-app-0");
        let long = "a".repeat(63);
        let (one, two) = (machine_name(&long, "app", 7), machine_name(&long, "worker", 7));
        assert!(is_name(&one) && is_name(&two) && one != two && one.ends_with("-7"), "{one} {two}");
    }
}
