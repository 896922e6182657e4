//! Page faults of flyrun-vmm on the host, which a resume is made of as far as memory goes.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// Of a process since it began, with and without a disk: fields 10 and 12 of proc(5)'s stat.
pub fn of(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("{path} is not understood: {text}"))
}

/// Of the one flyrun-vmm that there is.
pub fn of_vmm() -> Result<f64> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = fs::read_to_string(Path::new(&entry.path()).join("comm")).unwrap_or_default();
        if name.trim() == "flyrun-vmm" {
            let id = entry.file_name().to_string_lossy().parse().context("not a process id")?;
            return of(id);
        }
    }
    anyhow::bail!("no flyrun-vmm runs")
}

/// The second field is a name in brackets that may itself have any character.
fn parse(stat: &str) -> Option<f64> {
    let fields: Vec<_> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some(field(10)? + field(12)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_faults_count_and_a_name_may_look_like_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 5 3 0 1 2 0 0";
        assert_eq!(parse(stat), Some(103.0));
        assert_eq!(parse("7 (short) S 1"), None);
    }
}
