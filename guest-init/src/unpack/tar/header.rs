//! One block of 512 bytes: the header of ustar, GNU, star and version-7 archives (POSIX pax, "ustar interchange
//! format"; GNU tar manual, "Basic Tar Format").

use super::TarError;

/// Everything in an archive is a multiple of this.
pub const BLOCK: usize = 512;

/// A header block, as it is.
#[derive(Clone)]
pub struct Header(pub [u8; BLOCK]);

/// Which of the incompatible uses of the last fields a header makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Header {
    fn field(&self, start: usize, length: usize) -> &[u8] {
        self.0.get(start..start + length).unwrap_or_default()
    }

    /// Whether the block is all zeros, which marks the end.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// Checks the checksum, which some archivers have computed over signed bytes.
    ///
    /// # Errors
    /// [`TarError::Checksum`] when it is neither.
    pub fn check(&self) -> Result<(), TarError> {
        let told = number(self.field(148, 8)).ok_or(TarError::Number("checksum"))?;
        let bytes = || {
            self.0.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte })
        };
        let unsigned: i64 = bytes().map(i64::from).sum();
        let signed: i64 = bytes().map(|byte| i64::from(byte as i8)).sum();
        if told == unsigned || told == signed { Ok(()) } else { Err(TarError::Checksum) }
    }

    fn format(&self) -> Format {
        match (self.field(257, 8), self.field(508, 4)) {
            (b"ustar  \0", _) => Format::Gnu,
            (magic, b"tar\0") if magic.starts_with(b"ustar\0") => Format::Star,
            (magic, _) if magic.starts_with(b"ustar\0") => Format::Ustar,
            _ => Format::V7,
        }
    }

    /// The path, with the prefix of the formats that have one.
    pub fn path(&self) -> Vec<u8> {
        let name = text(self.field(0, 100));
        let prefix = match self.format() {
            Format::Ustar => text(self.field(345, 155)),
            Format::Star => text(self.field(345, 131)),
            Format::V7 | Format::Gnu => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// The target of a link.
    pub fn link(&self) -> Vec<u8> {
        text(self.field(157, 100)).to_vec()
    }

    /// The type flag.
    pub fn type_flag(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or(0)
    }

    /// A numeric field.
    fn value(&self, start: usize, length: usize, name: &'static str) -> Result<i64, TarError> {
        number(self.field(start, length)).ok_or(TarError::Number(name))
    }

    /// Permissions, including the bits above the lowest nine.
    ///
    /// # Errors
    /// [`TarError::Number`], as for all the fields below.
    pub fn mode(&self) -> Result<u32, TarError> {
        Ok((self.value(100, 8, "mode")? & 0o7777) as u32)
    }

    /// Owner.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn uid(&self) -> Result<i64, TarError> {
        self.value(108, 8, "uid")
    }

    /// Group.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn gid(&self) -> Result<i64, TarError> {
        self.value(116, 8, "gid")
    }

    /// Bytes of data behind the header.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn size(&self) -> Result<u64, TarError> {
        u64::try_from(self.value(124, 12, "size")?).map_err(|_| TarError::Number("size"))
    }

    /// Modification time in seconds.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn mtime(&self) -> Result<i64, TarError> {
        self.value(136, 12, "mtime")
    }

    /// Major and minor number of a device node.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn device(&self) -> Result<(u32, u32), TarError> {
        if self.format() == Format::V7 {
            return Ok((0, 0));
        }
        let narrow = |value: i64, name| u32::try_from(value).map_err(|_| TarError::Number(name));
        let major = narrow(self.value(329, 8, "devmajor")?, "devmajor")?;
        Ok((major, narrow(self.value(337, 8, "devminor")?, "devminor")?))
    }

    /// The four sparse segments of an old GNU header, each an offset and a length as text.
    pub fn gnu_sparse(&self) -> &[u8] {
        self.field(386, 96)
    }

    /// Whether more segments follow in a block of their own, and the file's size with its holes.
    ///
    /// # Errors
    /// [`TarError::Number`].
    pub fn gnu_sparse_rest(&self) -> Result<(bool, u64), TarError> {
        let size = self.value(483, 12, "realsize")?;
        let size = u64::try_from(size).map_err(|_| TarError::Number("realsize"))?;
        Ok((self.field(482, 1) != [0], size))
    }
}

/// Text up to the first NUL.
pub fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number: octal text, or with the first bit set base 256 in two's complement (GNU, star).
pub fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // Seven bits with their sign, then whole bytes.
    let first = i64::from(((first << 1) as i8) >> 1);
    field.iter().skip(1).try_fold(first, |value, byte| value.checked_mul(256)?.checked_add(i64::from(*byte)))
}

fn octal(field: &[u8]) -> Option<i64> {
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_text() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(0o77777777777));
        assert_eq!(number(b"000000000008"), None);
        assert_eq!(number(b"-1"), None);
    }

    #[test]
    fn numbers_are_base_256_with_the_first_bit_set() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]), Some(258));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]), Some(-256));
        assert_eq!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }

    #[test]
    fn a_negative_number_in_base_256_keeps_its_sign_over_the_whole_field() {
        let mut field = [0xff; 12];
        field[4..].copy_from_slice(&(-1_000_000_007i64).to_be_bytes());
        assert_eq!(number(&field), Some(-1_000_000_007));
    }
}
