//! What holds between the apps of one `flyrun serve`.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{App, Carries, Port};
use super::problem::{Position, Problem, Refused};
use super::{File, Hostname, Place};

/// The apps of these files, as one proxy can serve them.
///
/// # Errors
/// Two have the same name, the same port where requests do not tell them apart, or the same host name where they do.
pub fn together(files: &[File]) -> Result<Vec<App>, Refused> {
    let mut problems = Vec::new();
    names_differ(files, &mut problems);
    ports_differ(files, &mut problems);
    if problems.is_empty() {
        return Ok(files.iter().map(|file| file.app.clone()).collect());
    }
    problems.sort_by(|a, b| (&a.file, a.position).cmp(&(&b.file, b.position)));
    Err(Refused { problems, left_out: 0 })
}

fn names_differ(files: &[File], problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<&str, &File> = BTreeMap::new();
    for file in files {
        if let Some(other) = seen.insert(&file.app.name, file) {
            let message = format!("the app '{}' is in {} too", file.app.name, at(other, &Place::Name));
            problems.push(file.problem(&Place::Name, message, "Give one of them another name."));
        }
    }
}

/// Who listens on a port.
struct Listener<'f> {
    file: &'f File,
    port: &'f Port,
}

impl Listener<'_> {
    fn place(&self) -> Place {
        Place::Port(*self.port.numbers.start())
    }
}

fn ports_differ(files: &[File], problems: &mut Vec<Problem>) {
    let mut by_number: BTreeMap<u16, Vec<Listener<'_>>> = BTreeMap::new();
    for file in files {
        for port in file.app.services.iter().flat_map(|service| &service.ports) {
            for number in port.numbers.clone() {
                by_number.entry(number).or_default().push(Listener { file, port });
            }
        }
    }
    // Two ranges, or ports 80 and 443, have the same to say of each number.
    let mut told = BTreeSet::new();
    for (number, listeners) in &by_number {
        for (index, later) in listeners.iter().enumerate() {
            let earlier = || listeners.iter().take(index);
            if let Some((first, why)) =
                earlier().find_map(|one| Some((one, cannot_share(one.port, later.port)?)))
            {
                if told.insert((&later.file.name, &first.file.name, None)) {
                    let message = format!("port {number} is {}'s too: {why}", at(first.file, &first.place()));
                    problems.push(later.file.problem(
                        &later.place(),
                        message,
                        "Give one of them another port.",
                    ));
                }
                continue;
            }
            let before_a_name = |app: &App| {
                app.accept_proxy_protocol
                    .then(|| app.trusted_proxies.iter().copied().collect::<BTreeSet<_>>())
            };
            let of_later = before_a_name(&later.file.app);
            if let Some(first) = earlier().find(|one| before_a_name(&one.file.app) != of_later)
                && told.insert((&later.file.name, &first.file.name, None))
            {
                let message = format!(
                    "port {number} is {}'s too, and they differ in accept_proxy_protocol or its trusted_proxies, \
                     which count before a client has named its host",
                    at(first.file, &first.place())
                );
                problems.push(later.file.problem(&later.place(), message, "Write the same in both files."));
            }
            for name in &later.file.app.hostnames {
                let whose = earlier().find(|one| one.file.app.hostnames.contains(name));
                if let Some(first) =
                    whose.filter(|one| told.insert((&later.file.name, &one.file.name, Some(name))))
                {
                    problems.push(same_hostname(*number, first.file, later.file, name));
                }
            }
        }
    }
}

/// Why clients of one port cannot be told apart; `None` if they can, by host name.
fn cannot_share(one: &Port, other: &Port) -> Option<&'static str> {
    match (&one.carries, &other.carries) {
        (Carries::Http(_), Carries::Http(_)) if one.tls.is_some() == other.tls.is_some() => None,
        (Carries::Tcp { .. }, Carries::Tcp { .. }) if one.tls.is_some() && other.tls.is_some() => None,
        (Carries::Tcp { .. }, Carries::Tcp { .. }) => Some("raw TCP has no host name"),
        _ => Some("the handlers differ"),
    }
}

fn same_hostname(number: u16, first: &File, later: &File, name: &Hostname) -> Problem {
    let place = Place::Hostname(name.clone());
    let whose = at(first, &place);
    let message = match name {
        Hostname::Any => format!("every host name on port {number} is {whose}'s too"),
        _ => format!("the host name '{name}' on port {number} is {whose}'s too"),
    };
    later.problem(&place, message, "Give each app [flyrun] hostnames of its own.")
}

/// Another file in a sentence.
fn at(file: &File, place: &Place) -> String {
    let name = file.name.escape_debug();
    match file.places.iter().find(|(known, _)| known == place) {
        Some((_, Position { line, .. })) => format!("{name}:{line}"),
        None => name.to_string(),
    }
}
