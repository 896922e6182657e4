//! Which machine the user means.

use crate::error::{Error, Result};
use crate::machine::{Machines, Record, State};

/// The running machine with this name, id, or beginning of an id.
///
/// # Errors
/// There is none, there are several, or it does not run.
pub fn find_running(machines: &Machines, wanted: &str) -> Result<Record> {
    let record = choose(machines.list()?, wanted)?;
    if record.state != State::Started {
        return Err(Error::new(format!("machine '{wanted}' does not run"))
            .advice("Only a running machine can be talked to."));
    }
    Ok(record)
}

fn choose(records: Vec<Record>, wanted: &str) -> Result<Record> {
    let mut exact = records.iter().filter(|record| record.id == wanted || record.name == wanted);
    if let Some(record) = exact.next() {
        return Ok(record.clone());
    }
    let begins = |record: &&Record| !wanted.is_empty() && record.id.starts_with(wanted);
    let mut candidates = records.iter().filter(begins);
    match (candidates.next(), candidates.next()) {
        (Some(record), None) => Ok(record.clone()),
        (Some(_), Some(_)) => Err(Error::new(format!("several machines' ids begin with '{wanted}'"))
            .advice("Write more of the id, or the machine's name.")),
        (None, _) => Err(Error::new(format!("there is no machine '{wanted}'"))
            .advice("Name it by its id or by the --name it was given.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;

    fn record(id: &str, name: &str) -> Record {
        Record {
            version: crate::machine::VERSION,
            id: id.into(),
            name: name.into(),
            image: "busybox".into(),
            chain_id: "sha256:0".into(),
            cpus: 1,
            memory: Size::mib(128),
            disk: None,
            auto_remove: false,
            state: State::Started,
            created_at: 1,
            outcome: None,
        }
    }

    #[test]
    fn a_machine_is_found_by_name_id_and_beginning_of_an_id() {
        let all = || vec![record("abc1", "web"), record("abd2", "abc"), record("eff3", "db")];
        let found = |wanted| choose(all(), wanted).map(|record| record.id).map_err(|error| error.to_string());
        assert_eq!(found("web"), Ok("abc1".into()));
        assert_eq!(found("eff3"), Ok("eff3".into()));
        assert_eq!(found("e"), Ok("eff3".into()));
        assert_eq!(found("abc"), Ok("abd2".into()), "a whole name comes before the beginning of an id");
        assert!(found("ab").unwrap_err().contains("several"));
        assert!(found("").unwrap_err().contains("no machine"));
        assert!(found("x").unwrap_err().contains("no machine 'x'"));
    }
}
