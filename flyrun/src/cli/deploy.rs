//! `flyrun deploy`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::{Context, print_line};
use crate::apps::{judge, read, told};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::serve::{self, Ask, Deploy, Step, Strategy};

/// What is read where neither app nor file is given.
const FLY_TOML: &str = "fly.toml";

/// Bring a new version of an app to its place, without losing a request
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun deploy                          the app of ./fly.toml, as that says it is to be
  flyrun deploy -c shop.toml --image registry.example.com/shop:8
  flyrun deploy -a shop                  what the file says that is served; a tag may have moved
  flyrun deploy --strategy bluegreen --wait-timeout 2m

The flyrun serve that serves the app makes machines of the new version beside the old ones. They get requests when \
the checks of their services, and [checks], have passed. `rolling` does so one after another: a new one is ready before \
an old one ends its requests. `bluegreen` has all of them ready before the first gets a request. A machine with a \
volume is stopped before the new one has it; requests wait meanwhile. If a new machine ends, or its checks do not pass \
in time, the new ones are removed and the old ones go on: exit code 125, and the reason.

The file takes the place of the one that is served when it is deployed. An --image counts until the file that is \
served names another, or the next deploy. Ctrl-C ends the command, not the deploy: its end is in the log of flyrun serve.")]
pub struct Arguments {
    /// The app, as its file is served [default: the one of ./fly.toml, which is deployed]
    #[arg(short, long, value_name = "APP")]
    app: Option<String>,
    /// Deploy this fly.toml
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Another image than the file's
    #[arg(short, long, value_name = "IMAGE")]
    image: Option<String>,
    /// rolling or bluegreen [default: as the file says, else rolling]
    #[arg(long, value_name = "STRATEGY", value_parser = strategy)]
    strategy: Option<Strategy>,
    /// How long a machine may take until its checks pass, as 90s or 5m [default: as the file says, else 5m]
    #[arg(long, value_name = "TIME", value_parser = wait_timeout)]
    wait_timeout: Option<Duration>,
    /// Print each step as a line of JSON
    #[arg(long)]
    json: bool,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let (app, file) = which(arguments)?;
    if let Some(image) = &arguments.image {
        images::Reference::parse(image)
            .map_err(|error| Error::caused(format!("'{}' is not an image", image.escape_debug()), &error))?;
    }
    let wait_timeout_ms =
        arguments.wait_timeout.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    let ask = Ask::Deploy(Deploy {
        app: app.clone(),
        file,
        image: arguments.image.clone(),
        strategy: arguments.strategy,
        wait_timeout_ms,
    });
    serve::ask(&context.paths, &app, &ask, |step| tell(&app, step, arguments.json))?;
    Ok(ExitCode::Success)
}

/// The app, and the file that describes it if that is not to be the one that is served.
fn which(arguments: &Arguments) -> Result<(String, Option<(String, String)>)> {
    let path = match (&arguments.config, &arguments.app) {
        (Some(path), _) => path.as_path(),
        (None, Some(app)) => return Ok((app.clone(), None)),
        (None, None) => Path::new(FLY_TOML),
    };
    if arguments.config.is_none() && !path.exists() {
        return Err(Error::new("there is no fly.toml here").advice(
            "Name the app (-a APP) or its file (-c FILE); `flyrun status` shows the apps that are served.",
        ));
    }
    let bytes = read(path).map_err(|refused| told(&refused))?;
    let file = judge(path, &bytes).map_err(|refused| told(&refused))?;
    if let Some(app) = arguments.app.as_ref().filter(|app| **app != file.app.name) {
        return Err(Error::new(format!(
            "{} is the file of the app {}, not of {app}",
            file.name, file.app.name
        ))
        .advice("Leave -a away, or name another file."));
    }
    let path = std::fs::canonicalize(path).context(format!("cannot find {}", path.display()))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok((file.app.name, Some((path.to_string_lossy().into_owned(), text))))
}

fn tell(app: &str, step: &Step, json: bool) -> Result<()> {
    if json {
        return print_line(&serde_json::to_string(step).context("cannot write JSON")?);
    }
    match step {
        // That is the error.
        Step::Failed { .. } => {}
        Step::Done { .. } => print_line(&line(app, step))?,
        step => anstream::eprintln!("{}", line(app, step)),
    }
    Ok(())
}

fn line(app: &str, step: &Step) -> String {
    let told = match step {
        Step::Waiting => "waits for what flyrun serve is doing".to_string(),
        Step::Preparing { image } => format!("prepares {image}"),
        Step::Starting { group, machines: 1 } => format!("starts a machine of group {group}"),
        Step::Starting { group, machines } => format!("starts machines of group {group}, up to {machines}"),
        Step::Unhealthy { machine, why } => format!("{machine} is not healthy yet: {why}"),
        Step::Healthy { machine } => format!("{machine} is healthy"),
        Step::Draining { machines: 1 } => "a machine of the old version ends its requests".to_string(),
        Step::Draining { machines } => format!("{machines} machines of the old version are left"),
        Step::Switched => "requests go to the new version".to_string(),
        Step::RollingBack { .. } => "goes back to the old version".to_string(),
        Step::Done { changed: false, .. } => "runs this version already".to_string(),
        Step::Done { versions, .. } => {
            let versions: Vec<_> =
                versions.iter().map(|(group, version)| format!("{group} {version}")).collect();
            format!("deployed: {}", versions.join(", "))
        }
        Step::Failed { why } => why.clone(),
    };
    let told: String = told.chars().filter(|c| !c.is_control()).collect();
    format!("{app}: {told}")
}

fn strategy(text: &str) -> std::result::Result<Strategy, String> {
    match text {
        "rolling" => Ok(Strategy::Rolling),
        "bluegreen" => Ok(Strategy::Bluegreen),
        "canary" => Err("canary is not built here: rolling has the first new machine pass its checks before an old one ends".into()),
        "immediate" => Err("immediate is not built here: machines get requests when their checks pass; use rolling or bluegreen".into()),
        _ => Err("it must be rolling or bluegreen".into()),
    }
}

fn wait_timeout(text: &str) -> std::result::Result<Duration, String> {
    let parsed = match text.parse() {
        // flyctl's file has bare numbers of seconds.
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text),
    };
    let wait = parsed.map_err(|error| format!("{error}; write 90s or 5m"))?;
    let up_to_a_day = Duration::from_secs(1)..=Duration::from_secs(86_400);
    if up_to_a_day.contains(&wait) { Ok(wait) } else { Err("it must be 1s to 1day".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_strategies_are_as_flyctl_has_them() {
        assert_eq!(wait_timeout("5m0s"), Ok(Duration::from_secs(300)));
        assert_eq!(wait_timeout("90"), Ok(Duration::from_secs(90)));
        for wrong in ["0", "x", "2days", "-1s"] {
            assert!(wait_timeout(wrong).is_err(), "{wrong}");
        }
        assert_eq!(strategy("bluegreen"), Ok(Strategy::Bluegreen));
        assert!(strategy("canary").unwrap_err().contains("canary is not built"));
        assert!(strategy("immediate").unwrap_err().contains("immediate is not built"));
    }

    #[test]
    fn a_file_names_its_app_and_another_name_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shop.toml");
        std::fs::write(&path, "app = 'shop'\nbuild.image = 'x'\n").unwrap();
        let with = |app: Option<&str>, config: Option<&Path>| Arguments {
            app: app.map(str::to_string),
            config: config.map(Path::to_path_buf),
            image: None,
            strategy: None,
            wait_timeout: None,
            json: false,
        };
        assert_eq!(which(&with(Some("shop"), None)).unwrap(), ("shop".to_string(), None));
        let (app, file) = which(&with(None, Some(&path))).unwrap();
        assert_eq!((app.as_str(), file.unwrap().1.lines().count()), ("shop", 2));
        let error = which(&with(Some("web"), Some(&path))).unwrap_err().to_string();
        assert!(error.contains("of the app shop, not of web"), "{error}");
    }

    #[test]
    fn a_step_is_one_line_whatever_a_machine_says() {
        let step = Step::Unhealthy { machine: "web-app-1".into(), why: "port 80: \x1b[31mno\nway".into() };
        assert_eq!(line("web", &step), "web: web-app-1 is not healthy yet: port 80: [31mnoway");
        let versions = [("app".to_string(), "1a".to_string())].into();
        let step = Step::Done { app: "web".into(), versions, changed: true };
        assert_eq!(line("web", &step), "web: deployed: app 1a");
    }
}
