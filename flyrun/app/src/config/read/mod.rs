//! The tree to the model. Nothing here fails: a value that is wrong is written to the log, and a default takes its place, so
//! that all that is wrong is found.

mod checks;
mod flyrun;
mod groups;
mod ports;
mod services;
mod words;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeTable;

use super::Place;
use super::keys;
use super::model::*;
use super::problem::{Log, quote};
use super::table::{Bare, Table};
use words::*;

pub(crate) use services::ServiceAt;

/// What was read, and where it stands; all places are offsets into the text.
#[derive(Debug)]
pub(crate) struct Draft {
    pub app: App,
    pub services: Vec<ServiceAt>,
    /// The first `[[mounts]]` of each group that has any.
    pub mounts: BTreeMap<String, usize>,
    pub max_machines: usize,
    pub accept_proxy_protocol: usize,
    pub acme: usize,
    pub strategy: usize,
    pub places: Vec<(Place, usize)>,
}

/// Longer times than a day are mistakes.
const UP_TO_A_DAY: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(86_400);
const KILL_TIMEOUT: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(300);

/// Reads a whole file.
pub(crate) fn app<'t>(tree: &'t Spanned<DeTable<'t>>, log: &'t Log<'t>) -> Draft {
    let top = Table::top(&keys::TOP, tree.get_ref(), log);
    let mut places = Vec::new();
    let name = top.required("app");
    let name = name.and_then(|node| {
        places.push((Place::Name, node.at));
        node.text_that(is_app_name, "1 to 63 of a-z, 0-9 and '-', a letter or digit at both ends")
    });
    let region =
        top.get("primary_region").and_then(|node| node.text_that(is_label, "a word such as \"local\""));
    let image = image(&top, log, &mut places);
    let (deploy, strategy) = deploy(&top);
    let groups::Read { groups, names, mounts } = groups::read(&top, log, &mut places);
    let extra = flyrun::read(&top, log, &mut places);
    let has_certificate = !extra.certificates.is_empty() || extra.acme.is_some();
    let services = services::read(&top, &names, has_certificate, log);
    let (services, services_at) = services.into_iter().unzip();
    let app = App {
        name: name.unwrap_or_default().to_string(),
        primary_region: region.unwrap_or("local").to_string(),
        image,
        kill_signal: top.choice("kill_signal", Signal::Int),
        kill_timeout: top.duration("kill_timeout", Bare::Seconds, KILL_TIMEOUT, Duration::from_secs(5)),
        deploy,
        env: env(&top, log),
        groups,
        services,
        checks: checks::named(&top, &names),
        hostnames: extra.hostnames,
        certificates: extra.certificates,
        acme: extra.acme,
        trusted_proxies: extra.trusted_proxies,
        accept_proxy_protocol: extra.accept_proxy_protocol,
        body_timeout: extra.body_timeout,
        total_timeout: extra.total_timeout,
        idle_timeout: extra.idle_timeout,
        start_timeout: extra.start_timeout,
        queue_timeout: extra.queue_timeout,
        queue_limit: extra.queue_limit,
        max_machines: extra.max_machines,
    };
    Draft {
        app,
        services: services_at,
        mounts,
        max_machines: extra.max_machines_at,
        accept_proxy_protocol: extra.accept_proxy_protocol_at,
        acme: extra.acme_at,
        strategy,
        places,
    }
}

/// `[build] image`, the one key there without which nothing can be run.
fn image(top: &Table<'_>, log: &Log<'_>, places: &mut Vec<(Place, usize)>) -> String {
    let build = top.table("build", &keys::BUILD);
    let Some(node) = build.and_then(|build| build.get("image")) else {
        let at = build.map_or(top.at, |build| build.at);
        log.advise(
            at,
            "there is no image to run",
            "Name it: [build] with image = \"nginx\", or oci:DIR. flyrun builds none.",
        );
        return String::new();
    };
    places.push((Place::Image, node.at));
    node.text_that(|text| !text.trim().is_empty(), "an image such as \"nginx\" or \"oci:DIR\"")
        .unwrap_or_default()
        .to_string()
}

/// `[deploy]`, and where its strategy stands.
fn deploy(top: &Table<'_>) -> (Deploy, usize) {
    const FIVE_MINUTES: Duration = Duration::from_secs(300);
    let mut deploy = Deploy {
        strategy: Strategy::Rolling,
        wait_timeout: FIVE_MINUTES,
        release_command: None,
        release_command_timeout: FIVE_MINUTES,
    };
    let Some(table) = top.table("deploy", &keys::DEPLOY) else { return (deploy, 0) };
    deploy.strategy = table.choice("strategy", Strategy::Rolling);
    deploy.wait_timeout = table.duration("wait_timeout", Bare::Seconds, UP_TO_A_DAY, FIVE_MINUTES);
    deploy.release_command = table.get("release_command").and_then(|node| {
        let words = command(&node)?;
        if words.is_empty() {
            node.wrong("a command");
            return None;
        }
        Some(words)
    });
    deploy.release_command_timeout =
        table.duration("release_command_timeout", Bare::Seconds, UP_TO_A_DAY, FIVE_MINUTES);
    (deploy, table.get("strategy").map_or(0, |node| node.at))
}

/// `[env]`.
fn env(top: &Table<'_>, log: &Log<'_>) -> BTreeMap<String, String> {
    let Some(node) = top.get("env") else { return BTreeMap::new() };
    let is_name = |name: &str| !name.is_empty() && !name.contains(['=', '\0']);
    let is_text = |text: &str| !text.contains('\0');
    let pairs = node.text_pairs((is_name, "the name of a variable"), (is_text, "a text without zero bytes"));
    for (entry, _) in pairs.iter().filter(|(entry, _)| entry.name.starts_with("FLY_")) {
        let message = format!("{} cannot be set: names that begin with FLY_ are flyrun's", quote(entry.name));
        log.advise(entry.key_at, message, "Choose another name.");
    }
    pairs.into_iter().map(|(entry, text)| (entry.name.to_string(), text)).collect()
}
