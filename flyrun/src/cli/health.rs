//! The flags of commands that make a machine, as far as they concern its health.

use clap::Args;

use super::Context;
use crate::error::{Error, Result};
use crate::machine::health::{Health, Healthcheck, HttpTest, Test};
use crate::machine::{Record, State};
use crate::moment::Period;
use crate::monitor;

/// A check more often than this would be a load of its own. docker's bound.
const MIN_MS: u64 = 1;

/// What can be said about a machine's health check.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Health checks")]
pub struct HealthArguments {
    /// A shell command in the machine that ends with 0 while it does its work [default: the image's]
    #[arg(long, value_name = "COMMAND", conflicts_with = "health_http")]
    health_cmd: Option<String>,
    /// A port and path of the machine that answer a GET with 2xx while it does its work
    #[arg(long, value_name = "[PORT][/PATH]")]
    health_http: Option<HttpTest>,
    /// Time from one check to the next [default: the image's, or 30s]
    #[arg(long, value_name = "DURATION")]
    health_interval: Option<Period>,
    /// Time after which a check has failed [default: the image's, or 30s]
    #[arg(long, value_name = "DURATION")]
    health_timeout: Option<Period>,
    /// Failures in a row that make the machine unhealthy [default: the image's, or 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    health_retries: Option<u32>,
    /// Time after the start in which failures do not count [default: the image's, or 0s]
    #[arg(long, value_name = "DURATION")]
    health_start_period: Option<Period>,
    /// Time from one check to the next during the start period [default: the image's, or 5s]
    #[arg(long, value_name = "DURATION")]
    health_start_interval: Option<Period>,
    /// Make no checks, whatever the image says
    #[arg(long, conflicts_with_all = ["health_cmd", "health_http"])]
    no_healthcheck: bool,
}

impl HealthArguments {
    /// The image's check with the user's wishes over it.
    ///
    /// # Errors
    /// A time is out of range, or there is nothing to check.
    pub fn healthcheck(
        &self,
        image: Option<&images::Healthcheck>,
        has_network: bool,
    ) -> Result<Option<Healthcheck>> {
        if self.no_healthcheck {
            return Ok(None);
        }
        let Some(mut check) = self.test().map(Healthcheck::new).or_else(|| image.and_then(of_image)) else {
            return if self.tunes() { Err(nothing_to_check()) } else { Ok(None) };
        };
        if matches!(check.test, Test::Http(_)) && !has_network {
            return Err(Error::new("--health-http asks over the network, and the machine is to have none")
                .advice("Use --health-cmd, or leave --network none away."));
        }
        if let Some(image) = image.filter(|_| self.test().is_none()) {
            take_times(&mut check, image);
        }
        for (wanted, time, flag) in [
            (self.health_interval, &mut check.interval_ms, "--health-interval"),
            (self.health_timeout, &mut check.timeout_ms, "--health-timeout"),
            (self.health_start_interval, &mut check.start_interval_ms, "--health-start-interval"),
        ] {
            if let Some(Period(period)) = wanted {
                *time = period.as_millis() as u64;
            }
            if *time < MIN_MS {
                return Err(Error::new(format!("{flag} is too short")).advice("Give it at least 1ms."));
            }
        }
        if let Some(Period(period)) = self.health_start_period {
            check.start_period_ms = period.as_millis() as u64;
        }
        check.retries = self.health_retries.unwrap_or(check.retries);
        Ok(Some(check))
    }

    fn test(&self) -> Option<Test> {
        let command = self.health_cmd.as_deref().map(shell);
        command.or_else(|| self.health_http.clone().map(Test::Http))
    }

    fn tunes(&self) -> bool {
        self.health_retries.is_some()
            || [
                self.health_interval,
                self.health_timeout,
                self.health_start_period,
                self.health_start_interval,
            ]
            .iter()
            .any(Option::is_some)
    }
}

/// What the checks of a machine that runs have found out.
pub fn health(context: &Context, record: &Record) -> Option<Health> {
    let runs = record.state == State::Started && record.config.health.is_some();
    runs.then(|| monitor::health::read(&context.paths.machines().join(&record.id)))?
}

fn shell(command: &str) -> Test {
    Test::Command(vec!["/bin/sh".into(), "-c".into(), command.into()])
}

fn of_image(image: &images::Healthcheck) -> Option<Healthcheck> {
    let test = match image.test.split_first() {
        Some((kind, words)) if kind == "CMD" && !words.is_empty() => Test::Command(words.to_vec()),
        Some((kind, [command, ..])) if kind == "CMD-SHELL" => shell(command),
        // NONE, and what docker does not know either.
        _ => return None,
    };
    Some(Healthcheck::new(test))
}

/// In an image 0 stands for the default.
fn take_times(check: &mut Healthcheck, image: &images::Healthcheck) {
    for (time, image_ns) in [
        (&mut check.interval_ms, image.interval_ns),
        (&mut check.timeout_ms, image.timeout_ns),
        (&mut check.start_period_ms, image.start_period_ns),
        (&mut check.start_interval_ms, image.start_interval_ns),
    ] {
        if image_ns > 0 {
            *time = image_ns.div_ceil(1_000_000);
        }
    }
    if image.retries > 0 {
        check.retries = image.retries;
    }
}

fn nothing_to_check() -> Error {
    Error::new("there is no health check to change: the image has none")
        .advice("Give one with --health-cmd or --health-http.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        health: HealthArguments,
    }

    fn checked(flags: &[&str], image: Option<&images::Healthcheck>) -> Result<Option<Healthcheck>> {
        let line = Line::try_parse_from(["x"].iter().chain(flags)).unwrap();
        line.health.healthcheck(image, true)
    }

    fn image(test: &[&str]) -> images::Healthcheck {
        images::Healthcheck {
            test: test.iter().map(|word| word.to_string()).collect(),
            interval_ns: 7_000_000_000,
            retries: 9,
            ..images::Healthcheck::default()
        }
    }

    #[test]
    fn the_image_speaks_first_and_the_user_last() {
        let image = image(&["CMD", "curl", "-f", "http://localhost/"]);
        let own = checked(&[], Some(&image)).unwrap().unwrap();
        assert_eq!((own.interval_ms, own.timeout_ms, own.retries), (7_000, 30_000, 9));
        assert!(matches!(own.test, Test::Command(words) if words[0] == "curl"));
        let tuned =
            checked(&["--health-interval", "1s", "--health-retries", "1"], Some(&image)).unwrap().unwrap();
        assert_eq!((tuned.interval_ms, tuned.retries), (1_000, 1));
        // Another test brings none of the image's times along.
        let other = checked(&["--health-cmd", "true"], Some(&image)).unwrap().unwrap();
        assert_eq!((other.interval_ms, other.retries), (30_000, 3));
        assert_eq!(checked(&["--no-healthcheck"], Some(&image)).unwrap(), None);
    }

    #[test]
    fn an_image_may_have_none() {
        for test in [&["NONE"][..], &[], &["CMD"], &["CMD-SHELL"], &["MAGIC", "x"]] {
            assert_eq!(checked(&[], Some(&image(test))).unwrap(), None, "{test:?}");
        }
        assert_eq!(checked(&[], None).unwrap(), None);
        assert!(checked(&["--health-retries", "2"], None).unwrap_err().to_string().contains("--health-cmd"));
    }

    #[test]
    fn a_check_that_cannot_be_made_is_refused() {
        assert!(checked(&["--health-cmd", "x", "--health-interval", "0s"], None).is_err());
        let line = Line::try_parse_from(["x", "--health-http", "80/up"]).unwrap();
        assert!(line.health.healthcheck(None, false).is_err());
        assert!(Line::try_parse_from(["x", "--health-http", "80", "--health-cmd", "y"]).is_err());
    }
}
