//! One guest of the I/O benchmarks: follows what it tells on its console, and makes figures of it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::busy::Busy;

/// A run that the guest has told of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    name: String,
    /// Bytes moved, or requests made.
    amount: u64,
    cost: Busy,
}

/// What one byte or one request costs, round by round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    /// Instructions.
    pub instructions: Vec<f64>,
    /// VM exits.
    pub exits: Vec<f64>,
}

/// Runs the VMM until the guest is done; the costs by the names that the guest gives.
pub fn follow(command: &mut Command) -> Result<BTreeMap<String, Costs>> {
    let mut vmm = Vmm(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let stdout = vmm.0.stdout.take().context("it has no standard output")?;
    costs(&read_runs(stdout, Busy::now)?)
}

/// A process that ends when it is dropped: what it is here for is over then.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped_already = self.0.wait();
    }
}

/// Reads the console to its end. `now` is called at each line that a run begins or ends with.
fn read_runs(console: impl Read, now: impl Fn() -> Result<Busy>) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut began = None;
    let mut all = String::new();
    for line in BufReader::new(console).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match (words.as_slice(), began.take()) {
            (["BEGIN", name, _], None) => began = Some(((*name).to_owned(), now()?)),
            (["END", name, amount], Some((expected, before))) if *name == expected => {
                let cost = now()?.since(before);
                runs.push(Run { name: expected, amount: amount.parse()?, cost });
            }
            (["DONE"], None) => return Ok(runs),
            // What the kernel may have to say.
            (_, pending) => began = pending,
        }
        all.push_str(&line);
    }
    bail!("the guest ended before it was done: {all}")
}

/// Each run with a small amount and the next one of its name with a large one make a value.
fn costs(runs: &[Run]) -> Result<BTreeMap<String, Costs>> {
    let mut small: BTreeMap<&str, &Run> = BTreeMap::new();
    let mut costs: BTreeMap<String, Costs> = BTreeMap::new();
    for run in runs {
        let Some(before) = small.remove(run.name.as_str()) else {
            small.insert(&run.name, run);
            continue;
        };
        let more = run.amount.checked_sub(before.amount).filter(|more| *more > 0);
        let more = more.with_context(|| format!("{} is not larger the second time", run.name))? as f64;
        let cost = run.cost.since(before.cost);
        let costs = costs.entry(run.name.clone()).or_default();
        costs.instructions.push(cost.ns as f64 / more);
        costs.exits.push(cost.exits as f64 / more);
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn told(console: &str) -> Result<Vec<Run>> {
        let clock = Cell::new(0);
        read_runs(console.as_bytes(), || {
            clock.set(clock.get() * 3 + 100);
            Ok(Busy { ns: clock.get(), exits: clock.get() / 100 })
        })
    }

    #[test]
    fn a_byte_costs_what_the_larger_run_needs_more() {
        let runs = told("noise\r\nBEGIN tx 10\r\nEND tx 10\r\nBEGIN tx 30\r\nEND tx 30\r\nDONE\r\n").unwrap();
        let costs = costs(&runs).unwrap();
        // The clock shows 100, 400, 1300, 4000.
        assert_eq!(costs["tx"], Costs { instructions: vec![120.0], exits: vec![1.2] });
    }

    #[test]
    fn a_guest_that_ends_early_is_an_error_with_its_console() {
        let error = told("BEGIN tx 10\nFAILED tx\niperf3: error\n").unwrap_err();
        assert!(error.to_string().contains("iperf3: error"), "{error}");
    }

    #[test]
    fn two_runs_of_one_size_are_an_error() {
        let runs = told("BEGIN tx 10\nEND tx 10\nBEGIN tx 10\nEND tx 10\nDONE\n").unwrap();
        assert!(costs(&runs).is_err());
    }
}
