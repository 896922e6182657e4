//! Where the data of a sparse file belongs (GNU tar manual, "Storing Sparse Files").

use super::{TarError, header, pax};

/// More would only be a way to fill the memory of the machine that unpacks.
pub const MAX_SEGMENTS: usize = 1 << 20;

/// A run of data in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Makes segments from pairs of numbers.
///
/// # Errors
/// [`TarError::Sparse`] for an odd count.
pub fn from_pairs(numbers: &[u64]) -> Result<Vec<Segment>, TarError> {
    if !numbers.len().is_multiple_of(2) || numbers.len() / 2 > MAX_SEGMENTS {
        return Err(TarError::Sparse);
    }
    let segment = |pair: &[u64]| match pair {
        [offset, length] => Ok(Segment { offset: *offset, length: *length }),
        _ => Err(TarError::Sparse),
    };
    numbers.chunks(2).map(segment).collect()
}

/// Adds the segments of an old GNU header or of a block that continues one: 24 bytes each, the first empty one ends
/// the list.
///
/// # Errors
/// [`TarError::Sparse`] for numbers that are none, and for too many of them.
pub fn add_gnu(segments: &mut Vec<Segment>, fields: &[u8]) -> Result<(), TarError> {
    for field in fields.chunks_exact(24) {
        let (offset, length) = field.split_at(12);
        if offset.first().is_none_or(|byte| *byte == 0) {
            break;
        }
        if segments.len() >= MAX_SEGMENTS {
            return Err(TarError::Sparse);
        }
        let parse = |field| header::number(field).and_then(|number| u64::try_from(number).ok());
        match (parse(offset), parse(length)) {
            (Some(offset), Some(length)) => segments.push(Segment { offset, length }),
            _ => return Err(TarError::Sparse),
        }
    }
    Ok(())
}

/// Checks that the segments are in order, do not overlap, end within the file, and have exactly the stored data.
///
/// # Errors
/// [`TarError::Sparse`].
pub fn validate(segments: &[Segment], file_size: u64, stored: u64) -> Result<(), TarError> {
    let mut end = 0u64;
    let mut total = 0u64;
    for segment in segments {
        if segment.offset < end {
            return Err(TarError::Sparse);
        }
        end = segment.offset.checked_add(segment.length).ok_or(TarError::Sparse)?;
        total = total.checked_add(segment.length).ok_or(TarError::Sparse)?;
    }
    // Offsets of files are signed 64-bit numbers.
    let fits = end <= file_size && file_size <= i64::MAX as u64 && total == stored;
    if fits { Ok(()) } else { Err(TarError::Sparse) }
}

/// Reads the map of version 1.0, which stands before the data as lines of decimal numbers.
#[derive(Debug, Default)]
pub struct MapReader {
    line: Vec<u8>,
    count: Option<u64>,
    numbers: Vec<u64>,
}

impl MapReader {
    /// Takes one block; whether the map is complete with it.
    ///
    /// # Errors
    /// [`TarError::Sparse`] for lines that are no numbers and for more than [`MAX_SEGMENTS`].
    pub fn push(&mut self, block: &[u8]) -> Result<bool, TarError> {
        for byte in block {
            if self.is_complete() {
                return Ok(true);
            }
            if *byte != b'\n' {
                if self.line.len() >= 20 {
                    return Err(TarError::Sparse);
                }
                self.line.push(*byte);
                continue;
            }
            let number = pax::decimal(&self.line).ok_or(TarError::Sparse)?;
            self.line.clear();
            match self.count {
                None if number > MAX_SEGMENTS as u64 => return Err(TarError::Sparse),
                None => self.count = Some(number),
                Some(_) => self.numbers.push(number),
            }
        }
        Ok(self.is_complete())
    }

    fn is_complete(&self) -> bool {
        self.count.is_some_and(|count| self.numbers.len() as u64 == count * 2)
    }

    /// The segments of a complete map.
    ///
    /// # Errors
    /// [`TarError::Sparse`] if it is not complete.
    pub fn finish(self) -> Result<Vec<Segment>, TarError> {
        if self.is_complete() { from_pairs(&self.numbers) } else { Err(TarError::Sparse) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(pairs: &[(u64, u64)]) -> Vec<Segment> {
        pairs.iter().map(|(offset, length)| Segment { offset: *offset, length: *length }).collect()
    }

    #[test]
    fn segments_must_be_in_order_and_within_the_file() {
        assert!(validate(&segments(&[(0, 10), (20, 5), (30, 0)]), 30, 15).is_ok());
        for (bad, size, stored) in [
            (&[(10, 5), (0, 5)][..], 30, 10),
            (&[(0, 10), (5, 10)], 30, 20),
            (&[(0, 10), (20, 15)], 30, 25),
            (&[(0, 10)], 30, 11),
            (&[(u64::MAX, 2)], 30, 2),
            (&[(0, u64::MAX), (u64::MAX, 1)], u64::MAX, 0),
        ] {
            assert!(validate(&segments(bad), size, stored).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_map_may_cross_blocks() {
        let mut reader = MapReader::default();
        assert_eq!(reader.push(b"2\n0\n1"), Ok(false));
        assert_eq!(reader.push(b"0\n40"), Ok(false));
        assert_eq!(reader.push(b"96\n8\n\0\0\0"), Ok(true));
        assert_eq!(reader.finish().unwrap(), segments(&[(0, 10), (4096, 8)]));
    }

    #[test]
    fn a_map_is_bounded() {
        assert!(MapReader::default().push(b"99999999999\n").is_err());
        assert!(MapReader::default().push(&[b'1'; 30]).is_err());
        assert!(MapReader::default().push(b"x\n").is_err());
        assert!(MapReader::default().finish().is_err());
    }
}
