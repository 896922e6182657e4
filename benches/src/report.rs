//! What was measured: as a table for people and as JSON for programs.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

/// One figure. `value` is the median of `runs` and `spread` the distance of its smallest and largest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    runs: usize,
    spread: f64,
}

/// All figures, in the order measured.
#[derive(Debug, Default)]
pub struct Report {
    figures: Vec<Figure>,
}

impl Report {
    /// Adds the figure that these values make; nothing if there are none.
    pub fn add(&mut self, name: impl Into<String>, unit: &'static str, values: &[f64]) {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        if let (Some(value), Some(first), Some(last)) = (median(&sorted), sorted.first(), sorted.last()) {
            let (value, spread) = (round(value), round(last - first));
            self.figures.push(Figure { name: name.into(), value, unit, runs: sorted.len(), spread });
        }
    }

    /// The figures as lines of text, and below them those that both flyrun and QEMU have, side by side.
    pub fn table(&self) -> String {
        self.all() + &self.side_by_side()
    }

    fn all(&self) -> String {
        let width = self.figures.iter().map(|figure| figure.name.len()).max().unwrap_or(0);
        let mut text =
            format!("{:width$} {:>10} {:20} {:>4} {:>8}\n", "benchmark", "median", "unit", "runs", "spread");
        for Figure { name, value, unit, runs, spread } in &self.figures {
            let _infallible = writeln!(text, "{name:width$} {value:>10} {unit:20} {runs:>4} {spread:>8}");
        }
        text
    }

    fn side_by_side(&self) -> String {
        let pairs: Vec<_> = self.figures.iter().filter_map(|figure| self.pair(figure)).collect();
        let width = pairs.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for (number, (name, flyrun, qemu)) in pairs.into_iter().enumerate() {
            if number == 0 {
                let _infallible = writeln!(
                    text,
                    "\n{:width$} {:>10} {:>10} {:>6} unit",
                    "beside QEMU", "flyrun", "qemu", "ratio"
                );
            }
            let (unit, ratio) = (flyrun.unit, flyrun.value / qemu.value);
            let (flyrun, qemu) = (flyrun.value, qemu.value);
            let _infallible = writeln!(text, "{name:width$} {flyrun:>10} {qemu:>10} {ratio:>6.3} {unit}");
        }
        text
    }

    /// The name without its VMM, flyrun's figure and QEMU's, if this is flyrun's and there is the other.
    fn pair<'a>(&'a self, flyrun: &'a Figure) -> Option<(String, &'a Figure, &'a Figure)> {
        let (before, after) = flyrun.name.split_once(".flyrun")?;
        let twin = format!("{before}.qemu{after}");
        let qemu = self.figures.iter().find(|figure| figure.name == twin && figure.value > 0.0)?;
        Some((format!("{before}{after}"), flyrun, qemu))
    }

    /// Writes the figures as an array of objects.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.figures)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some((upper + lower) / 2.0)
}

/// Three digits behind the point: a microsecond of a millisecond.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_median_and_the_whole_spread() {
        let mut report = Report::default();
        report.add("boot", "ms_virtual", &[30.0, 20.0, 21.5]);
        report.add("even", "count", &[1.0, 4.0]);
        report.add("nothing", "count", &[]);
        let figures: Vec<_> =
            report.figures.iter().map(|f| (f.name.as_str(), f.value, f.runs, f.spread)).collect();
        assert_eq!(figures, [("boot", 21.5, 3, 10.0), ("even", 2.5, 2, 3.0)]);
    }

    #[test]
    fn what_both_vmms_were_measured_at_stands_side_by_side() {
        let mut report = Report::default();
        report.add("net.tx.flyrun", "instructions/byte", &[1.5]);
        report.add("net.tx.flyrun.exits", "exits/MiB", &[10.0]);
        report.add("net.tx.qemu", "instructions/byte", &[3.0]);
        report.add("net.rx.qemu", "instructions/byte", &[3.0]);
        let text = report.side_by_side();
        let words: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_ascii_whitespace().collect()).collect();
        assert_eq!(words.last().unwrap(), &["net.tx", "1.5", "3", "0.500", "instructions/byte"]);
        assert_eq!(words.len(), 3);
        assert_eq!(Report::default().side_by_side(), "");
    }

    #[test]
    fn the_json_is_an_array_with_the_fields_that_were_agreed() {
        let mut report = Report::default();
        report.add("boot.bare.flyrun", "ms_virtual", &[25.0]);
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write_json(file.path()).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap();
        let wanted = serde_json::json!([{"name": "boot.bare.flyrun", "value": 25.0, "unit": "ms_virtual", "runs": 1, "spread": 0.0}]);
        assert_eq!(json, wanted);
    }
}
