//! From an image's configuration and the user's flags to what the guest is told: a pure function.
//!
//! Where both speak, the rules are those of the OCI image specification (config.md) and of `docker run`.

use protocol::{RunConfig, Tmpfs, TtySize};
use thiserror::Error;

/// PATH of a workload whose image sets none; docker's.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The part of an image's configuration that a launch needs.
#[derive(Clone, Debug, Default)]
pub struct ImageDefaults {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub working_dir: String,
}

/// What the user asked for on the command line.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// `--entrypoint`; an empty string removes the image's.
    pub entrypoint: Option<String>,
    /// The words behind the image.
    pub command: Vec<String>,
    /// `-e` and `--env-file`, in order: `K=V`, or `K` to take the value over from flyrun's own environment.
    pub env: Vec<String>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
    pub hostname: String,
    pub tty: Option<TtySize>,
    pub stdin: bool,
    pub read_only: bool,
    /// `--tmpfs /path[:options]`.
    pub tmpfs: Vec<String>,
}

/// Why image and flags together make no process.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LaunchError {
    #[error("the image has no command, and none was given: add one behind the image's name")]
    NoCommand,
    #[error("'{0}' is not an environment variable: write KEY=VALUE, or KEY to pass the one you have")]
    BadVariable(String),
    #[error("--tmpfs '{0}': write an absolute path, and options behind a colon, such as /tmp:size=64m")]
    BadTmpfs(String),
    #[error("--workdir '{0}' is not an absolute path")]
    BadWorkingDir(String),
    #[error("--hostname '{0}' is not a host name: up to 63 letters, digits, dots and hyphens")]
    BadHostname(String),
}

/// What guest-init is told. The first disk is the root filesystem, the second, unless read-only, the machine's own.
///
/// # Errors
/// [`LaunchError`] names the flag that cannot be followed.
pub fn run_config(
    image: &ImageDefaults,
    wishes: &Wishes,
    own_env: impl Fn(&str) -> Option<String>,
) -> Result<RunConfig, LaunchError> {
    let workdir = wishes.working_dir.clone().unwrap_or_else(|| image.working_dir.clone());
    if !workdir.is_empty() && !workdir.starts_with('/') {
        return Err(LaunchError::BadWorkingDir(workdir));
    }
    if !is_hostname(&wishes.hostname) {
        return Err(LaunchError::BadHostname(wishes.hostname.clone()));
    }
    Ok(RunConfig {
        rootfs: "/dev/vda".into(),
        disk: (!wishes.read_only).then(|| "/dev/vdb".into()),
        hostname: wishes.hostname.clone(),
        argv: argv(image, wishes)?,
        env: environment(image, wishes, own_env)?,
        user: wishes.user.clone().unwrap_or_else(|| image.user.clone()),
        workdir,
        tty: wishes.tty,
        stdin: wishes.stdin,
        tmpfs: wishes.tmpfs.iter().map(|text| tmpfs(text)).collect::<Result<_, _>>()?,
        // These belong to each start.
        pids_limit: None,
        volumes: Vec::new(),
        shares: Vec::new(),
        delivery: None,
        network: None,
        entropy: Vec::new(),
        init_log: false,
    })
}

fn argv(image: &ImageDefaults, wishes: &Wishes) -> Result<Vec<String>, LaunchError> {
    let (entrypoint, default_cmd) = match &wishes.entrypoint {
        Some(own) if own.is_empty() => (vec![], vec![]),
        Some(own) => (vec![own.clone()], vec![]),
        None => (image.entrypoint.clone(), image.cmd.clone()),
    };
    let cmd = if wishes.command.is_empty() { default_cmd } else { wishes.command.clone() };
    let argv = [entrypoint, cmd].concat();
    if argv.is_empty() { Err(LaunchError::NoCommand) } else { Ok(argv) }
}

fn environment(
    image: &ImageDefaults,
    wishes: &Wishes,
    own_env: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, LaunchError> {
    let mut env = vec![DEFAULT_PATH.to_string(), format!("HOSTNAME={}", wishes.hostname)];
    if wishes.tty.is_some() {
        env.push("TERM=xterm".into());
    }
    // An image's configuration may hold entries that are no assignments; docker drops them too.
    for variable in image.env.iter().filter(|variable| variable.find('=').is_some_and(|at| at > 0)) {
        set(&mut env, variable.clone());
    }
    for variable in &wishes.env {
        match variable.split_once('=') {
            Some((key, _)) if !key.is_empty() => set(&mut env, variable.clone()),
            None if !variable.is_empty() => match own_env(variable) {
                Some(value) => set(&mut env, format!("{variable}={value}")),
                None => env.retain(|other| key_of(other) != variable),
            },
            _ => return Err(LaunchError::BadVariable(variable.clone())),
        }
    }
    Ok(env)
}

fn key_of(variable: &str) -> &str {
    variable.split_once('=').map_or(variable, |(key, _)| key)
}

/// Sets a variable, in the place of an earlier one of its name.
pub fn set(env: &mut Vec<String>, variable: String) {
    match env.iter_mut().find(|other| key_of(other) == key_of(&variable)) {
        Some(other) => *other = variable,
        None => env.push(variable),
    }
}

fn tmpfs(text: &str) -> Result<Tmpfs, LaunchError> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') || path == "/" {
        return Err(LaunchError::BadTmpfs(text.to_string()));
    }
    Ok(Tmpfs { path: path.to_string(), options: options.to_string() })
}

/// RFC 1123, with the underscore that docker users have.
pub fn is_hostname(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    !name.is_empty() && name.len() <= 63 && name.chars().all(allowed) && !name.starts_with(['-', '.'])
}

/// Lines of an environment file: `K=V` or `K`, with comments and empty lines passed over, as docker reads them.
pub fn env_file_lines(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["serve".into(), "-v".into()],
            env: vec!["PATH=/opt/bin".into(), "A=1".into(), "=bad".into(), "worse".into()],
            user: "app".into(),
            working_dir: "/srv".into(),
        }
    }

    fn wishes() -> Wishes {
        Wishes { hostname: "box".into(), ..Wishes::default() }
    }

    fn launch(image: &ImageDefaults, wishes: &Wishes) -> Result<RunConfig, LaunchError> {
        run_config(image, wishes, |key| (key == "MINE").then(|| "yes".to_string()))
    }

    #[test]
    fn an_image_alone_decides_everything() {
        let config = launch(&image(), &wishes()).unwrap();
        assert_eq!(config.argv, ["/entry", "serve", "-v"]);
        assert_eq!(config.env, ["PATH=/opt/bin", "HOSTNAME=box", "A=1"]);
        assert_eq!((config.user.as_str(), config.workdir.as_str()), ("app", "/srv"));
        assert_eq!(config.disk.as_deref(), Some("/dev/vdb"));
    }

    #[test]
    fn a_command_replaces_cmd_and_keeps_the_entrypoint() {
        let config = launch(&image(), &Wishes { command: vec!["check".into()], ..wishes() }).unwrap();
        assert_eq!(config.argv, ["/entry", "check"]);
    }

    #[test]
    fn an_own_entrypoint_drops_the_images_cmd() {
        let config = launch(&image(), &Wishes { entrypoint: Some("sh".into()), ..wishes() }).unwrap();
        assert_eq!(config.argv, ["sh"]);
    }

    #[test]
    fn an_empty_entrypoint_leaves_the_command_alone() {
        let own = Wishes { entrypoint: Some(String::new()), command: vec!["ls".into()], ..wishes() };
        assert_eq!(launch(&image(), &own).unwrap().argv, ["ls"]);
        let none = Wishes { entrypoint: Some(String::new()), ..wishes() };
        assert_eq!(launch(&image(), &none), Err(LaunchError::NoCommand));
    }

    #[test]
    fn variables_are_set_taken_over_and_removed() {
        let env = ["A=2", "MINE", "PATH", "B="].map(String::from).to_vec();
        let config = launch(&image(), &Wishes { env, ..wishes() }).unwrap();
        assert_eq!(config.env, ["HOSTNAME=box", "A=2", "MINE=yes", "B="]);
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        let bad = |wishes: Wishes| launch(&image(), &wishes).unwrap_err();
        assert_eq!(bad(Wishes { env: vec!["=x".into()], ..wishes() }), LaunchError::BadVariable("=x".into()));
        assert_eq!(
            bad(Wishes { tmpfs: vec!["tmp".into()], ..wishes() }),
            LaunchError::BadTmpfs("tmp".into())
        );
        let relative = Wishes { working_dir: Some("src".into()), ..wishes() };
        assert_eq!(bad(relative), LaunchError::BadWorkingDir("src".into()));
        let host = Wishes { hostname: "a b".into(), ..wishes() };
        assert_eq!(bad(host), LaunchError::BadHostname("a b".into()));
    }

    #[test]
    fn a_terminal_brings_term_along() {
        let config =
            launch(&image(), &Wishes { tty: Some(TtySize { rows: 1, cols: 2 }), ..wishes() }).unwrap();
        assert!(config.env.contains(&"TERM=xterm".to_string()));
    }

    #[test]
    fn an_environment_file_may_have_comments() {
        assert_eq!(env_file_lines("# a\n\nA=1\n  B=2 # kept\nC\n"), ["A=1", "B=2 # kept", "C"]);
    }
}
