//! `--from-snapshot`: a machine that goes on where another was.

use super::Context;
use super::new_machine::{Flags, Made, check_name, parse_labels};
use crate::error::{Error, Result, from_images};
use crate::host;
use crate::launch::is_hostname;
use crate::machine::restart::RestartPolicy;
use crate::machine::{Patience, Record, State, new_id};
use crate::paths::Library;
use crate::snapshot;

/// Flags that would change what is in the snapshot, or what its machine was made with.
pub const FIXED: [&str; 45] = [
    "image",
    "command",
    "entrypoint",
    "env",
    "env_file",
    "workdir",
    "user",
    "cpus",
    "cpu_shares",
    "memory",
    "pids_limit",
    "disk",
    "disk_bandwidth",
    "disk_iops",
    "net_bandwidth",
    "net_packets",
    "kernel",
    "cold",
    "read_only",
    "tmpfs",
    "volume",
    "mount",
    "secrets",
    "file_literal",
    "file_local",
    "file_secret",
    "publish_all",
    "dns",
    "add_host",
    "net_backend",
    "pull",
    "plain_http",
    "restart",
    "health_cmd",
    "health_http",
    "health_interval",
    "health_timeout",
    "health_retries",
    "health_start_period",
    "health_start_interval",
    "no_healthcheck",
    "stop_signal",
    "stop_timeout",
    "log_driver",
    "log_opt",
];

/// Makes a machine from a snapshot, suspended where that was taken.
///
/// # Errors
/// There is no such snapshot, a flag cannot be followed, or this host cannot run machines. Nothing is left then.
pub fn make(context: &Context, flags: &Flags, name: &str) -> Result<Made> {
    let source = context.snapshots().find(name)?;
    let record = record(&source.machine, flags)?;
    let library = Library::find()?;
    host::ensure_kvm(&library)?;
    let store = context.store()?;
    let chain_id = source.machine.chain_id.parse();
    let lease = match chain_id {
        Ok(chain_id) => store.hold_rootfs(&chain_id).map_err(|error| from_images(&error))?,
        Err(_) => None,
    };
    let lease = lease.ok_or_else(|| {
        Error::new(format!("the root filesystem of snapshot '{name}' is gone"))
            .advice("Import the snapshot again, from an export that has it.")
    })?;
    let directory = context.snapshots().directory_of(&source.id);
    let made = context.machines().create_filled(record, |target| snapshot::copy(&directory, target));
    let machine = made.map_err(|error| match directory.exists() {
        true => error,
        false => Error::new(format!("snapshot '{name}' was removed in this moment")),
    })?;
    Ok(Made { library, store, machine, _lease: lease })
}

/// Removes a machine that could not even try to go on: all it had is in the snapshot still.
pub fn undo(context: &Context, id: &str) {
    if let Ok(Some(machine)) = context.machines().acquire(id, Patience::Wait)
        && machine.record().state == State::Suspended
        && let Err(error) = machine.remove()
    {
        anstream::eprintln!("flyrun: {error}");
    }
}

fn record(source: &Record, flags: &Flags) -> Result<Record> {
    if let Some(name) = &flags.name {
        check_name(name)?;
    }
    let mut record = snapshot::offspring(source, &new_id()?, flags.name.as_deref());
    let config = &mut record.config;
    if let Some(hostname) = &flags.hostname {
        if !is_hostname(hostname) {
            return Err(Error::new(format!("--hostname {hostname:?} is not a host name"))
                .advice("Use letters, digits, '-' and '.'."));
        }
        config.run.hostname.clone_from(hostname);
    }
    let lacks = |what: &str, flag: &str| {
        Error::new(format!("the snapshot's process has no {what}, and gets none"))
            .advice(format!("Leave {flag} away, or take the snapshot of a machine that was made with it."))
    };
    if flags.interactive && !config.run.stdin {
        return Err(lacks("standard input", "-i"));
    }
    if flags.tty && !config.tty {
        return Err(lacks("terminal", "-t"));
    }
    flags.network.change(&mut config.network)?;
    config.labels.extend(parse_labels(&flags.label)?);
    config.auto_remove = flags.rm;
    if flags.rm {
        config.restart = RestartPolicy::No;
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;
    use crate::network::Mode;

    fn flags(words: &[&str]) -> std::result::Result<Flags, clap::Error> {
        let command = Flags::augment_args(clap::Command::new("run"));
        Flags::from_arg_matches(&command.try_get_matches_from([&["run"], words].concat())?)
    }

    fn made(source: &Record, words: &[&str]) -> Result<Record> {
        record(source, &flags(&[&["--from-snapshot", "s"], words].concat()).unwrap())
    }

    #[test]
    fn what_would_change_the_workload_is_refused_by_name() {
        for words in [
            &["-e", "A=1"][..],
            &["--memory", "1g"],
            &["--entrypoint", "x"],
            &["-v", "a:/b"],
            &["--read-only"],
        ] {
            let told = flags(&[&["--from-snapshot", "s"], words].concat()).unwrap_err().to_string();
            assert!(told.contains("--from-snapshot") && told.contains("cannot be used with"), "{told}");
        }
        let told = flags(&["--from-snapshot", "s", "busybox", "true"]).unwrap_err().to_string();
        assert!(told.contains("IMAGE"), "{told}");
        assert!(flags(&[]).is_err() && flags(&["busybox"]).is_ok());
    }

    #[test]
    fn each_flag_is_refused_or_followed() {
        let followed =
            ["rm", "interactive", "tty", "hostname", "name", "mode", "publish", "label", "from_snapshot"];
        let command = Flags::augment_args(clap::Command::new("run"));
        let mut all: Vec<_> = command.get_arguments().map(|flag| flag.get_id().as_str()).collect();
        let mut known = [&FIXED[..], &followed].concat();
        all.sort_unstable();
        known.sort_unstable();
        assert_eq!(all, known);
    }

    #[test]
    fn what_is_the_hosts_can_be_chosen() {
        let mut source = Record::example("web");
        source.config.restart = RestartPolicy::Always;
        source.config.network.publish = crate::network::publish::parse("8080:80").unwrap();
        let same = made(&source, &[]).unwrap();
        assert_eq!((same.config.restart, same.config.network.publish[0].host), (RestartPolicy::Always, 0));
        assert_ne!(same.id, source.id);
        let words =
            ["--name", "two", "--rm", "-p", "9090:90", "--network", "shop", "-l", "a=b", "--hostname", "h"];
        let other = made(&source, &words).unwrap();
        assert_eq!((other.name.as_str(), other.config.run.hostname.as_str()), ("two", "h"));
        assert_eq!((other.config.auto_remove, other.config.restart), (true, RestartPolicy::No));
        assert_eq!((other.config.network.publish.len(), other.config.network.publish[0].host), (1, 9090));
        assert_eq!(other.config.network.mode, Mode::Named("shop".into()));
        assert_eq!(other.config.labels["a"], "b");
    }

    #[test]
    fn what_the_process_has_not_it_does_not_get() {
        let mut source = Record::example("web");
        for (words, what) in
            [(&["-i"][..], "standard input"), (&["-t"], "terminal"), (&["--network", "none"], "card")]
        {
            assert!(made(&source, words).unwrap_err().to_string().contains(what));
        }
        source.config.network.mode = Mode::None;
        for words in [&["--network", "default"][..], &["-p", "80"]] {
            assert!(made(&source, words).is_err(), "{words:?}");
        }
        source.config.run.stdin = true;
        assert!(made(&source, &["-i", "--network", "none"]).is_ok());
    }
}
