//! How many clients may be connected to one `flyrun serve`.

use crate::error::{Error, Result};

/// Where nobody says otherwise, and there are descriptors for so many.
const DEFAULT: u64 = 65_536;
/// Descriptors for all else: certificates, files, monitors, listeners.
const OTHERS: u64 = 512;
/// A client's connection, and the one to its machine.
const EACH: u64 = 2;
/// Where nobody says otherwise, an address leaves this part of all connections to others.
const PART_OF_OTHERS: usize = 4;

/// What the command line says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub connections: Option<u32>,
    pub of_one: Option<u32>,
}

/// Connections at a time, and of these from one address, of a process that may have so many descriptors.
///
/// # Errors
/// More are wanted than there are descriptors for.
pub fn bounds(wanted: Wanted, descriptors: Option<u64>) -> Result<(usize, usize)> {
    let room = descriptors.map_or(u64::MAX, |limit| limit.saturating_sub(OTHERS) / EACH).max(1);
    let all = match wanted.connections.map(u64::from) {
        Some(connections) if connections > room => {
            return Err(Error::new(format!(
                "--max-connections {connections} is more than the {room} that this process has descriptors for"
            ))
            .advice("Raise the limit of open files: `ulimit -n`, or LimitNOFILE= of the unit."));
        }
        Some(connections) => connections,
        None => DEFAULT.min(room),
    };
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    let of_one = wanted
        .of_one
        .map_or(all - all / PART_OF_OTHERS, |count| usize::try_from(count).unwrap_or(usize::MAX));
    Ok((all, of_one.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_never_has_all_connections_unless_it_is_told_to() {
        assert_eq!(bounds(Wanted::default(), None).unwrap(), (65_536, 49_152));
        assert_eq!(bounds(Wanted::default(), Some(1 << 20)).unwrap(), (65_536, 49_152));
        assert_eq!(bounds(Wanted { connections: Some(2), of_one: None }, None).unwrap(), (2, 2));
        assert_eq!(bounds(Wanted { connections: Some(100), of_one: Some(100) }, None).unwrap(), (100, 100));
    }

    #[test]
    fn no_more_are_accepted_than_there_are_descriptors_for() {
        assert_eq!(bounds(Wanted::default(), Some(4608)).unwrap(), (2048, 1536));
        assert_eq!(bounds(Wanted::default(), Some(64)).unwrap(), (1, 1));
        let told =
            bounds(Wanted { connections: Some(2049), of_one: None }, Some(4608)).unwrap_err().to_string();
        assert!(told.contains("2049") && told.contains("2048") && told.contains("LimitNOFILE"), "{told}");
    }
}
