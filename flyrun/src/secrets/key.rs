//! The key that secrets are encrypted with: 32 bytes of the host's randomness in a file that only its owner reads.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::hmac;
use zeroize::Zeroizing;

use crate::error::{Context, Error, Result};
use crate::paths::make_private_dir;
use crate::random;

/// The variable that names another key file than the store's own.
pub const VARIABLE: &str = "FLYRUN_SECRETS_KEY_FILE";
const NAME: &str = "secrets.key";
const KEY_BYTES: usize = 32;
/// A key file is hexadecimal digits and perhaps the end of the line.
const MAX_FILE_BYTES: u64 = 256;
/// Bytes of what tells keys apart.
pub const ID_BYTES: usize = 8;

/// Where the key is.
#[derive(Clone, Debug)]
pub struct KeyFile {
    path: PathBuf,
    /// Whether flyrun makes it.
    is_own: bool,
}

/// The key, from which one for each purpose is made.
pub struct Key(hmac::Key);

impl KeyFile {
    /// The store's own, or the one that is named.
    pub fn new(root: &Path, named: Option<PathBuf>) -> KeyFile {
        match named {
            Some(path) => KeyFile { path, is_own: false },
            None => KeyFile { path: root.join(NAME), is_own: true },
        }
    }

    /// Reads the key.
    ///
    /// # Errors
    /// There is none, others can read it, or it is not a key.
    pub fn read(&self) -> Result<Key> {
        let shown = self.path.display();
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::new(format!("the key of the secrets, {shown}, is not there")).advice(
                    match self.is_own {
                        true => format!(
                            "Bring it back, or name another place in {VARIABLE}; without it no secret can be read."
                        ),
                        false => format!("Make one: (umask 077; openssl rand -hex 32 > {shown})"),
                    },
                ));
            }
            Err(error) => {
                return Err(Error::caused(format!("cannot read the key of the secrets, {shown}"), &error));
            }
        };
        let metadata = file.metadata().context(format!("cannot look at {shown}"))?;
        if !metadata.is_file() {
            return Err(Error::new(format!("the key of the secrets, {shown}, is not a file")));
        }
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(Error::new(format!(
                "others can read the key of the secrets, {shown} (mode {mode:03o})"
            ))
            .advice(format!("chmod 600 {shown}, and change the secrets if somebody may have read it.")));
        }
        let mut text = Zeroizing::new(String::new());
        let read = file.take(MAX_FILE_BYTES).read_to_string(&mut text);
        let bytes = read.ok().and_then(|_| from_hex(text.trim_end()));
        let bytes = bytes.ok_or_else(|| {
            Error::new(format!("{shown} is not a key: it has not {} hexadecimal digits", KEY_BYTES * 2))
                .advice(format!("Bring the right file back, or name it in {VARIABLE}."))
        })?;
        Ok(Key::new(&*bytes))
    }

    /// Reads the key, and makes it if nothing was ever encrypted with one.
    ///
    /// # Errors
    /// As [`Self::read`], and when it cannot be written.
    pub fn read_or_make(&self, is_first: bool) -> Result<Key> {
        if self.is_own && is_first && !self.path.exists() {
            self.make()?;
        }
        self.read()
    }

    fn make(&self) -> Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        make_private_dir(directory)?;
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        random::fill(&mut *bytes)?;
        let digits = Zeroizing::new(hex(&*bytes) + "\n");
        let draft = directory.join(format!(".{NAME}.new"));
        let told = || format!("cannot write {}", self.path.display());
        let _ = fs::remove_file(&draft);
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&draft).context(told())?;
        file.write_all(digits.as_bytes()).and_then(|()| file.sync_all()).context(told())?;
        // A link does not replace: whoever was first has made the key.
        match fs::hard_link(&draft, &self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::caused(told(), &error));
            }
            _ => {}
        }
        let _ = fs::remove_file(&draft);
        File::open(directory).and_then(|directory| directory.sync_all()).context(told())
    }
}

impl Key {
    fn new(bytes: &[u8]) -> Key {
        Key(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// The key for one purpose: HMAC-SHA256 of its name.
    pub fn derive(&self, purpose: &str) -> Zeroizing<[u8; KEY_BYTES]> {
        let mut derived = Zeroizing::new([0; KEY_BYTES]);
        let tag = hmac::sign(&self.0, purpose.as_bytes());
        derived.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        derived
    }

    /// What tells this key from others, and nothing about it.
    pub fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(self.derive("flyrun secrets: key id").iter()).for_each(|(to, from)| *to = *from);
        id
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Key {
    /// A key for tests.
    pub fn example(byte: u8) -> Key {
        Key::new(&[byte; KEY_BYTES])
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    if text.len() != KEY_BYTES * 2 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refused(file: &KeyFile) -> String {
        match file.read() {
            Ok(_) => panic!("it is read"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_key_is_made_once_and_only_its_owner_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        let file = KeyFile::new(&root, None);
        assert!(refused(&file).contains("is not there"));
        let made = file.read_or_make(true).unwrap();
        assert_eq!(fs::metadata(root.join(NAME)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(file.read_or_make(true).unwrap().id(), made.id());
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
        // Others cannot be told by it.
        assert_ne!(Key::example(1).id(), made.id());
    }

    #[test]
    fn a_key_that_is_gone_is_not_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let file = KeyFile::new(directory.path(), None);
        assert!(file.read_or_make(false).is_err());
        let named = KeyFile::new(directory.path(), Some(directory.path().join("mine")));
        assert!(named.read_or_make(true).is_err());
        assert!(refused(&named).contains("openssl rand -hex 32"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("k");
        let file = KeyFile::new(directory.path(), Some(path.clone()));
        for text in ["", "abc", &"g".repeat(64), &"a".repeat(63), &"a".repeat(66), &"é".repeat(32)] {
            fs::write(&path, text).unwrap();
            set_mode(&path, 0o600);
            assert!(refused(&file).contains("is not a key"), "{text}");
        }
        fs::write(&path, "a".repeat(64) + "\n").unwrap();
        assert_eq!(file.read().ok().unwrap().id(), Key::example(0xaa).id());
        set_mode(&path, 0o640);
        assert!(refused(&file).contains("chmod 600"));
        assert!(refused(&KeyFile::new(&path, Some(directory.path().into()))).contains("not a file"));
    }
}
