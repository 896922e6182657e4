//! A TOML table while it is read: gives out typed values, and writes down what is wrong with them.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::de::{DeArray, DeTable, DeValue};

use super::keys::Section;
use super::names::Named;
use super::problem::{Log, quote, shorten};
use super::units::{Bytes, duration_text, parse_duration};

/// A table whose keys are known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'t> {
    section: &'static Section,
    entries: &'t DeTable<'t>,
    /// Where it begins, as an offset.
    pub at: usize,
    log: &'t Log<'t>,
}

/// A value with its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node<'t> {
    /// The key, or that of the list it is in.
    pub name: &'t str,
    /// Where the key is, as an offset.
    pub key_at: usize,
    /// Where the value is, as an offset.
    pub at: usize,
    value: &'t DeValue<'t>,
    log: &'t Log<'t>,
}

/// The most elements of a list or table that are read: work that grows with their square stays small.
const MAX_ELEMENTS: usize = 1000;

/// What a bare number means where a duration is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bare {
    Seconds,
    Milliseconds,
}

impl<'t> Table<'t> {
    /// The whole file.
    pub fn top(section: &'static Section, entries: &'t DeTable<'t>, log: &'t Log<'t>) -> Self {
        Table { section, entries, at: 0, log }.with_known_keys()
    }

    fn with_known_keys(self) -> Self {
        for (key, _) in self.entries.iter() {
            let (name, at) = (key.get_ref().as_ref(), key.span().start);
            if self.section.has(name) {
                continue;
            }
            match self.section.foreign.iter().find(|(foreign, _)| *foreign == name) {
                Some((_, remedy)) => {
                    self.log.advise(at, format!("flyrun does not support {}", quote(name)), *remedy);
                }
                None => self.log.advise(
                    at,
                    format!("there is no key {} {}", quote(name), self.section.within()),
                    self.section.advice_on(name),
                ),
            }
        }
        self
    }

    /// The value of a key.
    pub fn get(&self, name: &str) -> Option<Node<'t>> {
        debug_assert!(self.section.has(name), "{name} is read and not a key of {}", self.section.place());
        let (key, value) = self.entries.get_key_value(name)?;
        Some(Node {
            name: key.get_ref(),
            key_at: key.span().start,
            at: value.span().start,
            value: value.get_ref(),
            log: self.log,
        })
    }

    /// The value of a key that must be there.
    pub fn required(&self, name: &str) -> Option<Node<'t>> {
        let node = self.get(name);
        if node.is_none() {
            self.log.add(self.at, format!("'{name}' is missing {}", self.section.within()));
        }
        node
    }

    pub fn flag(&self, name: &str, default: bool) -> bool {
        self.get(name).and_then(|node| node.flag()).unwrap_or(default)
    }

    pub fn choice<T: Named>(&self, name: &str, default: T) -> T {
        self.get(name).and_then(|node| node.choice()).unwrap_or(default)
    }

    pub fn duration(
        &self,
        name: &str,
        bare: Bare,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> Duration {
        self.get(name).and_then(|node| node.duration(bare, range)).unwrap_or(default)
    }

    /// A table inside.
    pub fn table(&self, name: &str, section: &'static Section) -> Option<Table<'t>> {
        self.get(name)?.table(section)
    }

    /// Tables inside: `[[name]]` several times, or `[name]` once.
    pub fn tables(&self, name: &str, section: &'static Section) -> Vec<Table<'t>> {
        let Some(node) = self.get(name) else { return Vec::new() };
        let elements = if node.value.is_table() { vec![node] } else { node.list("a table, or several") };
        elements.into_iter().filter_map(|element| element.table(section)).collect()
    }
}

impl<'t> Node<'t> {
    /// Says that this value must be something else.
    pub fn wrong(&self, wanted: &str) {
        self.log.add(self.at, format!("{} is {}: it must be {wanted}", quote(self.name), self.told()));
    }

    /// Says that the key cannot stand here.
    pub fn refuse(&self, why: &str, advice: &str) {
        self.log.advise(self.at, format!("{} {why}", quote(self.name)), advice);
    }

    /// The value, in a sentence.
    fn told(&self) -> String {
        match self.value {
            DeValue::String(text) => quote(text),
            DeValue::Integer(number) if number.radix() == 10 => shorten(number.as_str()),
            DeValue::Boolean(flag) => flag.to_string(),
            DeValue::Table(_) => "a table".into(),
            DeValue::Array(_) => "a list".into(),
            DeValue::Datetime(_) => "a date or time".into(),
            DeValue::Integer(_) | DeValue::Float(_) => "a number of another form".into(),
        }
    }

    pub fn text(&self, wanted: &str) -> Option<&'t str> {
        let text = self.value.as_str();
        if text.is_none() {
            self.wrong(wanted);
        }
        text
    }

    /// A text that satisfies a condition.
    pub fn text_that(&self, is_good: impl Fn(&str) -> bool, wanted: &str) -> Option<&'t str> {
        let text = self.text(wanted)?;
        if is_good(text) {
            return Some(text);
        }
        self.wrong(wanted);
        None
    }

    pub fn flag(&self) -> Option<bool> {
        let flag = self.value.as_bool();
        if flag.is_none() {
            self.wrong("true or false");
        }
        flag
    }

    /// As a flag, if it is one. Where flags stand beside other types.
    pub fn as_flag(&self) -> Option<bool> {
        self.value.as_bool()
    }

    pub fn as_text(&self) -> Option<&'t str> {
        self.value.as_str()
    }

    /// The value as a program's environment would have it; none for lists, tables and times.
    pub fn as_scalar(&self) -> Option<String> {
        match self.value {
            DeValue::String(text) => Some(text.to_string()),
            DeValue::Integer(number) => {
                Some(self.as_integer().map_or(number.to_string(), |value| value.to_string()))
            }
            DeValue::Float(number) => Some(number.as_str().to_string()),
            DeValue::Boolean(flag) => Some(flag.to_string()),
            DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
        }
    }

    pub fn as_integer(&self) -> Option<i64> {
        let DeValue::Integer(number) = self.value else { return None };
        i64::from_str_radix(number.as_str(), number.radix()).ok()
    }

    pub fn is_list(&self) -> bool {
        self.value.is_array()
    }

    pub fn is_empty_list(&self) -> bool {
        self.value.as_array().is_some_and(|list| list.is_empty())
    }

    /// A whole number; old files have ports as text, which counts too.
    pub fn number(&self, range: RangeInclusive<u32>, what: &str) -> Option<u32> {
        let number = self.as_integer().or_else(|| self.as_text()?.parse().ok());
        let number =
            number.and_then(|number| u32::try_from(number).ok()).filter(|number| range.contains(number));
        if number.is_none() {
            self.wrong(&format!("{what}, {} to {}", range.start(), range.end()));
        }
        number
    }

    pub fn port(&self) -> Option<u16> {
        self.number(1..=u32::from(u16::MAX), "a port").and_then(|port| u16::try_from(port).ok())
    }

    pub fn choice<T: Named>(&self) -> Option<T> {
        let choice = self.as_text().and_then(T::named);
        if choice.is_none() {
            self.wrong(&one_of::<T>());
        }
        choice
    }

    pub fn duration(&self, bare: Bare, range: RangeInclusive<Duration>) -> Option<Duration> {
        let bare_value = || u64::try_from(self.as_integer()?).ok();
        let duration = match bare {
            _ if self.as_text().is_some() => self.as_text().and_then(parse_duration),
            Bare::Seconds => bare_value().map(Duration::from_secs),
            Bare::Milliseconds => bare_value().map(Duration::from_millis),
        };
        let duration = duration.filter(|duration| range.contains(duration));
        if duration.is_none() {
            let unit = if matches!(bare, Bare::Seconds) { "seconds" } else { "milliseconds" };
            let (least, most) = (duration_text(*range.start()), duration_text(*range.end()));
            self.wrong(&format!(
                "a duration from {least} to {most}, such as \"1m30s\", or a number of {unit}"
            ));
        }
        duration
    }

    /// A size in whole MiB; a bare number counts in `bare`.
    pub fn bytes(&self, bare: Bytes, range: RangeInclusive<Bytes>) -> Option<Bytes> {
        let text_number = || self.as_text()?.trim().parse::<u64>().ok();
        let number = self.as_integer().and_then(|number| u64::try_from(number).ok()).or_else(text_number);
        let size = match number {
            Some(number) => number.checked_mul(bare.0).map(Bytes),
            None => self.as_text().and_then(Bytes::parse),
        };
        let size = size.filter(|size| range.contains(size) && size.0.is_multiple_of(Bytes::mib(1).0));
        if size.is_none() {
            self.wrong(&format!(
                "a size from {} to {} in whole MiB, such as \"512mb\", or a number of {}",
                range.start(),
                range.end(),
                bare.to_string().trim_start_matches('1')
            ));
        }
        size
    }

    fn bound(&self, count: usize) {
        if count > MAX_ELEMENTS {
            self.log.add(
                self.at,
                format!("{} has {count} elements, at most {MAX_ELEMENTS} are allowed", quote(self.name)),
            );
        }
    }

    /// The elements of a list.
    pub fn list(&self, wanted: &str) -> Vec<Node<'t>> {
        let Some(list) = self.value.as_array() else {
            self.wrong(wanted);
            return Vec::new();
        };
        self.bound(list.len());
        let list: &'t DeArray<'t> = list;
        list.iter()
            .take(MAX_ELEMENTS)
            .map(|element| Node { at: element.span().start, value: element.get_ref(), ..*self })
            .collect()
    }

    /// A list of texts, each made into something; those that cannot be are left out.
    pub fn texts<T>(&self, wanted: &str, make: impl Fn(&Node<'t>, &'t str) -> Option<T>) -> Vec<T> {
        let elements = self.list(&format!("a list of {wanted}"));
        elements.iter().filter_map(|element| make(element, element.text(wanted)?)).collect()
    }

    /// A table whose keys are known.
    pub fn table(&self, section: &'static Section) -> Option<Table<'t>> {
        let Some(entries) = self.value.as_table() else {
            self.wrong(&format!("a table, {}", section.header));
            return None;
        };
        Some(Table { section, entries, at: self.at, log: self.log }.with_known_keys())
    }

    /// The entries of a table whose keys are the user's.
    pub fn entries(&self) -> Vec<Node<'t>> {
        let Some(entries) = self.value.as_table() else {
            self.wrong("a table");
            return Vec::new();
        };
        self.bound(entries.len());
        entries
            .iter()
            .take(MAX_ELEMENTS)
            .map(|(key, value)| Node {
                name: key.get_ref(),
                key_at: key.span().start,
                at: value.span().start,
                value: value.get_ref(),
                log: self.log,
            })
            .collect()
    }

    /// A table of names and texts: the pairs of which both satisfy their condition.
    pub fn text_pairs(
        &self,
        (is_name, wanted_name): (impl Fn(&str) -> bool, &str),
        (is_text, wanted_text): (impl Fn(&str) -> bool, &str),
    ) -> Vec<(Node<'t>, String)> {
        let mut pairs = Vec::new();
        for entry in self.entries() {
            if !is_name(entry.name) {
                self.log.add(entry.key_at, format!("{} is not {wanted_name}", quote(entry.name)));
            } else if let Some(text) = entry.as_scalar().filter(|text| is_text(text)) {
                pairs.push((entry, text));
            } else {
                entry.wrong(wanted_text);
            }
        }
        pairs
    }
}

/// The names of a type in a sentence.
pub(crate) fn one_of<T: Named>() -> String {
    let names: Vec<_> = T::NAMES.iter().map(|(name, _)| format!("\"{name}\"")).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}
