//! `[processes]`, and the tables that say something about groups of machines.

use std::collections::{BTreeMap, BTreeSet};

use super::words::*;
use crate::config::keys::{self, Section};
use crate::config::model::*;
use crate::config::problem::{Log, quote};
use crate::config::table::{Node, Table};
use crate::config::{Bytes, Place};

/// The group that there is without `[processes]`.
const DEFAULT_GROUP: &str = "app";
/// What a machine can have, as `flyrun run` has it.
const MAX_CPUS: u8 = 32;
const MIN_MEMORY: Bytes = Bytes::mib(48);
const MAX_MEMORY: Bytes = Bytes::mib(1 << 20);
const MIN_VOLUME: Bytes = Bytes::mib(64);
const MAX_VOLUME: Bytes = Bytes::mib(8 << 20);
const DEFAULT_VOLUME: Bytes = Bytes::mib(10 << 10);

/// The names of groups.
#[derive(Debug)]
pub(crate) struct Names {
    all: BTreeSet<String>,
    default: String,
}

/// What was read of groups.
pub(super) struct Read {
    pub groups: BTreeMap<String, Group>,
    pub names: Names,
    /// Where the first `[[mounts]]` of each group stands.
    pub mounts: BTreeMap<String, usize>,
}

impl Names {
    fn new(all: BTreeSet<String>) -> Names {
        let first = all.first().map_or(DEFAULT_GROUP, String::as_str);
        let default = if all.contains(DEFAULT_GROUP) { DEFAULT_GROUP } else { first }.to_string();
        Names { all, default }
    }

    /// The groups that the `processes` of a table names, of which each exists; none if there are no names.
    fn named(&self, table: &Table<'_>) -> Vec<String> {
        let Some(node) = table.get("processes") else { return Vec::new() };
        let known = self.all.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let names: BTreeSet<String> = node
            .texts("groups of [processes]", |element, name| {
                if self.all.contains(name) {
                    return Some(name.to_string());
                }
                element.wrong(&format!("a group of [processes], of which there is: {known}"));
                None
            })
            .into_iter()
            .collect();
        names.into_iter().collect()
    }

    /// The same, and the default group if there are no names.
    pub fn of(&self, table: &Table<'_>) -> Vec<String> {
        match self.named(table) {
            none if none.is_empty() => vec![self.default.clone()],
            names => names,
        }
    }
}

/// Reads `[processes]` and all that is said about single groups.
pub(super) fn read(top: &Table<'_>, log: &Log<'_>, places: &mut Vec<(Place, usize)>) -> Read {
    let commands = commands(top, log);
    let names = Names::new(commands.keys().cloned().collect());
    let vms = one_each(top, &names, log, ("vm", &keys::VM), |table| vm(table, log));
    let restarts = one_each(top, &names, log, ("restart", &keys::RESTART), |table| restart(table, log));
    let group = |(name, command): (String, Vec<String>)| {
        let vm = vms.get(&name).copied().unwrap_or(SMALLEST);
        let restart = restarts.get(&name).copied().unwrap_or(Restart::OnFailure { retries: DEFAULT_RETRIES });
        let group = Group { command, vm, restart, mounts: Vec::new(), files: Vec::new(), metrics: None };
        (name, group)
    };
    let mut read = Read { groups: commands.into_iter().map(group).collect(), names, mounts: BTreeMap::new() };
    for table in top.tables("mounts", &keys::MOUNTS) {
        let Some(mount) = mount(&table) else { continue };
        for name in read.names.of(&table) {
            read.mounts.entry(name).or_insert(table.at);
        }
        let clashes = |other: &Mount| other.destination == mount.destination || other.source == mount.source;
        read.add(
            &table,
            log,
            ("[[mounts]] with this source or destination", |group| {
                let is_new = !group.mounts.iter().any(clashes);
                group.mounts.push(mount.clone());
                is_new
            }),
        );
    }
    for table in top.tables("files", &keys::FILES) {
        let Some(file) = file(&table, log, places) else { continue };
        read.add(
            &table,
            log,
            ("[[files]] with this guest_path", |group| {
                let is_new = !group.files.iter().any(|other| other.guest_path == file.guest_path);
                group.files.push(file.clone());
                is_new
            }),
        );
    }
    for table in top.tables("metrics", &keys::METRICS) {
        let Some(metrics) = metrics(&table) else { continue };
        read.add(&table, log, ("[[metrics]]", |group| group.metrics.replace(metrics.clone()).is_none()));
    }
    read.sort();
    read
}

impl Read {
    /// Adds what a table says to each of its groups; `add` tells whether that is new there.
    fn add(
        &mut self,
        table: &Table<'_>,
        log: &Log<'_>,
        (what, mut add): (&str, impl FnMut(&mut Group) -> bool),
    ) {
        for name in self.names.of(table) {
            if self.groups.get_mut(&name).is_some_and(|group| !add(group)) {
                twice(log, table.at, what, &name);
            }
        }
    }

    /// In an order that does not depend on which group was named first; a mount comes before those inside it.
    fn sort(&mut self) {
        for group in self.groups.values_mut() {
            group.mounts.sort_by(|a, b| a.destination.cmp(&b.destination));
            group.files.sort_by(|a, b| a.guest_path.cmp(&b.guest_path));
        }
    }
}

fn commands(top: &Table<'_>, log: &Log<'_>) -> BTreeMap<String, Vec<String>> {
    let mut commands = BTreeMap::new();
    for entry in top.get("processes").map(|node| node.entries()).unwrap_or_default() {
        if !is_name(entry.name) {
            let message = format!("{} is not a group's name", quote(entry.name));
            log.advise(entry.key_at, message, "Use letters, digits, '_', '.' and '-', at most 63.");
        }
        commands.insert(entry.name.to_string(), command(&entry).unwrap_or_default());
    }
    if commands.is_empty() {
        commands.insert(DEFAULT_GROUP.to_string(), Vec::new());
    }
    commands
}

/// One value for each group: of the table that names it, or of the one that names none.
fn one_each<T: Copy>(
    top: &Table<'_>,
    names: &Names,
    log: &Log<'_>,
    (name, section): (&str, &'static Section),
    read: impl Fn(&Table<'_>) -> T,
) -> BTreeMap<String, T> {
    let (mut own, mut common) = (BTreeMap::new(), None);
    for table in top.tables(name, section) {
        let value = read(&table);
        let named = names.named(&table);
        if named.is_empty() && common.replace(value).is_some() {
            twice(log, table.at, section.header, "all groups");
        }
        for name in named {
            if own.insert(name.clone(), value).is_some() {
                twice(log, table.at, section.header, &name);
            }
        }
    }
    if let Some(common) = common {
        names.all.iter().for_each(|name| {
            own.entry(name.clone()).or_insert(common);
        });
    }
    own
}

fn twice(log: &Log<'_>, at: usize, what: &str, group: &str) {
    log.advise(
        at,
        format!("this is another {what} for {}", quote(group)),
        "Leave one of them away, or name other groups under processes.",
    );
}

const SMALLEST: Vm = Vm { cpu_kind: CpuKind::Shared, cpus: 1, memory: Bytes::mib(256) };

impl CpuKind {
    /// The memory that a machine has for each CPU unless its file says otherwise.
    fn memory(self, cpus: u8) -> Bytes {
        let each = match self {
            CpuKind::Shared => 256,
            CpuKind::Performance => 2048,
        };
        Bytes::mib(each * u64::from(cpus))
    }
}

/// `size` is what the other keys change.
fn vm(table: &Table<'_>, log: &Log<'_>) -> Vm {
    const SIZE: &str = "shared-cpu-Nx with N of 1, 2, 4, 6, 8 or performance-Nx with N of 1, 2, 4, 6 … 16";
    let size = table.get("size").and_then(|node| {
        let preset = node.text(SIZE).map(preset);
        if preset == Some(None) {
            node.wrong(SIZE);
        }
        preset?
    });
    let (kind, cpus) = size.unwrap_or((SMALLEST.cpu_kind, SMALLEST.cpus));
    let cpu_kind = table.choice("cpu_kind", kind);
    let own = table.get("cpus").and_then(|node| node.number(1..=u32::from(MAX_CPUS), "a number of CPUs"));
    let cpus = own.and_then(|own| u8::try_from(own).ok()).unwrap_or(cpus);
    let range = MIN_MEMORY..=MAX_MEMORY;
    let read = |name| table.get(name).map(|node: Node<'_>| (node, node.bytes(Bytes::mib(1), range.clone())));
    let (memory, memory_mb) = (read("memory"), read("memory_mb"));
    if let (Some(_), Some((node, _))) = (&memory, &memory_mb) {
        log.advise(node.key_at, "memory and memory_mb are the same", "Leave one of them away.");
    }
    let memory = memory.or(memory_mb).and_then(|(_, bytes)| bytes);
    Vm { cpu_kind, cpus, memory: memory.unwrap_or(cpu_kind.memory(cpus)) }
}

/// Fly.io's named sizes.
fn preset(name: &str) -> Option<(CpuKind, u8)> {
    let count = |prefix| name.strip_prefix(prefix)?.strip_suffix('x')?.parse::<u8>().ok();
    let shared = count("shared-cpu-").filter(|count| [1, 2, 4, 6, 8].contains(count));
    let performance =
        count("performance-").filter(|count| *count == 1 || (2..=16).contains(count) && count % 2 == 0);
    shared.map(|count| (CpuKind::Shared, count)).or(performance.map(|count| (CpuKind::Performance, count)))
}

const DEFAULT_RETRIES: u32 = 10;

fn restart(table: &Table<'_>, log: &Log<'_>) -> Restart {
    const POLICY: &str = "\"always\", \"never\" or \"on-failure\"";
    let retries = table.get("retries");
    let policy = table
        .get("policy")
        .and_then(|node| node.text_that(|text| POLICY.contains(&format!("\"{text}\"")), POLICY));
    let policy = match policy {
        Some("always") => Restart::Always,
        Some("never") => Restart::Never,
        _ => {
            let number = retries.and_then(|node| node.number(1..=1_000_000, "a number of restarts"));
            return Restart::OnFailure { retries: number.unwrap_or(DEFAULT_RETRIES) };
        }
    };
    if let Some(node) = retries {
        log.advise(node.key_at, "retries are counted with policy = \"on-failure\" only", "Leave it away.");
    }
    policy
}

fn mount(table: &Table<'_>) -> Option<Mount> {
    let source = table.required("source").and_then(|node| {
        node.text_that(is_name, "a volume's name: letters, digits, '_', '.' and '-', at most 63")
    });
    let destination =
        table.required("destination").and_then(|node| node.text_that(is_guest_path, GUEST_PATH));
    let size =
        table.get("initial_size").and_then(|node| node.bytes(Bytes::mib(1024), MIN_VOLUME..=MAX_VOLUME));
    Some(Mount {
        source: source?.to_string(),
        destination: destination?.trim_end_matches('/').to_string(),
        initial_size: size.unwrap_or(DEFAULT_VOLUME),
    })
}

fn file(table: &Table<'_>, log: &Log<'_>, places: &mut Vec<(Place, usize)>) -> Option<GuestFile> {
    let path = table.required("guest_path").and_then(|node| node.text_that(is_guest_path, GUEST_PATH));
    let sources: Vec<Node<'_>> =
        ["raw_value", "local_path", "secret_name"].iter().filter_map(|name| table.get(name)).collect();
    let [source] = sources.as_slice() else {
        let message = format!("[[files]] has {} of raw_value, local_path and secret_name", sources.len());
        log.advise(table.at, message, "Give it exactly one.");
        return None;
    };
    let content = match source.name {
        "local_path" => {
            let path = source.text_that(is_host_path, "a path of the host")?.to_string();
            places.push((Place::HostFile(path.clone()), source.at));
            Content::HostFile(path)
        }
        "secret_name" => Content::Secret(source.text_that(is_name, "a secret's name")?.to_string()),
        _ => Content::Text(source.text("a text")?.to_string()),
    };
    Some(GuestFile { guest_path: path?.to_string(), content })
}

fn metrics(table: &Table<'_>) -> Option<Metrics> {
    let port = table.required("port").and_then(|node| node.port());
    let path = table.get("path").and_then(|node| node.text_that(is_url_path, URL_PATH)).unwrap_or("/metrics");
    Some(Metrics { port: port?, path: path.to_string() })
}
