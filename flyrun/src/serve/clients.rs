//! How many clients may be connected to one `flyrun serve`.

use ::proxy::Options;

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

/// The proxy's bounds in a process that may have so many descriptors.
///
/// # Errors
/// More are wanted than there are descriptors for.
pub fn bounded(wanted: Wanted, descriptors: Option<u64>) -> Result<Options> {
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
    let max_connections = usize::try_from(all).unwrap_or(usize::MAX);
    let of_one = wanted.of_one.map_or(max_connections - max_connections.div_ceil(PART_OF_OTHERS), |count| {
        usize::try_from(count).unwrap_or(usize::MAX)
    });
    Ok(Options { max_connections, max_connections_per_client: Some(of_one.max(1)), ..Options::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All connections, and those of one address.
    fn bounds(wanted: Wanted, descriptors: u64) -> (usize, usize) {
        let options = bounded(wanted, Some(descriptors)).unwrap();
        (options.max_connections, options.max_connections_per_client.unwrap())
    }

    #[test]
    fn one_address_never_has_all_connections_unless_it_is_told_to() {
        assert_eq!(bounds(Wanted::default(), u64::MAX), (65_536, 49_152));
        assert_eq!(bounds(Wanted::default(), 1 << 20), (65_536, 49_152));
        assert_eq!(bounds(Wanted { connections: Some(2), of_one: None }, u64::MAX), (2, 1));
        assert_eq!(bounds(Wanted { connections: Some(100), of_one: Some(100) }, u64::MAX), (100, 100));
    }

    #[test]
    fn no_more_are_accepted_than_there_are_descriptors_for() {
        assert_eq!(bounds(Wanted::default(), 4608), (2048, 1536));
        assert_eq!(bounds(Wanted::default(), 64), (1, 1));
        let told =
            bounded(Wanted { connections: Some(2049), of_one: None }, Some(4608)).unwrap_err().to_string();
        assert!(told.contains("2049") && told.contains("2048") && told.contains("LimitNOFILE"), "{told}");
    }
}
