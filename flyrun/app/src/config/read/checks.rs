//! Checks: of services, which gate requests, and `[checks]`, which do not.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::groups::Names;
use super::words::*;
use crate::config::keys;
use crate::config::model::{Asks, Check, Method, NamedCheck, Service};
use crate::config::table::{Bare, Node, Table};

const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);
const GRACE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);

/// A check that asks for no more than a connection.
pub(super) fn tcp(table: &Table<'_>) -> Check {
    let default = Service::default_check();
    Check {
        interval: table.duration("interval", Bare::Milliseconds, INTERVAL, default.interval),
        timeout: table.duration("timeout", Bare::Milliseconds, TIMEOUT, default.timeout),
        grace_period: table.duration("grace_period", Bare::Milliseconds, GRACE, default.grace_period),
        asks: Asks::Tcp,
    }
}

/// A check that makes a request.
pub(super) fn http(table: &Table<'_>) -> Check {
    // flyctl writes methods in both cases.
    let method = table.get("method").and_then(|node| method(&node)).unwrap_or(Method::Get);
    let path = table.get("path").and_then(|node| node.text_that(is_url_path, URL_PATH)).unwrap_or("/");
    if let Some(node) = table.get("protocol") {
        node.text_that(|text| text == "http", "\"http\": checks do not speak TLS to the app");
    }
    let asks = Asks::Http { method, path: path.to_string(), headers: headers(table) };
    Check { asks, ..tcp(table) }
}

fn method(node: &Node<'_>) -> Option<Method> {
    let upper = node.as_text().map(str::to_ascii_uppercase);
    upper.and_then(|name| <Method as crate::config::Named>::named(&name)).or_else(|| node.choice())
}

fn headers(table: &Table<'_>) -> BTreeMap<String, String> {
    let Some(node) = table.get("headers") else { return BTreeMap::new() };
    let pairs = node.text_pairs((is_header_name, "a header's name"), (is_header_value, HEADER_VALUE));
    pairs.into_iter().map(|(entry, value)| (entry.name.to_ascii_lowercase(), value)).collect()
}

/// `[checks]`.
pub(super) fn named(top: &Table<'_>, names: &Names) -> BTreeMap<String, NamedCheck> {
    let entries = top.get("checks").map(|node| node.entries()).unwrap_or_default();
    let read = |node: &Node<'_>| {
        let table = node.table(&keys::CHECKS)?;
        let port = table.required("port").and_then(|node| node.port());
        let kind = table.required("type");
        let kind = kind
            .and_then(|node| node.text_that(|text| ["tcp", "http"].contains(&text), "\"tcp\" or \"http\""));
        let check = if kind == Some("tcp") { only_tcp(&table) } else { http(&table) };
        Some((node.name.to_string(), NamedCheck { groups: names.of(&table), port: port?, check }))
    };
    entries.iter().filter_map(read).collect()
}

/// A check whose table could have been one of a request.
fn only_tcp(table: &Table<'_>) -> Check {
    for name in ["method", "path", "protocol", "headers"] {
        if let Some(node) = table.get(name) {
            node.refuse("belongs to a check of type \"http\"", "Leave it away, or write type = \"http\".");
        }
    }
    tcp(table)
}
