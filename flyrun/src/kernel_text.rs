//! The text of kernels that machines have in common, in the host's memory ([`vmm::snapshot::text`]). That of all base snapshots, which
//! nobody's image has run in: what a machine's own snapshot says is its guest's word. Put there when a base has been made, and, as memory
//! does not survive a reboot, behind the start of a machine.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use vmm::snapshot::header::Header;
use vmm::snapshot::{restore, text};

use crate::paths::{Paths, make_private_dir};

/// Puts the text of each base there that is not, and takes away what no base has. Without it a resume takes longer, and that is all.
pub fn keep(paths: &Paths) {
    keep_in(&paths.kernel_text(), &paths.bases());
}

/// Takes it all away. Machines that run keep what they have mapped.
pub fn remove(paths: &Paths) {
    let _nothing_there = fs::remove_dir_all(paths.kernel_text());
}

fn keep_in(dir: &Path, bases: &Path) {
    let mut wanted = Vec::new();
    for base in entries(bases) {
        let Ok(header) = restore::header(&base) else { continue };
        let Some(text) = header.text.as_ref().filter(|text| text.is_sound()) else { continue };
        let path = dir.join(&text.sha256);
        if !path.exists() {
            // Another base may have the same, and the next start tries again.
            let _ = put(&path, &base, &header);
        }
        wanted.push(path);
    }
    // Half a file of another flyrun that does the same now is made again behind the next start.
    for surplus in entries(dir).filter(|path| !wanted.contains(path)) {
        let _ = fs::remove_file(surplus);
    }
}

/// Under another name first: half of a text must not be taken for one.
fn put(path: &Path, base: &Path, header: &Header) -> io::Result<()> {
    path.parent().map_or(Ok(()), make_private_dir).map_err(io::Error::other)?;
    let draft = path.with_extension(std::process::id().to_string());
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&draft)?;
    match text::copy(base, header, &mut file)? {
        true => fs::rename(&draft, path),
        false => Ok(()),
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vmm::snapshot::format;
    use vmm::snapshot::identity::sha256;
    use vmm::snapshot::text::TextId;

    use super::*;

    const MIB: usize = 1 << 20;

    /// A base whose text, the memory from 2 to 4 MiB, is said to have this digest.
    fn base(bases: &Path, name: &str, byte: u8, sha256: String) {
        let dir = bases.join(name);
        fs::create_dir(&dir).unwrap();
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../vmm/tests/fixtures/state-1");
        let fixture = fs::read(fixture).unwrap();
        let (mut header, _) = format::decode(&fixture).unwrap();
        header.memory.base = false;
        header.text = Some(TextId { first: 512, pages: 512, sha256 });
        fs::write(dir.join(vmm::snapshot::STATE), format::encode(&header.to_json().unwrap(), &[])).unwrap();
        let memory = File::create(dir.join(vmm::snapshot::MEMORY)).unwrap();
        memory.write_all_at(&vec![byte; 2 * MIB], 2 * MIB as u64).unwrap();
    }

    #[test]
    fn each_text_is_there_once_as_long_as_there_is_a_base_with_it() {
        let (bases, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = place.path().join("kernel-text");
        keep_in(&dir, bases.path());
        assert!(!dir.exists());
        let digest = |byte| sha256(&vec![byte; 2 * MIB]);
        base(bases.path(), "one", 1, digest(1));
        base(bases.path(), "same", 1, digest(1));
        base(bases.path(), "two", 2, digest(2));
        // Another content than it says, and what is no name of a file here.
        base(bases.path(), "wrong", 3, digest(4));
        base(bases.path(), "elsewhere", 1, "../elsewhere".into());
        fs::create_dir(bases.path().join("none")).unwrap();
        keep_in(&dir, bases.path());
        let found = || {
            let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
            let mut names: Vec<_> = entries(&dir).map(name).collect();
            names.sort();
            names
        };
        let mut both = [digest(1), digest(2)];
        both.sort();
        assert_eq!(found(), both);
        assert_eq!(entries(place.path()).count(), 1);
        assert_eq!(fs::read(dir.join(digest(2))).unwrap(), vec![2; 2 * MIB]);
        fs::remove_dir_all(bases.path().join("two")).unwrap();
        fs::write(dir.join("half.123"), "x").unwrap();
        keep_in(&dir, bases.path());
        assert_eq!(found(), [digest(1)]);
    }
}
